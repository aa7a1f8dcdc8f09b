"""`jaxlightning checkpoint inspect | verify | diff`: what is in a checkpoint, whether it is
intact, and where two of them differ."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._checkpoint import looks_like_checkpoint, verify_checkpoint
from .._checkpoint_files import CheckpointDamaged
from .._checkpoint_manifest import Manifest, StoredArray
from .._checkpoint_read import CheckpointReader, read_manifest
from .._no_checkpoint import no_checkpoint
from ._terminal import one_line

__all__ = ["add_command"]

OF_THE_MACHINE = ("throughput/", "device/", "host/")
"""What metrics begin with that measure time and memory, in which no two runs are alike."""


def add_command(commands: Any) -> None:
    """Adds `checkpoint` to the subparsers of the command line."""
    parser = commands.add_parser("checkpoint", help="look into checkpoints, verify, compare")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    path_help = "a checkpoint, or a folder of checkpoints"
    inspect = actions.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("path", type=Path, help=path_help)
    inspect.add_argument("--all", action="store_true", help="print all of the metadata too")
    inspect.set_defaults(run=_inspect)
    verify = actions.add_parser("verify", help="read all of it; exit code 1 if a bit is wrong")
    verify.add_argument("path", type=Path, help=path_help)
    verify.set_defaults(run=_verify)
    diff = actions.add_parser("diff", help="compare two; exit code 1 if they differ")
    diff.add_argument("path", type=Path, help="a checkpoint")
    diff.add_argument("other", type=Path, help="another checkpoint")
    diff.set_defaults(run=_diff)


def _inside(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or those that are in it, damaged ones included."""
    path = path.absolute()
    if looks_like_checkpoint(path):
        return [path]
    found = sorted(filter(looks_like_checkpoint, path.iterdir())) if path.is_dir() else []
    if not found:
        raise no_checkpoint(path)
    return found


def _inspect(arguments: argparse.Namespace) -> int:
    found = _inside(arguments.path)
    if found != [arguments.path.absolute()]:
        return _list(found)
    manifest = read_manifest(found[0])
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    print(f"{found[0]}\n  step      {manifest.step}\n  saved     {one_line(manifest.saved_at)}")
    print(f"  versions  {one_line(versions)}")
    print(f"\n{len(manifest.arrays)} arrays, {manifest.nbytes:,} bytes")
    _print_table([(path, str(a), f"{a.nbytes:,}") for path, a in manifest.arrays.items()])
    if manifest.scalars:
        print("\nnumbers that are compared, not restored")
        _print_table([(path, repr(scalar), "") for path, scalar in manifest.scalars.items()])
    metadata = dict(manifest.metadata)
    parameters = metadata.pop("hyperparameters", {})
    if isinstance(parameters, dict) and parameters:
        print(f"\nhyper-parameters of {one_line(str(metadata.get('task')))}")
        _print_table([(name, json.dumps(value), "") for name, value in parameters.items()])
    if arguments.all:
        print("\nmetadata\n" + json.dumps(metadata, indent=2))
    elif metadata:
        print(f"\nmetadata of {one_line(', '.join(metadata))}: `--all` prints it")
    return 0


def _list(found: list[Path]) -> int:
    rows = []
    for path in found:
        try:
            manifest = read_manifest(path)
        except CheckpointDamaged as error:
            rows.append((path.name, "damaged", str(error)))
        else:
            rows.append((path.name, f"step {manifest.step}", f"{manifest.nbytes:,} bytes"))
    _print_table(rows)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    damaged = 0
    for path in _inside(arguments.path):
        try:
            manifest = verify_checkpoint(path)
        except CheckpointDamaged as error:
            damaged += 1
            print(one_line(f"damaged  {path.name}: {error}"))
        else:
            print(
                f"intact   {path.name}: step {manifest.step}, {len(manifest.arrays)} arrays, "
                f"{manifest.nbytes:,} bytes"
            )
    return 1 if damaged else 0


def _diff(arguments: argparse.Namespace) -> int:
    with CheckpointReader(arguments.path) as one, CheckpointReader(arguments.other) as other:
        lines = [*_array_differences(one, other), *other_differences(one.manifest, other.manifest)]
    for line in lines:
        print(one_line(line))
    if not lines:
        print("No difference.")
    return 1 if lines else 0


def _array_differences(one: CheckpointReader, other: CheckpointReader) -> Iterator[str]:
    first, second = one.manifest.arrays, other.manifest.arrays
    for path in {**first, **second}:
        if path not in second:
            yield f"{path}: {first[path]} only in the first"
        elif path not in first:
            yield f"{path}: {second[path]} only in the second"
        elif str(first[path]) != str(second[path]):
            yield f"{path}: {first[path]} in the first, {second[path]} in the second"
        else:
            difference = value_difference(first[path], one.array(path), other.array(path))
            if difference:
                yield f"{path}: {difference}"


def value_difference(stored: StoredArray, one: np.ndarray, other: np.ndarray) -> str:
    """How two arrays of one shape and dtype differ, bit by bit; empty if they do not."""
    bits = (array.reshape(-1).view(np.uint8).reshape(array.size, -1) for array in (one, other))
    differing = np.any(np.not_equal(*bits), axis=1) if one.size else np.zeros(0, bool)
    count = int(differing.sum())
    if not count:
        return ""
    if stored.prng is not None:
        return f"other {stored}"
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    gap = np.abs(
        one.reshape(-1)[differing].astype(wide) - other.reshape(-1)[differing].astype(wide)
    )
    largest = gap[~np.isnan(gap)].max(initial=0.0)
    return f"{count:,} of {one.size:,} elements differ, by {largest:.3g} at most"


_OF_NO_LAW = re.compile(
    rf"metadata/(run|loggers/\d+/log_dir|metrics/({'|'.join(OF_THE_MACHINE)}).*)$"
)
"""What differs between two runs that compute the same: whose it is, where it logs, and how fast."""


def other_differences(one: Manifest, other: Manifest) -> Iterator[str]:
    """All else, but for what tells two equal runs apart."""
    for name in ("step", "scalars", "versions", "metadata"):
        first = dict(_flat(name, getattr(one, name)))
        second = dict(_flat(name, getattr(other, name)))
        for path in {**first, **second}:
            if first.get(path) != second.get(path) and not _OF_NO_LAW.match(path):
                yield f"{path}: {first.get(path, 'absent')} in the first, " + (
                    f"{second.get(path, 'absent')} in the second"
                )


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Values by path, as text, in which NaN equals itself and 1 is not 1.0."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(f"{path}/{name}", item)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _flat(f"{path}/{number}", item)
    else:
        yield path, json.dumps(value)


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    rows = [(one_line(a), one_line(b), one_line(c)) for a, b, c in rows]
    first, second = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    for row in rows:
        print(f"  {row[0]:<{first}}  {row[1]:<{second}}  {row[2]}".rstrip())
