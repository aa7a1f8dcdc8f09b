"""Which tokens a masked language model has to predict, chosen on the device inside the step.

A pure function of the tokens and a key: a new key, as every training step has, gives a new mask
with nothing stored; the key of an evaluation step, which depends on the batch's number only, gives
the same mask in every evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from ._tokenizer import WordStarts


class Masked(NamedTuple):
    """Rows with some tokens hidden, and what was there. Shapes depend on those of the rows only.

    A row with fewer tokens than others has fewer predictions too; `weights` are 0 for the rest,
    which `positions` spends on tokens that stay as they are.
    """

    tokens: Int[Array, "batch seq"]
    positions: Int[Array, "batch predictions"]
    labels: Int[Array, "batch predictions"]
    weights: Float[Array, "batch predictions"]


def num_predictions(seq_len: int, rate: float = 0.15) -> int:
    """How many tokens of a row of `seq_len` are predicted: a share `rate`, at least one."""
    return max(1, round(rate * seq_len))


def mask_tokens(
    tokens: Int[Array, "batch seq"],
    key: PRNGKeyArray,
    *,
    mask_id: int,
    special: Sequence[int],
    vocab_size: int,
    where: Bool[Array, "batch seq"] | None = None,
    segments: Int[Array, "batch seq"] | None = None,
    rate: float = 0.15,
    predictions: int | None = None,
    word_starts: WordStarts | None = None,
    max_ngram: int = 1,
) -> Masked:
    """Hides n-grams of whole words, as ALBERT does (Lan et al. 2020, section 4.1): each is replaced
    by `mask_id` with probability 0.8, by random tokens with 0.1, and stays with 0.1. (Drawn for the
    n-gram, as SpanBERT does; google-research/albert draws for each of its tokens.)

    The words of a row are parted into n-grams one after the other, of length n with p(n) ∝ 1/n;
    n-grams are then taken in random order until the row has its predictions: `max(1, round(rate *
    n))` of n tokens, a fixed number, as in google-research/albert, and not one coin a token. The
    last one gives up the words at its end that do not fit, and words of one piece fill up, so that
    the number is met wherever the row has enough of them. (So a row's first word, which always
    begins an n-gram, is taken a little more often than others.) Special tokens are never chosen,
    never within an n-gram, and never put in as random ones; [CLS] and [SEP] count in n, as they do
    there.

    **Arguments:**

    - `special`: the ids of special tokens, `mask_id` among them.
    - `where`: which tokens are a row's own; by default all. Padding is not.
    - `segments`: for packed rows, the number of each token's text; no n-gram spans two of them.
    - `predictions`: in place of `rate`, how many of a row of `seq` tokens.
    - `word_starts`: which pieces begin a word; by default all do.
    - `max_ngram`: the largest n.

    **Raises:** `ValueError` for a `rate` outside (0, 1), or ids outside the vocabulary.
    """
    seq = tokens.shape[1]
    if predictions is not None and not predictions < seq:
        raise ValueError(
            f"`predictions={predictions}` of rows of {seq} tokens leave nothing to predict from."
        )
    rate = rate if predictions is None else predictions / seq
    _check(mask_id, special, vocab_size, rate)
    hidden = jnp.isin(tokens, jnp.asarray(sorted(special), tokens.dtype))
    own = jnp.ones_like(hidden) if where is None else where
    eligible = own & ~hidden
    # Not of three dimensions, which XLA takes three times as long to compile.
    bits = jax.random.bits(key, (tokens.shape[0], 4 * seq))
    lengths, scores, kinds, noise = jnp.split(bits, 4, axis=1)
    new, starts = _parted(tokens, eligible, segments, word_starts, max_ngram, lengths)

    number = jnp.maximum(jnp.cumsum(new, axis=1) - 1, 0)
    order = _in_random_order(jnp.take_along_axis(scores, number, axis=1), eligible)
    wanted = [num_predictions(length, rate) for length in range(seq + 1)]
    length = eligible.sum(1, keepdims=True)
    count = jnp.minimum(jnp.asarray(wanted)[own.sum(1, keepdims=True)], length)
    positions, predicted = _taken(order, length, count, starts, min(wanted[-1], seq))

    kind = jnp.take_along_axis(kinds, number, axis=1)
    shown = _ordinary(noise, special, vocab_size).astype(tokens.dtype)
    shown = jnp.where(kind < _share(0.8), jnp.asarray(mask_id, tokens.dtype), shown)
    shown = jnp.where(kind < _share(0.9), shown, tokens)
    labels = jnp.take_along_axis(tokens, positions, axis=1)
    shown = jnp.where(predicted, jnp.take_along_axis(shown, positions, axis=1), labels)
    return Masked(
        tokens=jnp.put_along_axis(tokens, positions, shown, axis=1, inplace=False),
        positions=positions,
        labels=labels,
        weights=predicted.astype(jnp.float32),
    )


def _share(share: float) -> np.uint32:
    """What that share of random 32 bits is below."""
    return np.uint32(min(share * 2**32, 2**32 - 1))


def _parted(
    tokens: Int[Array, "batch seq"],
    eligible: Bool[Array, "batch seq"],
    segments: Int[Array, "batch seq"] | None,
    word_starts: WordStarts | None,
    max_ngram: int,
    bits: UInt32[Array, "batch seq"],
) -> tuple[Bool[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Where n-grams begin, and where words do."""
    fresh = ~_shifted(eligible, 1)
    if segments is not None:
        fresh |= segments != _shifted(segments, 1)
    starts = eligible
    if word_starts is not None:
        starts &= fresh | jnp.asarray(word_starts.table())[tokens]
    if max_ngram == 1:
        return starts, starts
    # n-gram k ends before word n_0 + … + n_k.
    shares = 1 / np.arange(1, max_ngram + 1)
    limits = np.cumsum(shares / shares.sum())[:-1]
    lengths = 1 + sum((bits >= _share(limit)).astype(jnp.int32) for limit in limits)
    rows = jnp.arange(len(tokens))[:, None]
    begins = jnp.zeros(tokens.shape, bool)
    begins = begins.at[rows, jnp.cumsum(lengths, axis=1)].set(True, mode="drop")
    word = jnp.cumsum(starts, axis=1) - 1
    first = word == 0
    new = starts & (fresh | first | jnp.take_along_axis(begins, jnp.maximum(word, 0), axis=1))
    return new, starts


def _in_random_order(
    scores: UInt32[Array, "batch seq"], eligible: Bool[Array, "batch seq"]
) -> Int[Array, "batch seq"]:
    """The positions by their score, which an n-gram's tokens share and so stay together and in
    order; those that are not eligible last."""
    seq = scores.shape[1]
    low = np.uint32((1 << (seq - 1).bit_length()) - 1)
    # The position in the lowest bits of what is sorted: one array, four times as fast as argsort.
    keys = jnp.where(eligible, scores >> 1, _share(1.0)) & ~low
    ordered = jnp.sort(keys | jnp.arange(seq, dtype=jnp.uint32)[None], axis=1, stable=False)
    return (ordered & low).astype(jnp.int32)


def _taken(
    order: Int[Array, "batch seq"],
    length: Int[Array, "batch 1"],
    count: Int[Array, "batch 1"],
    starts: Bool[Array, "batch seq"],
    most: int,
) -> tuple[Int[Array, "batch most"], Bool[Array, "batch most"]]:
    """Of the first `length` tokens in this order, `count` in whole words: their positions, and
    which of them count."""
    seq = order.shape[1]
    rank = jnp.arange(seq)[None]
    starts = jnp.take_along_axis(starts, order, axis=1)
    # Where a word may end: the one that begins last within the limit may not end within it.
    ends = jnp.pad(starts | (rank >= length), ((0, 0), (0, 1)), constant_values=True)
    cuts = jnp.arange(seq + 1)[None]
    kept = jnp.max(jnp.where(ends & (cuts <= count), cuts, 0), axis=1, keepdims=True)
    single = starts & (rank >= count) & ends[:, 1:]
    singles = jnp.cumsum(single, axis=1)
    filled = jnp.minimum(singles, count - kept)
    chosen = (rank < kept) | (single & (singles == filled))
    # Chosen ones to the front, in their order; behind them whatever comes first.
    upto = jnp.minimum(rank + 1, kept) + filled
    total = kept + filled[:, -1:]
    place = jnp.where(chosen, upto - 1, total + rank - upto)
    rows = jnp.arange(len(order))[:, None]
    positions = jnp.zeros((len(order), most), order.dtype)
    positions = positions.at[rows, place].set(order, mode="drop")
    return positions, jnp.arange(most)[None] < total


def _shifted(x: Array, by: int) -> Array:
    """Each position's neighbour to the left (`by` 1) or right (-1); 0 or false at the end."""
    if by > 0:
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _ordinary(
    bits: UInt32[Array, "batch seq"], special: Sequence[int], vocab_size: int
) -> Int[Array, "batch seq"]:
    """Of random bits, uniform ids that are not special: to one part in 2**32 / `vocab_size`."""
    ids = (bits % np.uint32(vocab_size - len(set(special)))).astype(jnp.int32)
    for skipped in sorted(set(special)):
        ids = ids + (ids >= skipped).astype(ids.dtype)
    return ids


def _check(mask_id: int, special: Sequence[int], vocab_size: int, rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"The share of tokens to mask, `rate={rate}`, has to lie in (0, 1).")
    for number in (mask_id, *special):
        if not 0 <= number < vocab_size:
            raise ValueError(
                f"The special token {number} is no id of a vocabulary of `vocab_size={vocab_size}`."
            )
    if mask_id not in special:
        raise ValueError(f"`mask_id={mask_id}` has to be among the ids of `special={special}`.")
    if len(set(special)) == vocab_size:
        raise ValueError(f"All {vocab_size} tokens of the vocabulary are special.")
