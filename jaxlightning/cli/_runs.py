"""What lies in the folder of a run: digests, logged metrics, checkpoints. It may come from anybody,
so that nothing is believed, followed, unpickled or imported."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._checkpoint import looks_like_checkpoint
from .._checkpoint_files import CheckpointDamaged, open_inside
from .._checkpoint_manifest import Manifest
from .._checkpoint_read import read_manifest
from .._digest import FILE_NAME as DIGESTS
from .._digest import DigestRecord

METRICS = ("metrics.jsonl", "metrics.csv")
"""Loggers' files that can be compared. They say the same, so that one of them is enough."""
DEPTH = 4
"""How many folders down the parts of a run are looked for."""
LONGEST = 2**26
"""Bytes of a line."""
_INTEGER = re.compile(r"-?\d+")
_SPELLED = ("NaN", "Infinity", "-Infinity")


class RunError(ValueError):
    """The folder of a run cannot be read, or there is nothing to do with it."""


class Run(NamedTuple):
    """Where the parts of a run lie."""

    root: Path
    digests: Path | None
    metrics: Path | None
    checkpoints: list[Path]


def find_run(path: Path) -> Run:
    """Looks for a run in a folder and below it.

    **Raises:** `RunError` where there is none, or more than one.
    """
    root = path.resolve()
    if not root.is_dir():
        raise RunError(
            f"`{path}` is no folder. Name the folder of a run: the one with its logs, the one with "
            "its checkpoints, or one that has both below it."
        )
    if looks_like_checkpoint(root):
        raise RunError(
            f"`{path}` is a checkpoint, and no run. To compare two checkpoints: "
            "`jaxlightning checkpoint diff ONE OTHER`."
        )
    folders = list(_folders(root, DEPTH))
    digests = _only(root, [f for f in folders if _has(f, DIGESTS)])
    metrics = _only(root, [f for f in folders if any(_has(f, name) for name in METRICS)])
    checkpoints = {f: found for f in folders if (found := _checkpoints_in(f))}
    if digests is None and metrics is None:
        _only(root, list(checkpoints))  # nothing says that they are of one run
    log = metrics and next(metrics / name for name in METRICS if _has(metrics, name))
    every = [one for found in checkpoints.values() for one in found]
    return Run(root, digests and digests / DIGESTS, log, every)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            is_other = entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False)
            if not is_other and not looks_like_checkpoint(path):
                yield from _folders(path, depth - 1)


def _has(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)


def _checkpoints_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if looks_like_checkpoint(path)]


def _only(root: Path, folders: list[Path]) -> Path | None:
    """The folder itself before those below it, of which there may be one."""
    if len(folders) > 1 and folders[0] != root:
        listed = "".join(f"\n  {folder}" for folder in folders)
        raise RunError(f"`{root}` has more than one run below it. Name one of them:{listed}")
    return folders[0] if folders else None


# Logs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Complete lines and their numbers. A last one that a kill cut short is none."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = open_inside(folder, path.name, path.parent)
    finally:
        os.close(folder)
    with open(file, "rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST), b""), 1):
            if line.endswith(b"\n"):
                try:
                    yield number, line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise _unreadable(path, number, "it is no text in UTF-8") from error
            elif len(line) == LONGEST:
                raise _unreadable(path, number, f"it has more than {LONGEST:,} bytes")


def _unreadable(path: Path, number: int, why: str) -> RunError:
    return RunError(
        f"Line {number} of `{path}` cannot be read: {why}. jaxlightning writes no such line, so "
        "the file was damaged or changed."
    )


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, number, f"it is no JSON ({type(error).__name__})") from error


def read_digests(path: Path) -> Iterator[DigestRecord]:
    """The records of `digests.jsonl`, whose steps rise."""
    latest = -1
    for number, line in _lines(path):
        try:
            record = DigestRecord.of_json(_json(path, number, line))
        except ValueError as error:
            raise _unreadable(path, number, str(error)) from error
        if record.step <= latest:
            raise _unreadable(path, number, f"step {record.step} comes after step {latest}")
        latest = record.step
        yield record


Logged = dict[str, list[str]]
"""What was logged at a step: numbers by name, written so that equal text means equal bits."""


def read_metrics(path: Path) -> dict[int, Logged]:
    """All that a logger's file has, by step."""
    found: dict[int, Logged] = {}
    for number, record in _json_records(path) if path.suffix == ".jsonl" else _rows(path):
        step = record.get("step")
        if step is None or not step.isdecimal() or len(step) > 15:
            raise _unreadable(path, number, "it has no `step`, or that is no number of steps")
        logged = found.setdefault(int(step), {})
        for name, text in record.items():
            if name != "step":
                logged.setdefault(name, []).append(text)
    return found


def _json_records(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    for number, line in _lines(path):
        content = _json(path, number, line)
        if not isinstance(content, dict):
            raise _unreadable(path, number, "it is no object")
        yield number, {name: _as_text(path, number, value) for name, value in content.items()}


def _as_text(path: Path, number: int, value: Any) -> str:
    if type(value) in (int, float):
        return repr(value)
    if value in _SPELLED:
        return repr(float(value))
    raise _unreadable(path, number, "it has a value that is no number")


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    columns: list[str] = []
    for number, line in _lines(path):
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error as error:
            raise _unreadable(path, number, f"it is no row of a table ({error})") from error
        if number == 1:
            columns = cells
            continue
        if len(cells) != len(columns):
            raise _unreadable(path, number, f"it has {len(cells)} cells, and not {len(columns)}")
        named = zip(columns, cells, strict=True)
        yield number, {name: _cell(path, number, cell) for name, cell in named if cell}


def _cell(path: Path, number: int, cell: str) -> str:
    try:
        return repr(int(cell) if _INTEGER.fullmatch(cell) else float(cell))
    except ValueError:
        raise _unreadable(path, number, "it has a value that is no number") from None


# Checkpoints


class Saved(NamedTuple):
    """The checkpoints of a run that are compared, the latest of each step and kind, and those that
    are damaged."""

    by_step: dict[tuple[int, bool], tuple[Path, Manifest]]
    """By step, and by whether only weights were saved."""
    damaged: list[Path]


def read_checkpoints(run: Run) -> Saved:
    """Reads manifests only."""
    found = Saved({}, [])
    for path in run.checkpoints:
        try:
            manifest = read_manifest(path)
        except CheckpointDamaged:
            found.damaged.append(path)
            continue
        kind = manifest.step, "stream" not in manifest.metadata
        other = found.by_step.get(kind)
        if other is None or _age(other[1]) < _age(manifest):
            found.by_step[kind] = path, manifest
    return found


def _age(manifest: Manifest) -> tuple[int, str]:
    return manifest.serial, manifest.saved_at
