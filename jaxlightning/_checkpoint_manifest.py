"""The manifest of a checkpoint: what each byte of its array files means, and all else to know.

    step_0000000042/
        arrays-00000-of-00001.safetensors   one file a process: the shards that it holds
        manifest.json                       see [`Manifest`][]
        COMMIT                              sha256 of the manifest, written last

Tensors in the array files are named by short numbers; the paths of the leaves are here. Nothing
in this file touches the disk.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._checkpoint_files import CheckpointDamaged, CheckpointError

FORMAT = 1
BLOCK = 16 * 2**20
"""Checksums are taken of blocks of this many bytes, so that parts can be read and verified."""
LIMIT = 2**30
"""How many bytes a manifest may have, and a header of an array file."""
DEPTH = 100
"""How deep the metadata may be nested: functions that walk them call themselves as often."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}")
ARRAY_FILE = re.compile(r"arrays-\d{5}-of-\d{5}\.safetensors")

DTYPES: dict[str, str | None] = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "complex128": None,
    "int2": None,
    "int4": None,
    "uint2": None,
    "uint4": None,
    "float4_e2m1fn": None,
    "float8_e3m4": None,
    "float8_e4m3": None,
    "float8_e4m3b11fnuz": None,
    "float8_e4m3fnuz": None,
    "float8_e5m2fnuz": None,
}
"""What safetensors call each dtype that a checkpoint can hold. `None`: they lack it, and it is
stored as bytes, an element of less than 8 bits in one byte."""

Region = tuple[tuple[int, int], ...]
"""Where a shard lies in its array: from and to on each axis."""


class Shard(NamedTuple):
    """A part of an array, and where its bytes are."""

    file: str
    offset: int
    size: int
    region: Region
    sha256: tuple[str, ...]
    """Of each block."""

    def blocks(self) -> Iterator[tuple[int, int, str]]:
        """From, to and checksum of each block, counted from the start of the shard."""
        for number, digest in enumerate(self.sha256):
            yield number * BLOCK, min((number + 1) * BLOCK, self.size), digest


class StoredArray(NamedTuple):
    """One leaf as it is stored. For PRNG keys dtype and shape are those of the key data."""

    dtype: str
    shape: tuple[int, ...]
    prng: str | None
    """The implementation, where the leaf is an array of PRNG keys."""
    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return describe(self.dtype, self.shape, self.prng)


class StoredFile(NamedTuple):
    """One array file: its length, and that and the checksum of its header."""

    size: int
    header_size: int
    header_sha256: str


Scalar = bool | int | float


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that there is to know about a checkpoint but the arrays' bytes."""

    name: str
    step: int
    serial: int
    """Higher than that of any other checkpoint that was in the folder: unlike a clock, it tells
    which of two of one step is the later one."""
    saved_at: str
    versions: Mapping[str, str]
    files: Mapping[str, StoredFile]
    arrays: Mapping[str, StoredArray]
    scalars: Mapping[str, Scalar]
    """Python numbers among the leaves, such as a dropout rate: compared, never restored."""
    metadata: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def describe(dtype: str, shape: Sequence[int], prng: str | None) -> str:
    if prng is not None:
        return f"keys[{','.join(map(str, shape[:-1]))}] of `{prng}`"
    return f"{dtype}[{','.join(map(str, shape))}]"


def plain(value: Any, where: str = "metadata", depth: int = 0) -> Any:
    """`value` as JSON gives it back, or an error that names what JSON cannot hold.

    Tuples come back as lists. NaN and infinities are kept, in the spelling of Python's `json`.
    """
    if depth > DEPTH:
        raise CheckpointError(
            f"`{where[:40]}...` is nested more than {DEPTH} levels deep, if it ends at all, and a "
            "checkpoint's metadata may not be. Flatten it."
        )
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(
                    f"`{where}` has the key `{key!r}`, and keys of a checkpoint's metadata are "
                    f"strings, as in JSON. Write `{str(key)!r}`."
                )
        return {key: plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise CheckpointError(
        f"`{where}` is a `{type(value).__module__}.{type(value).__qualname__}`, and a checkpoint's "
        "metadata holds only what JSON can: text, numbers, booleans, None, lists and dicts. Write "
        "`float(...)` for a number on the device, and put arrays into the tree."
    )


_PACKAGES = ("jaxlightning", "jax", "jaxlib", "numpy", "equinox", "optax", "flax", "grain")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an extra, or a tree that isn't installed
            continue
    return found


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def commit_of(manifest: bytes) -> bytes:
    """The content of `COMMIT`."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def encode_manifest(manifest: Manifest) -> bytes:
    content = {
        "format": FORMAT,
        "name": manifest.name,
        "step": manifest.step,
        "serial": manifest.serial,
        "saved_at": manifest.saved_at,
        "versions": dict(manifest.versions),
        "files": {name: file._asdict() for name, file in manifest.files.items()},
        "arrays": {
            path: array._asdict() | {"shards": [shard._asdict() for shard in array.shards]}
            for path, array in manifest.arrays.items()
        },
        "scalars": dict(manifest.scalars),
        "metadata": dict(manifest.metadata),
    }
    encoded = json.dumps(content, separators=(",", ":")).encode()
    if len(encoded) > LIMIT:
        raise CheckpointError(
            f"Its manifest would have {len(encoded):,} bytes, and {LIMIT:,} is the most that can "
            "be read again. Put less into the metadata, and large data into arrays."
        )
    return encoded


def encode_part(name: str, file: StoredFile, arrays: Mapping[str, StoredArray]) -> bytes:
    """What one of several processes says of its file to the one that writes the manifest."""
    shards = {path: [shard._asdict() for shard in array.shards] for path, array in arrays.items()}
    return json.dumps({"name": name, "file": file._asdict(), "shards": shards}).encode()


def decode_part(encoded: bytes) -> tuple[str, StoredFile, dict[str, tuple[Shard, ...]]]:
    content = json.loads(encoded)
    shards = {path: tuple(map(_stored_shard, found)) for path, found in content["shards"].items()}
    return content["name"], _stored_file(content["name"], content["file"]), shards


def decode_manifest(encoded: bytes) -> Manifest:
    """Reads a manifest and believes nothing: it may come from anybody.

    Raises `CheckpointDamaged` unless all sizes fit together, so that whoever reads the arrays
    neither allocates nor reads what is not there.
    """
    try:
        content = json.loads(encoded, object_pairs_hook=_object)
        if _count(content["format"]) > FORMAT:
            raise CheckpointError(
                f"It was written by a newer jaxlightning (format {content['format']}; this one "
                f"reads up to {FORMAT}). Upgrade: `pip install -U jaxlightning`."
            )
        manifest = Manifest(
            name=typed(content["name"], str),
            step=_count(content["step"]),
            serial=_count(content.get("serial", 0)),  # before there were any
            saved_at=typed(content["saved_at"], str),
            versions={
                package: typed(version, str) for package, version in content["versions"].items()
            },
            files={name: _stored_file(name, file) for name, file in content["files"].items()},
            arrays={path: _stored_array(array) for path, array in content["arrays"].items()},
            scalars={
                path: typed(scalar, bool, int, float) for path, scalar in content["scalars"].items()
            },
            metadata=_shallow(typed(content["metadata"], dict)),
        )
        _check_layout(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointDamaged(f"Its manifest makes no sense ({reason}).") from error
    return manifest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys may not come twice: of which of the two is the other a check?"""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(
            key for key, times in collections.Counter(k for k, _ in pairs).items() if times > 1
        )
        raise ValueError(f"`{twice[:100]}` comes twice")
    return found


def _shallow(metadata: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [metadata]
    for _ in range(DEPTH + 1):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"the metadata is nested more than {DEPTH} levels deep")
    return metadata


def typed(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise TypeError(
            f"`{str(value)[:100]}` should be of type {' or '.join(t.__name__ for t in types)}"
        )
    return value


def _count(value: Any) -> int:
    if not 0 <= typed(value, int) < 2**48:
        raise ValueError(f"{value} is out of range")
    return value


def _stored_file(name: str, content: Any) -> StoredFile:
    if not ARRAY_FILE.fullmatch(name):
        raise ValueError(f"`{name}` is not the name of an array file")
    header = typed(content["header_sha256"], str)
    header_size = _count(content["header_size"])
    if header_size > LIMIT:
        raise ValueError(f"the header of `{name}` has {header_size} bytes")
    return StoredFile(_count(content["size"]), header_size, header)


def _stored_array(content: Any) -> StoredArray:
    dtype, prng = typed(content["dtype"], str), content["prng"]
    if dtype not in DTYPES:
        raise ValueError(f"the dtype `{dtype}` is unknown")
    shape = tuple(map(_count, content["shape"]))
    # What numpy can make; an array without elements may have huge sizes beside the 0.
    if len(shape) > 64 or math.prod(size or 1 for size in shape) >= 2**59:
        raise ValueError(f"no array has the shape {list(shape)}"[:200])
    if prng is not None and (typed(prng, str) == "" or dtype != "uint32" or not shape):
        raise ValueError(f"keys of `{prng}` are not stored as {dtype}{list(shape)}")
    return StoredArray(dtype, shape, prng, tuple(map(_stored_shard, content["shards"])))


def _stored_shard(content: Any) -> Shard:
    region = tuple((_count(start), _count(stop)) for start, stop in content["region"])
    digests = tuple(typed(digest, str) for digest in content["sha256"])
    file, offset, size = typed(content["file"], str), content["offset"], content["size"]
    return Shard(file, _count(offset), _count(size), region, digests)


def _check_layout(manifest: Manifest) -> None:
    """Every byte of every file belongs to exactly one shard, every element of every array too."""
    if not NAME.fullmatch(manifest.name):
        raise ValueError(f"`{manifest.name}` is not the name of a checkpoint")
    in_file: dict[str, list[Shard]] = {name: [] for name in manifest.files}
    for path, array in manifest.arrays.items():
        for shard in array.shards:
            in_file[shard.file].append(shard)
            _check_shard(path, array, shard)
        if _overlap([shard.region for shard in array.shards if shard.size]):
            raise ValueError(f"shards of `{path}` overlap")
        if sum(shard.size for shard in array.shards) != array.nbytes:
            raise ValueError(f"shards of `{path}` leave a part of it out")
    for name, shards in in_file.items():
        end = manifest.files[name].header_size
        for shard in sorted(shards, key=lambda shard: (shard.offset, shard.size)):
            if shard.offset != end:
                raise ValueError(f"`{name}` has bytes that belong to no array, or to two")
            end += shard.size
        if end != manifest.files[name].size:
            raise ValueError(f"`{name}` has another length than its arrays")


def _overlap(regions: list[Region]) -> bool:
    """Whether two regions share an element, or do not lie on a grid, as those of shardings do."""
    for axis in zip(*regions, strict=True):
        if any(a[1] > b[0] for a, b in itertools.pairwise(sorted(set(axis)))):
            return True
    return len(set(regions)) < len(regions)


def _check_shard(path: str, array: StoredArray, shard: Shard) -> None:
    within = len(shard.region) == len(array.shape) and all(
        start <= stop <= length
        for (start, stop), length in zip(shard.region, array.shape, strict=True)
    )
    elements = math.prod(stop - start for start, stop in shard.region)
    blocks = -(-shard.size // BLOCK)
    if (
        not within
        or elements * np.dtype(array.dtype).itemsize != shard.size
        or len(shard.sha256) != blocks
    ):
        raise ValueError(f"a shard of `{path}` does not fit {array}")
