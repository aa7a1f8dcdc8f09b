"""ALBERT's tasks: what is trained on what, as `jaxlightning.TaskModule`s."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from jaxlightning import Accuracy, Mean, TaskModule
from jaxlightning._checks import nearest
from jaxlightning.parallel import Rule

from ._config import AlbertConfig
from ._layers import named_key
from ._masking import mask_tokens
from ._model import Albert, MaskedLMHead, gather
from ._optimizers import Recipe
from ._tokenizer import SpecialIds

IGNORED = -100
"""The label, as in PyTorch and Hugging Face, of a position where nothing is to be predicted."""

_KEYS = (
    "tokens",
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "segment_ids",
    "labels",
)


class Rows(NamedTuple):
    """What `Albert` takes, read from a batch."""

    tokens: Int[Array, "batch seq"]
    own: Bool[Array, "batch seq"]
    """Which tokens belong to their row; the others are padding."""
    seen: Bool[Array, "batch seq"] | Bool[Array, "batch seq seq"]
    """The same, or in pairs for rows that are packed of several segments."""
    token_types: Int[Array, "batch seq"] | None
    positions: Int[Array, "batch seq"] | None
    labels: Int[Array, "batch seq"] | None

    @classmethod
    def read(cls, batch: dict[str, Any], config: AlbertConfig) -> Rows:
        """From a batch with the keys that `AlbertForMaskedLM` lists.

        **Raises:** `KeyError` without tokens, `ValueError` for a misspelt key or arrays whose
        shapes differ.
        """
        for key in sorted(set(batch) - set(_KEYS)):
            # Close ones only: others, such as `special_tokens_mask`, may be there unread.
            if difflib.get_close_matches(key, _KEYS, cutoff=0.7):
                near = nearest(key, _KEYS)
                raise ValueError(f"`AlbertForMaskedLM` reads no `{key}` in a batch.{near}")
        name = "input_ids" if "input_ids" in batch and "tokens" not in batch else "tokens"
        tokens = batch[name]
        for key, array in batch.items():
            if key in _KEYS and (array.shape != tokens.shape or array.ndim != 2):
                raise ValueError(
                    f"The batch's `{key}` has shape {array.shape}, but `{name}` has "
                    f"{tokens.shape}. Both have to be (batch, seq)."
                )
        segments = batch.get("segment_ids")
        if "attention_mask" in batch:
            own = batch["attention_mask"].astype(bool)
        elif segments is not None:
            own = segments != 0
        else:
            own = tokens != config.pad_token_id
        seen = own
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]
            seen = same & rearrange(own, "batch seq -> batch 1 seq")
        return cls(
            tokens=tokens,
            own=own,
            seen=seen,
            token_types=batch.get("token_type_ids"),
            positions=batch.get("position_ids"),
            labels=batch.get("labels"),
        )


class AlbertForMaskedLM(TaskModule):
    """Masked language modelling: hides some tokens of each row and predicts them.

        task = AlbertForMaskedLM.init(AlbertConfig.preset("small"), key)
        task = Trainer(max_steps=3000).fit(task, data)

    A batch is a dict of integer arrays (batch, seq):

    - `tokens`, or `input_ids`: ids, with [CLS], [SEP] and padding in place;
    - `attention_mask`: 0 for padding. By default what is not the configuration's `pad_token_id`;
    - `token_type_ids`: by default 0;
    - `segment_ids`: for rows packed of several texts, 1, 2, … and 0 for padding: tokens see those
      of their own text. Usually along with `position_ids`, by default 0, 1, 2, …;
    - `labels`: the tokens to predict, -100 elsewhere. Then nothing is masked here, and the head
      runs on all positions. Without them it runs on the masked ones only.

    Every parameter is trained: there is no pooler, which this objective would leave without a
    gradient. Rows of the position and token type embeddings that no batch uses get no gradient
    either, only weight decay.
    """

    independent_examples = True

    albert: Albert
    head: MaskedLMHead
    special: SpecialIds = eqx.field(static=True, default=SpecialIds(0, 1, 2, 3, 4))
    """The tokenizer's special tokens, which are never masked. The default is ALBERT's."""
    mask_rate: float = eqx.field(static=True, default=0.15)
    """The share of a row's tokens that are predicted."""
    top_k: int = eqx.field(static=True, default=5)
    """How many pieces `predict_step` names for each position."""
    recipe: Recipe = eqx.field(static=True, default=Recipe())
    """The optimizer and its numbers."""

    @classmethod
    def init(cls, config: AlbertConfig, key: PRNGKeyArray, **options: Any) -> AlbertForMaskedLM:
        """With random weights (`_layers.initial`).

        **Arguments:**

        - `options`: `special`, `mask_rate` and `top_k` of this class, and the fields of `Recipe`:
          `optimizer`, `learning_rate`, `weight_decay`, `warmup_steps`, `total_steps`, …

        **Raises:** `ValueError` for an unknown option, or a value that cannot be.
        """
        albert = Albert(config, key=named_key(key, "albert"), pooler=False)
        head = MaskedLMHead(config, key=named_key(key, "head"))
        return cls.of(albert, head, **options)

    @classmethod
    def of(cls, albert: Albert, head: MaskedLMHead, **options: Any) -> AlbertForMaskedLM:
        """As `init`, with weights that are there already."""
        own = {"special", "mask_rate", "top_k"}
        for name in sorted(set(options) - own - set(Recipe._fields)):
            raise ValueError(
                f"`AlbertForMaskedLM` has no option `{name}`."
                f"{nearest(name, [*own, *Recipe._fields])}"
            )
        recipe = Recipe(**{k: v for k, v in options.items() if k not in own})
        return cls(albert, head, recipe=recipe, **{k: options[k] for k in own & set(options)})

    def __check_init__(self) -> None:
        self.recipe.check()
        size = self.config.vocab_size
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"`mask_rate={self.mask_rate}` has to lie between 0 and 1.")
        if not 1 <= self.top_k <= size:
            raise ValueError(f"`top_k={self.top_k}` has to lie between 1 and `vocab_size={size}`.")
        if self.special.pad != self.config.pad_token_id:
            raise ValueError(
                f"The tokenizer pads with {self.special.pad}, but the model's configuration has "
                f"`pad_token_id={self.config.pad_token_id}`: padding would count as text. Write "
                f"`dataclasses.replace(config, pad_token_id={self.special.pad})`."
            )
        if max(self.special) >= size:
            raise ValueError(
                f"The special token {max(self.special)} is no id of a vocabulary of "
                f"`vocab_size={size}`. Pass those of the tokenizer: "
                "`special=special_ids(tokenizer)`."
            )

    @property
    def config(self) -> AlbertConfig:
        return self.albert.config

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[Mean, dict[str, Accuracy]]:
        rows = Rows.read(batch, self.config)
        dropout_key = named_key(key, "dropout")
        if rows.labels is None:
            masked = mask_tokens(
                rows.tokens,
                named_key(key, "masking"),
                mask_id=self.special.mask,
                special=self.special,
                vocab_size=self.config.vocab_size,
                where=rows.own,
                rate=self.mask_rate,
            )
            hidden = self.hidden(rows._replace(tokens=masked.tokens), dropout_key)
            hidden = gather(hidden, masked.positions)
            labels, weights = masked.labels, masked.weights
        else:
            hidden = self.hidden(rows, dropout_key)
            weights = (rows.labels != IGNORED).astype(jnp.float32)
            labels = jnp.where(rows.labels == IGNORED, 0, rows.labels)
        logits = self.head(hidden, self.albert.embeddings.words)
        loss = Mean.over(cross_entropy(logits, labels), weights)
        return loss, {"accuracy": Accuracy.of(logits, labels, where=weights)}

    def predict_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> dict[str, Shaped[Array, "batch seq top"]]:
        """The likeliest pieces at every position, best first: `ids`, and `log_probs`."""
        log_probs = jax.nn.log_softmax(self.logits(batch), axis=-1)
        best, ids = jax.lax.top_k(log_probs, self.top_k)
        return {"ids": ids, "log_probs": best}

    def configure_optimizers(self) -> optax.GradientTransformation:
        return self.recipe.build()

    def partition_rules(self) -> Sequence[Rule]:
        return (*self.albert.partition_rules(), ("head/bias", PartitionSpec("tensor")))

    def hyperparameters(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.config),
            **self.recipe._asdict(),
            "mask_rate": self.mask_rate,
            "top_k": self.top_k,
            "special": self.special._asdict(),
        }

    @classmethod
    def from_hyperparameters(
        cls, hyperparameters: Mapping[str, Any], key: PRNGKeyArray
    ) -> AlbertForMaskedLM:
        of_config = {field.name for field in dataclasses.fields(AlbertConfig)}
        config = AlbertConfig(**{k: v for k, v in hyperparameters.items() if k in of_config})
        options = {k: v for k, v in hyperparameters.items() if k not in of_config}
        if isinstance(options.get("special"), Mapping):
            options["special"] = SpecialIds(**options["special"])
        return cls.init(config, key, **options)

    def hidden(
        self, rows: Rows, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq hidden"]:
        """The last layer's vectors."""
        return self.albert(
            rows.tokens,
            mask=rows.seen,
            token_types=rows.token_types,
            positions=rows.positions,
            key=key,
        )

    def logits(self, batch: dict[str, Any]) -> Float[Array, "batch seq vocab"]:
        """Logits at every position of a batch that is taken as it is, in inference mode."""
        task = eqx.nn.inference_mode(self)
        hidden = task.hidden(Rows.read(batch, self.config))
        return self.head(hidden, self.albert.embeddings.words)


def cross_entropy(
    logits: Float[Array, "batch some vocab"], labels: Int[Array, "batch some"]
) -> Float[Array, "batch some"]:
    """The negative log likelihood of each label, in the logits' dtype.

    The label's logit is summed out, not looked up: where logits are sharded over the vocabulary,
    each device has some, and looking one up would gather them all.
    """
    at = rearrange(labels, "batch some -> batch some 1")
    is_label = jax.lax.broadcasted_iota(at.dtype, logits.shape, 2) == at
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_label, logits, 0).sum(axis=-1)


def check_tokens(tokens: Int[np.ndarray, "batch seq"], config: AlbertConfig) -> None:
    """Checks rows of ids on the host, where the compiled step cannot look at values.

    **Raises:** `ValueError` for an id outside the vocabulary, or rows longer than the positions.
    """
    if tokens.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"The rows have {tokens.shape[1]} tokens, but the model has positions for "
            f"`max_position_embeddings={config.max_position_embeddings}`. Cut the rows."
        )
    wrong = np.argwhere((tokens < 0) | (tokens >= config.vocab_size))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"The token {tokens[row, column]} (row {row}, position {column}) is no id of a model "
            f"of `vocab_size={config.vocab_size}`. Make the model for the tokenizer: "
            '`AlbertConfig.preset("small", vocab_size=tokenizer.get_vocab_size())`.'
        )


def check_vocabulary(size: int, config: AlbertConfig) -> None:
    """**Raises:** `ValueError` where a tokenizer of `size` pieces is not the model's."""
    if size != config.vocab_size:
        relation = "larger" if size > config.vocab_size else "smaller"
        raise ValueError(
            f"The tokenizer's vocabulary is {relation} than the model's: {size} pieces, but "
            f"`vocab_size={config.vocab_size}`. Take the tokenizer that the model was trained with."
        )
