"""`jaxlightning compare`: the first step and leaf at which two runs part."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from .._checkpoint_files import CheckpointDamaged
from .._checkpoint_manifest import Manifest
from .._checkpoint_read import CheckpointReader
from .._listing import SHOWN
from ._checkpoint import OF_THE_MACHINE, other_differences, value_difference
from ._runs import (
    Logged,
    Run,
    RunError,
    Saved,
    find_run,
    read_checkpoints,
    read_digests,
    read_metrics,
)
from ._terminal import one_line

__all__ = ["add_command"]

LOGGED = "logged steps"


def add_command(commands: Any) -> None:
    """Adds `compare` to the subparsers of the command line."""
    parser = commands.add_parser(
        "compare",
        help="find where two runs part",
        description="Compares, bit by bit and at the steps that both runs have, the digests that "
        "the callback `Digest` wrote, logged metrics (JSONL, CSV) and checkpoints. Exit code 0: "
        "no difference; 1: they part; 2: there was nothing to compare.",
    )
    run_help = "a run's folder of logs or of checkpoints, or one that has them below it"
    parser.add_argument("first", metavar="RUN_A", type=Path, help=run_help)
    parser.add_argument("second", metavar="RUN_B", type=Path, help=run_help)
    parser.add_argument(
        "--ignore",
        metavar="REGEX",
        type=_regex,
        help="metrics in whose names it is found are not compared, and neither are "
        + ", ".join(f"{start}*" for start in OF_THE_MACHINE),
    )
    parser.set_defaults(run=_run)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


class Comparison(NamedTuple):
    """One source of evidence, at the steps that both runs have of it."""

    what: str
    steps: int
    agreed: int | None = None
    """The last step before `parted`, or of all."""
    parted: int | None = None
    """The first step at which they differ."""
    names: Sequence[str] = ()
    """What differs there."""
    lines: Sequence[str] = ()
    """The same, and how."""
    remarks: Sequence[str] = ()
    """What was not compared."""


def _run(arguments: argparse.Namespace) -> int:
    first, second = find_run(arguments.first), find_run(arguments.second)
    saved = read_checkpoints(first), read_checkpoints(second)
    found = [
        _compare_digests(first, second),
        _compare_checkpoints(*saved),
        _compare_metrics(first, second, arguments.ignore),
    ]
    if not any(comparison.steps for comparison in found):
        raise RunError(_nothing_in_common(first, second))
    parted = [comparison for comparison in found if comparison.parted is not None]
    print(one_line(_verdict(found, parted)))
    remarks = (f"not compared: {remark}" for comparison in found for remark in comparison.remarks)
    for line in chain(*map(_details, found), remarks, _set_up(*saved)):
        print(one_line(line))
    return 1 if parted else 0


def _nothing_in_common(first: Run, second: Run) -> str:
    def has(run: Run) -> str:
        parts = {"digests": run.digests, "metrics": run.metrics, "checkpoints": run.checkpoints}
        return " and ".join(part for part, there in parts.items() if there) or "none of them"

    return (
        f"`{first.root}` and `{second.root}` have no step in common at which digests, metrics "
        f"(`metrics.jsonl`, `metrics.csv`) or checkpoints could be compared: the first has "
        f"{has(first)}, the second {has(second)}. Train both with `callbacks=[Digest()]` and the "
        "same `log_every_n_steps`."
    )


def _verdict(found: list[Comparison], parted: list[Comparison]) -> str:
    if not parted:
        return f"No difference in {', '.join(_count(one) for one in found if one.steps)}."
    earliest = min(parted, key=lambda one: one.parted or 0)  # of one step, that of the state
    at, (name, *others) = earliest.parted or 0, earliest.names
    # Metrics that agree do not say that the state does.
    trusted = [one for one in found if one is earliest or one.what != LOGGED]
    agreed = [one.agreed for one in trusted if one.agreed is not None and one.agreed < at]
    when = f"part after step {max(agreed)}, by step {at}" if agreed else f"differ at step {at}"
    return f"The runs {when}: `{name}`{f' and {len(others)} more' if others else ''}."


def _count(one: Comparison) -> str:
    what = one.what if one.steps != 1 else re.sub(r"s\b", "", one.what, count=1)
    return f"{one.steps} {what}"


def _details(one: Comparison) -> Iterator[str]:
    if one.steps:
        until = "nothing agrees" if one.agreed is None else f"all agree until step {one.agreed}"
        then = "" if one.parted is None else f", part at step {one.parted}"
        yield f"{_count(one)}: {until}{then}"
    yield from _some(one.lines)


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"  and {len(lines) - SHOWN} more"


def _walk(
    what: str,
    first: Mapping[int, Any],
    second: Mapping[int, Any],
    differing: Callable[[int], list[str]],
) -> Comparison:
    """Goes through common steps until something differs."""
    steps = sorted(first.keys() & second.keys())
    agreed = None
    for step in steps:
        if names := differing(step):
            return Comparison(what, len(steps), agreed, step, names)
        agreed = step
    return Comparison(what, len(steps), agreed)


def _missing(what: str, first: object, second: object) -> Comparison:
    """In place of a comparison, where not both sides have something."""
    alone = "first" if first else "second"
    remarks = [f"{what}, which only the {alone} run has"] if first or second else []
    return Comparison(what, 0, remarks=remarks)


def _only_in(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Says so where one side alone has it."""
    if name in one and name in other:
        return None
    return f"{name}: only in the {'first' if name in one else 'second'}"


# Digests


def _compare_digests(first: Run, second: Run) -> Comparison:
    if first.digests is None or second.digests is None:
        return _missing("digests", first.digests, second.digests)
    paths = first.digests, second.digests
    # Of each record only the total is kept: all of a long run would need much memory.
    one, other = ({record.step: record.digest for record in read_digests(p)} for p in paths)
    leaves: list[Mapping[str, str]] = [{}, {}]

    def differing(step: int) -> list[str]:
        if one[step] == other[step]:
            return []
        leaves[:] = (next(r.leaves for r in read_digests(p) if r.step == step) for p in paths)
        a, b = leaves
        return [name for name in {**a, **b} if a.get(name) != b.get(name)]

    found = _walk("digests", one, other, differing)
    return found._replace(lines=[_only_in(name, *leaves) or name for name in found.names])


# Metrics


def _compare_metrics(first: Run, second: Run, ignore: re.Pattern[str] | None) -> Comparison:
    if first.metrics is None or second.metrics is None:
        return _missing("metrics", first.metrics, second.metrics)

    def compared(step: Logged) -> Logged:
        return {
            name: values
            for name, values in step.items()
            if not (name.startswith(OF_THE_MACHINE) or (ignore and ignore.search(name)))
        }

    one, other = (
        {step: kept for step, logged in read_metrics(path).items() if (kept := compared(logged))}
        for path in (first.metrics, second.metrics)
    )

    def differing(step: int) -> list[str]:
        a, b = one[step], other[step]
        return [name for name in a if name in b and a[name] != b[name]]

    names = [dict.fromkeys(chain(*side.values())) for side in (one, other)]
    alone = [line for name in {**names[0], **names[1]} if (line := _only_in(name, *names))]
    found = _walk(LOGGED, one, other, differing)._replace(remarks=alone)
    if found.parted is None:
        return found
    a, b = one[found.parted], other[found.parted]
    return found._replace(
        lines=[
            f"{name}: {', '.join(a[name])} in the first, {', '.join(b[name])} in the second"
            for name in found.names
        ]
    )


# Checkpoints


def _compare_checkpoints(first: Saved, second: Saved) -> Comparison:
    pairs: dict[int, list[Pair]] = {}
    for kind in sorted(first.by_step.keys() & second.by_step.keys()):
        pairs.setdefault(kind[0], []).append((first.by_step[kind], second.by_step[kind]))
    lines: list[str] = []

    def differing(step: int) -> list[str]:
        for pair in pairs[step]:
            if names := _differing_arrays(pair):
                lines[:] = [*_differences(names[:SHOWN], pair), *names[SHOWN:]]
                return names
        return []

    found = _walk("steps with checkpoints", pairs, pairs, differing)
    damaged = [f"`{path}`, which is damaged" for path in (*first.damaged, *second.damaged)]
    missing = _missing("checkpoints", first.by_step, second.by_step).remarks
    only = missing if not (first.by_step and second.by_step) else ()
    return found._replace(lines=lines, remarks=[*only, *damaged])


Pair = tuple[tuple[Path, Manifest], tuple[Path, Manifest]]


def _differing_arrays(pair: Pair) -> list[str]:
    """Not the open sums of metrics, which measure the run and do not steer it: how far they have
    got depends on what a step had caused when the checkpoint of that step was taken."""
    (_, one), (_, other) = pair
    names = [name for name in {**one.arrays, **other.arrays} if not name.startswith("metrics/")]
    return [name for name in names if not _same(name, pair)]


def _same(name: str, pair: Pair) -> bool:
    (path, one), (other_path, other) = pair
    a, b = one.arrays.get(name), other.arrays.get(name)
    if a is None or b is None or str(a) != str(b):
        return False
    cut, other_cut = ({s.region: s.sha256 for s in array.shards} for array in (a, b))
    if cut.keys() == other_cut.keys():
        return cut == other_cut
    # Cut for other devices, so that checksums are of other parts: the arrays have to be read.
    with CheckpointReader(path) as reader, CheckpointReader(other_path) as other_reader:
        return reader.array(name).tobytes() == other_reader.array(name).tobytes()


def _differences(names: list[str], pair: Pair) -> Iterator[str]:
    (path, one), (other_path, other) = pair
    a, b = one.arrays, other.arrays
    with CheckpointReader(path) as reader, CheckpointReader(other_path) as other_reader:
        for name in names:
            if (alone := _only_in(name, a, b)) is not None:
                yield alone
            elif str(a[name]) != str(b[name]):
                yield f"{name}: {a[name]} in the first, {b[name]} in the second"
            else:
                try:
                    arrays = reader.array(name), other_reader.array(name)
                    yield f"{name}: {value_difference(a[name], *arrays)}"
                except CheckpointDamaged as error:
                    yield f"{name}: other checksums; {error}"


def _set_up(first: Saved, second: Saved) -> Iterator[str]:
    """What checkpoints say of how the runs were set up: perhaps the cause of a difference."""
    found = [
        [manifest for (_, weights_only), (_, manifest) in saved.by_step.items() if not weights_only]
        for saved in (first, second)
    ]
    if not all(found):
        return
    parts = ("versions/", "scalars/", "metadata/task", "metadata/hyperparameters/")
    lines = [
        line
        for line in other_differences(found[0][0], found[1][0])
        if line.startswith((*parts, "metadata/fixed/"))
    ]
    if lines:
        yield "set up differently:"
        yield from _some(lines)
