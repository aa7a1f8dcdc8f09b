"""What devices say to each other in a compiled program: read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

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
    span: int
    """Over how many devices, in their order, such a group reaches: more than a node has, and it
    goes over the network."""
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
            if kind == "collective-permute":  # A start: operand, result, and two contexts.
                arrays = arrays[1:2] if asynchronous and len(arrays) > 1 else arrays[:1]
            elif asynchronous and len(arrays) > 1 and kind != "all-reduce":
                # A start gives its operands back, then results.
                arrays = arrays[len(arrays) // 2 :]
            group, span = _group(line)
            found.append(
                Collective(
                    kind=kind,
                    arrays=tuple(arrays),
                    group=group,
                    span=span,
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
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((\[[\d,]+\])(T\([\d,]+\))?\))? \{([^}]*)\}"
)
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


def _group(line: str) -> tuple[int, int]:
    """The size of the groups, and over how many neighbouring devices one reaches, of
    `replica_groups={{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)`, or `mesh['a'=2,'b'=2] {'b'}`."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return _size_and_span(np.array([int(n) for n in listed.group(1).split(",") if n]))
    iota = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\])(T\([\d,]+\))?", line)
    if iota:
        return _size_and_span(_ordered(*iota.groups()[1:]).reshape(_numbers(iota.group(1)))[0])
    named = _MESH.search(line)
    if named is None:
        return 0, 0
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
    devices = _ordered(named.group(2) or f"[{math.prod(sizes.values())}]", named.group(3))
    grid = devices.reshape(list(sizes.values()))
    for axis, within in re.findall(r"'(\w+)'(?::(\(\d+\)\d+))?", named.group(4)):
        if within:  # A part of an axis: of so many steps, after so many in front of it.
            before, size = map(int, re.findall(r"\d+", within))
            number = list(sizes).index(axis)
            inner = grid.shape[number] // before // size
            grid = np.take(grid, np.arange(size) * inner, axis=number)
    of_group = {axis for axis, _ in re.findall(r"'(\w+)'(:)?", named.group(4))}
    first = tuple(slice(None) if axis in of_group else 0 for axis in sizes)
    return _size_and_span(grid[first].ravel())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _ordered(shape: str, permutation: str | None) -> np.ndarray:
    """Devices in the order that `[2,4]T(1,0)` stands for."""
    sizes = _numbers(shape)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return (devices.transpose(_numbers(permutation)) if permutation else devices).ravel()


def _size_and_span(devices: np.ndarray) -> tuple[int, int]:
    return (devices.size, int(devices.max() - devices.min()) + 1) if devices.size else (0, 0)


def total_bytes(found: Sequence[Collective], kind: str | None = None) -> int:
    """Of all results, of one kind or of all, each as often as a step runs it, and once where
    that is not known."""
    return sum(c.bytes * (c.times or 1) for c in found if kind in (None, c.kind))
