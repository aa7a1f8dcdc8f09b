"""When what is due: functions of counters, so that a resumed run does the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

Phase = Literal["epoch", "started", "stepped", "settled", "ended"]


@dataclasses.dataclass
class Position:
    """Where a fit is. Together with the state, all that the loop needs to go on.

    `phase` says what is done: `"epoch"`: whole epochs; `"started"`: what the
    start of an epoch causes; `"stepped"`: a step, but not yet all that
    it causes (log, validation, checkpoint); `"settled"`: a step and all that it causes; `"ended"`:
    an epoch, or the part of it with which the fit was over, and all that its end causes, with
    `epoch` still its number.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    """Loader batches taken in this epoch."""
    window: int = 0
    """Loader batches that the latest step took."""
    total_batches: int = 0
    """Loader batches taken in all epochs."""
    last: bool = False
    """Whether the epoch's last batch has been taken."""
    phase: Phase = "epoch"

    def advance(self, window: int, last: bool, steps: int = 1) -> None:
        self.step += steps
        self.batches += window
        self.total_batches += window
        self.window = window
        self.last = last
        self.phase = "stepped"

    def end_epoch(self) -> None:
        self.epoch += 1
        self.batches = self.window = 0
        self.last = False
        self.phase = "epoch"

    def after_end(self) -> Position:
        """A copy, which at the end of an epoch is at the start of the next one."""
        copied = dataclasses.replace(self)
        if copied.phase == "ended" and copied.last:
            copied.end_epoch()
        return copied


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The plan of a fit. `None` stands for no limit, and for an unknown length."""

    epoch_batches: int | None
    """Loader batches in an epoch."""
    max_epochs: int | None = None
    max_steps: int | None = None
    min_epochs: int = 0
    min_steps: int = 0
    log_every: int = 50
    val_batches: int | None = None
    """Loader batches from one validation to the next; `None`: at the end of an epoch."""
    val_epochs: int | None = 1
    """Epochs from one validation to the next; `None`: batches are counted across epochs."""
    validates: bool = False
    accumulate: int = 1
    start_epoch: int = 0
    """The epoch in which the training loader was asked for."""
    start_step: int = 0

    @property
    def total_steps(self) -> int | float:
        """Optimizer steps of the whole fit, or infinity where nobody can know."""
        steps = math.inf if self.max_steps is None else self.max_steps
        if self.epoch_batches is None or self.max_epochs is None:
            return steps
        epochs = self.max_epochs - self.start_epoch
        return min(
            steps, self.start_step + epochs * math.ceil(self.epoch_batches / self.accumulate)
        )

    def finished(self, at: Position) -> bool:
        return (self.max_steps is not None and at.step >= self.max_steps) or (
            self.max_epochs is not None and at.epoch >= self.max_epochs
        )

    def may_stop(self, at: Position) -> bool:
        """Whether a request to stop is honoured: both minima have to be met."""
        epochs = at.epoch + (1 if at.last else 0)
        return epochs >= self.min_epochs and at.step >= self.min_steps

    def may_end_epoch(self, at: Position, batches: int) -> bool:
        """Whether `max_steps` leave room for the rest of an epoch of so many batches."""
        if self.max_steps is None:
            return True
        return at.batches + (self.max_steps - at.step) * self.accumulate >= batches

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0

    def validation_due(self, epoch: int, batches: int, total: int, window: int, last: bool) -> bool:
        """Whether a validation follows the step that ended after these batches."""
        if not self.validates:
            return False
        if self.val_epochs is not None and (epoch + 1) % self.val_epochs:
            return False
        if self.val_batches is None:
            return last
        taken = total if self.val_epochs is None else batches
        return taken // self.val_batches > (taken - window) // self.val_batches

    def validates_at(self, at: Position) -> bool:
        return self.validation_due(at.epoch, at.batches, at.total_batches, at.window, at.last)

    def block(self, at: Position, most: int, needs_state: Callable[[int], bool]) -> int:
        """How many of the next `most` steps can run before somebody looks at the state."""
        for ahead in range(1, most):
            step, batches = at.step + ahead, at.batches + ahead
            last = batches == self.epoch_batches
            if (
                last
                or step == self.max_steps
                or step % self.log_every == 0
                or self.validation_due(at.epoch, batches, at.total_batches + ahead, 1, last)
                or needs_state(step)
            ):
                return ahead
        return most

    def explain(
        self,
        steps: int,
        start: Position,
        most: int = 1,
        needs_state: Callable[[int], bool] = lambda step: False,
    ) -> list[tuple[int, list[str]]]:
        """What happens at each of the next `steps` steps, in blocks of `most`."""
        at = dataclasses.replace(start)
        if at.last:
            at.end_epoch()
        found: list[tuple[int, list[str]]] = []
        block_end = at.step
        while len(found) < steps and not self.finished(at):
            if at.step == block_end:
                block_end += self.block(at, most, needs_state)
            left = math.inf if self.epoch_batches is None else self.epoch_batches - at.batches
            window = int(min(self.accumulate, left))
            at.advance(window, last=window == left)
            events = ["step", "on_train_batch_end"]
            found.append((at.step, events))
            if at.step < block_end:
                continue
            if self.logs(at.step):
                events.append("log")
            if self.validates_at(at):
                events.append("validate")
            events.append("on_checkpoint('step')")
            if at.last or self.finished(at):
                events += ["on_train_epoch_end", "on_checkpoint('epoch')"]
            if at.last:
                at.end_epoch()
        return found


def val_batches(interval: int | float, epoch_batches: int | None, across: bool) -> int | None:
    """`val_check_interval` in loader batches; `None` means the end of an epoch.

    **Raises:** `ValueError` where a fraction has nothing to be a fraction of, or where an epoch
    is shorter than the interval.
    """
    if isinstance(interval, float):
        if interval == 1.0:
            return epoch_batches if across else None
        if epoch_batches is None:
            raise ValueError(
                f"`val_check_interval={interval}` is a fraction of an epoch, but the training data "
                "has no length. Write a number of batches: `val_check_interval=1000`."
            )
        return max(1, int(epoch_batches * interval))
    if epoch_batches is not None and interval > epoch_batches and not across:
        raise ValueError(
            f"`val_check_interval={interval}` is more than the {epoch_batches} batches of an "
            "epoch, so no validation would ever run. Write a smaller number, or let batches be "
            "counted across epochs: `check_val_every_n_epoch=None`."
        )
    return interval


def describe_schedule(plan: list[tuple[int, list[str]]]) -> str:
    """One line a step."""
    return "\n".join(f"step {step}: {' ▸ '.join(events)}" for step, events in plan)
