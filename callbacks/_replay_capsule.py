"""Keeps what a failed step needs, so that it can be run again and looked into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlightning._callback import Callback, Checkpoint
from jaxlightning._endings import note
from jaxlightning.parallel import _processes as processes

from ._non_finite import NonFiniteSteps

if TYPE_CHECKING:
    from jaxlightning._capsule import Suspect
    from jaxlightning._trainer import Trainer


class ReplayCapsule(Callback):
    """Writes a folder with all that the step needs in which a fit fails: the state before it, its
    batch, its randomness and the configuration.

        jaxlightning replay FOLDER --task train.py:Classifier

    runs that step again, operation by operation, and says in which of them, and in which line of
    yours, NaN first appears or an error is raised. The failure itself goes on as it would have.

    - **A loss or gradient that is NaN or infinite** ends the run, with the state before that step:
      nothing is taken from it on until the host hears of it, one log interval late. Nobody waits
      for the device. The batch is then read from the loader again; of a loader that gives its
      batches once it is lost. Together with `SkipNonFinite(max_in_a_row)` that one says when the
      run ends, and the capsule holds the first step of the last streak.
    - **An error in the step**, of a host callback, `eqx.error_if` or the device: the state before
      had been given to the step, and is gone. The capsule names the latest checkpoint in its place,
      unless the run has `detect_anomaly=True`, which keeps the state. A task that owns its update
      is watched for NaN by `detect_anomaly=True` only.
    - An error while the step is traced is none of the step's, and leaves no capsule.

    **Arguments:**

    - `dirpath`: where capsules go, by default the folder `capsules` in the logger's folder, or else
      in `Trainer(default_root_dir=...)`. None is ever replaced.
    """

    path: str | None
    """The capsule that the latest fit left; `None` if it left none."""

    def __init__(self, dirpath: str | os.PathLike[str] | None = None):
        self._given_dirpath = None if dirpath is None else os.path.abspath(dirpath)
        self.path = None
        self._writes = False

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._writes = stage == "fit" and not trainer.fast_dev_run
        self.path = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """**Raises:** `ValueError` where a resume would take a capsule for a checkpoint, and in a
        job of several processes."""
        if processes.count() > 1:
            raise ValueError(
                "`ReplayCapsule` keeps the state and batch of a run of one process, and this job "
                f"has {processes.count()}. Take it out; `SkipNonFinite` names the batches."
            )
        for callback in trainer.callbacks:
            taken = getattr(callback, "dirpath", None)
            if isinstance(callback, Checkpoint) and taken == str(self._folder(trainer)):
                raise ValueError(
                    f"`ReplayCapsule(dirpath={taken!r})` is the folder of "
                    f"`{type(callback).__name__}`, where a resumed run looks for checkpoints. "
                    "Write another one, or none."
                )

    def _folder(self, trainer: Trainer) -> Path:
        root = trainer.log_dir or trainer.default_root_dir
        return Path(self._given_dirpath or os.path.join(root, "capsules")).absolute()

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        if not self._writes or not isinstance(exception, Exception):
            return
        try:
            suspect = _suspect(trainer, exception)
            if suspect is not None:
                self._write(trainer, suspect, exception)
        except Exception as second:
            note(exception, second)

    def _write(self, trainer: Trainer, suspect: Suspect, exception: Exception) -> None:
        from jaxlightning._capsule import how_to_replay, write_capsule

        refused = isinstance(exception, NonFiniteSteps)
        path = write_capsule(trainer, self._folder(trainer), suspect, exception, refused)
        self.path = str(path)
        exception.add_note(how_to_replay(path))


def _suspect(trainer: Trainer, exception: Exception) -> Suspect | None:
    from jaxlightning._capsule import Suspect, failed_steps

    if isinstance(exception, NonFiniteSteps):
        return Suspect(exception.first - 1, [exception.batches], state=trainer.state)
    return failed_steps(trainer)
