"""What a checkpoint says of a run may make no sense, although every byte is as it was written:
whoever can write a checkpoint can make its checksums right too."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ._checkpoint_files import CheckpointError
from ._checkpoint_manifest import typed
from ._schedule import Phase, Position

_NONSENSE = (KeyError, TypeError, AttributeError, IndexError, OverflowError, ZeroDivisionError)


@contextlib.contextmanager
def sensible(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Around what takes back a part of what the checkpoint `path` says.

    **Arguments:**

    - `more`: `ValueError`, where none is raised on purpose.

    **Raises:** `CheckpointError` instead of what reading nonsense leads to.
    """
    nonsense: tuple[type[Exception], ...] = (*_NONSENSE, *more)
    try:
        yield
    except nonsense as error:
        raise CheckpointError(
            f"`{path}` is intact, but what it says of the run makes no sense here: "
            f"{type(error).__name__}: {error!s:.200}. Either `Trainer.save_checkpoint` of this "
            "version did not write it, or a callback, a logger or the data module can't take back "
            "the state that it gave. To take its weights alone: "
            f"`load_weights({str(path)!r}, task)`."
        ) from error


def position(saved: Any) -> Position:
    """**Raises:** `TypeError` or `ValueError` where it is none."""
    found = Position(**typed(saved, dict))
    for field in dataclasses.fields(found):
        value = typed(getattr(found, field.name), type(field.default))
        if isinstance(value, int) and not 0 <= value < 2**48:
            raise ValueError(f"`{field.name}` can't be {value}")
    if found.phase not in get_args(Phase):
        raise ValueError(f"`phase` can't be {found.phase!r:.50}")
    return found


def known_metrics(saved: Any) -> dict[str, Any]:
    """What monitors look at: numbers, and arrays of them.

    **Raises:** `TypeError` or `ValueError` where it is none.
    """
    found = {name: np.asarray(value) for name, value in typed(saved, dict).items()}
    for name, array in found.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(f"`{name}` can't be {saved[name]!r:.50}")
    return {name: saved[name] if array.ndim == 0 else array for name, array in found.items()}


def rewind_request(saved: Any) -> tuple[int, str] | None:
    """**Raises:** `TypeError` or `ValueError` where it is none."""
    if saved is None:
        return None
    step, reason = saved
    return typed(step, int), typed(reason, str)
