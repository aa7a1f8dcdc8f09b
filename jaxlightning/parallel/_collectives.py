"""What devices say to each other in a compiled program: read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """An array in a program's text."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Rounded up to whole bytes."""
        return -(-math.prod(self.shape) * _bits(self.dtype) // 8)


class Collective(NamedTuple):
    """One operation between devices."""

    kind: str
    """One of `KINDS`."""
    arrays: tuple[Array, ...]
    """Its results on a device."""
    group: int
    """How many devices take part in each; 0 where the text does not say."""
    in_loop: bool
    """Whether it is in the body or the condition of a `while`."""
    times: int | None
    """How often a step runs it; `None` where a loop's count is not known."""

    @property
    def bytes(self) -> int:
        """Of its results on a device, once."""
        return sum(array.bytes for array in self.arrays)

    @property
    def moved(self) -> float:
        """Bytes that each device sends, once, when the group forms a ring: of the whole, n - 1 of
        n parts, and for an all-reduce twice."""
        n = max(self.group, 1)
        factor = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1.0,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1.0,
        }[self.kind]
        return self.bytes * factor


def collectives(program: jax.stages.Compiled | str) -> list[Collective]:
    """The collectives of a compiled program, or of its text (`as_text()`), in its order.

    Asynchronous ones, a `-start` and a `-done`, count once.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    computations = dict(_computations(text))
    times, looped = _executions(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            kind, asynchronous = match["kind"], match["start"] is not None
            arrays = list(_arrays(match["type"]))
            if asynchronous and len(arrays) > 1 and kind != "all-reduce":
                arrays = arrays[
                    len(arrays) // 2 :
                ]  # A start gives its operands back, then results.
            if kind == "collective-permute":
                arrays = arrays[:1]
            found.append(
                Collective(
                    kind=kind,
                    arrays=tuple(arrays),
                    group=_group(line),
                    in_loop=name in looped,
                    times=times.get(name, 1),
                )
            )
    return found


_COLLECTIVE = re.compile(
    rf"= (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^\s*(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*)?.*\{$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's name, and its lines."""
    text = re.sub(r"/\*.*?\*/", "", text)
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            header = _HEADER.match(line)
            name, lines = (header.group(1) if header else ""), []
        elif line.startswith("}"):
            if name:
                yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _executions(
    computations: dict[str, list[str]],
) -> tuple[dict[str, int | None], set[str]]:
    """How often each computation is run, and which are run in loops. The entry comes last."""
    times: dict[str, int | None] = {}
    looped: set[str] = set()

    def visit(name: str, count: int | None, in_loop: bool) -> None:
        before = times.get(name, 0)
        times[name] = None if count is None or before is None else before + count
        if in_loop:
            looped.add(name)
        for line in computations.get(name, ()):
            is_loop = " while(" in line
            trips = _TRIPS.search(line) if is_loop else None
            inner = count
            if is_loop:
                known = int(trips.group(1)) if trips else None
                inner = None if known is None or count is None else count * known
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"%?([\w.\-]+)", branches)
            for other in called:
                if other in computations:
                    visit(other, inner, in_loop or is_loop)

    if computations:
        visit(list(computations)[-1], 1, False)
    return times, looped


def _arrays(text: str) -> Iterator[Array]:
    for dtype, shape in _ARRAY.findall(text):
        if dtype != "token":
            yield Array(dtype, tuple(int(n) for n in shape.split(",") if n))


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 32


def _group(line: str) -> int:
    """The size of the groups, of `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]`, or
    `mesh['a'=2,'b'=2] {'b'}`."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota.group(1)) if iota else 0


def total_bytes(found: Sequence[Collective], kind: str | None = None) -> int:
    """Of all results, of one kind or of all, each as often as a step runs it, and once where
    that is not known."""
    return sum(c.bytes * (c.times or 1) for c in found if kind in (None, c.kind))
