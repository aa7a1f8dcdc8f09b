"""PyTorch's `.bin` files, read without PyTorch and without running what is in them.

Such a file is a zip archive with a pickle, `NAME/data.pkl`, which says how tensors are made of the
storages in `NAME/data/KEY`. A pickle can call any function; this reader knows the three that a
`state_dict` needs, and refuses every other by name.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _StorageKind(NamedTuple):
    dtype: np.dtype[Any]


class _Storage(NamedTuple):
    numbers: Shaped[np.ndarray, " count"]


def read_torch_file(path: str | Path) -> dict[str, Shaped[np.ndarray, ...]]:
    """The tensors of a `state_dict` that `torch.save` wrote, by name.

    **Raises:** `ValueError` for a file that is no such archive, is cut off or damaged, or whose
    pickle wants anything but tensors.
    """
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(_no_archive(path)) from None
    with archive:
        try:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = pickled.removesuffix("data.pkl")
            order = folder + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its bytes are big-endian")
            content = _Reader(archive.read(pickled), archive, folder).load()
        except _Refused as error:
            raise ValueError(
                f"`{path}` wants more than tensors: {error}. It is not read, because unpickling "
                "would run it. Ask for the model as `model.safetensors`."
            ) from None
        except Exception as error:
            raise ValueError(f"`{path}` is cut off or damaged: {error}.") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in tensors.items()
    ):
        raise ValueError(f"`{path}` holds no `state_dict`: no dict from names to tensors.")
    return dict(tensors)


def _no_archive(path: Path) -> str:
    with path.open("rb") as file:
        old = file.read(2) == b"\x80\x02"
    if old:
        return (
            f"`{path}` has the layout of PyTorch before 1.6, which is not read here. Where PyTorch "
            "is installed: `torch.save(torch.load(path, weights_only=True), path)`."
        )
    return f"`{path}` is no file of PyTorch's: it is no zip archive. It may be cut off."


class _Refused(Exception):
    pass


class _Reader(pickle.Unpickler):
    def __init__(self, pickled: bytes, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _StorageKind(_STORAGES[name])
        raise _Refused(f"`{module}.{name}`")

    def persistent_load(self, pid: Any) -> Any:
        what, kind, key, _, count = pid
        if what != "storage" or not isinstance(kind, _StorageKind) or "/" in str(key):
            raise _Refused(f"the object {what!r}")
        data = self.archive.read(f"{self.folder}data/{key}")
        numbers = np.frombuffer(data, kind.dtype)
        if len(numbers) < count:
            raise ValueError(f"the storage {key} has {len(numbers)} numbers, not {count}")
        return _Storage(numbers)


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """A tensor, a view of its storage. Nothing in the file is believed: what reaches further would
    be other memory of the process."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor is made of something that is no storage")
    numbers, size, stride = storage.numbers, tuple(size), tuple(stride)
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor's sizes are no numbers from 0 on")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(numbers) or (0 not in size and last >= len(numbers)):
        raise ValueError("a tensor reaches beyond its storage")
    if 0 in size:
        return np.zeros(size, numbers.dtype)
    steps = tuple(step * numbers.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False)
    return view.copy()
