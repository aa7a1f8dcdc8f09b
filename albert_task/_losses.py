"""The losses of classification over many classes, such as a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

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
    return _by_chunks(_scored, (head, words), (hidden, labels), chunk)


def _scored(head: MaskedLMHead, words: Array, hidden: Array, labels: Array) -> Scored:
    logits = head(hidden, words)
    return Scored(cross_entropy(logits, labels), jnp.argmax(logits, axis=-1).astype(labels.dtype))


class Likeliest(NamedTuple):
    """The likeliest pieces at some positions, best first."""

    ids: Int[Array, "batch some top"]
    log_probs: Float[Array, "batch some top"]


def likeliest(
    head: MaskedLMHead,
    words: Float[Array, "vocab embedding"],
    hidden: Float[Array, "batch some hidden"],
    top: int,
    chunk: int = CHUNK,
) -> Likeliest:
    """The `top` likeliest pieces at each position, in chunks as `scored`."""

    def found(head: MaskedLMHead, words: Array, hidden: Array) -> Likeliest:
        log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(head(hidden, words), axis=-1), top)
        return Likeliest(ids, log_probs)

    return _by_chunks(found, (head, words), (hidden,), chunk)


_Found = TypeVar("_Found")


def _by_chunks(
    function: Callable[..., _Found], weights: PyTree, arrays: tuple[Array, ...], chunk: int
) -> _Found:
    """`function(*weights, *arrays)`, of `chunk` positions at once."""
    batch, some = arrays[0].shape[:2]
    several = max(1, chunk // batch)
    if some <= several:
        return function(*weights, *arrays)
    # The chunks' gradients are added up in the dtype of what each of them takes.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), weights)

    @jax.checkpoint
    def turn(part: tuple[Array, ...]) -> _Found:
        own = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, weights)
        return function(*own, *part)

    parts = jax.lax.map(turn, tuple(in_turns(x, several) for x in arrays))
    whole = "turns batch several ... -> batch (turns several) ..."
    return jax.tree.map(lambda part: rearrange(part, whole)[:, :some], parts)


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
