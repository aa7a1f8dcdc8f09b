"""Replay capsules: a folder with all that a step needs that failed, to run it again elsewhere.

It is a checkpoint like others, with the tree `{"state": ..., "steps": [[batch, ...], ...]}`: the
state before the step, and its batches (several under accumulation; several steps where a block
failed as one). What else there is to know is in its metadata, under `CAPSULE`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._batch_structure import structure_of
from ._callback import overrides
from ._checkpoint import CheckpointStore, find_checkpoints
from ._checkpoint_read import read_metadata
from ._configuration import FLAGS
from ._saver import checkpoint_folder
from ._state import Skipped, TrainState
from ._task import TaskModule
from ._whereabouts import StepBatches, is_readable, rows_of
from .data import DeviceBatch
from .data._epochs import has_batches, is_one_pass

if TYPE_CHECKING:
    from ._trainer import Trainer

CAPSULE = "capsule"
"""The metadata's key, by which a capsule is told from other checkpoints."""


class Suspect(NamedTuple):
    """Steps that are to be run again: one, or those of a block that failed as a whole."""

    before: int
    """The global step before the first of them."""
    batches: Sequence[StepBatches | None]
    """Of each step; `None` where nobody knows."""
    windows: Sequence[list[DeviceBatch]] | None = None
    """The batches themselves, where they are still at hand."""
    state: TrainState | None = None
    """The state before the first; `None` where it is gone."""


def failed_steps(trainer: Trainer) -> Suspect | None:
    """The steps of the dispatch that failed on the device, if one did. Waits for the device."""
    run = trainer._run
    if run is None or not run.leaves:
        return None
    at = run.position
    found = run.failed_ahead()
    if found is not None:
        before, end = found
        return Suspect(before, [_taken_at(trainer, step + 1) for step in range(before, end)])
    window = run.failed_window
    if window is None:
        return None
    size = 1 if run.takes_blocks else len(window)
    starts = range(0, len(window), size)
    batches = [
        StepBatches(at.step + 1 + i, at.epoch, at.batches + start, at.batches + start + size)
        for i, start in enumerate(starts)
    ]
    gone = any(leaf.is_deleted() for leaf in run.leaves)
    windows = [window[start : start + size] for start in starts]
    return Suspect(at.step, batches, windows, None if gone else run.state)


def _taken_at(trainer: Trainer, step: int) -> StepBatches | None:
    """The batches of one of the latest steps of this epoch, counted back from now."""
    at, usual = trainer._run.position, trainer._arguments.accumulate_grad_batches
    back = at.step - step
    stop = at.batches if back <= 0 else at.batches - at.window - (back - 1) * usual
    first = stop - (at.window if back == 0 else usual)
    if back < 0:  # dispatched, and not counted yet
        first, stop = at.batches, at.batches + usual
    return StepBatches(step, at.epoch, first, stop) if first >= 0 else None


class Unavailable(Exception):
    """A batch can't be had again; the message says why."""


def read_again(trainer: Trainer, batches: StepBatches | None) -> list[DeviceBatch]:
    """The batches of a step, from the loader, at once where it can be entered anywhere.

    **Raises:** `Unavailable`.
    """
    if batches is None:
        raise Unavailable("nobody knows which they were")
    feed = trainer._run.feed
    kind = f"a `{type(feed.loader).__name__}`"
    if not is_readable(trainer, batches):
        raise Unavailable("the `DataModule` has made a new loader since then")
    if is_one_pass(feed.loader):
        raise Unavailable(f"the loader is {kind}, which gives its batches once")
    enters = has_batches(feed.loader) or isinstance(feed.loader, list | tuple)
    start = batches.first if enters else 0
    with contextlib.closing(feed.epoch(batches.epoch, start)) as epoch:
        found = list(islice(epoch, batches.first - start, batches.stop - start))
    if len(found) < batches.stop - batches.first:
        raise Unavailable(f"the loader, {kind}, gives fewer this time")
    return found


def write_capsule(
    trainer: Trainer, folder: Path, suspect: Suspect, error: BaseException, refused: bool
) -> Path:
    """Writes a capsule into `folder`, and returns its path.

    **Arguments:**

    - `refused`: whether the step was refused as not finite. Batches that were read again are then
      tried: not every loader gives the same ones twice.
    """
    run = trainer._run
    found: dict[str, Any] = {"lost": None, "reproduced": None}
    tree: dict[str, PyTree] = {}
    windows = suspect.windows
    if windows is None:
        try:
            windows = [read_again(trainer, batches) for batches in suspect.batches]
        except Exception as reason:  # the loader may do anything
            windows = []
            found["lost"] = str(reason) if isinstance(reason, Unavailable) else repr(reason)
    state = suspect.state
    if state is not None:
        tree["state"] = state = _bare(state, suspect.before)
        if refused and windows:
            found["reproduced"] = _is_refused(trainer, state, windows[0])
    if windows:
        tree["steps"] = [[batch.batch for batch in window] for window in windows]
    found["structure"] = structure_of(windows[0][0].batch) if windows else None
    step = suspect.before + 1
    task = run.abstract_state().task if state is None else state.task
    metadata = {
        CAPSULE: {
            "step": step,
            "steps": [_where(trainer, batches) for batches in suspect.batches],
            "batch": found,
            "state": state is not None,
            "checkpoint": None if state is not None else _latest_checkpoint(trainer),
            "error": _error(error),
            "task": _task(task),
            "hyperparameters": task.hyperparameters(),
            **_configuration(trainer),
        }
    }
    with CheckpointStore(folder) as store:
        return store.save(step, tree, metadata, name=_new_name(folder, step), wait=True)


def _bare(state: TrainState, step: int) -> TrainState:
    """What a step needs of a state. Refused steps have changed nothing of it but its number."""
    number = jnp.asarray(step, state.step.dtype)
    return state.replace(step=number, metrics={}, skipped=None)


def _is_refused(trainer: Trainer, state: TrainState, window: list[DeviceBatch]) -> bool | None:
    """Whether the compiled step is refused again; `None` where there is no room to try."""
    counts, metrics = trainer.state.skipped, trainer.state.metrics
    fresh = None if counts is None else Skipped.none()
    try:
        _, outputs = trainer._run.tried(state.replace(metrics=metrics, skipped=fresh), window)
        return bool(outputs["skipped"] > 0)
    except Exception:
        return None


def _where(trainer: Trainer, batches: StepBatches | None) -> dict[str, Any] | None:
    if batches is None:
        return None
    return batches._asdict() | {"rows": rows_of(trainer, batches)}


def _latest_checkpoint(trainer: Trainer) -> str | None:
    with contextlib.suppress(Exception):  # of a save that failed, others tell
        trainer.wait_for_checkpoints()
    found = find_checkpoints(checkpoint_folder(trainer))
    return str(found[-1].path) if found else None


def _error(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__qualname__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _task(task: TaskModule) -> dict[str, Any]:
    """For people to read: nothing is imported because a file names it."""
    try:
        file = inspect.getsourcefile(type(task))
    except (OSError, TypeError):  # made at a prompt
        file = None
    return {
        "module": type(task).__module__,
        "name": type(task).__qualname__,
        "file": None if file is None else os.path.abspath(file),
    }


def _configuration(trainer: Trainer) -> dict[str, Any]:
    arguments = trainer._arguments
    total = trainer.estimated_stepping_batches
    # Those that the arguments above, and the task itself, will bring again need not be named.
    wraps = [c for c in trainer._given_callbacks if overrides(c, "wrap_optimizer")]
    if arguments.gradient_clip_val is not None:
        wraps = [c for c in wraps if type(c).__name__ != "GradientClipping"]
    return {
        "precision": trainer.precision.names(),
        "seed": arguments.seed,
        "accumulate_grad_batches": arguments.accumulate_grad_batches,
        "gradient_clip_val": arguments.gradient_clip_val,
        "gradient_clip_algorithm": arguments.gradient_clip_algorithm,
        "total_steps": None if total == float("inf") else int(total),
        "wrap_optimizer": [type(callback).__qualname__ for callback in wraps],
        "callbacks": [type(c).__qualname__ for c in trainer.callbacks],
        "devices": trainer.mesh.size,
        "platform": trainer.mesh.devices.flat[0].platform,
        "flags": {name: getattr(jax.config, name) for name in FLAGS},
        "argv": sys.argv,
    }


def _new_name(folder: Path, step: int) -> str:
    name = base = f"step_{step:010d}"
    version = 0
    while (folder / name).exists():
        version += 1
        name = f"{base}-v{version}"
    return name


def suggested_task(capsule: dict[str, Any]) -> str:
    """What to write for `--task`, quoted for a shell. A name that is none in Python, which
    whoever made the file may have thought of, is left open."""
    task = capsule["task"]
    module = task["module"] if _is_dotted(task["module"]) else "MODULE"
    if module == "__main__" and task["file"] is not None:
        near = os.path.relpath(task["file"])
        file = task["file"] if near.startswith("..") else near
        module = file if file.isprintable() else "FILE"
    name = task["name"] if _is_dotted(task["name"]) else "NAME"
    return shlex.quote(f"{module}:{'FUNCTION' if why_a_function(capsule) else name}")


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def why_a_function(capsule: dict[str, Any]) -> str:
    """Why the class alone is not enough to build the run; empty if it is."""
    if wraps := capsule["wrap_optimizer"]:
        return f"the optimizer is not the task's own, but changed by {_listed(wraps)}"
    if "<locals>" in capsule["task"]["name"]:
        return "the class is local to a function"
    return ""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def how_to_replay(path: Path) -> str:
    """What a capsule holds, and how to run it again."""
    capsule = read_metadata(path)[CAPSULE]
    batch = capsule["batch"]
    lines = [
        f"A replay capsule was written to `{path}`. To see in which operation it appears, run",
        f"    jaxlightning replay {shlex.quote(str(path))} --task {suggested_task(capsule)}",
    ]
    if why := why_a_function(capsule):
        lines.append(f"FUNCTION returns `(trainer, task)` as this run has them: {why}.")
    if not capsule["state"]:
        saved = capsule["checkpoint"]
        lines.append(
            "The state before the step is not in it: it had been given to the step, and is gone. "
            + (f"That of `{saved}` is used instead. " if saved else "")
            + "`Trainer(detect_anomaly=True)` keeps it."
        )
    if batch["lost"]:
        lines.append(f"Its batch is not in it: {batch['lost']}.")
    if batch["reproduced"] is False:
        lines.append(
            "The batch was read from the loader again, and the step is finite with it: the loader "
            "does not give the same batches twice."
        )
    return "\n".join(lines)
