"""Rows of an embedding table, by number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._layers import in_turns

_AT_ONCE = 2**27
"""Entries of the matrix that a gradient is computed by: 268 MB in 16 bits."""


def looked_up(
    table: Float[Array, "rows d"], ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq d"]:
    """The rows `ids` of `table`. An id outside of it gives NaN, which gets noticed; JAX's own
    indexing gives some other row.

    On a GPU the gradient is a product of matrices, and no scattered addition. Of a masked language
    model's tokens every seventh is the same, [MASK], and thousands of threads would add to one row
    in turn: XLA's atomic additions made ALBERT-base's whole step three times as slow
    (openxla/xla #26371 and #46225), and their order, so the sum, differs from run to run.
    """
    if jax.default_backend() != "gpu":
        return _rows(table, ids)
    return by_product(table, ids)


@jax.custom_vjp
def by_product(
    table: Float[Array, "rows d"], ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq d"]:
    """`looked_up`, as on a GPU."""
    return _rows(table, ids)


def _rows(table: Array, ids: Array) -> Array:
    # In float32, so that its gradient is summed in it: in bfloat16, 256 + 1 is 256.
    wide = table.astype(jnp.float32)
    rows = wide.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(table.dtype)


def _forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    # Of the table only its shape and dtype are used, so no compiled program keeps it.
    return _rows(table, ids), (table, ids)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, ids = kept
    return _summed(gradient, ids, len(table)).astype(table.dtype), None


by_product.defvjp(_forward, _backward)


def _summed(gradient: Array, ids: Array, rows: int) -> Float[Array, "rows d"]:
    """The sum of `gradient` over the places of each id, in float32."""
    batch, seq = ids.shape
    several = max(1, min(seq, _AT_ONCE // (rows * batch)))

    def turn(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        ids, gradient = part
        chosen = jax.nn.one_hot(ids, rows, dtype=gradient.dtype)
        sums = jnp.einsum(
            "bsr,bsd->rd",
            chosen,
            gradient,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return total + sums, None

    start = jnp.zeros((rows, gradient.shape[-1]), jnp.float32)
    return jax.lax.scan(turn, start, (in_turns(ids, several), in_turns(gradient, several)))[0]
