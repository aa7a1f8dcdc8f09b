"""From a tree on the devices to the bytes of a safetensors file.

The format (https://github.com/huggingface/safetensors) is written here and not by its package,
whose numpy side saves strided and big-endian arrays wrong without a word, and knows neither
bfloat16 nor int4.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ._checkpoint_files import CheckpointError
from ._checkpoint_manifest import (
    BLOCK,
    DTYPES,
    FORMAT,
    Region,
    Scalar,
    Shard,
    StoredArray,
    StoredFile,
)
from .parallel._mesh import leaf_path
from .parallel._processes import is_main


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Leaves by path. Two leaves that read alike, as in `{"a/b": x, "a": {"b": y}}`, go by the
    longer spelling `['a/b']`."""
    return list(zip(*_names_and_leaves(tree), strict=True))


def _names_and_leaves(tree: PyTree) -> tuple[tuple[str, ...], list[Any]]:
    leaves, structure = jax.tree.flatten(tree)
    try:
        return _names(structure), leaves
    except TypeError:  # something static in the tree has no hash
        return _names.__wrapped__(structure), leaves


@functools.lru_cache(maxsize=4)
def _names(structure: jax.tree_util.PyTreeDef) -> tuple[str, ...]:
    """Cached: for many small leaves their names take longer than their copies."""
    tree = jax.tree.unflatten(structure, [0] * structure.num_leaves)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    short = [leaf_path(path) for path in paths]
    times = collections.Counter(short)
    names = tuple(
        name if times[name] == 1 else jax.tree_util.keystr(path)
        for name, path in zip(short, paths, strict=True)
    )
    (name, count), *_ = collections.Counter(names).most_common(1) or [("", 1)]
    if count > 1:
        raise CheckpointError(
            f"Two leaves have the same path, `{name}`, so that one would be restored as the "
            "other. Give the keys of that container different names."
        )
    return names


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def is_scalar(leaf: Any) -> bool:
    return type(leaf) in (bool, int, float)


class HostArray(NamedTuple):
    """One leaf on the host: its dtype, global shape and PRNG implementation, and its parts.

    A part is an array and the slices it was cut out with, `None` for all of the leaf.
    """

    dtype: str
    shape: tuple[int, ...]
    prng: str | None
    parts: list[tuple[tuple[slice, ...] | None, Any]]


class Snapshot(NamedTuple):
    """A tree on the host, that nothing done to the tree can change any more."""

    names: tuple[str, ...]
    leaves: list[Any]
    """Arrays are numpy's, or `HostArray`s; the rest is as it was."""

    def arrays(self) -> dict[str, HostArray]:
        return {
            name: leaf if isinstance(leaf, HostArray) else _whole(name, leaf)
            for name, leaf in zip(self.names, self.leaves, strict=True)
            if isinstance(leaf, np.ndarray | HostArray)
        }

    def scalars(self) -> dict[str, Scalar]:
        named = zip(self.names, self.leaves, strict=True)
        return {name: leaf for name, leaf in named if is_scalar(leaf)}


def snapshot(tree: PyTree) -> Snapshot:
    """Copies the arrays of a tree to the host: waits for the device, and for nothing else.

    Leaves that are neither arrays nor Python numbers (functions, strings) are left out.
    """
    names, leaves = _names_and_leaves(tree)
    # This is what a training waits for: for many small leaves every further call a leaf counts.
    plain: dict[type, bool] = {}
    here: dict[jax.sharding.Sharding, bool] = {}
    all_here = [device.platform for device in jax.devices()] == ["cpu"]
    travelling: list[int] = []
    for number, leaf in enumerate(leaves):
        kind = type(leaf)
        if kind not in plain:
            plain[kind] = isinstance(leaf, jax.Array) and not _is_key(leaf)
        if plain[kind] and (all_here or _is_here(leaf.sharding, here)):
            # `np.asarray` would be a view of the buffer. While there is one, JAX does not donate
            # that buffer, but copies it at every step.
            leaves[number] = np.array(leaf)
            continue
        if is_array(leaf):
            leaves[number] = _sent(names[number], leaf)
            travelling.append(number)
    for number in travelling:
        leaves[number] = _arrived(leaves[number])
    return Snapshot(names, leaves)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_here(where: jax.sharding.Sharding, known: dict[jax.sharding.Sharding, bool]) -> bool:
    """Whether an array there lies whole in the memory of this machine, and has no way to go."""
    if where not in known:
        devices: list[Any] = list(where.device_set)
        at_hand = devices[0].platform == "cpu" or "host" in str(where.memory_kind)
        known[where] = at_hand and len(devices) == 1
    return known[where]


def _sent(name: str, leaf: Any) -> HostArray:
    """The parts of a leaf that this process has to write, on their way to the host and not waited
    for: many travel together."""
    if not isinstance(leaf, jax.Array):
        return _whole(name, np.array(leaf, leaf.dtype.newbyteorder("<"), order="C"))
    prng = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
    if prng is not None:
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_replicated and leaf.is_fully_addressable:
        parts: list[Any] = [(None, leaf.addressable_data(0))]
    else:
        # Replicas are written once, in a job of several processes by the one that has the first.
        shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        parts = [(shard.index, shard.data) for shard in shards]
    for number, (cut, part) in enumerate(parts):
        if _is_here(part.sharding, {}):
            parts[number] = (cut, np.array(part))
        else:
            part.copy_to_host_async()
    return HostArray(dtype_name(leaf.dtype), leaf.shape, prng, parts)


def _arrived(leaf: HostArray) -> HostArray:
    return leaf._replace(parts=[(cut, np.asarray(part)) for cut, part in leaf.parts])


def _whole(name: str, array: np.ndarray) -> HostArray:
    dtype = dtype_name(array.dtype)
    if dtype not in DTYPES:
        raise CheckpointError(
            f"`{name}` has dtype `{dtype}`, which a checkpoint cannot hold. Numbers and booleans "
            "of a fixed size can be saved; put text into the metadata."
        )
    # What has no place on the devices is the same on all processes, and written by the first.
    return HostArray(dtype, array.shape, None, [(None, array)] if is_main() else [])


def on_host(leaf: Any) -> np.ndarray:
    """All of a leaf in one contiguous little-endian array."""
    array = np.asarray(leaf)
    return np.array(array, array.dtype.newbyteorder("<"), order="C", copy=None)


@functools.lru_cache
def dtype_name(dtype: Any) -> str:
    """Of a numpy or a PRNG key dtype. Cached: numpy takes 15 µs to make it up."""
    return str(dtype.name)


def _region(cut: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Region:
    if cut is None:
        return tuple((0, length) for length in shape)
    bounds = (part.indices(length) for part, length in zip(cut, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy where it has that."""
    return array.reshape(-1).view(np.uint8).data


def safetensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """The header of a file whose tensors, name to dtype, shape and size in bytes, follow it
    in this order and without holes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        native = DTYPES[dtype]
        header[name] = {
            "dtype": native or "U8",
            "shape": list(shape) if native else [size],
            "data_offsets": [end, end + size],
        }
        end += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


Checksums = dict[str, list[tuple[str, ...]]]
"""Of each block of each part of each array."""


def checksums(arrays: Mapping[str, HostArray]) -> Checksums:
    return {
        path: [_block_checksums(as_bytes(part)) for _, part in array.parts]
        for path, array in arrays.items()
    }


def _block_checksums(data: memoryview) -> tuple[str, ...]:
    blocks = (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))
    return tuple(hashlib.sha256(block).hexdigest() for block in blocks)


class ArrayFile:
    """What one process writes: a header, and the bytes of its parts in `chunks`.

    Parts of large items come first, which leaves every tensor aligned to its item size.
    """

    def __init__(self, name: str, arrays: Mapping[str, HostArray]):
        self.name = name
        self._arrays = arrays
        parts = [
            (path, number, part)
            for path, array in arrays.items()
            for number, (_, part) in enumerate(array.parts)
        ]
        parts.sort(key=lambda part: -part[2].itemsize)
        self._parts = [(path, number) for path, number, _ in parts]
        self.chunks = [as_bytes(part) for _, _, part in parts]
        tensors = {
            str(tensor): (dtype_name(part.dtype), part.shape, part.nbytes)
            for tensor, (_, _, part) in enumerate(parts)
        }
        self.header = safetensors_header(tensors, {"format": f"jaxlightning {FORMAT}"})

    def described(self, sha256: Checksums) -> tuple[StoredFile, dict[str, StoredArray]]:
        """What the manifest says of this file and of the arrays in it."""
        shards: dict[str, list[Shard]] = {path: [] for path in self._arrays}
        end = len(self.header)
        for (path, number), chunk in zip(self._parts, self.chunks, strict=True):
            region = _region(self._arrays[path].parts[number][0], self._arrays[path].shape)
            shards[path].append(Shard(self.name, end, len(chunk), region, sha256[path][number]))
            end += len(chunk)
        arrays = {
            path: StoredArray(array.dtype, array.shape, array.prng, tuple(shards[path]))
            for path, array in self._arrays.items()
        }
        return StoredFile(end, len(self.header), hashlib.sha256(self.header).hexdigest()), arrays
