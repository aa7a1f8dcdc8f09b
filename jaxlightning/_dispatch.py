"""What one call of the compiled program takes: a batch, micro-batches, or a block of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import PyTree

from ._metrics import Metric
from ._state import TrainState
from ._step import MicroBatches, TrainStep, block_of_steps
from .data import DeviceBatch
from .parallel import placed

Metrics = dict[str, Metric]
Shapes = tuple[tuple[int, ...], ...]


class Dispatch(Protocol):
    """How batches become the varying arguments of the program, and what it does with them."""

    most: int
    """Batches in one call at most."""

    def fits(self, held: list[DeviceBatch], batch: DeviceBatch) -> bool:
        """Whether `batch` can join those held already in one call."""

    def varying(self, window: list[DeviceBatch]) -> PyTree:
        """The program's arguments, flat where it matters."""

    def announced(self, shapes: Sequence[PyTree], batches: int | None) -> list[PyTree]:
        """Abstract arguments, one for each program that an epoch of `batches` batches needs;
        `shapes` are the loader's: that of its batches, and, if any, of the smaller last one."""

    def run(
        self, step: TrainStep, state: TrainState, varying: PyTree, structure: Any
    ) -> tuple[TrainState, Metrics]:
        """The traced function. `structure` is a batch's."""


class Single:
    """One batch, one step."""

    most = 1

    def fits(self, held: list[DeviceBatch], batch: DeviceBatch) -> bool:
        return False

    def varying(self, window: list[DeviceBatch]) -> PyTree:
        return window[0].leaves

    def announced(self, shapes: Sequence[PyTree], batches: int | None) -> list[PyTree]:
        return [jax.tree.leaves(shape) for shape in shapes]

    def run(
        self, step: TrainStep, state: TrainState, varying: PyTree, structure: Any
    ) -> tuple[TrainState, Metrics]:
        return step(state, jax.tree.unflatten(structure, varying))


class Accumulated:
    """Several batches, one step. The last window of an epoch may have fewer."""

    def __init__(self, count: int):
        self.most = count

    def fits(self, held: list[DeviceBatch], batch: DeviceBatch) -> bool:
        if any(other.shapes != held[0].shapes for other in held[1:]):
            raise ValueError(
                f"`accumulate_grad_batches={self.most}` needs batches that are alike, but for the "
                f"last one of an epoch. Here one of the shapes {held[-1].shapes} is followed by "
                "more. Pad the batches to one length, or do not accumulate."
            )
        return True

    def varying(self, window: list[DeviceBatch]) -> PyTree:
        if len(window) > 1 and window[-1].shapes != window[0].shapes:
            return [b.leaves for b in window[:-1]], window[-1].leaves
        return [b.leaves for b in window], None

    def announced(self, shapes: Sequence[PyTree], batches: int | None) -> list[PyTree]:
        usual = jax.tree.leaves(shapes[0])
        ragged = jax.tree.leaves(shapes[1]) if len(shapes) > 1 else None
        if batches is None:
            return [([usual] * self.most, None)]
        windows, rest = divmod(batches, self.most)
        found: list[PyTree] = []
        if windows > (0 if rest or ragged is None else 1):
            found.append(([usual] * self.most, None))
        count = rest or self.most
        last: PyTree
        if ragged is None:
            last = ([usual] * count, None)
        else:
            equal, rest_of_it = ([usual] * (count - 1), ragged) if count > 1 else ([ragged], None)
            last = (equal, rest_of_it)
        return found if rest == 0 and ragged is None else [*found, last]

    def run(
        self, step: TrainStep, state: TrainState, varying: PyTree, structure: Any
    ) -> tuple[TrainState, Metrics]:
        equal, ragged = varying
        unflatten = structure.unflatten
        batches = MicroBatches(
            list(map(unflatten, equal)), None if ragged is None else unflatten(ragged)
        )
        return step(state, batches)


class Block:
    """Several batches, as many steps, in one program."""

    def __init__(self, count: int):
        self.most = count
        self._counts: dict[int, jax.Array] = {}

    def fits(self, held: list[DeviceBatch], batch: DeviceBatch) -> bool:
        return held[-1].shapes == batch.shapes

    def varying(self, window: list[DeviceBatch]) -> PyTree:
        count = len(window)
        if count not in self._counts:
            at = _replicated(window[0].leaves[0])
            (self._counts[count],) = placed([np.int32(count)], [at])
        leaves = [b.leaves for b in window]
        return leaves + leaves[-1:] * (self.most - count), self._counts[count]

    def announced(self, shapes: Sequence[PyTree], batches: int | None) -> list[PyTree]:
        count = jax.ShapeDtypeStruct((), np.int32)
        return [([jax.tree.leaves(shape)] * self.most, count) for shape in shapes]

    def run(
        self, step: TrainStep, state: TrainState, varying: PyTree, structure: Any
    ) -> tuple[TrainState, Metrics]:
        leaves, count = varying
        return block_of_steps(step, state, list(map(structure.unflatten, leaves)), count)


def _replicated(like: jax.Array) -> jax.sharding.Sharding:
    sharding = like.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
