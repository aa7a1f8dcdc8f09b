"""What an ALBERT is made of: Hugging Face's field names, the released sizes by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from jaxlightning._nearest import nearest

PresetName = Literal["tiny", "small", "base", "large", "xlarge", "xxlarge"]

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "swish", "tanh")

ATTENTIONS = ("auto", "xla", "cudnn")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
REMATS = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
EXECUTION = ("attention", "remat", "scan_layers")
"""Fields that say how the model is computed, not what it is: no part of a saved model."""

_PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(
        vocab_size=512,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
    "small": dict(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
    ),
    "base": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "large": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    "xlarge": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16
    ),
    "xxlarge": dict(
        hidden_size=4096, intermediate_size=16384, num_hidden_layers=12, num_attention_heads=64
    ),
}

_SIZES = (
    "vocab_size",
    "embedding_size",
    "hidden_size",
    "num_hidden_layers",
    "num_hidden_groups",
    "num_attention_heads",
    "intermediate_size",
    "inner_group_num",
    "max_position_embeddings",
    "type_vocab_size",
)
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
_POSITIVE = ("initializer_range", "layer_norm_eps")


@dataclasses.dataclass(frozen=True)
class AlbertConfig:
    """An ALBERT's architecture (Lan et al. 2020), with Hugging Face's names and defaults.

    The defaults are those of `transformers.AlbertConfig`, which is the xxlarge model; see
    `preset` for the others. Checked when made; `dataclasses.replace` makes a changed copy.
    """

    vocab_size: int = 30000
    embedding_size: int = 128
    """E: the embeddings' own, smaller width (section 3.1, factorised embeddings)."""
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    """How many groups of weights the layers share: layer i uses group `int(i / (L / groups))`."""
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    """How many different layers a group runs one after the other, each time it is used."""
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: int | float = 0.0
    attention_probs_dropout_prob: int | float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: int | float = 0.02
    layer_norm_eps: int | float = 1e-12
    classifier_dropout_prob: int | float = 0.1
    position_embedding_type: str = "absolute"
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 3
    labels: tuple[str, ...] | list[str] = ()
    """What a classifier tells apart, by the order of its outputs; Hugging Face's `id2label`."""
    problem_type: str | None = None
    """Of sequence classification: one of `PROBLEM_TYPES`; by default regression for one label,
    else a single label."""
    attention: str = "auto"
    """How attention is computed: `"xla"`, `"cudnn"` (flash attention, 16 bits, on NVIDIA GPUs), or
    `"auto"`, cuDNN's where it can be used and XLA's elsewhere."""
    remat: str = "none"
    """What a layer keeps for the backward pass, which computes the rest again: all of it with
    `"none"`, else what the policy of that name in `jax.checkpoint_policies` says, such as
    `"dots_with_no_batch_dims_saveable"`. On CPU that takes `scan_layers` to have an effect."""
    scan_layers: bool = False
    """Whether the layers of a group are one loop in the program, which compiles sooner, or
    written out, which XLA can fuse across."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"`labels={self.labels}` has a name twice.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"`problem_type={self.problem_type!r}` is unknown; it is one of "
                f"{', '.join(map(repr, PROBLEM_TYPES))}."
            )
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}={value!r}` has to be an integer of at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size={self.hidden_size}` is not divisible by "
                f"`num_attention_heads={self.num_attention_heads}`, but each head gets an equal "
                "share of it. Change one of the two."
            )
        if self.num_hidden_groups > self.num_hidden_layers:
            raise ValueError(
                f"`num_hidden_groups={self.num_hidden_groups}` is more than "
                f"`num_hidden_layers={self.num_hidden_layers}`: some groups would never be used."
            )
        for name in (*_DROPOUTS, *_POSITIVE):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"`{name}={value!r}` has to be a number.")
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has to be at least 0 and below 1."
                )
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has to be above 0.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"`hidden_act={self.hidden_act!r}` is unknown; it is one of "
                f"{', '.join(map(repr, ACTIVATIONS))}.{nearest(str(self.hidden_act), ACTIVATIONS)}"
            )
        for name, known in (("attention", ATTENTIONS), ("remat", REMATS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"`{name}={value!r}` is unknown; it is one of "
                    f"{', '.join(map(repr, known))}.{nearest(str(value), known)}"
                )
        if self.position_embedding_type != "absolute":
            raise ValueError(
                f"`position_embedding_type={self.position_embedding_type!r}` is not supported: "
                "every released ALBERT has `'absolute'` positions."
            )
        pad = self.pad_token_id
        if not isinstance(pad, int) or not 0 <= pad < self.vocab_size:
            raise ValueError(
                f"`pad_token_id={pad!r}` is no id of a vocabulary of "
                f"`vocab_size={self.vocab_size}`."
            )

    @property
    def problem(self) -> str:
        """The `problem_type` of sequence classification that is in effect."""
        default = "regression" if len(self.labels) == 1 else "single_label_classification"
        return self.problem_type or default

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The group that each layer uses, by the reference's formula, rounding included."""
        per_group = self.num_hidden_layers / self.num_hidden_groups
        return tuple(int(i / per_group) for i in range(self.num_hidden_layers))

    @classmethod
    def preset(cls, name: PresetName | str, version: int = 2, **changes: Any) -> AlbertConfig:
        """A size by name: the released `"base"`, `"large"`, `"xlarge"`, `"xxlarge"`; `"small"`
        for pretraining on a few CPU cores; `"tiny"` for tests.

        **Arguments:**

        - `version`: 1 has dropout 0.1 (but xxlarge none), 2 has none. Architectures are equal.
        - `changes`: fields to set otherwise, such as `vocab_size=8192`.
        """
        if name not in _PRESETS:
            raise ValueError(
                f"There is no ALBERT preset {name!r}; there are "
                f"{', '.join(map(repr, _PRESETS))}.{nearest(name, _PRESETS)}"
            )
        if version not in (1, 2):
            raise ValueError(f"`version={version!r}` is unknown; ALBERT has versions 1 and 2.")
        dropout = 0.1 if version == 1 and name != "xxlarge" else 0.0
        values: dict[str, Any] = dict(
            _PRESETS[name], hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
        return cls.from_dict(values | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AlbertConfig:
        """From a dict of fields, or of a Hugging Face `config.json`.

        The many further keys of a Hugging Face file (one with a `model_type`) that do not
        describe the architecture are left out. Any other unknown key is an error.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {
            name: value
            for name, value in values.items()
            if name in fields and not (value is None and name.endswith("_token_id"))
        }  # null: of a model that uses no such token, and so none that differs from the default
        if "labels" not in known and "model_type" in values:
            known["labels"] = _labels(values)
        model_type = values.get("model_type", "albert")
        if model_type != "albert":
            raise ValueError(
                f"`model_type={model_type!r}`: this is the configuration of another model. "
                "An ALBERT's has `'albert'`."
            )
        if values.get("net_structure_type", 0) != 0:
            raise ValueError(
                f"`net_structure_type={values['net_structure_type']!r}` is not supported: every "
                "released ALBERT has 0."
            )
        for name in sorted(set(values) - fields):
            # A misspelt field must not pass as one of Hugging Face's further keys, of which
            # `sep_token_id` is the one nearest to a field: 0.83.
            if name == "classifier_dropout" and "model_type" in values:
                continue  # BERT's key, which transformers writes here too
            misspelt = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            if misspelt or "model_type" not in values:
                raise ValueError(
                    f"`AlbertConfig` has no field `{name}`.{nearest(name, fields)} "
                    f"The fields are {', '.join(sorted(fields))}."
                )
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The architecture's fields, and `model_type`: what Hugging Face's `config.json` needs."""
        fields = dataclasses.asdict(self)
        left_out = {*EXECUTION, "labels"} | (
            {"problem_type"} if self.problem_type is None else set()
        )
        named = {"model_type": "albert"} | {k: v for k, v in fields.items() if k not in left_out}
        if self.labels:
            named["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            named["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return named

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> AlbertConfig:
        """From a file such as Hugging Face's `config.json`."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{path}` is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"`{path}` holds a JSON {type(values).__name__}, but a configuration is an object "
                'of fields, such as {"hidden_size": 768}.'
            )
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"`{path}`: {error}") from error


def unnamed_labels(count: int) -> tuple[str, ...]:
    """The labels of a Hugging Face model whose classes nobody has named."""
    return tuple(f"LABEL_{number}" for number in range(count))


_CLASSIFIES = r"(Flax|TF)?AlbertFor(Sequence|Token)Classification"


def _labels(values: dict[str, Any]) -> tuple[str, ...]:
    """The labels of a Hugging Face file, in the order of their ids. Of a classifier it leaves out
    the two that are its default.

    **Raises:** `ValueError` for ids that are not 0, 1, 2, …
    """
    named = values.get("id2label")
    if named is None:
        kinds = values.get("architectures") or []
        kinds = kinds if isinstance(kinds, list) else [kinds]
        default = 2 if any(re.fullmatch(_CLASSIFIES, str(kind)) for kind in kinds) else 0
        count = values.get("num_labels", default)
        if isinstance(count, bool) or not isinstance(count, int):
            raise ValueError(f"`num_labels={count!r}` has to be an integer.")
        return unnamed_labels(count)
    try:
        by_id = {int(number): str(label) for number, label in named.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"`id2label={named!r}` has to map ids to names, such as {{'0': 'negative'}}."
        ) from error
    if sorted(by_id) != list(range(len(by_id))):
        raise ValueError(f"`id2label={named!r}`: the ids have to be 0, 1, 2, … without a gap.")
    return tuple(by_id[number] for number in range(len(by_id)))
