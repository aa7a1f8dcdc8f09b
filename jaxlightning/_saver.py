"""Saving a run: what its checkpoints hold, when they are taken, and where they go."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from ._callback import Checkpoint
from ._checkpoint import CheckpointStore, Entry, SaveFailed, find_checkpoints
from ._checkpoint_manifest import plain
from ._configuration import DECIDING_FLAGS, ROUNDING_FLAGS
from ._endings import run_all
from ._say import say
from ._signals import Interrupted
from .data._iterator_state import encode_state
from .parallel import _processes as processes

if TYPE_CHECKING:
    from ._fit import FitRun
    from ._trainer import Trainer

_INTERRUPTED = "interrupted-step_"


class Saver:
    """Takes checkpoints of a run at its settled points, so that what they hold is consistent."""

    def __init__(self) -> None:
        self._stores: dict[Path, CheckpointStore] = {}
        self._requests: list[tuple[Path, bool]] = []
        self._deletions: list[Path] = []
        self._interrupted: list[Path] = []
        self._before_commit: list[Callable[[], Any]] = []
        self._latest: tuple[Path, Any] | None = None

    def request(self, path: str | os.PathLike[str], weights_only: bool) -> None:
        self._requests.append((Path(path).absolute(), weights_only))

    def before_commit(self, call: Callable[[], Any]) -> None:
        """For `on_save_checkpoint`: to be called, on another thread, before the checkpoint that is
        being taken is committed, which it is not if that raises."""
        self._before_commit.append(call)

    @property
    def asked(self) -> bool:
        return bool(self._requests)

    def save(self, trainer: Trainer) -> None:
        """Saves all that was asked for. Waits for the copy to the host only."""
        requests, self._requests = self._requests, []
        for path, weights_only in requests:
            state = trainer.state
            tree: PyTree = state
            if weights_only:  # what is evaluated: without the optimizer's state, averages are lost
                tree = {"task": trainer._bus.evaluation_task(trainer, state.task)}
            metadata = checkpoint_metadata(trainer, path, weights_only)
            store = self._store(path.parent)
            if not weights_only:
                for logger in trainer.loggers:
                    self.before_commit(logger.begin_save())
            calls, self._before_commit = self._before_commit, []
            store.save(trainer.global_step, tree, metadata, path.name, before_commit=calls)
            if not weights_only:
                self._supersede(store, path)
                self._latest = (path, _place(trainer._run))
        deletions, self._deletions = self._deletions, []
        for path in deletions:
            self._store(path.parent).delete(path)

    def holds(self, run: FitRun, folder: Path) -> Path | None:
        """The latest checkpoint, if it is in `folder`, the run is still where it was taken, and it
        is on the disk. To be asked after `wait`."""
        if self._latest is None:
            return None
        path, place = self._latest
        held = path.parent == folder and place == _place(run)
        return path if held and path.exists() else None

    def goes_on_from(self, path: Path, run: FitRun) -> None:
        """What signals left beside it up to its step is to be deleted with the next checkpoint."""
        self._latest = (path, _place(run))
        left, step = find_checkpoints(path.parent), run.position.step
        self._interrupted = [
            entry.path
            for entry in left
            if entry.path.name.startswith(_INTERRUPTED) and entry.step <= step
        ]

    def _supersede(self, store: CheckpointStore, by: Path) -> None:
        found = [path for path in self._interrupted if path.parent == by.parent and path != by]
        for path in filter(Path.exists, found):
            store.delete(path)  # only once the one under way is committed
        self._interrupted = [path for path in self._interrupted if path not in found]

    def save_now(self, trainer: Trainer) -> None:
        """As `save`, and waits until all is on the disk."""
        try:
            self.save(trainer)
        finally:
            self.close()

    def reserve(self, folder: Path) -> None:
        """Takes the lock of a folder of checkpoints until the end of the fit."""
        self._store(folder)

    def _store(self, root: Path) -> CheckpointStore:
        if root not in self._stores:
            self._stores[root] = CheckpointStore(root)
        return self._stores[root]

    def wait(self) -> None:
        """Returns when all checkpoints are on the disk.

        **Raises:** the first failure, once nothing is under way any more: the next save works.
        """
        failures = []
        for store in self._stores.values():
            try:
                store.wait()
            except SaveFailed as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def delete(self, path: str | os.PathLike[str]) -> None:
        """Deletes a checkpoint; while others are asked for, only after these are on the disk."""
        path = Path(path).absolute()
        if self._requests:
            self._deletions.append(path)
        else:
            self.delete_now(path)

    def delete_now(self, path: Path) -> None:
        """Deletes a checkpoint, while none is under way."""
        self._store(path.parent).delete(path)

    def abandon(self) -> None:
        """Gives up what is under way, so that nobody waits for it."""
        for store in self._stores.values():
            store.abandon()

    def close(self) -> None:
        """Waits, and lets go of the folders, and of what was asked for too late."""
        self._requests, self._deletions, self._latest = [], [], None
        stores, self._stores = self._stores, {}
        errors: list[BaseException] = []
        for store in stores.values():
            try:
                store.close()
            except BaseException as error:
                errors.append(error)
                if isinstance(error, KeyboardInterrupt):  # nobody is to wait for the others either
                    for other in stores.values():
                        other.abandon()
        if errors:
            raise errors[0]


def _place(run: FitRun) -> Any:
    """Where a run is, as far as a checkpoint that is taken there tells."""
    return (run.position.after_end(), run.rewind_request)


def checkpoint_metadata(trainer: Trainer, path: Path, weights_only: bool) -> dict[str, Any]:
    """All of a run that is not in its state, as JSON values, for a checkpoint at `path`."""
    run, stream = trainer._run, trainer._stream
    task = run.state.task
    found: dict[str, Any] = {
        "task": type(task).__qualname__,
        "hyperparameters": task.hyperparameters(),
        "position": dataclasses.asdict(run.position),
        "run": run.id,
    }
    if weights_only:
        return found
    callbacks = trainer._callback_states
    found |= {
        "stream": stream.state_dict(),
        "metrics": {k: np.asarray(v).tolist() for k, v in trainer.callback_metrics.items()},
        "callbacks": trainer._bus.state_dict() if callbacks is None else callbacks,
        "data": trainer._sources.module.state_dict(),
        "loaders": trainer._asked,
        "iterator": encode_state(run.data_state),
        "rewind": run.rewind_request,
        "stop": trainer._remembered_stop,
        "loggers": [_described(logger, path) for logger in trainer.loggers],
        "fixed": fixed_configuration(trainer),
        "environment": environment(trainer),
    }
    trainer._bus.on_save_checkpoint(trainer, found)
    return found


def _described(logger: Any, path: Path) -> dict[str, Any]:
    folder = logger.log_dir
    return {
        "kind": type(logger).__qualname__,
        "state": logger.state_dict(),
        # Relative, so that a run's folder may be moved.
        "log_dir": None if folder is None else os.path.relpath(folder, path),
    }


def goes_on(entry: Entry) -> bool:
    """Whether a run can go on from a checkpoint: it does not hold weights only."""
    return "stream" in entry.metadata


def fixed_configuration(trainer: Trainer) -> dict[str, Any]:
    """What has to be equal for a resumed run to be the same run."""
    found = {
        "seed": trainer.seed,
        "precision": trainer.precision.names(),
        **{name: getattr(jax.config, name) for name in DECIDING_FLAGS},
        **{name: getattr(trainer, name) for name in _FIXED},
        **trainer._run.configuration,
        "train data": trainer._run.feed.fingerprint(),
        "validation data": {k: feed.fingerprint() for k, feed in trainer._val_feeds.items()},
    }
    return plain(found)  # as it comes back from JSON


def environment(trainer: Trainer) -> dict[str, Any]:
    """What a run computes the same with, but for rounding: it may go on elsewhere."""
    return {
        "platform": trainer.mesh.devices.flat[0].platform,
        "mesh": dict(trainer.mesh.shape),
        "deterministic": trainer._arguments.deterministic,
        **{name: getattr(jax.config, name) for name in ROUNDING_FLAGS},
    }


_FIXED = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "steps_per_dispatch",
    "val_check_interval",
)
"""Arguments of the Trainer on which the results of a run, or its decisions, depend."""


# Where


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where checkpoints of this trainer go unless they are given a path."""
    callback = trainer.checkpoint_callback
    dirpath = getattr(callback, "dirpath", None)
    root = trainer.log_dir or trainer.default_root_dir
    return Path(dirpath or os.path.join(root, "checkpoints")).absolute()


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """That one, and those that other callbacks save to."""
    saving = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]
    given = {Path(path).absolute() for c in saving if (path := getattr(c, "dirpath", None))}
    return sorted(given | {checkpoint_folder(trainer)})


def reserve(trainer: Trainer, make: bool) -> None:
    """Refuses a second run in a folder of checkpoints: at once, with the pid of the first, and
    before it touches what that has logged. With `make` also where there is no folder yet."""
    if not trainer._arguments.enable_checkpointing or trainer.fast_dev_run:
        return
    for folder in checkpoint_folders(trainer):
        if make or folder.is_dir():
            trainer._saver.reserve(folder)


def save_interrupted(trainer: Trainer, stop: Interrupted, checkpoint: Any) -> None:
    """Saves where a signal stopped the run, and says how to go on; `checkpoint` is what it went on
    from, if it did."""
    if trainer._stage_entry != "fit":
        return
    if not trainer._signals.deferring:
        say(f"{stop}: no step was taken, so there was nothing to save.")
        return
    step = trainer.global_step
    if not trainer._arguments.enable_checkpointing:
        stop.goes_on = False
        say(f"{stop} at step {step}. Nothing was saved: `enable_checkpointing=False`.")
        return
    # A save that failed before must not keep this one, the last, from being tried.
    saves: list[Callable[[], Any]] = [
        trainer._saver.wait,
        partial(_save_here, trainer, stop, checkpoint),
    ]
    failure = run_all(_until_stopped(trainer, saves), None)
    if isinstance(failure, Exception) and not isinstance(failure, SaveFailed):
        raise SaveFailed(f"{stop}: step {step} could not be saved ({failure}).") from failure
    if failure is not None:
        raise failure


def _save_here(trainer: Trainer, stop: Interrupted, checkpoint: Any) -> None:
    step, folder, saver = trainer.global_step, checkpoint_folder(trainer), trainer._saver
    path = saver.holds(trainer._run, folder)
    if path is None:
        path = folder / f"{_INTERRUPTED}{step:010d}"
        saver.request(path, False)
    saver.save(trainer)
    saver.wait()
    how = "The same command goes on from there."
    if checkpoint not in ("auto", "last"):
        how = (
            'To go on, run the same command with `fit(..., resume="auto")` or '
            f"`fit(..., ckpt_path={str(path)!r})`."
        )
    say(f"{stop}: saved step {step} to `{path}`. {how}")


def exception_saves(trainer: Trainer) -> list[Callable[[], Any]]:
    """What saves what callbacks want to have of a fit that failed, whatever else failed."""
    signals, saver = trainer._signals, trainer._saver
    if processes.count() > 1:  # The others know nothing of it, and saving takes all of them.
        return []
    if trainer._stage_entry != "fit" or not signals.deferring or signals.stopped_at_once:
        return []
    asks = partial(trainer._bus.on_checkpoint, trainer, "exception")
    return _until_stopped(trainer, [saver.wait, asks, partial(saver.save, trainer)])


def _until_stopped(trainer: Trainer, calls: Iterable[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """These calls, of which none does anything after a second SIGINT."""

    def unless_stopped(call: Callable[[], Any]) -> None:
        if not trainer._signals.stopped_at_once:
            call()

    return [partial(unless_stopped, call) for call in calls]
