"""What a model puts in the place of `[MASK]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._losses import scored
from ._model import gather
from ._rows import Rows, check_tokens, check_vocabulary
from ._tasks import AlbertForMaskedLM
from ._tokenizer import special_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MASK = "[MASK]"
_ROUND = 32
_AT_ONCE = 16  # texts, of which each has another token masked


class Guess(NamedTuple):
    """A piece for a blank."""

    piece: str
    """As in the vocabulary: a `▁` begins a word."""
    probability: float

    def __str__(self) -> str:
        word = self.piece.replace("▁", "") or "▁"
        return f"{word} {self.probability:.1%}"


class Filled(NamedTuple):
    """A text with its blanks filled in."""

    text: str
    """With the likeliest piece in each blank."""
    guesses: list[list[Guess]]
    """For each blank, the likeliest pieces, best first."""


def fill_mask(task: AlbertForMaskedLM, tokenizer: Tokenizer, text: str, top_k: int = 5) -> Filled:
    """Predicts each `[MASK]` of a text, of which there may be several, each on its own.

        fill_mask(task, tokenizer, "the quick [MASK] fox").text

    Special tokens are never predicted. Blocks on the device; texts of similar length share one
    compilation.

    **Raises:** `ValueError` without a `[MASK]`, for a text longer than the model's positions, and
    for a tokenizer that is not the model's.
    """
    check_vocabulary(tokenizer.get_vocab_size(), task.config)
    special = special_ids(tokenizer)
    row = np.asarray([tokenizer.encode(text).ids], np.int32)
    check_tokens(row, task.config)
    blanks = np.flatnonzero(row[0] == special.mask)
    if not len(blanks):
        raise ValueError(
            f"There is no `{_MASK}` in the text {text!r}. Write one where to guess. How likely a "
            "whole text is, tell `albert fill-mask --score` and `pseudo_perplexity`."
        )
    if not 1 <= top_k <= task.config.vocab_size - len(special):
        raise ValueError(
            f"`top_k={top_k}` has to lie between 1 and the number of pieces that are not special, "
            f"{task.config.vocab_size - len(special)}."
        )

    length = row.shape[1]
    padded = min(-(-length // _ROUND) * _ROUND, task.config.max_position_embeddings)
    tokens = np.full((1, padded), special.pad, np.int32)
    tokens[:, :length] = row
    likely = np.array(_probabilities(task, jnp.asarray(tokens), jnp.int32(length))[0, blanks])
    likely[:, list(special)] = -1.0
    guesses = [
        [
            Guess(tokenizer.id_to_token(int(number)) or "", float(of[number]))
            for number in np.argsort(-of, kind="stable")[:top_k]
        ]
        for of in likely
    ]
    return Filled(_written(text, [found[0].piece for found in guesses]), guesses)


@eqx.filter_jit
def _probabilities(
    task: AlbertForMaskedLM, tokens: Int[Array, "1 seq"], length: Int[Array, ""]
) -> Float[Array, "1 seq vocab"]:
    batch = {"tokens": tokens, "attention_mask": _own(tokens, length)}
    return jax.nn.softmax(task.logits(batch), axis=-1)


def _own(tokens: Int[Array, "batch seq"], length: Int[Array, ""]) -> Int[Array, "batch seq"]:
    """Not by the padding's id, which the tokenizer and the model may see differently."""
    own = (jnp.arange(tokens.shape[1]) < length)[None].astype(jnp.int32)
    return jnp.broadcast_to(own, tokens.shape)


def _written(text: str, pieces: list[str]) -> str:
    """The user's own text, not the tokens decoded, which have lost its case and rare characters."""
    first, *rest = text.split(_MASK)
    written = first
    for piece, after in zip(pieces, rest, strict=True):
        # The blank stands for `▁word`, the space before it included, or for more of a word.
        word = piece.startswith("▁")
        if word and (not written or written[-1].isspace()):
            piece = piece[1:]
        written = (written if word else written.rstrip()) + piece.replace("▁", " ") + after
    return written


def pseudo_perplexity(task: AlbertForMaskedLM, tokenizer: Tokenizer, text: str) -> float:
    """How surprised a masked language model is by a text: `exp` of the mean negative log
    likelihood of its tokens, `<unk>` among them, each masked on its own (Salazar et al. 2020,
    "Masked Language Model Scoring", section 2.2). Blocks on the device.

    **Raises:** `ValueError` for a text without a token, or longer than the model's positions, and
    for a tokenizer that is not the model's.
    """
    special = special_ids(tokenizer)
    check_vocabulary(tokenizer.get_vocab_size(), task.config)
    row = np.asarray(tokenizer.encode(text).ids, np.int32)[None]
    check_tokens(row, task.config)
    places = np.flatnonzero(~np.isin(row[0], [*set(special) - {special.unk}]))
    if len(places) == 0:
        raise ValueError(f"The text {text!r} has no token to score.")
    length = row.shape[1]
    padded = min(-(-length // _ROUND) * _ROUND, task.config.max_position_embeddings)
    tokens = np.full((1, padded), special.pad, np.int32)
    tokens[:, :length] = row
    total = 0.0
    for begin in range(0, len(places), _AT_ONCE):
        some = places[begin : begin + _AT_ONCE]
        masked = np.repeat(tokens, _AT_ONCE, axis=0)
        masked[np.arange(len(some)), some] = special.mask
        where = np.zeros(_AT_ONCE, np.int32)
        where[: len(some)] = some
        nll = _surprise(
            task,
            jnp.asarray(masked),
            jnp.int32(length),
            jnp.asarray(where),
            jnp.asarray(tokens[0, where]),
        )
        total += float(np.asarray(nll, np.float64)[: len(some)].sum())
    return float(np.exp(total / len(places)))


@eqx.filter_jit
def _surprise(
    task: AlbertForMaskedLM,
    tokens: Int[Array, "batch seq"],
    length: Int[Array, ""],
    places: Int[Array, " batch"],
    labels: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    task = eqx.nn.inference_mode(task)
    batch = {"tokens": tokens, "attention_mask": _own(tokens, length)}
    hidden = gather(task.hidden(Rows.read(batch, task.config)), places[:, None])
    words = task.albert.embeddings.words
    return scored(task.head, words, hidden, labels[:, None]).nll[:, 0]
