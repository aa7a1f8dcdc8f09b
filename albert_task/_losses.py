"""The losses of classification over many classes, such as a vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from ._layers import in_turns
from ._model import MaskedLMHead

CHUNK = 1024
"""Positions whose logits over the vocabulary are there at once: 123 MB of 30,000 pieces."""


class Scored(NamedTuple):
    """What a head makes of some positions, where the labels are known."""

    nll: Float[Array, "batch some"]
    """The negative log likelihood of each label, in nats."""
    best: Int[Array, "batch some"]
    """The likeliest piece; of equal ones the first."""


def scored(
    head: MaskedLMHead,
    words: Float[Array, "vocab embedding"],
    hidden: Float[Array, "batch some hidden"],
    labels: Int[Array, "batch some"],
    chunk: int = CHUNK,
) -> Scored:
    """Scores `labels` at as many positions at once as `chunk` says, and one of each row at least.

    No more logits are there at any time, also in the backward pass, which computes them again:
    that costs a third of the head, under 1 % of ALBERT-base.
    """
    batch, some = labels.shape
    several = max(1, chunk // batch)
    if some <= several:
        return _scored(head, words, hidden, labels)

    @jax.checkpoint
    def turn(part: tuple[Array, Array]) -> Scored:
        return _scored(head, words, *part)

    parts = jax.lax.map(turn, (in_turns(hidden, several), in_turns(labels, several)))
    whole = "turns batch several -> batch (turns several)"
    return Scored(*(rearrange(part, whole)[:, :some] for part in parts))


def _scored(head: MaskedLMHead, words: Array, hidden: Array, labels: Array) -> Scored:
    logits = head(hidden, words)
    return Scored(cross_entropy(logits, labels), jnp.argmax(logits, axis=-1).astype(labels.dtype))


def cross_entropy(
    logits: Float[Array, "batch some vocab"], labels: Int[Array, "batch some"]
) -> Float[Array, "batch some"]:
    """The negative log likelihood of each label, in the logits' dtype; NaN for what is no class.

    The label's logit is summed out, not looked up: where logits are sharded over the vocabulary,
    each device has some, and looking one up would gather them all.
    """
    at = rearrange(labels, "batch some -> batch some 1")
    is_label = jax.lax.broadcasted_iota(at.dtype, logits.shape, 2) == at
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_label, logits, 0).sum(axis=-1)
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), nll, jnp.nan)
