"""When to save, and which checkpoints to keep."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlightning._callback import Checkpoint
from jaxlightning._checkpoint import check_writable
from jaxlightning._checkpoint_manifest import NAME

from ._announce import announce
from ._filename import FilenameTemplate
from ._monitored import badness, check_mode, monitored_value, of_validation
from ._timer import Duration, clock_says, parse_duration

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class ModelCheckpoint(Checkpoint):
    """Saves checkpoints, and keeps the best of them.

        best = ModelCheckpoint(monitor="val/accuracy", mode="max", save_top_k=3)
        Trainer(callbacks=[best]).fit(task, data)
        best.best_model_path

    **When.** Every so many epochs, steps or minutes; by default each epoch. What belongs to an
    epoch is saved after each validation, and at the end of an epoch in place of a validation
    there. A step's checkpoint is saved after its validation, if there is one. A metric of the
    validation belongs to the state that was validated: a checkpoint that falls due in between
    waits for the next validation.

    **What is kept.** The `save_top_k` best by `monitor`, or without a monitor the latest. A score
    that is not finite is worse than any other, is never the best, and takes no other's place. A
    checkpoint is deleted only after the one that takes its place has been committed.
    """

    dirpath: str | None
    """The folder of the checkpoints, known from `setup` on."""

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        *,
        monitor: str | None = None,
        mode: str = "min",
        verbose: bool = False,
        save_top_k: int = 1,
        save_last: bool = False,
        save_weights_only: bool = False,
        save_on_exception: bool = False,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: Duration | None = None,
        save_on_train_epoch_end: bool | None = None,
        auto_insert_metric_name: bool = True,
    ):
        """
        - `dirpath`: by default the folder `checkpoints` in the logger's folder, or else in
          `Trainer(default_root_dir=...)`.
        - `filename`: a template, by default `"{epoch}-{step}"`; metrics by name, as in
          `"{epoch}-{val/loss:.2f}"`. A name that is taken gets `-v1`, `-v2`, ...
        - `monitor`, `mode`: the metric to rank by, and whether `"min"` or `"max"` is best.
        - `save_top_k`: how many to keep; -1: all, 0: none but the last.
        - `save_last`: whether to keep the latest one as well, whatever its score, and to save
          one at the end of the fit. It is a checkpoint like the others: `last_model_path`.
        - `save_weights_only`: leave out what only a resume needs.
        - `save_on_exception`: whether to save when the fit ends in an exception.
        - `every_n_epochs`, `every_n_train_steps`, `train_time_interval`: at most one of them.
          The interval is `"DD:HH:MM:SS"`, a timedelta, or its arguments as a dict.
        - `save_on_train_epoch_end`: whether an epoch's checkpoint is saved at its end (`True`)
          or after each validation (`False`); by default as said above.
        - `auto_insert_metric_name`: whether `{epoch}` gives `epoch=3` rather than `3`.
        """
        check_mode("ModelCheckpoint", mode)
        _check_triggers(every_n_epochs, every_n_train_steps, train_time_interval)
        _check_top_k(save_top_k, monitor)
        interval = train_time_interval
        if every_n_train_steps is None and interval is None and every_n_epochs is None:
            every_n_epochs = 1
        self.monitor = monitor
        self.mode = mode
        self.verbose = verbose
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.save_weights_only = save_weights_only
        self.save_on_exception = save_on_exception
        self.every_n_epochs = every_n_epochs or 0
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = (
            None if interval is None else parse_duration(interval, "train_time_interval")
        )
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self._template = FilenameTemplate(filename or "{epoch}-{step}", auto_insert_metric_name)
        self._given_dirpath = None if dirpath is None else os.path.abspath(dirpath)
        self.dirpath = self._given_dirpath
        self._saves = False
        self._saved_time = time.monotonic()
        self._forget()

    def _forget(self) -> None:
        self._scores: dict[str, float | None] = {}
        """Names of the ranked checkpoints, oldest first, and their scores if finite."""
        self._last: str | None = None
        self._newest: str | None = None
        self._replaced: list[str] = []
        """Names of those whose place the newest one took, deleted as soon as that is committed."""
        self._undeleted: list[str] = []
        self._pending = False
        """Whether one has fallen due and waits for its score."""
        self._saved_at = 0
        self._validated_at: int | None = None

    # What is kept

    def _path(self, name: str | None) -> str:
        return "" if name is None else str(Path(self.dirpath or "") / name)

    def _exists(self, name: str) -> bool:
        return os.path.exists(self._path(name))

    @property
    def _best(self) -> str | None:
        if self.monitor is None:
            return next(reversed(self._scores), None)
        finite = [name for name, score in self._scores.items() if score is not None]
        return min(finite, key=self._badness, default=None)

    @property
    def _worst(self) -> str | None:
        if self.monitor is None:
            return next(iter(self._scores), None)
        # Of equal ones the latest: the best, of equal ones the first, is never the worst.
        return max(reversed(self._scores), key=self._badness, default=None)

    def _badness(self, name: str) -> float:
        return badness(self._scores[name], self.mode)

    @property
    def best_model_path(self) -> str:
        """The best checkpoint; without a monitor the latest; `""` if there is none."""
        return self._path(self._best)

    @property
    def best_model_score(self) -> float | None:
        return None if self._best is None else self._scores[self._best]

    @property
    def best_k_models(self) -> dict[str, float | None]:
        """The ranked checkpoints and their scores, `None` where that is not finite."""
        return {self._path(name): score for name, score in self._scores.items()}

    @property
    def kth_best_model_path(self) -> str:
        """The checkpoint that is the next to go; `""` if there is none."""
        return self._path(self._worst)

    @property
    def kth_value(self) -> float | None:
        return None if self._worst is None else self._scores[self._worst]

    @property
    def last_model_path(self) -> str:
        """The latest checkpoint, under `save_last`; `""` if there is none."""
        return self._path(self._last)

    # When

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._saves = stage == "fit" and not trainer.fast_dev_run
        root = trainer.log_dir or trainer.default_root_dir
        dirpath = self._given_dirpath or os.path.abspath(os.path.join(root, "checkpoints"))
        if self._saves or self.dirpath is None:
            self.dirpath = dirpath
        if self._saves:
            _check_writable(dirpath)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begins anew, or drops what a restored state lists but the disk does not have."""
        if trainer.global_step == 0:
            self._forget()
        self._drop_lost()

    def _drop_lost(self) -> None:
        lost = sorted(name for name in self._kept() if not self._exists(name))
        self._scores = {name: score for name, score in self._scores.items() if name not in lost}
        self._last = None if self._last in lost else self._last
        if lost:
            announce(f"Checkpoints are no longer in `{self.dirpath}`: {', '.join(lost)}.")

    def on_train_start(self, trainer: Trainer) -> None:
        self._saved_time = time.monotonic()

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._undeleted:
            trainer.wait_for_checkpoints()
            self._delete_replaced(trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        if self._saves and not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    def needs_state(self, step: int) -> bool:
        return self.every_n_train_steps > 0 and step % self.every_n_train_steps == 0

    def monitors(self) -> Sequence[str]:
        names = [name for name in self._template.fields if name not in ("epoch", "step")]
        return [*names, self.monitor] if self.monitor is not None else names

    def on_checkpoint(self, trainer: Trainer, point: str) -> None:
        step = trainer.global_step
        if self._undeleted:
            self._delete_replaced(trainer)
        if self._saved_at == step or not self._saves:
            return
        if point == "exception":
            if self.save_on_exception:
                self._save(trainer)
            return
        settled = self._settled(trainer, point)
        due = self._step_due(trainer, point) or (settled and self._epoch_due(trainer))
        self._pending |= due and self.save_top_k != 0
        if self._pending:
            value = self._value(trainer, point)
            # At the end, where nothing was ever validated, an unranked one is better than none.
            if value is not None or self.monitor is None or (point == "end" and not self._scores):
                self._pending = False
                self._offer(trainer, value)
        if self.save_last and (due or settled or point == "end") and self._saved_at != step:
            self._save(trainer)

    def _step_due(self, trainer: Trainer, point: str) -> bool:
        if point != "step":
            return False
        if self.train_time_interval is not None:
            spent = time.monotonic() - self._saved_time
            due = clock_says(trainer, spent >= self.train_time_interval.total_seconds())
            if due:
                self._saved_time = time.monotonic()
            return due
        return self.needs_state(trainer.global_step)

    def _settled(self, trainer: Trainer, point: str) -> bool:
        """Whether this is a point at which an epoch's checkpoint is saved."""
        if self.save_on_train_epoch_end or point != "step":
            return point == "epoch" and self.save_on_train_epoch_end is not False
        if self._validated_at != trainer.global_step:
            return False
        return self.save_on_train_epoch_end is False or not trainer.is_last_batch

    def _epoch_due(self, trainer: Trainer) -> bool:
        n = self.every_n_epochs
        return n > 0 and (trainer.current_epoch + 1) % n == 0

    def _value(self, trainer: Trainer, point: str) -> float | None:
        """The monitored value of the present state, or `None` while there is none."""
        if self.monitor is None:
            return None
        if of_validation(self.monitor) and self._validated_at != trainer.global_step:
            return None
        return monitored_value(trainer, self.monitor, epoch_end=point == "epoch")

    # How

    def _offer(self, trainer: Trainer, value: float | None) -> None:
        """Saves a checkpoint if it is among the best."""
        score = value if value is not None and math.isfinite(value) else None
        full = self.monitor is not None and 0 < self.save_top_k <= len(self._scores)
        if full and badness(score, self.mode) >= self._badness(self._worst or ""):
            self._say(trainer, f"`{self.monitor}` = {value} is not in the top {self.save_top_k}.")
            return
        self._save(trainer, ranked=True, score=score)

    def _kept(self) -> set[str]:
        return set(self._scores) | ({self._last} if self._last else set())

    def _save(self, trainer: Trainer, *, ranked: bool = False, score: float | None = None) -> None:
        # One save is under way at a time, so this costs nothing; it makes names reproducible.
        trainer.wait_for_checkpoints()
        self._delete_replaced(trainer)
        self._newest = name = self._new_name(trainer)
        before = self._kept()
        if ranked:
            if 0 < self.save_top_k <= len(self._scores):
                del self._scores[self._worst or ""]
            self._scores[name] = score
        if self.save_last:
            self._last = name
        self._replaced = sorted(before - self._kept())
        self._undeleted = list(self._replaced)
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self._path(name), weights_only=self.save_weights_only)
        known = "" if score is None else f"`{self.monitor}` = {score:.6g}; "
        self._say(trainer, f"{known}saving `{self._path(name)}`.")

    def _delete_replaced(self, trainer: Trainer) -> None:
        """Does so once the newest checkpoint has been committed, that is, has its name."""
        if self._exists(self._newest or ""):
            for name in filter(self._exists, self._undeleted):
                trainer.delete_checkpoint(self._path(name))
            self._undeleted = []

    def _new_name(self, trainer: Trainer) -> str:
        counters = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        name = base = self._template.format({**trainer.callback_metrics, **counters})
        # Those of other callbacks may still be on their way to the disk.
        others = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]
        taken = {c._path(n) for c in others for n in (*c._kept(), *c._undeleted)}
        version = 0
        while self._path(name) in taken or self._exists(name):
            version += 1
            name = f"{base}-v{version}"
        return name

    def _say(self, trainer: Trainer, message: str) -> None:
        if self.verbose:
            announce(f"Epoch {trainer.current_epoch}, step {trainer.global_step}: {message}")

    # State

    @property
    def state_key(self) -> str:
        interval = self.train_time_interval
        when = {
            "every_n_epochs": self.every_n_epochs or None,
            "every_n_train_steps": self.every_n_train_steps or None,
            "train_time_interval": None if interval is None else str(interval),
        }
        what = {"monitor": self.monitor, "mode": self.mode}
        given = [f"{k}={v}" for k, v in {**what, **when}.items() if v is not None]
        return f"{type(self).__qualname__}({', '.join(given)})"

    def state_dict(self) -> dict[str, Any]:
        # Names, not paths: a run's folder may be moved.
        return {
            "scores": list(self._scores.items()),
            "last": self._last,
            "newest": self._newest,
            "replaced": list(self._replaced),
            "pending": self._pending,
            "saved_at": self._saved_at,
            "validated_at": self._validated_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        named = [*dict(state["scores"]), state["last"], state["newest"], *state["replaced"]]
        for name in named:
            # What they name may be deleted, so they may not be paths to anywhere.
            if name is not None and not NAME.fullmatch(name):
                raise ValueError(
                    f"`{name}` is no name of a checkpoint, but the state of `ModelCheckpoint` "
                    "that is to be restored lists it. It was not written by `ModelCheckpoint`."
                )
        self._scores = dict(state["scores"])
        self._last = state["last"]
        self._newest = state["newest"]
        self._replaced = list(state["replaced"])
        self._undeleted = list(state["replaced"])
        self._pending = state["pending"]
        self._saved_at = state["saved_at"]
        self._validated_at = state["validated_at"]

    def take_back(self, state: dict[str, Any]) -> None:
        """Some that it lists may have been deleted since then."""
        self.load_state_dict(state)
        self._drop_lost()


def _check_triggers(
    epochs: int | None, steps: int | None, interval: datetime.timedelta | Any | None
) -> None:
    given = {
        "every_n_epochs": epochs,
        "every_n_train_steps": steps,
        "train_time_interval": interval,
    }
    several = [name for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise ValueError(
            f"`ModelCheckpoint` got {' and '.join(f'`{n}`' for n in several)}, but one callback "
            "saves by one clock. Write two: `callbacks=[ModelCheckpoint(every_n_epochs=1), "
            "ModelCheckpoint(every_n_train_steps=500)]`."
        )
    for name, value in (("every_n_epochs", epochs), ("every_n_train_steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` of `ModelCheckpoint` has to be at least 1, not {value}.")


def _check_top_k(save_top_k: int, monitor: str | None) -> None:
    if save_top_k < -1:
        raise ValueError(
            f"`save_top_k={save_top_k}` of `ModelCheckpoint` is not known. Write a number of "
            "checkpoints to keep, 0 for none, or -1 for all."
        )
    if monitor is None and save_top_k > 1:
        raise ValueError(
            f"`ModelCheckpoint(save_top_k={save_top_k})` has to know by what to rank. Write "
            f'`ModelCheckpoint(monitor="val/loss", save_top_k={save_top_k})`, or `save_top_k=-1` '
            "to keep all."
        )


def _check_writable(dirpath: str) -> None:
    """**Raises:** `OSError` if `dirpath` could not be made or written. Leaves nothing behind."""
    existing = Path(dirpath)
    while not os.path.lexists(existing):
        existing = existing.parent
    check_writable(existing)
