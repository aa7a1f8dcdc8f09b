"""The files that hold a Hugging Face model's tensors, in the formats there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from ._torch_file import read_torch_file

Tensors = dict[str, Shaped[np.ndarray, "..."]]

FILES = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
"""By preference. The first two may be in parts, named by an index such as
`model.safetensors.index.json`."""


def read_tensors(folder: str | Path) -> Tensors:
    """All tensors of the model in a folder, by PyTorch's names.

    **Raises:** `FileNotFoundError` where there is none of `FILES`, or a part is missing;
    `ValueError` for a file that cannot be read.
    """
    folder = Path(folder)
    for name in FILES:
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return _READERS[path.suffix](path)
        if index.is_file():
            return _parts(index)
    raise FileNotFoundError(
        f"There are no weights in `{folder}`: none of {', '.join(f'`{name}`' for name in FILES)}, "
        "nor an index of parts. Give the folder of a model, with `config.json` and its weights."
    )


def _parts(index: Path) -> Tensors:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(named.values()))
        inside = all(Path(file).name == file for file in files)
        foreign = [file for file in files if Path(file).suffix not in _READERS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{index}` is no index of a model's parts: {error!r}.") from None
    if not inside:
        raise ValueError(f"`{index}` names a file outside its folder: {files}.")
    if foreign:
        raise ValueError(f"`{index}` names files of another format: {', '.join(foreign)}.")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`{index}` names parts that are not there: {', '.join(f'`{n}`' for n in missing)}. "
            "The download may be incomplete."
        )
    tensors: Tensors = {}
    for file in files:
        tensors |= _READERS[Path(file).suffix](index.parent / file)
    lost = sorted(set(named) - set(tensors))
    if lost:
        raise ValueError(f"`{index}` names tensors that are in no part: {', '.join(lost[:5])}.")
    return tensors


def _safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`{path}` is no safetensors file: {error}.") from error
    except (AttributeError, TypeError) as error:  # of dtypes that numpy has not
        raise ValueError(f"`{path}` holds numbers of a kind that is not read: {error}.") from error


def _msgpack(path: Path) -> Tensors:
    """Flax's parameters, under PyTorch's names and in its layout."""
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        content = msgpack_restore(path.read_bytes())
        flat = flatten_dict(content, sep=".")
        arrays = {name: np.asarray(value) for name, value in flat.items()}
    except Exception as error:
        raise ValueError(f"`{path}` cannot be read as Flax's msgpack: {error!r}.") from error
    tensors: Tensors = {}
    for name, array in arrays.items():
        if array.dtype == object:
            raise ValueError(f"`{path}` holds no array in `{name}`.")
        named, turned = _from_flax(name, array)
        tensors[named] = turned
    return tensors


def _from_flax(name: str, array: Shaped[np.ndarray, ...]) -> tuple[str, Shaped[np.ndarray, ...]]:
    *path, last = name.removeprefix("params.").split(".")
    if last == "kernel":
        return ".".join([*path, "weight"]), array.T
    if last in ("scale", "embedding"):
        return ".".join([*path, "weight"]), array
    return ".".join([*path, last]), array


_READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": _safetensors,
    ".bin": read_torch_file,
    ".msgpack": _msgpack,
}
