"""What the callbacks that watch one metric share: its value, and when there is a new one."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxlightning._callback import Callback
from jaxlightning._nearest import nearest

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


def check_mode(owner: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(
            f'`{owner}(mode="{mode}")` is not known. Write `mode="min"` for what should fall, such '
            'as a loss, or `mode="max"` for what should rise, such as an accuracy.'
        )


def check_at_least(owner: str, argument: str, value: int | float, least: int | float) -> None:
    """**Raises:** `ValueError` below `least`, and for NaN."""
    if not value >= least:
        raise ValueError(f"`{argument}` of `{owner}` has to be at least {least}, not {value}.")


def badness(value: float | None, mode: str) -> float:
    """A number that is smaller for what is better; what is unknown or not finite is worst."""
    if value is None or not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def monitored_value(trainer: Trainer, monitor: str, *, epoch_end: bool = False) -> float | None:
    """The latest value of the metric `monitor`, or `None` if there is none yet.

    At the end of an epoch, `train/x` is the epoch's aggregate, as in Lightning.
    """
    known = trainer.callback_metrics
    aggregate = f"{monitor}_epoch"
    if epoch_end and aggregate in known:
        return float(known[aggregate])
    return float(known[monitor]) if monitor in known else None


def of_validation(monitor: str) -> bool:
    return monitor.startswith("val/")


def has_validation(trainer: Trainer) -> bool:
    return any(trainer.num_val_batches)


class MonitorCallback(Callback):
    """A callback that is told each new value of one metric, during a fit.

    A metric of the validation is new after each validation; one of the training at the end of
    each epoch; any other after each validation if there is one, else at the end of each epoch.
    `check_on_train_epoch_end` decides otherwise. The sanity check does not count, and under
    `fast_dev_run` nothing does.
    """

    def __init__(
        self, monitor: str, mode: str, check_on_train_epoch_end: bool | None, strict: bool = True
    ):
        check_mode(type(self).__name__, mode)
        self.monitor = monitor
        self.mode = mode
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.strict = strict
        self._fitting = False

    @abc.abstractmethod
    def judge(self, trainer: Trainer, value: float) -> None:
        """Acts on a new value of the metric."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets what a former fit has seen."""

    def monitors(self) -> Sequence[str]:
        return (self.monitor,) if self.strict else ()

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}(monitor={self.monitor}, mode={self.mode})"

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._fitting = stage == "fit"

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.global_step == 0:
            self.reset()

    def on_validation_end(self, trainer: Trainer) -> None:
        if not self._waits_for_epoch_end(trainer) and not trainer.sanity_checking:
            self._check(trainer, epoch_end=False)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if self._waits_for_epoch_end(trainer):
            self._check(trainer, epoch_end=True)

    def _waits_for_epoch_end(self, trainer: Trainer) -> bool:
        if self.check_on_train_epoch_end is not None:
            return self.check_on_train_epoch_end
        if of_validation(self.monitor):
            return False
        return self.monitor.startswith("train/") or not has_validation(trainer)

    def _check(self, trainer: Trainer, epoch_end: bool) -> None:
        if not self._fitting or trainer.fast_dev_run:
            return
        value = monitored_value(trainer, self.monitor, epoch_end=epoch_end)
        if value is not None:
            self.judge(trainer, value)
        elif self.strict:
            known = trainer.callback_metrics
            raise RuntimeError(
                f'`{type(self).__name__}(monitor="{self.monitor}")` found no such metric at step '
                f"{trainer.global_step}. So far there are {sorted(known)}."
                f"{nearest(self.monitor, known)}"
            )
