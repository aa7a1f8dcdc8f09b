"""Going on with a run: which checkpoint to take, whether it fits, and how it is put back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ._checkpoint import (
    Entry,
    find_checkpoints,
    latest_checkpoint,
    read_by_all,
    restore_latest,
)
from ._checkpoint_manifest import typed
from ._checkpoint_manifest import versions as package_versions
from ._checkpoint_read import read_manifest, read_metadata
from ._configuration import differences
from ._saver import checkpoint_folder, checkpoint_folders, environment, fixed_configuration, goes_on
from ._say import say, warn
from ._sensible import known_metrics, position, rewind_request, sensible
from ._stream import MetricStream
from .data._iterator_state import decode_state

if TYPE_CHECKING:
    from ._fit import FitRun
    from ._trainer import Trainer


def check_asked(ckpt_path: Any, resume: str | None, allow_changes: bool) -> None:
    """**Raises:** `ValueError` for arguments of `fit` that are unknown or contradict each other."""
    if resume not in (None, "auto"):
        raise ValueError(f'`resume={resume!r}` is unknown. Write "auto", or `ckpt_path=`.')
    if ckpt_path == "auto":
        raise ValueError('`ckpt_path="auto"` is unknown. Write `resume="auto"`.')
    if resume is not None and ckpt_path is not None:
        raise ValueError("`resume` and `ckpt_path` contradict each other. Write one of them.")
    if allow_changes and resume is None and ckpt_path is None:
        raise ValueError(
            "`allow_changes=True` is about a checkpoint to go on from, and this fit starts anew. "
            'Add `resume="auto"` or `ckpt_path=`, or leave it out.'
        )


def latest_of_run(trainer: Trainer) -> tuple[Path, Callable[[Entry], bool]]:
    """The folder that has the latest checkpoint of the run, and which of those in it a run can go
    on from: of several runs that saved there, the one that saved last has them."""
    folders = checkpoint_folders(trainer)
    found = {folder: list(filter(goes_on, find_checkpoints(folder))) for folder in folders}
    newest = [max(x, key=lambda entry: entry.serial) for x in found.values() if x][:1]
    if not newest:
        return folders[0], goes_on
    run = newest[0].metadata.get("run")

    def of_run(entry: Entry) -> bool:
        return goes_on(entry) and entry.metadata.get("run") == run

    def highest(folder: Path) -> int:
        return max((entry.step for entry in filter(of_run, found[folder])), default=-1)

    return max(folders, key=highest), of_run


def resolve(trainer: Trainer, ckpt_path: str | os.PathLike[str], to_go_on: bool = False) -> Path:
    """The path that `"last"`, `"best"` or a path stands for; `to_go_on`: for a run to go on from.

    **Raises:** `FileNotFoundError` where there is no such checkpoint.
    """
    folder, among = checkpoint_folder(trainer), lambda entry: True
    begins = ' To begin where there is none, write `resume="auto"`.' if to_go_on else ""
    if to_go_on and ckpt_path == "last":
        folder, among = latest_of_run(trainer)
    if ckpt_path not in ("last", "best"):
        path = Path(ckpt_path).absolute()
        if not path.exists():
            near = [entry.path for entry in find_checkpoints(path.parent)]
            hint = f" That folder has {', '.join(p.name for p in near)}." if near else ""
            raise FileNotFoundError(
                f"`ckpt_path={str(ckpt_path)!r}` does not exist.{hint} Write the path of a "
                f'checkpoint, "last" or "best".{begins}'
            )
        return path
    trainer.wait_for_checkpoints()
    latest = latest_checkpoint(folder, among) if ckpt_path == "last" else None
    if latest is not None:
        return latest.path
    entries = find_checkpoints(folder)
    if not entries:
        raise FileNotFoundError(
            f'`ckpt_path="{ckpt_path}"`: there is no checkpoint in `{folder}`. Write the path of '
            f"one.{begins}"
        )
    if ckpt_path == "last":
        return entries[-1].path  # of weights only, which is said when it is looked into
    callback = trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "")
    if not best and callback is not None:
        for entry in reversed(entries):
            with sensible(entry.path):
                state = read_metadata(entry.path).get("callbacks", {}).get(callback.state_key)
                if state is not None:
                    callback.load_state_dict(state)
                    best = callback.best_model_path
                    break
    if not best:
        raise FileNotFoundError(
            '`ckpt_path="best"`: no `ModelCheckpoint` with a `monitor` has saved anything in '
            f'`{folder}`. Write `ckpt_path="last"`, or a path.'
        )
    return Path(best)


def go_back(trainer: Trainer, ckpt_path: Any) -> Path | None:
    """Finds the checkpoint to go on from, `"auto"`: the latest one, if any, and brings the data
    module to where its loaders were asked for, which is before a run can be built."""
    if ckpt_path != "auto":
        path = resolve(trainer, ckpt_path, to_go_on=True)
        _go_back_to(trainer, path, read_metadata(path))
        return path
    folder, among = latest_of_run(trainer)
    entries = find_checkpoints(folder)
    # If there are weights only, that is an error: to begin anew would not be what was asked for.
    for entry in [*filter(among, entries)][-1:] or entries[-1:]:
        _go_back_to(trainer, entry.path, entry.metadata)
        return entry.path
    return None


def _go_back_to(trainer: Trainer, path: Path, metadata: Mapping[str, Any]) -> None:
    refuse_weights_only(path, metadata)
    with sensible(path, ValueError):
        asked = metadata["loaders"]
        trainer._position.__dict__.update(position(asked["position"]).__dict__)
    with sensible(path):
        trainer._sources.module.load_state_dict(typed(asked["data"], dict))


_OPTIONAL = ("opt_state", "metrics", "loss_scale", "skipped")
"""What of a state begins anew where it does not fit any more, if changes are allowed."""


def _check_unchanged(trainer: Trainer, path: Path, allow_changes: bool) -> None:
    """**Raises:** `ValueError` that lists all that was changed since the checkpoint, unless that is
    allowed: then it is warned of, as other versions of packages and other devices are."""
    manifest = read_manifest(path)
    with sensible(path):
        changed = differences(manifest.metadata["fixed"], fixed_configuration(trainer))
        elsewhere = differences(manifest.metadata["environment"], environment(trainer))
        elsewhere += differences(manifest.versions, package_versions())
    if changed and not allow_changes:
        scheduled = any("LearningRateSchedule" in line for line in changed)
        raise ValueError(
            f"The run was changed since the checkpoint `{path}`, so going on from it would not be "
            f"the same run:{_listed(changed + elsewhere)}\nUndo the changes; or go on in spite of "
            "them, `fit(..., allow_changes=True)`; or start a new run with parts of the old one, "
            "`warm_start(path, task)`."
            + " (A schedule over the whole run is another one where the run is longer, unless it "
            "has its own length: `LearningRateSchedule(..., total_steps=)`.)" * scheduled
        )
    if changed or elsewhere:
        warn(
            f"The run goes on from `{path}`, but not bit for bit as it would have gone on then:"
            f"{_listed(changed + elsewhere)}",
        )


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def restore(
    trainer: Trainer,
    run: FitRun,
    stream: MetricStream,
    ckpt_path: Any,
    path: Path | None,
    allow_changes: bool,
) -> Path | None:
    """Brings a run to where the checkpoint was taken that `go_back` found; for `"auto"` to an
    earlier one if that is damaged."""
    like, optional = run.abstract_state(), _OPTIONAL if allow_changes else ()
    if path is not None:  # first: what was changed says more than arrays that do not fit
        _check_unchanged(trainer, path, allow_changes)
    if ckpt_path == "auto":
        folder, among = latest_of_run(trainer)
        found = restore_latest(folder, like, among, optional)
        if found is None:
            resume_loggers(trainer, -1, [])  # forget what was killed before it could save
            say(f"There is no checkpoint in `{folder}`, so the run begins.")
            return None
        tree, metadata, intact = found
        if intact != path:
            path = intact
            _go_back_to(trainer, path, metadata)
            trainer._reopen_data()
            _check_unchanged(trainer, path, allow_changes)
    else:
        assert path is not None
        tree, metadata = read_by_all(path, like, optional)
    bus = trainer._bus
    bus.on_load_checkpoint(trainer, metadata)
    anew = run.take_back(tree)
    if anew:
        say(f"Begun anew, as it was changed since the checkpoint: {', '.join(sorted(anew))}.")
    with sensible(path, ValueError):
        if "metrics" in anew:
            metadata["stream"] |= {"ended": None, "open": None, "epoch": None}
        run.position.__dict__.update(position(metadata["position"]).__dict__)
        run.data_state = decode_state(metadata["iterator"])
        run.id = typed(metadata["run"], str)
        run.rewind_request = rewind_request(metadata["rewind"])  # not yet carried out
        stop = typed(metadata["stop"], str, NoneType)
        stream.load_state_dict(metadata["stream"], run.metrics_like)
        trainer.callback_metrics = known_metrics(metadata["metrics"])
        before = position(metadata["loaders"]["position"]).total_batches
        changed = metadata["data"] != metadata["loaders"]["data"]  # since the loaders were made
    with sensible(path):
        bus.load_state_dict(typed(metadata["callbacks"], dict))
        if changed:
            trainer._sources.module.load_state_dict(typed(metadata["data"], dict))
        run.feed.go_on(run.position.total_batches - before, run.data_state)
        resume_loggers(trainer, run.position.step, metadata.get("loggers", []))
    if stop is not None:
        trainer.stop(stop)
        say(f"The run had been asked to stop, and is again: {stop}")
    trainer._saver.goes_on_from(path, run)
    at = dataclasses.replace(run.position)
    if at.last:
        at.end_epoch()
    over = (
        " Nothing is left to train: its limits are met." if trainer._schedule.finished(at) else ""
    )
    say(f"Going on from step {at.step}, `{path}`.{over}")
    return path


def resume_loggers(trainer: Trainer, step: int, saved: list[Any]) -> None:
    """Makes the loggers forget what was logged after a checkpoint that has `saved` of them."""
    left = list(saved)
    for logger in trainer.loggers:
        kind = type(logger).__qualname__
        found = next((entry for entry in left if entry["kind"] == kind), None)
        if found is not None:
            left.remove(found)
        logger.resume(step, {} if found is None else found["state"])


def refuse_weights_only(path: Path, metadata: Mapping[str, Any]) -> None:
    """**Raises:** `ValueError` for a checkpoint that no run can go on from."""
    if "stream" not in metadata:
        raise ValueError(
            f"The checkpoint `{path}` holds weights only, so no run can go on from it. Load it "
            f"into a task instead: `load_weights({str(path)!r}, task)`."
        )
