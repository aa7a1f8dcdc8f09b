"""Ends a fit when a metric says that going on is no use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._announce import announce
from ._monitored import MonitorCallback, badness, check_at_least

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class EarlyStopping(MonitorCallback):
    """Stops the fit when a metric stops improving.

        Trainer(callbacks=[EarlyStopping("val/loss", patience=5)])

    The Trainer's `min_epochs` and `min_steps` are honoured first.
    """

    stopping_reason: str | None
    """Why the fit was stopped: `"patience"`, `"threshold"`, `"divergence"` or `"non_finite"`."""
    stopping_message: str | None
    """The same as a sentence."""

    def __init__(
        self,
        monitor: str,
        *,
        min_delta: int | float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: int | float | None = None,
        divergence_threshold: int | float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ):
        """
        - `monitor`: the metric's name, such as `"val/loss"`.
        - `min_delta`: an improvement has to be larger than this.
        - `patience`: how many checks in a row may pass without improvement.
        - `verbose`: whether to print improvements.
        - `mode`: `"min"` or `"max"`.
        - `strict`: whether a metric that does not exist is an error.
        - `check_finite`: whether to stop at NaN or infinity. If not, they are no improvement.
        - `stopping_threshold`: stop once the metric is better than this.
        - `divergence_threshold`: stop once the metric is worse than this.
        - `check_on_train_epoch_end`: whether to check at the end of an epoch rather than of a
          validation; by default, where the metric is new.
        - `log_rank_zero_only`: whether `verbose` prints in the first process only.
        """
        super().__init__(monitor, mode, check_on_train_epoch_end, strict)
        check_at_least("EarlyStopping", "patience", patience, 0)
        check_at_least("EarlyStopping", "min_delta", min_delta, 0)
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self.reset()

    def reset(self) -> None:
        self.wait_count = 0
        self.best_score: float | None = None
        self.stopped_epoch: int | None = None
        self.stopping_reason = None
        self.stopping_message = None

    def on_fit_start(self, trainer: Trainer) -> None:
        super().on_fit_start(trainer)
        if self.stopping_message is not None:  # a run that had been stopped stays so
            trainer.stop(self.stopping_message, remembered=False)

    def judge(self, trainer: Trainer, value: float) -> None:
        reason, message = self._verdict(value)
        if reason is not None:
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason, self.stopping_message = reason, message
            trainer.stop(message, remembered=False)
        elif message and self.verbose:
            announce(message, everywhere=not self.log_rank_zero_only)

    def _verdict(self, value: float) -> tuple[str | None, str]:
        """Counts, and says whether to stop."""
        name, best = self.monitor, self.best_score
        if self.check_finite and not math.isfinite(value):
            known = "there was none before" if best is None else f"the best before was {best:.6g}"
            return "non_finite", f"`{name}` is {value}; {known}."
        if self._better(value, self.stopping_threshold):
            limit = self.stopping_threshold
            return "threshold", f"`{name}` = {value:.6g} is better than the threshold {limit}."
        if self._better(self.divergence_threshold, value):
            limit = self.divergence_threshold
            return "divergence", f"`{name}` = {value:.6g} is worse than the threshold {limit}."
        if badness(value, self.mode) < badness(best, self.mode) - self.min_delta:
            self.best_score, self.wait_count = value, 0
            gain = "" if best is None else f", better by {abs(value - best):.6g}"
            return None, f"`{name}` improved to {value:.6g}{gain}."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            return "patience", (
                f"`{name}` did not improve by more than {self.min_delta} in the last "
                f"{self.wait_count} checks; the best was {best if best is None else f'{best:.6g}'}."
            )
        return None, ""

    def _better(self, value: int | float | None, than: int | float | None) -> bool:
        """Whether both are known and `value` is the better one."""
        if value is None or than is None:
            return False
        return value < than if self.mode == "min" else value > than

    def state_dict(self) -> dict[str, Any]:
        return {
            "patience": self.patience,
            "wait_count": self.wait_count,
            "best_score": self.best_score,
            "stopped_epoch": self.stopped_epoch,
            "stopping_reason": self.stopping_reason,
            "stopping_message": self.stopping_message,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that had been stopped by another `patience` than this goes on."""
        self.wait_count = state["wait_count"]
        self.best_score = state["best_score"]
        self.stopped_epoch = state["stopped_epoch"]
        goes_on = state["patience"] != self.patience and state["stopping_reason"] == "patience"
        self.stopping_reason = None if goes_on else state["stopping_reason"]
        self.stopping_message = None if goes_on else state["stopping_message"]
