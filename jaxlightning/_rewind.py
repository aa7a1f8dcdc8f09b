"""Going back to a checkpoint in the middle of a run, and on with data that it has not seen.

The state is the checkpoint's, the data position that of now. So the batches in between are
skipped without a list of them, and a run that resumes from there skips them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ._checkpoint import CheckpointDamaged, Entry, find_checkpoints, read_by_all
from ._resume import resume_loggers
from ._saver import checkpoint_folder, checkpoint_folders, fixed_configuration
from ._say import say, warn
from ._sensible import known_metrics, position, sensible
from ._stream import MetricStream

if TYPE_CHECKING:
    from ._fit import FitRun
    from ._trainer import Trainer


def rewound(trainer: Trainer, run: FitRun, stream: MetricStream) -> bool:
    """Carries out what `Trainer.rewind` asked for; whether there was anything, and it could be.

    Afterwards the run is as if the checkpoint's step had been taken on the present batch, with all
    that a step causes still to come. At every moment of it a killed run goes on from a checkpoint
    that leads here: from one before the rewind, until that of the rewind has been committed.
    """
    if run.rewind_request is None:
        return False
    step, reason = run.rewind_request
    trainer.wait_for_checkpoints()
    found = _newest_intact(trainer, run, step)
    if found is None:
        run.rewind_request = None
        warn(
            f"{reason} To go back, a checkpoint of step {step} or before is needed, and this run "
            f"has none in {_listed(checkpoint_folders(trainer))}, so it goes on as it is. Save "
            "more often and keep older ones: "
            "`ModelCheckpoint(every_n_train_steps=100, save_top_k=-1)`.",
        )
        return False
    path, tree, metadata = found
    with sensible(path, ValueError):
        at, then = run.position, position(metadata["position"])
    skipped, undone = at.total_batches - then.total_batches, at.step - then.step
    # First of all: a resume must not prefer one of them to that of the rewind. And before the
    # callbacks' states are restored: what they list must not be there under a name used again.
    abandoned = _abandon(trainer, run, then.step)
    with sensible(path):
        _restore(trainer, run, stream, tree, metadata)
    run.rewind_request = None
    run.compile(trainer._signals.poll)  # it may reach further into an epoch than it would have
    trainer.save_checkpoint(_successor(trainer, path))
    trainer._save_requested()
    say(
        f"{reason} Went back {undone} steps to step {at.step}, `{path}`, and on after batch "
        f"{at.batches} of epoch {at.epoch}: {skipped} batches are skipped."
        + (f" Deleted, as they were taken in between: {_listed(abandoned)}." if abandoned else "")
    )
    return True


def _restore(
    trainer: Trainer, run: FitRun, stream: MetricStream, tree: PyTree, metadata: dict[str, Any]
) -> None:
    """All of the checkpoint but its place in the data.

    The stream is restored whole, so that every step that counts is part of one aggregate of an
    epoch: if the checkpoint is of an earlier epoch, what it had seen of that epoch and what is
    left of the present one are aggregated together.
    """
    bus = trainer._bus
    bus.on_load_checkpoint(trainer, metadata)
    bus.take_back(metadata["callbacks"])
    run.leaves = run.placed_leaves(jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    run.position.step = metadata["position"]["step"]
    run.position.phase = "stepped"
    stream.load_state_dict(metadata["stream"], run.metrics_like)
    resume_loggers(trainer, run.position.step, metadata.get("loggers", []))
    trainer.callback_metrics = known_metrics(metadata["metrics"])
    # Whoever still wants the run to stop says so again.
    trainer.should_stop, trainer.stop_reason, trainer._remembered_stop = False, None, None


def _newest_intact(
    trainer: Trainer, run: FitRun, step: int
) -> tuple[Path, PyTree, dict[str, Any]] | None:
    """The latest checkpoint of this run, as it is configured now, up to `step`."""
    fixed, home = fixed_configuration(trainer), checkpoint_folder(trainer)
    fitting = [
        entry
        for entry in _of_this_run(trainer, run)
        if entry.step <= step and entry.metadata.get("fixed") == fixed  # of weights only: none
    ]
    order = lambda entry: (entry.step, entry.path.parent == home, entry.serial)
    for entry in sorted(fitting, key=order, reverse=True):
        try:
            tree, metadata = read_by_all(entry.path, run.abstract_state())
        except CheckpointDamaged as error:
            warn(f"A damaged checkpoint is passed over: {error}")
        else:
            return entry.path, tree, metadata
    return None


def _of_this_run(trainer: Trainer, run: FitRun) -> Iterator[Entry]:
    """Its checkpoints, in all folders that its callbacks save to. Another run's may lie beside."""
    for folder in checkpoint_folders(trainer):
        for entry in find_checkpoints(folder):
            if entry.metadata.get("run") == run.id:
                yield entry


def _abandon(trainer: Trainer, run: FitRun, step: int) -> list[Path]:
    """Deletes the checkpoints of what is undone."""
    undone = [entry.path for entry in _of_this_run(trainer, run) if entry.step > step]
    for path in undone:
        trainer._saver.delete_now(path)
    return undone


def _successor(trainer: Trainer, path: Path) -> Path:
    """Where the rewound run is saved: in place of the checkpoint it went back to, which nobody
    should go on from any more and whose name the callbacks know; or, if that is not where a
    resume looks, there."""
    home = checkpoint_folder(trainer)
    return path if path.parent == home else home / f"rewound-step_{trainer.global_step:010d}"


def _listed(paths: list[Path]) -> str:
    return ", ".join(f"`{path}`" for path in paths)
