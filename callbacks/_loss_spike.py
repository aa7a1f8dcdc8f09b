"""Notices when the loss leaps up, and takes the run back to before it did."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlightning._callback import Callback, Checkpoint
from jaxlightning._say import warn

from ._monitored import check_at_least

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

_NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


class LossSpike(Callback):
    """Warns of a spike of the loss, or goes back to before it and skips its batches.

        Trainer(
            callbacks=[
                LossSpike(action="rewind"),
                ModelCheckpoint(every_n_train_steps=500, save_top_k=-1),
            ]
        )

    **What a spike is.** A metric of a log interval that is not finite, or that is above the median
    of the last `window` intervals by more than `deviations` standard deviations and by more than
    the share `min_rise` of that median; in `patience` intervals in a row. The deviation is
    estimated from the median absolute deviation. Half of the values would have to be outliers to
    move median and deviation at will (Rousseeuw and Croux 1993), so that a spike does not raise
    the bar for itself, as it does with a mean, while a new level is the norm after half a window.
    A value that is finite is not judged before there are `window` of them.

    **Rewinding.** With `action="rewind"` the run goes back to the latest checkpoint from before
    the interval in which the spike began, and goes on with the batches that come now: all that it
    took since then are skipped. That is what Chowdhery et al. 2022 (PaLM, section 5.1) did about
    20 times, who found that it is not such batches alone that cause a spike, but they and the
    state they meet. See `Trainer.rewind` for what is undone. If no checkpoint is old enough, that
    is warned of, and the run goes on.
    """

    rewinds: int
    """How often this run has been taken back."""

    def __init__(
        self,
        monitor: str = "train/loss",
        *,
        action: str = "warn",
        window: int = 20,
        deviations: int | float = 6.0,
        min_rise: int | float = 0.1,
        patience: int = 1,
        steps_before: int = 0,
        max_rewinds: int = 3,
    ):
        """
        - `monitor`: a metric of the training step that rises where things go wrong.
        - `action`: `"warn"` or `"rewind"`.
        - `window`: how many log intervals before this one are the norm.
        - `deviations`: how many standard deviations above their median a spike begins.
        - `min_rise`: what a spike has to rise by at least, as a share of the median: in a quiet
          stretch the deviation may be next to nothing.
        - `patience`: how many intervals in a row make a spike; at most half of `window`.
        - `steps_before`: how many steps before the spike's beginning the checkpoint has to be at
          least. For PaLM it was about 100.
        - `max_rewinds`: the run fails at the first spike after so many rewinds.
        """
        _check_monitor(monitor)
        if action not in ("warn", "rewind"):
            raise ValueError(
                f'`LossSpike(action="{action}")` is not known. Write `action="warn"`, or '
                '`action="rewind"` to go back to the latest checkpoint before the spike.'
            )
        least = {"window": 3, "patience": 1, "steps_before": 0, "max_rewinds": 1}
        given = {
            "window": window,
            "patience": patience,
            "steps_before": steps_before,
            "max_rewinds": max_rewinds,
        }
        for name, value in given.items():
            if not isinstance(value, int) or value < least[name]:
                raise ValueError(
                    f"`LossSpike({name}={value!r})` has to be an integer of at least {least[name]}."
                )
        if patience > window // 2:
            raise ValueError(
                f"`LossSpike(window={window}, patience={patience})` would take a spike for the "
                "norm before it has lasted long enough. Write a `patience` of at most half of "
                f"`window`: `LossSpike(window={2 * patience}, patience={patience})`."
            )
        check_at_least("LossSpike", "deviations", deviations, 0)
        check_at_least("LossSpike", "min_rise", min_rise, 0)
        self.monitor = monitor
        self.action = action
        self.window = window
        self.deviations = deviations
        self.min_rise = min_rise
        self.patience = patience
        self.steps_before = steps_before
        self.max_rewinds = max_rewinds
        self._watches = False
        self._forget()

    def _forget(self) -> None:
        self.rewinds = 0
        self._values: deque[float] = deque(maxlen=self.window)
        """Finite values of the latest intervals."""
        self._lasts = 0
        """How many intervals in a row, up to the latest one, were above the threshold."""
        self._began = 0
        """The step before the first of them."""
        self._asked = False
        """Whether the latest rewind of the run, should one come, was asked for here."""

    @property
    def threshold(self) -> float | None:
        """Above which the next value is a spike's; `None` while there are too few to tell."""
        if len(self._values) < self.window:
            return None
        median = statistics.median(self._values)
        deviation = _NORMAL * statistics.median(abs(x - median) for x in self._values)
        return median + max(self.deviations * deviation, self.min_rise * abs(median))

    def monitors(self) -> Sequence[str]:
        return (self.monitor,)

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._watches = stage == "fit" and not trainer.fast_dev_run
        if self._watches:
            self._forget()
            if self.action == "rewind":
                _check_saves(trainer)

    def on_log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        if not self._watches or self.monitor not in metrics:
            return
        value = float(metrics[self.monitor])
        threshold = self.threshold
        high = not math.isfinite(value) or (threshold is not None and value > threshold)
        if math.isfinite(value):
            self._values.append(value)
        if not high:
            self._lasts = 0
            return
        start = step - trainer.log_every_n_steps
        self._began = start if self._lasts == 0 else self._began
        self._lasts += 1
        if self._lasts == self.patience:
            known = "" if threshold is None else f"; above {threshold:.6g} is a spike"
            message = (
                f"`{self.monitor}` = {value:.6g} in steps {start + 1} to {step}{known}. "
                f"It began after step {self._began}."
            )
            if self.action == "rewind":
                self._rewind(trainer, message)
            else:
                warn(message)

    def _rewind(self, trainer: Trainer, message: str) -> None:
        if self.rewinds >= self.max_rewinds:
            raise RuntimeError(
                f"A loss spike, after {self.rewinds} rewinds already: {message} It is not "
                "single batches that this run cannot bear. Lower the learning rate, or clip with "
                "`gradient_clip_val=1.0`; to go back more often, write "
                f"`LossSpike(max_rewinds={2 * self.max_rewinds})`."
            )
        self._asked = True
        trainer.rewind(max(self._began - self.steps_before, 0), message)

    # State

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}(monitor={self.monitor}, action={self.action})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "rewinds": self.rewinds,
            "values": list(self._values),
            "lasts": self._lasts,
            "began": self._began,
            "asked": self._asked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewinds = state["rewinds"]
        self._values = deque(state["values"], maxlen=self.window)
        self._lasts = state["lasts"]
        self._began = state["began"]
        self._asked = state["asked"]

    def take_back(self, state: dict[str, Any]) -> None:
        """Rewinds are no part of what is taken back, or there would be no end to them."""
        rewinds = self.rewinds + self._asked
        self.load_state_dict(state)
        self.rewinds, self._asked = rewinds, False


def _check_monitor(monitor: str) -> None:
    if not monitor.startswith("train/") or monitor.endswith("_epoch"):
        raise ValueError(
            f'`LossSpike(monitor="{monitor}")` has to be a metric of the training step, of which '
            'there is a value every log interval. Write one such as `monitor="train/loss"`.'
        )


def _check_saves(trainer: Trainer) -> None:
    """**Raises:** `ValueError` where there will be no checkpoint to go back to."""
    savers = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]
    weights_only = [c for c in savers if getattr(c, "save_weights_only", False)]
    if len(weights_only) < len(savers):
        return
    what = (
        f"`{type(weights_only[0]).__name__}` saves weights only"
        if weights_only
        else f"no callback saves any (`enable_checkpointing={trainer.enable_checkpointing}`)"
    )
    raise ValueError(
        f'`LossSpike(action="rewind")` goes back to checkpoints, but {what}. Add '
        "`ModelCheckpoint(every_n_train_steps=100, save_top_k=-1)` to `callbacks`, or write "
        '`LossSpike(action="warn")`.'
    )
