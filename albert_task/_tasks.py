"""Masked language modelling with an ALBERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxlightning import Accuracy, Mean, Metric, Perplexity
from jaxlightning.parallel import Rule

from ._base import AlbertTask, example_weights
from ._config import AlbertConfig
from ._layers import named_key
from ._losses import likeliest, scored
from ._masking import mask_tokens
from ._model import Albert, MaskedLMHead, gather
from ._rows import IGNORED, Rows
from ._tokenizer import SpecialIds, WordStarts


class AlbertForMaskedLM(AlbertTask):
    """Masked language modelling: hides some tokens of each row and predicts them.

        task = AlbertForMaskedLM.init(AlbertConfig.preset("small"), key)
        task = Trainer(max_steps=3000).fit(task, data)

    A batch is a dict of integer arrays (batch, seq):

    - `tokens`, or `input_ids`: ids, with [CLS], [SEP] and padding in place;
    - `attention_mask`: 0 for padding. By default what is not the configuration's `pad_token_id`;
    - `token_type_ids`: by default 0;
    - `segment_ids`: for rows packed of several texts, 1, 2, … and 0 for padding: tokens see those
      of their own text. Usually along with `position_ids`, by default 0, 1, 2, …;
    - `example_weight`: float (batch,), 0 for rows that count nothing; by default 1;
    - `labels`: the tokens to predict, -100 elsewhere. Then nothing is masked here, and the head
      runs on all positions. Without them it runs on the masked ones only.

    Every parameter is trained: there is no pooler, which this objective would leave without a
    gradient. Rows of the position and token type embeddings that no batch uses get no gradient
    either, only weight decay.
    """

    head: MaskedLMHead
    special: SpecialIds = eqx.field(static=True, kw_only=True, default=SpecialIds(0, 1, 2, 3, 4))
    """The tokenizer's special tokens, which are never masked. The default is ALBERT's."""
    mask_rate: float = eqx.field(static=True, kw_only=True, default=0.15)
    """The share of a row's tokens that are predicted."""
    predictions: int | None = eqx.field(static=True, kw_only=True, default=None)
    """In place of `mask_rate`: how many tokens of a full row, such as 20 of 128."""
    max_ngram: int = eqx.field(static=True, kw_only=True, default=1)
    """Up to how many words next to each other are masked together: n with p(n) ∝ 1/n."""
    word_starts: WordStarts | None = eqx.field(static=True, kw_only=True, default=None)
    """Which pieces begin a word, `WordStarts.of(tokenizer)`: words are then masked whole. Without
    it, each token counts as a word."""
    top_k: int = eqx.field(static=True, kw_only=True, default=5)
    """How many pieces `predict_step` names for each position."""

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        return {
            "albert": Albert(config, key=named_key(key, "albert"), pooler=False),
            "head": MaskedLMHead(config, key=named_key(key, "head")),
        }

    def __check_init__(self) -> None:
        size = self.config.vocab_size
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"`mask_rate={self.mask_rate}` has to lie between 0 and 1.")
        for name in ("predictions", "max_ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` has to be at least 1.")
        if self.word_starts is not None and self.word_starts.size != size:
            raise ValueError(
                f"`word_starts` is of a tokenizer of {self.word_starts.size} pieces, but the "
                f"model's configuration has `vocab_size={size}`. Take those of its own tokenizer."
            )
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

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[Mean | dict[str, Mean], dict[str, Metric]]:
        loss, metrics, _ = self.masked_lm(batch, key)
        return loss, metrics

    def limits(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return super().limits(batch) | {"labels": self.config.vocab_size}

    def masked_lm(
        self, batch: dict[str, Any], key: PRNGKeyArray
    ) -> tuple[Mean, dict[str, Metric], Float[Array, "batch seq hidden"]]:
        """The loss of what is masked, its metrics, and all hidden vectors."""
        rows = Rows.read(batch, self.config)
        if rows.labels is None:
            masked = mask_tokens(
                rows.tokens,
                named_key(key, "masking"),
                mask_id=self.special.mask,
                special=self.special,
                vocab_size=self.config.vocab_size,
                where=rows.own,
                segments=rows.segments,
                rate=self.mask_rate,
                predictions=self.predictions,
                word_starts=self.word_starts,
                max_ngram=self.max_ngram,
            )
            hidden = self.hidden(rows._replace(tokens=masked.tokens), key)
            chosen = gather(hidden, masked.positions)
            labels, weights = masked.labels, masked.weights
        else:
            hidden = chosen = self.hidden(rows, key)
            weights = (rows.labels != IGNORED).astype(jnp.float32)
            labels = jnp.where(rows.labels == IGNORED, 0, rows.labels)
        if "example_weight" in batch:
            weights = weights * example_weights(batch, weights[:, 0])[:, None]
        nll, best = scored(self.head, self.albert.embeddings.words, chosen, labels)
        metrics = {
            "accuracy": Accuracy.of(best, labels, where=weights),
            "perplexity": Perplexity.of(nll, where=weights),
        }
        return Mean.over(nll, weights), metrics, hidden

    def predict_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> dict[str, Shaped[Array, "batch seq top"]]:
        """The likeliest pieces at every position, best first: `ids`, and `log_probs`."""
        hidden = eqx.nn.inference_mode(self).hidden(Rows.read(batch, self.config))
        return likeliest(self.head, self.albert.embeddings.words, hidden, self.top_k)._asdict()

    def partition_rules(self) -> Sequence[Rule]:
        return (*super().partition_rules(), ("head/bias", PartitionSpec("tensor")))

    @classmethod
    def _read(cls, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        for name, kind in (("special", SpecialIds), ("word_starts", WordStarts)):
            if isinstance(options.get(name), Mapping):
                options[name] = kind(**options[name])
        return options

    def logits(self, batch: dict[str, Any]) -> Float[Array, "batch seq vocab"]:
        """Logits at every position of a batch that is taken as it is, in inference mode."""
        task = eqx.nn.inference_mode(self)
        hidden = task.hidden(Rows.read(batch, self.config))
        return self.head(hidden, self.albert.embeddings.words)
