"""A 64-bit digest of arrays, computed where they live, and the records that hold them.

    leaves = named_arrays(state)
    sums = jax.jit(digest_sums)(list(leaves.values()))        # uint32[leaves, 2], on the device
    digests = digests_by_path(leaves, np.asarray(sums))       # {"task/weight": "16 hex digits"}

What a digest is. The bits of each element are cut into words of 32 bits, low word first; an
element of fewer bits is one word, filled up with zeros; a PRNG key is its key data, a complex
number its two parts. Words are numbered through the array in C order. With `mix` for MurmurHash3's
finaliser, each of two lanes of 32 bits is, modulo 2**32,

    seed + sum over words i of mix(word_i ^ mix(i + seed))

and the digest is lane 0, then lane 1, as hex. The seeds are the two halves of BLAKE2b (8 bytes,
each half read little-endian) of the array's dtype and shape, such as `float32[8,6]`.

A sum of integers is exact and has no order, so that devices and shardings make no difference.
`mix` is one to one, so a change of a single word is always seen; other changes go unseen once in
2**64 times. It is no cryptographic hash: whoever wants two arrays of the same digest can make them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree, UInt32

from ._checkpoint_arrays import named_leaves
from ._checkpoint_manifest import describe

FILE_NAME = "digests.jsonl"
COUNTED = 2**32
"""Words of an array that 32 bits can number."""
SMALL = 2**16
"""Bytes of an array that may be copied, to digest it together with others."""
_HEX = re.compile(r"[0-9a-f]{16}")


def named_arrays(tree: PyTree) -> dict[str, Array]:
    """The arrays of a tree by path, as a checkpoint names them."""
    return {path: leaf for path, leaf in named_leaves(tree) if eqx.is_array(leaf)}


# On the device


def digest_sums(leaves: Sequence[Array]) -> UInt32[Array, "leaves lanes"]:
    """The two lanes of each array's digest."""
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        # Small ones of one kind are put together: programs of many parts take long to compile.
        is_small = leaf.size * leaf.dtype.itemsize <= SMALL
        alike.setdefault((leaf.dtype, leaf.shape) if is_small else index, []).append(index)
    found = [jax.vmap(_lanes)(jnp.stack([leaves[i] for i in group])) for group in alike.values()]
    order = np.argsort(np.concatenate(list(alike.values())))
    return jnp.concatenate(found)[order]


@jax.jit  # only to be traced once for each kind
def _lanes(leaf: Array) -> UInt32[Array, " lanes"]:
    prng = None
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        prng, leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
    label = describe(leaf.dtype.name, leaf.shape, prng).encode()
    seeds = np.frombuffer(hashlib.blake2b(label, digest_size=8).digest(), "<u4")
    words = _words(leaf)
    number = _numbers(leaf.shape, len(words))

    def mixed(seed: np.uint32) -> Array:
        return sum(
            (_mix(word ^ _mix(number + np.uint32(j) + seed)) for j, word in enumerate(words)),
            jnp.zeros(leaf.shape, jnp.uint32),
        )

    # One reduction of both lanes reads the array once. XLA's CPU compiler would also write the
    # mixed words of a plain `sum` to memory before it adds them.
    add = lambda one, other: (one[0] + other[0], one[1] + other[1])
    zero = np.uint32(0)  # XLA may add it any number of times, so the seeds can't be in its place.
    both = (mixed(seeds[0]), mixed(seeds[1]))
    return jnp.stack(lax.reduce(both, (zero, zero), add, range(leaf.ndim))) + seeds


def _words(x: Array) -> list[Array]:
    """The bits of the elements, each in one or more words, low word first."""
    dtype = x.dtype
    if dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return [*_words(lax.real(x)), *_words(lax.imag(x))]
    bits = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
    if bits == 64:
        both = lax.bitcast_convert_type(x, jnp.uint32)
        return [both[..., 0], both[..., 1]]
    return [lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)]


def _numbers(shape: tuple[int, ...], words: int) -> Array:
    """The number of each element's first word, modulo 2**32. Made axis by axis, because
    flattening would move the parts of an array that is sharded."""
    axes = [lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
    number = jnp.zeros(shape, jnp.uint32)
    for axis, along in enumerate(axes):
        stride = words * math.prod(shape[axis + 1 :])
        number += along * np.uint32(stride % COUNTED)
    if words * math.prod(shape) > COUNTED:
        for along in axes:  # The count starts again, and the place has to tell words apart.
            number = _mix(number ^ along)
    return number


def _mix(h: Array) -> Array:
    """`fmix32`, the finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


# On the host


def digests_by_path(paths: Iterable[str], sums: np.ndarray) -> dict[str, str]:
    """The digests as text, by path."""
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in zip(paths, sums.tolist(), strict=True)}


def total_digest(leaves: Mapping[str, str]) -> str:
    """One digest of all leaves and their paths, whatever their order: BLAKE2b (8 bytes) of the
    JSON object of both, sorted by path."""
    return hashlib.blake2b(json.dumps(leaves, sort_keys=True).encode(), digest_size=8).hexdigest()


class DigestRecord(NamedTuple):
    """A line of `digests.jsonl`: the digests of a state after `step` steps."""

    step: int
    digest: str
    leaves: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def of_json(cls, content: Any) -> DigestRecord:
        """**Raises:** `ValueError` for what is no record, which may come from anybody."""
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise ValueError("it is no object of `step`, `digest` and `leaves`")
        step, digest, leaves = content["step"], content["digest"], content["leaves"]
        if type(step) is not int or not 0 <= step < 2**48:
            raise ValueError("its `step` is no number of steps")
        if not isinstance(leaves, dict) or not all(map(_is_digest, [digest, *leaves.values()])):
            raise ValueError("a digest is not 16 digits of lower-case hex")
        if digest != total_digest(leaves):
            raise ValueError("its `digest` is not that of its `leaves`")
        return cls(step, digest, leaves)


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and _HEX.fullmatch(text) is not None
