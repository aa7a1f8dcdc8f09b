"""A progress bar that neither waits for the device nor slows the loop down."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import jax
from jaxtyping import PyTree

from jaxlightning._callback import Callback
from jaxlightning._say import may_be_lost

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

_REDRAW_S = 0.1
_LINE_S = 10.0
_COUNTED = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class TQDMProgressBar(Callback):
    """Shows the epoch, the step and the metrics delivered last; evaluations have their own bar.

    A step costs a look at the clock: the bar is redrawn ten times a second at most. Nothing is
    read from the device, so the metrics are those of the last log interval that was delivered.
    Where stderr is no terminal, a plain line is written every ten seconds.

    **Arguments:**

    - `refresh_rate`: redraw after every so many batches at most; 0 shows nothing.
    - `leave`: whether the bar of each epoch stays on the screen. The last one always does.
    - `metrics`: the names of the metrics to show; by default two of `train/` and two of
      `val/`, losses first.
    - `whole`: one bar for the whole fit, in steps, in place of one an epoch.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        metrics: Sequence[str] | None = None,
        whole: bool = False,
    ):
        if not isinstance(refresh_rate, int) or refresh_rate < 0:
            raise ValueError(
                f"`TQDMProgressBar(refresh_rate={refresh_rate!r})` has to be an integer of at "
                "least 0: redraw after every so many batches, or 0 for nothing."
            )
        self.refresh_rate = refresh_rate
        self.leave = leave
        self.metrics = metrics
        self.whole = whole
        self._notice: _Bar = _Hidden()
        self._train: _Bar = _Hidden()
        self._evaluation: _Bar = _Hidden()
        self._train_due = self._evaluation_due = math.inf
        self._done = self._evaluated = 0

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._close()
        if stage == "fit":
            self._notice = self._open("Compiling the steps", None, counts=False)

    def teardown(self, trainer: Trainer, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        self._close()

    # Training

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if self.whole:
            if isinstance(self._train, _Hidden):
                total = _known([trainer.estimated_stepping_batches])
                self._done = before = trainer.global_step
                self._train = self._open("Training", total, leave=True, before=before)
                self._train_due = self._first_due()
            return
        epoch, last = trainer.current_epoch, trainer.max_epochs
        title = f"Epoch {epoch}" if last in (None, -1) else f"Epoch {epoch}/{last - 1}"
        total = _known([trainer.num_training_batches])
        if self.leave or isinstance(self._train, _Hidden):
            self._train.close()
            self._train = self._open(title, total, leave=True)
        else:
            self._train.restart(title, total)
        self._train_due = self._first_due()

    def on_train_batch_end(
        self, trainer: Trainer, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        self._done = trainer.global_step if self.whole else batch_idx + 1
        if monotonic() < self._train_due or self._done % self.refresh_rate:
            return
        self._draw(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._draw(trainer)
        self._close()

    def _draw(self, trainer: Trainer) -> None:
        self._notice.close()
        known = trainer.progress_bar_metrics
        names = _first(known) if self.metrics is None else [m for m in self.metrics if m in known]
        values = [f"{name} {known[name]:.4g}" for name in names]
        count = [] if self.whole else [f"step {trainer.global_step}"]
        self._train.show(self._done, ", ".join([*count, *values]))
        self._train_due = monotonic() + _REDRAW_S

    # Evaluation

    def on_validation_start(self, trainer: Trainer) -> None:
        title = "Sanity check" if trainer.sanity_checking else "Validation"
        self._open_evaluation(title, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer) -> None:
        self._open_evaluation("Test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer) -> None:
        self._open_evaluation("Prediction", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._count()

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._count()

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._count()

    def on_validation_end(self, trainer: Trainer) -> None:
        self._close_evaluation()

    def on_test_end(self, trainer: Trainer) -> None:
        self._close_evaluation()

    def on_predict_end(self, trainer: Trainer) -> None:
        self._close_evaluation()

    def _open_evaluation(self, title: str, batches: Sequence[int | float | None]) -> None:
        during_fit = not isinstance(self._train, _Hidden)
        self._notice.close()
        self._evaluated = 0
        self._evaluation = self._open(title, _known(batches), leave=False, below=during_fit)
        self._evaluation_due = self._first_due()

    def _count(self) -> None:
        self._evaluated += 1
        if monotonic() < self._evaluation_due or self._evaluated % self.refresh_rate:
            return
        self._evaluation.show(self._evaluated, "")
        self._evaluation_due = monotonic() + _REDRAW_S

    def _close_evaluation(self) -> None:
        self._evaluation.show(self._evaluated, "")
        self._evaluation.close()

    # Bars

    def _open(self, title: str, total: int | None, **how: Any) -> _Bar:
        if not self._shown():
            return _Hidden()
        return _Terminal(title, total, **how) if _interactive() else _Lines(title, total, **how)

    def _shown(self) -> bool:
        return self.refresh_rate > 0 and jax.process_index() == 0

    def _first_due(self) -> float:
        return 0.0 if self._shown() else math.inf

    def _close(self) -> None:
        for bar in (self._notice, self._evaluation, self._train):
            bar.close()
        self._notice = self._evaluation = self._train = _Hidden()
        self._train_due = self._evaluation_due = math.inf


def _first(names: Iterable[str], most: int = 2) -> list[str]:
    """The first names of each stage, losses before all others."""
    found = []
    for stage in ("train/", "val/"):
        mine = [name for name in names if name.startswith(stage)]
        found += sorted(mine, key=lambda name: not name.endswith("/loss"))[:most]
    return found


def _known(batches: Sequence[int | float | None]) -> int | None:
    """The number of batches of all loaders; `None` where nobody knows."""
    counts = [math.inf if count is None else count for count in batches]
    return int(sum(counts)) if math.isfinite(sum(counts)) else None


def _interactive() -> bool:
    """Whether what is written to stderr can be overwritten: on terminals and in notebooks."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Bar(Protocol):
    def show(self, done: int, text: str) -> None: ...
    def restart(self, title: str, total: int | None) -> None: ...
    def close(self) -> None: ...


class _Hidden:
    def show(self, done: int, text: str) -> None: ...
    def restart(self, title: str, total: int | None) -> None: ...
    def close(self) -> None: ...


class _Terminal:
    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        leave: bool = False,
        below: bool = False,
        counts: bool = True,
        before: int = 0,
    ):
        from tqdm import tqdm

        self._bar = tqdm(
            desc=title,
            total=total,
            initial=before,
            leave=leave,
            position=1 if below else 0,
            bar_format=None if counts else "{desc} ...",
            file=sys.stderr,
            dynamic_ncols=True,
            # We decide when to redraw: each update does.
            mininterval=0,
            miniters=0,
        )

    def show(self, done: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def restart(self, title: str, total: int | None) -> None:
        self._bar.set_description_str(title, refresh=False)
        self._bar.total = total
        self._bar.reset()

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """For log files: a line at most every ten seconds, and one at the end of what stays."""

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        leave: bool = False,
        below: bool = False,
        counts: bool = True,
        before: int = 0,
    ):
        self._leave = leave
        self._before = before
        self._line = ""
        self.restart(title, total)
        self._written = monotonic()
        if not counts:
            self._print(f"{title} ...")

    def restart(self, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._started = monotonic()

    def show(self, done: int, text: str) -> None:
        from tqdm import tqdm

        now = monotonic()
        self._line = tqdm.format_meter(
            done,
            self._total,
            now - self._started,
            prefix=self._title,
            initial=self._before,
            postfix=text,
            bar_format=_COUNTED,
        )
        if now - self._written >= _LINE_S:
            self._write()

    def close(self) -> None:
        if self._leave and self._line:
            self._write()

    def _write(self) -> None:
        self._print(self._line)
        self._written = monotonic()
        self._line = ""

    def _print(self, line: str) -> None:
        with may_be_lost:
            print(line, file=sys.stderr, flush=True)
