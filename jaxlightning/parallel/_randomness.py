"""Randomness on one shard of a batch that is, row by row, what it is on the whole batch.

A task draws with the shape of its batch: `jax.random.bernoulli(key, p, x.shape)`. Where it runs on
a shard, that shape is the shard's, and every shard would draw the same. `shard_key` gives a key of
which such a draw is its own rows of what the whole batch would have drawn: with the partitionable
Threefry, number i of a draw is a hash of the key and i, so any rows of it can be made alone.

Which draws have the batch's rows is found, not guessed: the task is traced for two batch sizes, and
those draws are its rows' whose leading axis grows with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as prng
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jaxtyping import Array, PRNGKeyArray, UInt32


class NotByRows(Exception):
    """Why a task's randomness cannot be cut into rows: a sentence without its subject."""


class Draw(NamedTuple):
    """One draw, told by what is drawn and its shape."""

    kind: str
    """`"random_bits"` or `"random_split"`."""
    shape: tuple[int, ...]


_DRAWS = ("random_bits", "random_split")
_KEEPS_KEYS = {
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "random_fold_in",
    "reshape",
    "select_n",
    "rev",
    "slice",
    "split",
    "squeeze",
    "transpose",
    "unstack",
}
"""What may be done with keys without drawing from them."""


def draws_by_rows(trace: Callable[[int], ClosedJaxpr], rows: int, shards: int) -> frozenset[Draw]:
    """The draws of a task on a shard that are its rows of the whole batch's.

    **Arguments:**

    - `trace`: the task's computation for a batch of so many rows.
    - `rows`: those of the whole batch, a multiple of `shards`.

    **Raises:** `NotByRows` where that can't be told, or can't be done.
    """
    small, large = (list(_draws(trace(size).jaxpr)) for size in (rows, 2 * rows))
    if [kind for kind, *_ in small] != [kind for kind, *_ in large]:
        raise NotByRows("draws more often from its key for a larger batch")
    own, whole = set(), set()
    for (kind, shape, keys), (_, larger, more_keys) in zip(small, large, strict=True):
        if kind == "random_fold_in":
            if keys != more_keys:
                raise NotByRows(
                    "folds the places of its rows into keys (`jax.random.fold_in`); split a key "
                    "by rows instead: `jax.random.split(key, rows)`"
                )
        elif kind not in _DRAWS:
            raise NotByRows(f"uses its key in `{kind}`, of which the rows can't be told apart")
        elif shape == larger:
            whole.add(Draw(kind, shape))
        elif keys == more_keys and larger == (2 * shape[0], *shape[1:]) and not shape[0] % shards:
            own.add(Draw(kind, (shape[0] // shards, *shape[1:])))
        else:
            raise NotByRows(f"draws an array of shape {shape}, whose first axis is not its rows'")
    for draw in sorted(own):
        if draw in whole:
            raise NotByRows(f"draws twice with shape {draw.shape}, once by rows and once not")
        if math.prod(draw.shape) >= 2**32:
            raise NotByRows(f"draws more than 2³² numbers at once, with shape {draw.shape}")
    return frozenset(own)


def _draws(jaxpr: Jaxpr) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Kind, shape, and the keys' own shape, of all that keys are used for, in order."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        avals: list[Any] = [v.aval for v in equation.invars]
        keys = list(filter(_is_key, avals))
        inner = list(jaxprs_in_params(equation.params))
        if inner:
            for sub in inner:
                yield from _draws(sub)
        elif name in _DRAWS:
            yield name, tuple(equation.params["shape"]), keys[0].shape
        elif name == "random_fold_in":
            yield name, (), np.broadcast_shapes(*(aval.shape for aval in avals))
        elif keys and name not in _KEEPS_KEYS:
            yield name, (), ()


def _is_key(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)


def check_key(key: PRNGKeyArray) -> None:
    """**Raises:** `NotByRows` for a generator of which rows can't be made alone."""
    if str(jax.random.key_impl(key)) not in ("threefry2x32", "fry"):
        raise NotByRows("draws from a generator that is not Threefry")
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        raise NotByRows("runs under `jax_threefry_partitionable=False`")


def shard_key(
    data: UInt32[Array, " words"], shard: UInt32[Array, ""], own: frozenset[Draw]
) -> PRNGKeyArray:
    """The key of one shard. `data`: those of the whole batch's key; `own`: see `draws_by_rows`."""
    return jax.random.wrap_key_data(jnp.append(data, shard), impl=_implementation(own))


@functools.cache
def _implementation(own: frozenset[Draw]) -> Hashable:
    """Threefry, of which the draws `own` begin where the shard, the third word of a key, does."""

    def plain(key: Array) -> PRNGKeyArray:
        return jax.random.wrap_key_data(key[:2], impl="threefry2x32")

    def with_shard(data: Array, shard: Array) -> Array:
        return jnp.concatenate([data, jnp.broadcast_to(shard, (*data.shape[:-1], 1))], axis=-1)

    def hashed(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        high, low = _places(key[2], shape)
        first, second = prng.threefry2x32_p.bind(key[0], key[1], high, low)
        return first.reshape(shape), second.reshape(shape)

    def random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
        dtype = jnp.dtype(f"uint{bit_width}")
        if Draw("random_bits", tuple(shape)) not in own:
            return jax.random.bits(plain(key), shape, dtype)
        first, second = hashed(key, shape)
        if bit_width == 64:
            return (first.astype(dtype) << np.asarray(32, dtype)) | second.astype(dtype)
        return (first ^ second).astype(dtype)

    def split(key: Array, shape: tuple[int, ...]) -> Array:
        if Draw("random_split", tuple(shape)) in own:
            data = jnp.stack(hashed(key, shape), axis=-1)
        else:
            data = jax.random.key_data(jax.random.split(plain(key), shape))
        return with_shard(data, key[2])

    def fold_in(key: Array, data: Any) -> Array:
        return with_shard(jax.random.key_data(jax.random.fold_in(plain(key), data)), key[2])

    def seed(number: Array) -> Array:
        data = jax.random.key_data(jax.random.key(number, impl="threefry2x32"))
        return with_shard(data, jnp.uint32(0))

    return prng.define_prng_impl(
        key_shape=(3,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name="threefry2x32 of a shard",
        tag="shard",
    )


def _places(shard: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The places in the whole draw of this shard's numbers, as the halves of 64 bits."""
    size = math.prod(shape)
    # Of 32 bits each, as 64 are not there by default: shard * size by halves of `size`.
    over, under = (np.uint32(half) for half in divmod(size, 2**16))
    carried = shard * over + ((shard * under) >> np.uint32(16))
    begin = shard * np.uint32(size)
    low = jax.lax.iota(jnp.uint32, size) + begin
    high = (carried >> np.uint32(16)) + (low < begin).astype(jnp.uint32)
    return high.reshape(shape), low.reshape(shape)
