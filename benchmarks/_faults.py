"""What can happen to the files of a checkpoint. Every fault can be undone, so that one checkpoint
serves for hundreds; `tests/test_checkpoint_faults.py` uses the same as `checkpoint_faults`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """Something that may befall a checkpoint. `befall(folder)` is a context manager, in which it
    has, and gives the folder where the checkpoint lies then."""

    name: str
    befall: Callable[[Path], AbstractContextManager[Path]]


class Region(NamedTuple):
    """Bytes of a file of a checkpoint, from and to."""

    file: str
    start: int
    stop: int


def files(folder: Path) -> list[Region]:
    """Every file of a checkpoint that is not empty, as a region."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return [Region(str(path.relative_to(folder)), 0, path.stat().st_size) for path in found]


def flips(region: Region, count: int) -> list[Fault]:
    """One bit flipped, at `count` places spread over a region, or at all if it has no more."""
    spread = random.Random(f"{region}")
    bits = 8 * (region.stop - region.start)
    count = min(count, bits)
    places = [spread.randrange(bits * i // count, bits * (i + 1) // count) for i in range(count)]
    return [flip(region.file, region.start + place // 8, place % 8) for place in places]


def flip(file: str, place: int, bit: int) -> Fault:
    def flipped(folder: Path) -> None:
        with open(folder / file, "r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ 1 << bit]))

    @contextlib.contextmanager
    def befall(folder: Path) -> Iterator[Path]:
        flipped(folder)
        yield folder
        flipped(folder)

    return Fault(f"bit {bit} of byte {place} of {file} flipped", befall)


def truncations(region: Region, count: int) -> list[Fault]:
    """A file cut off, at `count` places from its very start to one byte before its end."""
    size = region.stop
    return [_cut(region.file, size * i // count) for i in range(count - 1)] + [
        _cut(region.file, size - 1)
    ]


def _cut(file: str, kept: int) -> Fault:
    return _replaced(file, f"cut to {kept} bytes", lambda old: old[:kept])


def tails(region: Region) -> list[Fault]:
    """A file that has the right length, or more, and not the right end."""
    return [
        _replaced(region.file, "with a byte more", lambda old: old + b"\0"),
        _replaced(region.file, "doubled", lambda old: old + old),
        _replaced(
            region.file,
            "with its last third zero",
            lambda old: old[: -len(old) // 3 or -1].ljust(len(old), b"\0"),
        ),
    ]


def _replaced(file: str, how: str, change: Callable[[bytes], bytes]) -> Fault:
    @contextlib.contextmanager
    def befall(folder: Path) -> Iterator[Path]:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(change(content))
        yield folder
        (folder / file).write_bytes(content)

    return Fault(f"{file} {how}", befall)


def removal(file: str) -> Fault:
    """A file or a folder of a checkpoint is gone."""

    @contextlib.contextmanager
    def befall(folder: Path) -> Iterator[Path]:
        kept = folder.parent.parent / "removed"
        os.rename(folder / file, kept)
        yield folder
        os.rename(kept, folder / file)

    return Fault(f"{file} removed", befall)


def renamed(name: str) -> Fault:
    """The newest step bears the name of a higher one."""

    @contextlib.contextmanager
    def befall(folder: Path) -> Iterator[Path]:
        other = folder.with_name(name)
        os.rename(folder, other)
        yield other
        os.rename(other, folder)

    return Fault("a step renamed to a higher one", befall)


def beside(what: str, name: str, make: Callable[[Path, Path], None]) -> Fault:
    """Something that is no checkpoint has the name of a higher step. `make` gets its path and
    that of the newest checkpoint."""

    @contextlib.contextmanager
    def befall(folder: Path) -> Iterator[Path]:
        other = folder.with_name(name)
        make(other, folder)
        yield other
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)
        else:
            other.unlink()

    return Fault(what, befall)


def imposters(name: str) -> list[Fault]:
    """What is no checkpoint, under the name of a step higher than all."""
    copy = lambda other, step: shutil.copytree(step, other) and None
    return [
        beside("an empty folder with a higher step", name, lambda other, _: other.mkdir()),
        beside("a link with a higher step", name, lambda other, step: other.symlink_to(step)),
        beside("a copy under a higher step", name, copy),
    ]
