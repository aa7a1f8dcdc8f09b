"""Scaled dot-product attention, by XLA or by cuDNN's flash attention."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._layers import dropped

_AMPERE = 8.0
_TILE = 128
"""The shortest rows that cuDNN's kernels, which work on so many at a time, are worth it for."""


def attend(
    q: Float[Array, "batch seq head dim"],
    k: Float[Array, "batch seq head dim"],
    v: Float[Array, "batch seq head dim"],
    mask: Bool[Array, "batch from seq"] | None,
    dropout: eqx.nn.Dropout,
    key: PRNGKeyArray | None,
    implementation: str,
) -> Float[Array, "batch seq head dim"]:
    """Each position's mean of `v`, weighted by softmax(q·k / √dim) over those that `mask` shows.

    **Arguments:**

    - `mask`: true where (from, to) is seen; (batch, 1, to) where all of a row see the same.
    - `implementation`: of `AlbertConfig.attention`.

    **Raises:** `ValueError`, at trace time, where `"cudnn"` cannot compute it, with the reason.
    """
    reason = _no_cudnn(q, mask, dropout, key)
    if implementation == "cudnn" and reason is not None:
        raise ValueError(
            f"`attention='cudnn'` cannot be used: {reason}. Write `attention='auto'`, which takes "
            "XLA's where that is so."
        )
    if implementation == "xla" or reason is not None:
        return _by_xla(q, k, v, mask, dropout, key)
    if mask is not None:  # which cuDNN wants whole, though one for all heads
        mask = jnp.broadcast_to(mask[:, None], (q.shape[0], 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _no_cudnn(
    q: Array, mask: Array | None, dropout: eqx.nn.Dropout, key: PRNGKeyArray | None
) -> str | None:
    """Why cuDNN's attention cannot compute this, if it cannot."""
    if jax.default_backend() != "gpu":
        return f"this is a {jax.default_backend().upper()}, and no GPU"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is not None and float(capability) < _AMPERE:
        return f"this GPU has compute capability {capability}, and it needs {_AMPERE}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes 16 bits, and this is {q.dtype}: train with `precision='bf16-mixed'`"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"a head's width has to be a multiple of 8 up to 128, and is {q.shape[-1]}"
    if q.shape[1] < _TILE:
        return f"it is for rows of at least {_TILE} tokens, and these have {q.shape[1]}"
    if mask is not None and q.shape[1] % 2:
        return f"with a mask it takes rows of an even length, and these have {q.shape[1]} tokens"
    if key is not None and dropout.p > 0 and not dropout.inference:
        return "it draws no dropout that would be the same on every number of devices"
    return None


def _by_xla(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    dropout: eqx.nn.Dropout,
    key: PRNGKeyArray | None,
) -> Array:
    q, k, v = (rearrange(x, "batch seq head dim -> batch head seq dim") for x in (q, k, v))
    q = q * np.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    # Written out: on CPU as fast as `jax.nn.dot_product_attention`, which has no dropout.
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        # Not -inf: a position that sees nothing, such as padding, must not become NaN.
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    probs = dropped(dropout, probs, key, "attention_probs")
    y = jnp.einsum("bhqk,bhkd->bhqd", probs, v)
    return rearrange(y, "batch head seq dim -> batch seq head dim")
