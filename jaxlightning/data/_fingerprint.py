"""What tells data from other data, at the price of milliseconds.

Fingerprints are nested dicts of plain values, the same in every process, so that a checkpoint can
list what was changed. Of contents they hold a checksum of a sample: at most 256 rows, evenly
spaced, and at most 1 MiB of them. Another file, another order and another preprocessing are
noticed; a change of a few values in rows that are not in the sample is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxlightning._configuration import BYTES, described, sampled

ROWS = 256
ROWS_OF_LIST = 64  # and of a dataset: each is a read of its own


def sampled_rows(count: int, most: int = ROWS) -> list[int]:
    """Numbers of at most `most` of `count` rows, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)).tolist()


def of_arrays(arrays: PyTree) -> dict[str, Any]:
    """Of a pytree of arrays with equal leading axes: each leaf's dtype, shape and checksum."""
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "array": {
            "array": f"{leaf.dtype}{list(leaf.shape)}",
            "checksum": _sample(leaf, BYTES // len(leaves)),
        }
        for path, leaf in leaves
    }


def of_list(rows: Sequence[Any]) -> dict[str, Any]:
    """Of a list of rows, each a pytree: their number, and the checksum of a sample."""
    digest = hashlib.sha256()
    for row in sampled_rows(len(rows), ROWS_OF_LIST):
        for path, leaf in jax.tree_util.tree_flatten_with_path(rows[row])[0]:
            found = described(leaf, BYTES // ROWS_OF_LIST)
            digest.update(f"{jax.tree_util.keystr(path)} {found}".encode())
    return {"rows": len(rows), "checksum": digest.hexdigest()[:16]}


def _sample(array: np.ndarray, budget: int) -> str:
    digest = hashlib.sha256()
    rows = sampled_rows(len(array))
    with _read_sparsely(array):
        for row in rows:
            digest.update(sampled(np.asarray(array[row]), budget // len(rows)))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _read_sparsely(array: Any) -> Iterator[None]:
    """Keeps the system from reading megabytes ahead at each place that is touched of a map."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    if array is None or not hasattr(mmap, "MADV_RANDOM"):
        yield
        return
    array.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        array.madvise(mmap.MADV_NORMAL)


def checksum(tree: PyTree) -> str:
    """Of all that is in the leaves of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}".encode())
        digest.update(sampled(array, array.nbytes))
    return digest.hexdigest()[:16]


def of_dataset(dataset: Any) -> dict[str, Any]:
    """Of a map-style `datasets.Dataset`: its columns' types, and a checksum of a sample.

    Its own `_fingerprint` is of no use for this: two equal datasets made from memory differ in it,
    and so does one whose file was copied.
    """
    schema = dataset.features.arrow_schema
    plain = dataset.with_format("arrow")
    digest = hashlib.sha256()
    left = BYTES
    for row in sampled_rows(len(dataset), ROWS_OF_LIST):
        table = plain[[row]]
        for column in table.columns:
            for piece in _flat(column.combine_chunks(), left):
                digest.update(piece)
                left -= len(piece)
        if left <= 0:
            break
    return {
        "columns": {name: str(schema.field(name).type) for name in schema.names},
        "checksum": digest.hexdigest()[:16],
    }


def _flat(array: Any, most: int) -> Iterator[bytes]:
    """The contents of an arrow array, however they lie in memory."""
    import pyarrow as pa

    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else array.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    yield f"{array.type} {len(array)} {array.null_count}\n".encode()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield array.value_lengths().to_numpy(zero_copy_only=False).tobytes()
        yield from _flat(array.flatten(), most)
    elif pa.types.is_fixed_size_list(array.type):
        yield from _flat(array.flatten(), most)
    elif pa.types.is_struct(array.type):
        for part in array.flatten():
            yield from _flat(part, most)
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        yield array.is_null().to_numpy(zero_copy_only=False).tobytes()
        filled = array.fill_null(0) if array.null_count else array
        yield filled.to_numpy(zero_copy_only=False).tobytes()[:most]
    else:
        for value in array.to_pylist():
            yield (value if isinstance(value, bytes) else repr(value).encode())[:most]
