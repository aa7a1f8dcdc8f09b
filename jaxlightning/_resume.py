"""Going on with a run: which checkpoint to take, whether it fits, and how it is put back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax

from ._checkpoint import Entry, find_checkpoints, latest_checkpoint, restore_latest
from ._checkpoint_manifest import typed
from ._checkpoint_manifest import versions as package_versions
from ._checkpoint_read import read_checkpoint, read_manifest, read_metadata
from ._configuration import differences
from ._saver import checkpoint_folder, environment, fixed_configuration, goes_on
from ._say import say
from ._sensible import known_metrics, position, rewind_request, sensible
from ._stream import MetricStream
from .data._iterator_state import decode_state

if TYPE_CHECKING:
    from ._fit import FitRun
    from ._trainer import Trainer


def resolve(
    trainer: Trainer, ckpt_path: str | os.PathLike[str], among: Callable[[Entry], bool]
) -> Path:
    """The path that `"last"`, of those `among` which one is looked for, `"best"` or a path stands
    for.

    **Raises:** `FileNotFoundError` where there is no such checkpoint.
    """
    folder = checkpoint_folder(trainer)
    if ckpt_path not in ("last", "best"):
        path = Path(ckpt_path).absolute()
        if not path.exists():
            near = [entry.path for entry in find_checkpoints(path.parent)]
            hint = f" That folder has {', '.join(p.name for p in near)}." if near else ""
            raise FileNotFoundError(f"`ckpt_path={str(ckpt_path)!r}` does not exist.{hint}")
        return path
    trainer.wait_for_checkpoints()
    latest = latest_checkpoint(folder, among) if ckpt_path == "last" else None
    if latest is not None:
        return latest.path
    entries = find_checkpoints(folder)
    if not entries:
        raise FileNotFoundError(
            f'`ckpt_path="{ckpt_path}"`: there is no checkpoint in `{folder}`. To start without '
            'one where there is none, write `resume="auto"`.'
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
        path = resolve(trainer, ckpt_path, goes_on)
        _go_back_to(trainer, path, read_metadata(path))
        return path
    entries = find_checkpoints(checkpoint_folder(trainer))
    # If there are weights only, that is an error: to begin anew would not be what was asked for.
    for entry in [*filter(goes_on, entries)][-1:] or entries[-1:]:
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


def check_unchanged(
    trainer: Trainer, path: Path, metadata: Mapping[str, Any], allow_changes: bool
) -> None:
    """**Raises:** `ValueError` that lists all that was changed since the checkpoint, unless that is
    allowed: then it is warned of, as other versions of packages and other devices are."""
    changed = differences(metadata["fixed"], fixed_configuration(trainer))
    elsewhere = differences(metadata["environment"], environment(trainer))
    elsewhere += differences(read_manifest(path).versions, package_versions())
    if changed and not allow_changes:
        raise ValueError(
            f"The run was changed since the checkpoint `{path}`, so going on from it would not be "
            f"the same run:{_listed(changed + elsewhere)}\nUndo the changes; or go on in spite of "
            "them, `fit(..., allow_changes=True)`; or start a new run with parts of the old one, "
            "`warm_start(path, task)`."
        )
    if changed or elsewhere:
        warnings.warn(
            f"The run goes on from `{path}`, but not bit for bit as it would have gone on then:"
            f"{_listed(changed + elsewhere)}",
            stacklevel=2,
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
    like = run.abstract_state()
    if ckpt_path == "auto":
        found = restore_latest(checkpoint_folder(trainer), like, goes_on)
        if found is None:
            resume_loggers(trainer, -1, [])  # forget what was killed before it could save
            return None
        tree, metadata, intact = found
        if intact != path:
            path = intact
            _go_back_to(trainer, path, metadata)
            trainer._reopen_data()
    else:
        assert path is not None
        tree, metadata = read_checkpoint(path, like)
    with sensible(path):
        check_unchanged(trainer, path, metadata, allow_changes)
    bus = trainer._bus
    bus.on_load_checkpoint(trainer, metadata)
    run.leaves = run.placed_leaves(jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    with sensible(path, ValueError):
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
    say(f"Going on from step {run.position.step}, `{path}`.")
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
