"""Limits on the time a fit may take."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxlightning._callback import Callback
from jaxlightning._nearest import nearest

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

Duration = str | datetime.timedelta | dict[str, Any]
"""`"DD:HH:MM:SS"`, a timedelta, or a timedelta's arguments."""

_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")


def parse_duration(duration: Any, argument: str = "duration") -> datetime.timedelta:
    """A [`Duration`][] as a timedelta.

    **Raises:** `ValueError` or `TypeError`, naming `argument`, for anything else.
    """
    example = f'Write `{argument}="00:12:00:00"` (days, hours, minutes, seconds)'
    if isinstance(duration, str):
        found = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip())
        parts = [int(part) for part in found.groups()] if found else []
        if not parts or parts[1] > 23 or parts[2] > 59 or parts[3] > 59:
            raise ValueError(
                f'`{argument}="{duration}"` is no duration. {example}, with two digits each, hours '
                "below 24, minutes and seconds below 60."
            )
        days, hours, minutes, seconds = parts
        duration = datetime.timedelta(days, seconds, minutes=minutes, hours=hours)
    elif isinstance(duration, dict):
        for unit in duration:
            if unit not in _UNITS:
                raise ValueError(
                    f"`{argument}={duration}` has the key `{unit}`, which is no unit of time. "
                    f"There are {list(_UNITS)}.{nearest(str(unit), _UNITS)}"
                )
        duration = datetime.timedelta(**duration)
    if not isinstance(duration, datetime.timedelta):
        raise TypeError(
            f"`{argument}` is a `{type(duration).__name__}`. {example}, a `datetime.timedelta`, "
            'or `{"hours": 12}`.'
        )
    if duration <= datetime.timedelta(0):
        raise ValueError(f"`{argument}={duration}` has to be longer than nothing. {example}.")
    return duration


def clock_says(trainer: Trainer, elapsed: bool) -> bool:
    """Whether time has elapsed, asked after a step: the same answer on all processes.

    Process 0's clock counts. To agree waits for the device, so several processes only do so where
    a log interval ends.
    """
    if jax.process_count() == 1:
        return elapsed
    if trainer.global_step % trainer.log_every_n_steps:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(elapsed)))


class Timer(Callback):
    """Measures how long the stages take, and stops the fit after `duration`.

        timer = Timer("00:12:00:00")
        Trainer(callbacks=[timer]).fit(task, data)
        timer.time_elapsed("train")

    Time goes on being counted after a resume. `Trainer(max_time=...)` makes one of these.
    """

    def __init__(self, duration: Duration | None = None, interval: str = "step"):
        """
        - `duration`: `"DD:HH:MM:SS"`, a timedelta, or its arguments as a dict; `None` only
          measures.
        - `interval`: where the fit may be stopped: after a `"step"` or after an `"epoch"`.
        """
        if interval not in ("step", "epoch"):
            raise ValueError(
                f'`Timer(interval="{interval}")` is not known. Write `"step"` or `"epoch"`.'
            )
        self.duration = None if duration is None else parse_duration(duration)
        self.interval = interval
        self._spent: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds spent in `"train"` (validations included), `"validate"` or `"test"`."""
        running = time.monotonic() - self._since[stage] if stage in self._since else 0.0
        return self._spent.get(stage, 0.0) + running

    def time_remaining(self) -> float | None:
        """Seconds of the duration that are left, at least 0; `None` without a duration."""
        if self.duration is None:
            return None
        return max(0.0, self.duration.total_seconds() - self.time_elapsed())

    def _start(self, stage: str) -> None:
        self._since[stage] = time.monotonic()

    def _end(self, stage: str) -> None:
        self._spent[stage] = self.time_elapsed(stage)
        self._since.pop(stage, None)

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.global_step == 0:
            self._spent.clear()

    def on_train_start(self, trainer: Trainer) -> None:
        self._start("train")
        # A run that resumes after its time was up has none left.
        self._stop_if(trainer, self.time_remaining() == 0.0)

    def on_train_end(self, trainer: Trainer) -> None:
        self._end("train")

    def on_train_batch_end(
        self, trainer: Trainer, outputs: Mapping[str, Any], batch: Any, batch_idx: int
    ) -> None:
        if self.duration is not None and self.interval == "step":
            self._stop_if(trainer, clock_says(trainer, self.time_remaining() == 0.0))

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if self.duration is not None and self.interval == "epoch":
            self._stop_if(trainer, clock_says(trainer, self.time_remaining() == 0.0))

    def on_validation_start(self, trainer: Trainer) -> None:
        if not trainer.sanity_checking:
            self._start("validate")

    def on_validation_end(self, trainer: Trainer) -> None:
        if not trainer.sanity_checking:
            self._end("validate")

    def on_test_start(self, trainer: Trainer) -> None:
        self._start("test")

    def on_test_end(self, trainer: Trainer) -> None:
        self._end("test")

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        for stage in list(self._since):
            self._end(stage)

    def _stop_if(self, trainer: Trainer, up: bool) -> None:
        if up and not trainer.should_stop:
            trainer.stop(f"The time limit of {self.duration} was reached.", remembered=False)

    @property
    def state_key(self) -> str:
        # Not the duration itself: a run that is resumed with more time has spent what it has.
        return f"Timer(interval={self.interval}, limits={self.duration is not None})"

    def state_dict(self) -> dict[str, Any]:
        stages = {**self._spent, **self._since}
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in stages}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._spent = dict(state["time_elapsed"])

    def take_back(self, state: dict[str, Any]) -> None:
        """Time that was spent stays spent."""
