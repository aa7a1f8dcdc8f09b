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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._layers import named_key


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
    rate: float = 0.15,
) -> Masked:
    """Hides tokens as BERT does (Devlin et al. 2019, section 3.1): of those to predict, each
    becomes `mask_id` with probability 0.8, a random token with 0.1, and stays with 0.1.

    A row of n tokens gets `max(1, round(rate * n))` predictions, drawn without replacement: a
    fixed number, as in google-research/albert, and not one coin a token. Special tokens are never
    chosen, and never put in as random ones; [CLS] and [SEP] count in n, as they do there.

    **Arguments:**

    - `special`: the ids of special tokens, `mask_id` among them.
    - `where`: which tokens are a row's own; by default all. Padding is not.

    **Raises:** `ValueError` for a `rate` outside (0, 1), or ids outside the vocabulary.
    """
    _check(mask_id, special, vocab_size, rate)
    hidden = jnp.isin(tokens, jnp.asarray(sorted(special), tokens.dtype))
    own = jnp.ones_like(hidden) if where is None else where
    eligible = own & ~hidden

    wanted = [num_predictions(length, rate) for length in range(tokens.shape[1] + 1)]
    scores = jax.random.uniform(named_key(key, "positions"), tokens.shape)
    _, positions = jax.lax.top_k(jnp.where(eligible, scores, -1.0), wanted[-1])
    count = jnp.minimum(jnp.asarray(wanted)[own.sum(1)], eligible.sum(1))
    predicted = jnp.arange(wanted[-1])[None] < count[:, None]

    labels = jnp.take_along_axis(tokens, positions, axis=1)
    u = jax.random.uniform(named_key(key, "replacement"), labels.shape)
    noise = _ordinary(named_key(key, "random"), labels, special, vocab_size)
    shown = jnp.where(u < 0.8, jnp.asarray(mask_id, labels.dtype), noise)
    shown = jnp.where(predicted & (u < 0.9), shown, labels)
    return Masked(
        tokens=jnp.put_along_axis(tokens, positions, shown, axis=1, inplace=False),
        positions=positions,
        labels=labels,
        weights=predicted.astype(jnp.float32),
    )


def _ordinary(
    key: PRNGKeyArray, like: Int[Array, "batch some"], special: Sequence[int], vocab_size: int
) -> Int[Array, "batch some"]:
    """Uniform over the ids that are not special."""
    ids = jax.random.randint(key, like.shape, 0, vocab_size - len(set(special)), like.dtype)
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
