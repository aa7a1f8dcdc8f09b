"""What ALBERT's tasks read from a batch of token ids."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Int

from jaxlightning._nearest import nearest

from ._config import AlbertConfig

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
_OF_ROWS = ("sentence_order_label", "start_positions", "end_positions", "example_weight")


class Rows(NamedTuple):
    """What `Albert` takes, read from a batch."""

    tokens: Int[Array, "batch seq"]
    own: Bool[Array, "batch seq"]
    """Which tokens belong to their row; the others are padding."""
    seen: Bool[Array, "batch seq"] | Bool[Array, "batch seq seq"]
    """The same, or in pairs for rows that are packed of several segments."""
    token_types: Int[Array, "batch seq"] | None
    positions: Int[Array, "batch seq"] | None
    segments: Int[Array, "batch seq"] | None
    """For packed rows, the number of each token's text."""
    labels: Int[Array, "batch seq"] | None

    @classmethod
    def read(cls, batch: dict[str, Any], config: AlbertConfig, one_label: bool = False) -> Rows:
        """From a batch with the keys that `AlbertForMaskedLM` lists; `one_label`: where `labels`
        are of rows, and not of tokens.

        **Raises:** `KeyError` without tokens, `ValueError` for a misspelt key or arrays whose
        shapes differ.
        """
        known = (*_KEYS, *_OF_ROWS)
        for key in sorted(set(batch) - set(known)):
            # Close ones only: others, such as `special_tokens_mask`, may be there unread.
            if difflib.get_close_matches(key, known, cutoff=0.7):
                near = nearest(key, known)
                raise ValueError(f"ALBERT's tasks read no `{key}` in a batch.{near}")
        name = "input_ids" if "input_ids" in batch and "tokens" not in batch else "tokens"
        tokens = batch[name]
        for key in (name, *(key for key in batch if key != name)):
            if key not in _KEYS or (one_label and key == "labels"):
                continue
            array = batch[key]
            if not hasattr(array, "dtype"):
                raise ValueError(
                    f"The batch's `{key}` is a `{type(array).__name__}`. Make it an array: "
                    f'`np.asarray(batch["{key}"])`.'
                )
            if key != "attention_mask" and array.dtype.kind not in "iu":
                raise ValueError(
                    f"The batch's `{key}` holds numbers of the type `{array.dtype}`, but has to "
                    "hold integers."
                )
            if array.ndim != 2 or array.shape != tokens.shape:
                beside = "" if key == name else f", and that of `{name}` is {tokens.shape}"
                raise ValueError(
                    f"The shape of the batch's `{key}` is {array.shape}{beside}, but has to be "
                    "(batch, seq)."
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
            segments=segments,
            labels=None if one_label else batch.get("labels"),
        )


def check_numbers(batch: Mapping[str, Any], limits: Mapping[str, int]) -> None:
    """Checks a batch on the host, where its numbers can be looked at.

    **Arguments:**

    - `limits`: the integers of that name lie below this, from 0 on. What is called a label may also
      be -100, and anything in rows whose `example_weight` is 0.

    **Raises:** `ValueError` for others.
    """
    for name, limit in limits.items():
        array = np.asarray(batch.get(name, 0))
        if array.dtype.kind not in "iu" or not array.size:
            continue
        if array.min() >= 0 and array.max() < limit:
            continue
        wrong = (array < 0) | (array >= limit)
        is_label = "label" in name
        if is_label:
            counts = np.asarray(batch.get("example_weight", 1.0)) != 0
            wrong &= (array != IGNORED) & counts.reshape(-1, *[1] * (array.ndim - 1))
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0].tolist())
            unless = f", or be {IGNORED} where there is none" if is_label else ""
            raise ValueError(
                f"The batch's `{name}` has {array[at]} at {list(at)}, but has to lie between 0 and "
                f"{limit - 1} here{unless}. {_WHY.get(name, '')}".rstrip()
            )


_OF_TOKENIZER = (
    "The model is made for the tokenizer: "
    '`AlbertConfig.preset("small", vocab_size=tokenizer.get_vocab_size())`.'
)
_WHY = {"tokens": _OF_TOKENIZER, "input_ids": _OF_TOKENIZER}


def check_tokens(tokens: Int[np.ndarray, "batch seq"], config: AlbertConfig) -> None:
    """Checks rows of ids on the host, where the compiled step cannot look at values.

    **Raises:** `ValueError` for an id outside the vocabulary, or rows longer than the positions.
    """
    if tokens.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"The rows have {tokens.shape[1]} tokens, but the model has positions for "
            f"`max_position_embeddings={config.max_position_embeddings}`. Cut the rows."
        )
    check_numbers({"tokens": tokens}, {"tokens": config.vocab_size})


def check_vocabulary(size: int, config: AlbertConfig) -> None:
    """**Raises:** `ValueError` where a tokenizer of `size` pieces is not the model's."""
    if size != config.vocab_size:
        relation = "larger" if size > config.vocab_size else "smaller"
        raise ValueError(
            f"The tokenizer's vocabulary is {relation} than the model's: {size} pieces, but "
            f"`vocab_size={config.vocab_size}`. Take the tokenizer that the model was trained with."
        )
