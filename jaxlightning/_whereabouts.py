"""Which batches a step took, found out later: when metrics arrive, the loop is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._listing import counted
from .data import DataLoader

if TYPE_CHECKING:
    from ._trainer import Trainer


class StepBatches(NamedTuple):
    """The loader batches of one optimizer step: numbers `first` to before `stop` of an epoch."""

    step: int
    epoch: int
    first: int
    stop: int

    def __str__(self) -> str:
        last = self.stop - 1
        which = f"batch {last}" if last == self.first else f"batches {self.first} to {last}"
        return f"{which} of epoch {self.epoch}"


class Whereabouts:
    """Computes the batches of a step from points that a run passed.

    Between two of them every step takes as many batches as are accumulated, so the ends of epochs
    (and wherever else somebody asks) are all that has to be remembered, and steps cost nothing.
    """

    def __init__(self) -> None:
        self._points: list[tuple[int, int, int]] = []
        """(global step, epoch, loader batches taken in it)"""

    def mark(self, trainer: Trainer) -> None:
        """Remembers where the run is. To be called wherever an epoch or a resumed run starts, and
        where an epoch ends."""
        at = trainer._position
        # A run that went back takes those steps again.
        self._points = [point for point in self._points if point[0] <= at.step]
        point = (at.step, at.epoch, at.batches)
        if self._points[-1:] != [point]:
            self._points.append(point)

    def of(self, trainer: Trainer, step: int) -> StepBatches | None:
        """The batches that a step took, or is about to take; `None` for one before all that is
        remembered."""
        self.mark(trainer)
        before = [point for point in self._points if point[0] < step]
        if not before:
            return None
        start, epoch, taken = before[-1]
        accumulate = trainer._arguments.accumulate_grad_batches
        first = taken + (step - 1 - start) * accumulate
        end = first + accumulate
        for _, other, batches in self._points[len(before) :][:1]:
            # The last step of an epoch may have taken fewer.
            end = min(end, batches) if other == epoch else end
        return StepBatches(step, epoch, first, end)

    def forget(self, step: int) -> None:
        """Keeps what steps after `step` need."""
        old = sum(point[0] <= step for point in self._points)
        del self._points[: max(old - 1, 0)]

    def state_dict(self) -> list[list[int]]:
        return [list(point) for point in self._points]

    def load_state_dict(self, points: Sequence[Sequence[int]]) -> None:
        self._points = [(step, epoch, batches) for step, epoch, batches in points]


def rows_of(trainer: Trainer, batches: StepBatches) -> list[list[int]] | None:
    """The rows of each of these batches; `None` where the loader does not number them, or is
    another one by now."""
    loader = trainer._run.feed.loader
    if not isinstance(loader, DataLoader) or not is_readable(trainer, batches):
        return None
    order, size = loader.order(batches.epoch), loader.batch_size
    numbers = range(batches.first, batches.stop)
    return [order[number * size : (number + 1) * size].tolist() for number in numbers]


def is_readable(trainer: Trainer, batches: StepBatches) -> bool:
    """Whether the loader is still the one that gave these batches; `DataModule`s may be asked
    for new ones."""
    asked: Any = trainer._asked["position"]["epoch"]
    return bool(batches.epoch >= asked)


def described(trainer: Trainer, batches: StepBatches) -> str:
    """`batch 3 of epoch 1 (rows 5, 0, 7)`."""
    rows = rows_of(trainer, batches)
    if rows is None:
        return str(batches)
    found = [row for batch in rows for row in batch]
    return f"{batches} (rows {counted(found)})"
