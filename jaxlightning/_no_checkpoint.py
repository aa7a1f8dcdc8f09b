"""What is said of a folder that is no checkpoint: mostly it is one that has some below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ._checkpoint import looks_like_checkpoint
from ._checkpoint_files import CheckpointError

_DEPTH = 6
"""How many folders down they are looked for."""
_LOOKED_INTO = 1000
"""In how many folders at most: it may be the root of everything."""
_SHOWN = 3


def no_checkpoint(path: Path) -> CheckpointError:
    """Says where the next ones are."""
    folders = islice(_folders(path, _DEPTH), _LOOKED_INTO) if path.is_dir() else iter(())
    found = list(islice(filter(looks_like_checkpoint, folders), _SHOWN + 1))
    if not found:
        return CheckpointError(f"`{path}` is no checkpoint, and there is none below it.")
    listed = ", ".join(f"`{below.relative_to(path)}`" for below in found[:_SHOWN])
    are, more = "are" if len(found) > 1 else "is", " and more" if len(found) > _SHOWN else ""
    return CheckpointError(f"`{path}` is no checkpoint; below it there {are} {listed}{more}.")


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Those below, except what is hidden, linked or inside a checkpoint. Who may not be read has
    nothing in it."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        yield path
        if depth > 1 and not looks_like_checkpoint(path):
            yield from _folders(path, depth - 1)
