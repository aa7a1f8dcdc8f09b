"""Reading the files that `export_weights` writes, and other programs too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ._checkpoint_files import CheckpointError
from ._checkpoint_manifest import DTYPES


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, bfloat16 and eight-bit floats included.

    The format has no checksums: a flipped bit is read as it is.

    **Raises:** `CheckpointError` for what is no such file.
    """
    import safetensors

    names = {native: dtype for dtype, native in DTYPES.items() if native is not None}
    try:
        # Its numpy side knows fewer dtypes; this checks the header and hands out bytes.
        tensors = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"`{path}` is no safetensors file ({error}). Write a checkpoint's folder, or a file "
            "that `export_weights` has written."
        ) from error
    found = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in names:
            raise CheckpointError(
                f"The tensor `{name}` of `{path}` has the dtype {tensor['dtype']}, which JAX lacks."
            )
        dtype = np.dtype(names[tensor["dtype"]])
        found[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return found
