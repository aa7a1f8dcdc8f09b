"""Reading a checkpoint: every byte is verified before it is used, and every leaf has to fit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import difflib
import hashlib
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._checkpoint_arrays import is_array, is_scalar, named_leaves
from ._checkpoint_files import CheckpointDamaged, CheckpointError, open_folder, open_inside
from ._checkpoint_manifest import (
    LIMIT,
    Manifest,
    Region,
    Shard,
    commit_of,
    decode_manifest,
    describe,
)
from ._listing import listed

GROUP = 256 * 2**20
"""About how many bytes of a checkpoint are on the host at once while it is restored."""


class CheckpointMismatch(CheckpointError):
    """An intact checkpoint of another state; `differences` lists all that differs."""

    def __init__(self, message: str, differences: Sequence[str]):
        super().__init__(message)
        self.differences = tuple(differences)


class CheckpointReader(contextlib.AbstractContextManager):
    """An open checkpoint, whose manifest and file headers have been verified.

    Raises `CheckpointDamaged` where what is read is not what was written. An error of the disk
    itself stays the `OSError` that it is: it says nothing about the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None):
        self.path = Path(path).absolute()
        self._name = name or self.path.name
        self._stack = contextlib.ExitStack()
        with self._stack:
            self._folder = open_folder(self.path)
            self._stack.callback(os.close, self._folder)
            self.manifest = self._verified_manifest()
            self._files = {name: self._verified_file(name) for name in self.manifest.files}
            self._stack = self._stack.pop_all()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self, name: str) -> int:
        file = open_inside(self._folder, name, self.path)
        self._stack.callback(os.close, file)
        return file

    def _damaged(self, what: str) -> CheckpointDamaged:
        return CheckpointDamaged(f"`{self.path}` is damaged: {what}.")

    def _verified_manifest(self) -> Manifest:
        commit = self._open("COMMIT")
        file = self._open("manifest.json")
        size = os.fstat(file).st_size
        if size > LIMIT:
            raise self._damaged(f"its manifest has {size} bytes")
        encoded = os.pread(file, size, 0)
        if os.pread(commit, 100, 0) != commit_of(encoded):
            raise self._damaged("`COMMIT` does not hold the checksum of `manifest.json`")
        try:
            manifest = decode_manifest(encoded)
        except CheckpointError as error:
            raise type(error)(f"`{self.path}` cannot be read. {error}") from error.__cause__
        if manifest.name != self._name:
            raise self._damaged(
                f"it was saved as `{manifest.name}`, at step {manifest.step}, and has been renamed "
                "since. Give it that name back"
            )
        return manifest

    def _verified_file(self, name: str) -> int:
        stored, file = self.manifest.files[name], self._open(name)
        size = os.fstat(file).st_size
        if size != stored.size:
            raise self._damaged(f"`{name}` has {size} bytes, and had {stored.size}")
        header = os.pread(file, stored.header_size, 0)
        if hashlib.sha256(header).hexdigest() != stored.header_sha256:
            raise self._damaged(f"the header of `{name}` does not match its checksum")
        return file

    def array(self, path: str) -> np.ndarray:
        """One leaf by its path, put together from its shards. PRNG keys come as their data."""
        stored = self.manifest.arrays[path]
        dtype = np.dtype(stored.dtype)
        parts = [
            self._verified_shard(path, shard)
            .view(dtype)
            .reshape([stop - start for start, stop in shard.region])
            for shard in stored.shards
        ]
        if len(parts) == 1:
            return parts[0]
        whole = np.empty(stored.shape, dtype)
        for part, shard in zip(parts, stored.shards, strict=True):
            whole[tuple(slice(start, stop) for start, stop in shard.region)] = part
        return whole

    def region(self, path: str, region: Region) -> np.ndarray:
        """A part of a leaf, from the blocks of its shards that hold any of it."""
        stored = self.manifest.arrays[path]
        dtype = np.dtype(stored.dtype)
        whole = np.empty([stop - start for start, stop in region], dtype)
        for shard in stored.shards:
            common = [
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, shard.region, strict=True)
            ]
            if any(start >= stop for start, stop in common):
                continue
            rows, first = self._rows(path, shard, common, dtype)
            from_ = [(shard.region[0][0] + first, 0), *shard.region[1:]] if common else []
            source = tuple(
                slice(a - o, b - o) for (a, b), (o, _) in zip(common, from_, strict=True)
            )
            target = tuple(
                slice(a - o, b - o) for (a, b), (o, _) in zip(common, region, strict=True)
            )
            whole[target] = rows[source]
        return whole

    def _rows(
        self, path: str, shard: Shard, common: list[tuple[int, int]], dtype: np.dtype
    ) -> tuple[np.ndarray, int]:
        """Those rows, along the first axis, of a shard that a part of it is in, and the number of
        the first one in the shard."""
        shape = [stop - start for start, stop in shard.region]
        if not shape:
            return self._verified_shard(path, shard).view(dtype).reshape(shape), 0
        row = math.prod(shape[1:]) * dtype.itemsize
        first, last = (at - shard.region[0][0] for at in common[0])
        data = self._verified_bytes(path, shard, first * row, last * row)
        return data.view(dtype).reshape([last - first, *shape[1:]]), first

    def _verified_bytes(self, path: str, shard: Shard, begin: int, end: int) -> np.ndarray:
        """Bytes of a shard, by reading the blocks that they are in."""
        blocks = [(a, b, digest) for a, b, digest in shard.blocks() if a < end and b > begin]
        if not blocks:
            return np.empty(0, np.uint8)
        offset = blocks[0][0]
        data = np.empty(blocks[-1][1] - offset, np.uint8)
        self._read_blocks(path, shard, blocks, data, offset)
        return data[begin - offset : end - offset]

    def _verified_shard(self, path: str, shard: Shard) -> np.ndarray:
        data = np.empty(shard.size, np.uint8)
        self._read_blocks(path, shard, shard.blocks(), data, 0)
        return data

    def _read_blocks(
        self,
        path: str,
        shard: Shard,
        blocks: Iterable[tuple[int, int, str]],
        data: np.ndarray,
        offset: int,
    ) -> None:
        """Reads and verifies blocks of a shard into `data`, which begins at byte `offset` of it."""
        for start, stop, digest in blocks:
            block = data.data[start - offset : stop - offset]
            read = os.preadv(self._files[shard.file], [block], shard.offset + start)
            if read != stop - start or hashlib.sha256(block).hexdigest() != digest:
                raise self._damaged(
                    f"bytes {shard.offset + start} to {shard.offset + stop} of `{shard.file}`, "
                    f"which belong to `{path}`, do not match their checksum"
                )

    def arrays(self, paths: Sequence[str]) -> list[np.ndarray]:
        """Several leaves, read and verified by as many threads as there are cores."""
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.array, paths))

    def groups(self, paths: Sequence[str]) -> Iterator[list[str]]:
        """`paths`, cut where the arrays of a group would need much memory."""
        group: list[str] = []
        size = 0
        for path in paths:
            if group and size + self.manifest.arrays[path].nbytes > GROUP:
                yield group
                group, size = [], 0
            group.append(path)
            size += self.manifest.arrays[path].nbytes
        if group:
            yield group


def read_manifest(path: str | os.PathLike[str], name: str | None = None) -> Manifest:
    """What a checkpoint holds, without its arrays. `name`: under which it was saved, where that
    is not the name of its folder."""
    with CheckpointReader(path, name) as reader:
        return reader.manifest


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that was given to `CheckpointStore.save`."""
    return dict(read_manifest(path).metadata)


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Reads all of a checkpoint; raises `CheckpointDamaged` if one bit differs."""
    with CheckpointReader(path) as reader:
        for group in reader.groups(list(reader.manifest.arrays)):
            reader.arrays(group)
        return reader.manifest


def load_arrays(path: str | os.PathLike[str], include: str | None = None) -> dict[str, np.ndarray]:
    """Arrays by leaf path, on the host; only those in whose path the regular expression
    `include` is found. For warm starts and analysis: nothing has to fit anything.

    PRNG keys come as their data (`jax.random.key_data`).
    """
    with CheckpointReader(path) as reader:
        paths = [name for name in reader.manifest.arrays if re.search(include or "", name)]
        if not paths and include is not None:
            present = ", ".join(f"`{name}`" for name in list(reader.manifest.arrays)[:5])
            raise CheckpointError(
                f"`include={include!r}` finds no leaf in `{reader.path}`, whose paths are like "
                f"{present}. To see all: `jaxlightning checkpoint inspect {reader.path}`."
            )
        return dict(zip(paths, reader.arrays(paths), strict=True))


def read_checkpoint(
    path: str | os.PathLike[str], like: PyTree, optional: Collection[str] = ()
) -> tuple[PyTree, dict[str, Any]]:
    """The tree and the metadata of a checkpoint.

    `like` is a tree of the same structure: arrays, or `jax.ShapeDtypeStruct`s where there are
    none yet. From it come the Python structure, all that is not an array (functions, numbers,
    static fields) and where arrays go: to the sharding of the leaf, to the default device for a
    leaf without one, to the host for a numpy array. Leaves are matched by path, and all of them
    have to match in shape, dtype and PRNG implementation: nothing is cast, left out or filled in.

    Python numbers among the leaves (`eqx.nn.Dropout.p`) have to be equal where both sides have
    them: they are configuration, and no restored state should belong to another one.

    With `optional`, names of fields of the tree, numbers may differ, and a field one of whose
    arrays differs stays as it is in `like`: as a whole, since it is not known what is what in it.
    """
    with CheckpointReader(path) as reader:
        named = named_leaves(like)
        wanted, manifest = _without(set(optional), named, reader.manifest)
        differing = differences(manifest, wanted)
        if differing:
            raise CheckpointMismatch(_mismatch_message(reader.path, differing), differing)
        leaves = dict(named)
        specs = {path: leaf for path, leaf in wanted if is_spec(leaf)}
        for group in reader.groups(list(specs)):
            leaves |= _placed(reader, group, specs)
        structure = jax.tree.structure(like)
        return jax.tree.unflatten(structure, list(leaves.values())), dict(reader.manifest.metadata)


def _without(
    optional: set[str], named: Sequence[tuple[str, Any]], manifest: Manifest
) -> tuple[Sequence[tuple[str, Any]], Manifest]:
    """Leaves and manifest without what differs and is optional."""
    if not optional:
        return named, manifest
    here = {path: _described(leaf) for path, leaf in named if is_spec(leaf)}
    there = {path: str(array) for path, array in manifest.arrays.items()}
    apart = {field_of(path) for path, _ in here.items() ^ there.items()} & optional
    arrays = {path: x for path, x in manifest.arrays.items() if field_of(path) not in apart}
    wanted = [(path, leaf) for path, leaf in named if field_of(path) not in apart]
    return wanted, dataclasses.replace(manifest, arrays=arrays, scalars={})


def field_of(path: str) -> str:
    """The field of the tree that a leaf is in: `opt_state` of `opt_state/0/mu`."""
    found = re.match(r"\W*(\w+)", path)
    return found[1] if found else path


def is_spec(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _placed(
    reader: CheckpointReader, paths: Sequence[str], specs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arrays, each where its spec lives."""
    placed: dict[str, Any] = {}
    by_devices: dict[Any, list[str]] = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda path: _read(reader, path, specs[path]), paths))
    arrays = dict(zip(paths, read, strict=True))
    for path, array in arrays.items():
        if isinstance(specs[path], np.ndarray):
            placed[path] = array
        elif isinstance(specs[path], np.generic):
            placed[path] = array[()]
        else:
            sharding = _sharding(specs[path])
            by_devices.setdefault(sharding and frozenset(sharding.device_set), []).append(path)
    for group in by_devices.values():
        shardings = [_sharding(specs[path]) for path in group]
        there = [
            array if isinstance(array, jax.Array) else jax.device_put(array, sharding)
            for array, sharding in zip((arrays[path] for path in group), shardings, strict=True)
        ]
        for path, leaf in zip(group, _owned(there, shardings), strict=True):
            key = reader.manifest.arrays[path].prng
            placed[path] = leaf if key is None else jax.random.wrap_key_data(leaf, impl=key)
    return placed


def _read(reader: CheckpointReader, path: str, spec: Any) -> np.ndarray | jax.Array:
    """A leaf on the host; or, where it goes in parts to several devices, there: of what is stored,
    only that is read which is in the parts of this process's devices, each part once."""
    if not _is_sharded(spec):
        return reader.array(path)
    parts: dict[Region, np.ndarray] = {}
    shape = reader.manifest.arrays[path].shape

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        region = tuple(
            cut.indices(length)[:2] for cut, length in zip(index or (), shape, strict=True)
        )
        if region not in parts:
            parts[region] = reader.region(path, region)
        return parts[region]

    sharding = _sharding(spec)
    assert sharding is not None
    return jax.make_array_from_callback(shape, sharding, part)


def _is_sharded(spec: Any) -> bool:
    """Whether a leaf goes in parts to several devices, or to those of several processes."""
    if isinstance(spec, np.ndarray | np.generic):
        return False
    sharding = _sharding(spec)
    return sharding is not None and not (
        sharding.is_fully_replicated and sharding.is_fully_addressable
    )


def _sharding(spec: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding | None:
    """Where to restore to; `None`: the default device, without a commitment to it."""
    if isinstance(spec, jax.Array) and not spec.committed:
        return None
    return spec.sharding


def _owned(
    arrays: list[jax.Array], shardings: list[jax.sharding.Sharding | None]
) -> list[jax.Array]:
    """The same arrays in buffers of JAX's own.

    `device_put` may leave an array in the memory of the numpy array it came from, which JAX can
    never donate: the first step would hold the state twice (jax#18617). The arrays are donated,
    so that on an accelerator, where the copy is not needed, there is none.
    """
    copied = lambda arrays: [jnp.copy(array) for array in arrays]
    return jax.jit(copied, donate_argnums=0, out_shardings=shardings)(arrays)


# What does not fit


def differences(manifest: Manifest, wanted: Sequence[tuple[str, Any]]) -> list[str]:
    """One line for each leaf of `wanted` that the checkpoint lacks or has otherwise, and for each
    that it has beyond them."""
    specs = {path: leaf for path, leaf in wanted if is_spec(leaf)}
    missing = [path for path in specs if path not in manifest.arrays]
    beyond = [path for path in manifest.arrays if path not in specs]
    lines = []
    for path in missing:
        near = difflib.get_close_matches(path, beyond, n=1, cutoff=0.8)
        hint = f"; was it `{near[0]}`?" if near else ""
        lines.append(f"`{path}`: {_described(specs[path])} is not in the checkpoint{hint}")
    lines += [f"`{path}`: {manifest.arrays[path]} is only in the checkpoint" for path in beyond]
    for path, spec in specs.items():
        stored = manifest.arrays.get(path)
        if stored is not None and str(stored) != _described(spec):
            lines.append(f"`{path}`: {stored} in the checkpoint, {_described(spec)} here")
    scalars = {path: leaf for path, leaf in wanted if is_scalar(leaf)}
    for path in scalars.keys() & manifest.scalars.keys():
        # `repr`, so that NaN equals itself, and 1 is neither 1.0 nor True.
        if repr(scalars[path]) != repr(manifest.scalars[path]):
            lines.append(
                f"`{path}`: {manifest.scalars[path]} in the checkpoint, {scalars[path]} here"
            )
    return lines


def _described(spec: Any) -> str:
    if not jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return describe(spec.dtype.name, spec.shape, None)
    return describe("uint32", (*spec.shape, 0), key_implementation(spec))


def key_implementation(spec: jax.Array | jax.ShapeDtypeStruct) -> str:
    found: list[str] = []
    # `key_impl` takes arrays and tracers, and a struct is neither.
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), spec)
    return found[0]


def _mismatch_message(path: Path, lines: Sequence[str]) -> str:
    return (
        f"`{path}` is intact, but of another state than the one it should be restored into:"
        f"{listed(lines)}\nBuild the same model, optimizer and callbacks as when it was saved, or "
        "take parts of it on purpose: `warm_start(path, task, include=...)`."
    )
