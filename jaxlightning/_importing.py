"""While a command imports a script of the user's, nothing in it may train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ._checkpoint_files import CheckpointError

_under_way: list[tuple[str, str]] = []
"""What is being done, and what is to be written instead."""


@contextlib.contextmanager
def nothing_trains(while_: str, instead: str) -> Iterator[None]:
    """In the body of the `with`, entry points of every Trainer raise."""
    _under_way.append((while_, instead))
    try:
        yield
    finally:
        _under_way.pop()


def refuse_imported(entry: str) -> None:
    """**Raises:** `CheckpointError` where `entry` is called by what a command imports."""
    if _under_way:
        while_, instead = _under_way[-1]
        raise CheckpointError(f"`{entry}` was called while {while_}: {instead}.")
