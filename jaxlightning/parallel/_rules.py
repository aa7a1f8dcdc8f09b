"""Rules that say how an array is sharded, by its path; strategies are lists of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._nearest import nearest

Spec = PartitionSpec | Callable[[tuple[int, ...], Mesh], PartitionSpec]
Rule = tuple[str, Spec]
"""A regular expression on a leaf's path, and how a leaf that it finds is sharded."""

AXES = ("data", "fsdp", "context", "tensor")
"""Of examples; of examples and parameters; of a sequence's places; within parameters."""
DATA_AXES = ("data", "fsdp")
"""The axes over which a batch is split."""
SMALL = 2**10
"""Numbers in a leaf that `fsdp` leaves whole: gathering it would cost more than keeping it."""


def fsdp(shape: tuple[int, ...], mesh: Mesh, given: PartitionSpec | None = None) -> PartitionSpec:
    """Shards the largest axis that the mesh's `fsdp` axis divides; small leaves stay whole.

    Of axes that are `given` to other axes of the mesh already it takes none: it shards further
    what the rule of a task has sharded over `tensor`.
    """
    given = PartitionSpec() if given is None else given
    size = mesh.shape.get("fsdp", 1)
    if size == 1 or math.prod(shape) < SMALL or "fsdp" in spec_axes(given):
        return given
    entries = [*given, *[None] * (len(shape) - len(given))]
    free = [
        axis for axis, length in enumerate(shape) if length % size == 0 and entries[axis] is None
    ]
    if not free:
        return given
    largest = max(free, key=lambda axis: shape[axis])
    entries[largest] = "fsdp"
    while entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


_FSDP: Rule = (r".*", fsdp)
STRATEGIES: dict[str, tuple[Rule, ...]] = {
    "auto": (_FSDP,),  # Nothing, on a mesh without that axis.
    "ddp": (),
    "fsdp": (_FSDP,),
    "tensor": (),  # The task's own.
}


def strategy_rules(strategy: str | Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a strategy's name, or the rules themselves."""
    if not isinstance(strategy, str):
        for rule in strategy if isinstance(strategy, list | tuple) else [strategy]:
            check_rule(rule, "`strategy`")
        return tuple(strategy)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"`strategy={strategy!r}` is unknown; it is one of {sorted(STRATEGIES)}, or a list of "
            f"`(regex on the leaf's path, PartitionSpec)`.{nearest(strategy, STRATEGIES)}"
        )
    return STRATEGIES[strategy]


def check_rule(rule: Any, whose: str) -> None:
    """**Raises:** `TypeError` for what is no rule, `ValueError` for an unknown axis."""
    is_pair = isinstance(rule, list | tuple) and len(rule) == 2
    if not (
        is_pair
        and isinstance(rule[0], str)
        and (isinstance(rule[1], PartitionSpec) or callable(rule[1]))
    ):
        raise TypeError(
            f"{whose} has the rule {rule!r}. A rule is a pair of a regular expression on a "
            'leaf\'s path and a `PartitionSpec`: `("head/weight", PartitionSpec("tensor"))`.'
        )
    for axis in () if callable(rule[1]) else spec_axes(rule[1]):
        if axis not in AXES:
            raise ValueError(
                f'{whose} shards `{rule[0]}` over an unknown axis "{axis}"; the axes are {AXES}.'
                f"{nearest(axis, AXES)}"
            )


def spec_axes(spec: Iterable[Any]) -> list[str]:
    """The names of the mesh's axes in a `PartitionSpec`."""
    entries = [entry for entry in spec if entry is not None]
    return [axis for e in entries for axis in (e if isinstance(e, tuple) else (e,))]


def only_axes(spec: Iterable[Any], kept: Iterable[str]) -> PartitionSpec:
    """A `PartitionSpec` of only the axes `kept`: over the others, what it shards is whole."""
    kept = tuple(kept)

    def entry(of: Any) -> Any:
        axes = tuple(axis for axis in spec_axes([of]) if axis in kept)
        return axes[0] if len(axes) == 1 else axes or None

    return PartitionSpec(*map(entry, spec))


def divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether the axes of a mesh divide those of an array."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
