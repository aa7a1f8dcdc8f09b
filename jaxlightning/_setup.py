"""What happens between `fit(...)` and the first step: callbacks, loggers, data, checks."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax

from ._arguments import Arguments
from ._callback import Bus, Callback, Checkpoint, overrides
from ._checks import check_monitors
from ._evaluate import abstract_outputs
from ._explain import announce
from ._fit import FitRun
from ._importing import refuse_imported
from ._init import TaskSource, call_configured
from ._nearest import nearest
from ._optim import task_optimizer
from ._precision import Precision
from ._say import warn
from ._schedule import Position, Schedule, val_batches
from ._sources import Loaders, first_batches
from ._step import EvalStep, TrainStep, owns_update
from ._stream import MetricStream, NoStream
from ._task import TaskModule, trainable_spec
from .data import DataLoader, Feed
from .data._epochs import is_one_pass
from .parallel import Placement, spec_axes
from .parallel import _processes as processes

if TYPE_CHECKING:
    from ._trainer import Trainer


def refuse_nested(trainer: Trainer, entry: str) -> None:
    """**Raises:** `RuntimeError` where an entry point is called inside another, and an error where
    a script is imported that is to be looked into, and not to train."""
    refuse_imported(entry)
    if trainer._stage_entry is not None:
        raise RuntimeError(
            f"`{entry}` was called during `{trainer._stage_entry}` of the same Trainer, whose "
            "place in its run would be lost. Give it a `Trainer` of its own."
        )


# Callbacks and loggers


def listed_callbacks(given: Any) -> list[Callback]:
    """`callbacks` as a list.

    **Raises:** `TypeError` for what is no callback.
    """
    listed = list(given or ()) if isinstance(given, list | tuple | None) else [given]
    for callback in listed:
        if not isinstance(callback, Callback):
            what = "class" if isinstance(callback, type) else "object"
            raise TypeError(
                f"`callbacks` has the {what} `{callback!r}`, which is no callback. Pass instances "
                "of `Callback`."
            )
        _warn_of_no_hooks(type(callback))
    return listed


def _warn_of_no_hooks(kind: type) -> None:
    hooks = [name for name in dir(Callback) if name.startswith("on_")]
    for name in dir(kind):
        if name.startswith("on_") and name not in hooks:
            in_place = _IN_PLACE.get(name)
            warn(
                f"`{kind.__qualname__}.{name}` looks like a hook, but there is none of that name, "
                "so it is never called."
                + (f" In its place there is {in_place}." if in_place else nearest(name, hooks)),
            )


_IN_STEP = "`inside_step(view)`, traced into the step, where the gradients are"
_IN_PLACE = {
    "on_before_backward": _IN_STEP,
    "on_after_backward": _IN_STEP,
    "on_before_optimizer_step": f"{_IN_STEP}, or `wrap_optimizer(trainer, tx)`, to change them",
    "on_before_zero_grad": "nothing: gradients are values",
}
"""What Lightning's hooks are here."""


def built_in_callbacks(arguments: Arguments, given: list[Callback]) -> list[Callback]:
    """The callbacks that the Trainer's arguments stand for."""
    found: list[Callback] = []

    def lacks(kind: type) -> bool:
        return not any(isinstance(callback, kind) for callback in given)

    if arguments.gradient_clip_val is not None:
        from jaxlightning.callbacks import GradientClipping

        algorithm = arguments.gradient_clip_algorithm or "norm"
        found.append(GradientClipping(arguments.gradient_clip_val, algorithm))
    if arguments.max_time is not None:
        from jaxlightning.callbacks import Timer
        from jaxlightning.callbacks._timer import (  # type: ignore[import-not-found]
            parse_duration,
        )

        found.append(Timer(parse_duration(arguments.max_time, "max_time")))
    if arguments.profiler is not None:
        found.append(_profiler(arguments.profiler))
    if arguments.enable_progress_bar:
        from jaxlightning.callbacks import TQDMProgressBar

        found += [TQDMProgressBar()] if lacks(TQDMProgressBar) else []
    if arguments.enable_model_summary:
        from jaxlightning.callbacks import ModelSummary

        found += [ModelSummary()] if lacks(ModelSummary) else []
    if arguments.enable_checkpointing:
        from jaxlightning.callbacks import ModelCheckpoint

        found += [ModelCheckpoint()] if lacks(Checkpoint) else []
    return found


def _profiler(profiler: Any) -> Callback:
    if isinstance(profiler, Callback):
        return profiler
    if profiler == "jax":
        from jaxlightning.callbacks import Profiler

        return Profiler()
    raise ValueError(
        f'`profiler={profiler!r}` is unknown. Write "jax", or a callback: '
        "`Profiler(start_step=10, num_steps=5)`."
    )


def refuse_switched_off(arguments: Arguments, callbacks: list[Callback]) -> None:
    """**Raises:** `ValueError` for a callback that another argument says there is none of."""
    saves: list[Callback] = [c for c in callbacks if isinstance(c, Checkpoint)]
    bars = [c for c in callbacks if type(c).__name__ == "TQDMProgressBar"]
    # Under `fast_dev_run` those that save do nothing, by themselves.
    found: dict[str, list[Callback]] = {
        "enable_checkpointing": [] if arguments.fast_dev_run else saves,
        "enable_progress_bar": bars,
    }
    for name, contradicting in found.items():
        if contradicting and getattr(arguments, name) is False:
            switch = "barebones=True" if arguments.barebones else f"{name}=False"
            raise ValueError(
                f"`{switch}`, but `callbacks` has a `{type(contradicting[0]).__name__}`. Remove "
                "one of the two."
            )
    clips = [c for c in callbacks if type(c).__name__ == "GradientClipping"]
    if clips and arguments.gradient_clip_val is not None:
        raise ValueError(
            f"`gradient_clip_val={arguments.gradient_clip_val}` and the `GradientClipping` of "
            "`callbacks` would clip twice. Remove one of the two."
        )


def make_loggers(logger: Any, root: str) -> list[Any]:
    """`True`: TensorBoard; `False`: none; a logger, or several."""
    from .loggers import Logger, TensorBoardLogger
    from .loggers._logger import Follower

    if logger is False:
        return []
    if logger is None or logger is True:
        logger = TensorBoardLogger(root)
    loggers = list(logger) if isinstance(logger, list | tuple) else [logger]
    for one in loggers:
        if not isinstance(one, Logger):
            raise TypeError(
                f"`logger` has a `{type(one).__name__}`, which is no `Logger`. Write `True`, "
                "`False`, or loggers such as `CSVLogger(save_dir)`."
            )
    return loggers if processes.is_main() else list(map(Follower, loggers))


def bus_for(trainer: Trainer, task: TaskModule) -> Bus:
    """The Trainer's callbacks and the task's; of the same type, the Trainer's."""
    types = {type(callback) for callback in trainer._given_callbacks}
    brought = call_configured(task.configure_callbacks, task, "configure_callbacks")
    own = [callback for callback in brought if type(callback) not in types]
    found = [*trainer._given_callbacks, *own]
    return Bus([*found, *_guards(trainer, task, found)])


def _guards(trainer: Trainer, task: TaskModule, callbacks: list[Callback]) -> list[Callback]:
    """Who refuses the step of which a `ReplayCapsule` keeps the state, unless somebody does."""
    names = {type(callback).__name__ for callback in callbacks}
    keeps = trainer.detect_anomaly or owns_update(task) or "SkipNonFinite" in names
    if trainer._stage_entry != "fit" or "ReplayCapsule" not in names or keeps:
        return []
    from jaxlightning.callbacks import SkipNonFinite

    guard = SkipNonFinite(max_in_a_row=1)
    guard.guards_capsule = True
    return [guard]


# Data


def make_feed(trainer: Trainer, loader: Any, name: str, limit: int | float) -> Feed:
    return Feed(
        loader,
        trainer._placement,
        name=name,
        limit=limit,
        poll=trainer._signals.poll_waiting,
        check=trainer._check_batch,
    )


def make_feeds(
    trainer: Trainer, loaders: Loaders, name: str, limit: int | float
) -> dict[str, Feed]:
    """None where the limit is 0."""
    if limit == 0:
        return {}
    several = len(loaders) > 1
    return {
        key: make_feed(trainer, loader, f"{name} {key!r}" if several else name, limit)
        for key, loader in loaders.items()
    }


def fit_loaders(trainer: Trainer) -> tuple[Any, Loaders]:
    """The training loader and those of validation."""
    overfit = trainer._arguments.overfit_batches
    train = trainer._sources.train()
    if isinstance(train, DataLoader) and train.is_auto:
        _settle_batch_size(trainer, train)
    if not overfit:
        loaders = trainer._sources.loaders("val")
        for loader in loaders.values():
            if is_one_pass(loader):
                raise TypeError(
                    f"The validation data is a `{type(loader).__name__}`, which gives its batches "
                    "once, but every validation reads them. Pass a `DataLoader`, a list, or "
                    "anything else that can be iterated again."
                )
        return train, loaders
    batches = first_batches(train, overfit)
    validates = bool(trainer._sources.loaders("val"))
    return batches, {"": batches} if validates else {}


def _settle_batch_size(trainer: Trainer, loader: DataLoader) -> None:
    from .tuning import batch_size

    most = max(min(loader.rows, 2**16), trainer._placement.shards)
    found = batch_size(trainer, trainer._fitted, loader.row(), most=most)
    # Processes may have different memory to spare.
    loader.settle(int(processes.share(processes.next_topic("batch size"), str(found))))


def open_data(trainer: Trainer) -> Feed:
    """Asks for the loaders of a fit. A checkpoint has to know when, and in which state of their
    module: a resumed run asks as this one did."""
    trainer._asked = {
        "position": dataclasses.asdict(trainer._position),
        "data": copy.deepcopy(trainer._sources.module.state_dict()),
    }
    train, val = fit_loaders(trainer)
    limits = trainer._arguments
    feed = make_feed(trainer, train, "training", limits.limit_train_batches)
    trainer._val_feeds = make_feeds(trainer, val, "validation", limits.limit_val_batches)
    trainer._schedule = make_schedule(limits, feed, bool(trainer._val_feeds), trainer._position)
    return feed


def open_feeds(trainer: Trainer) -> list[Feed]:
    feeds = [*trainer._val_feeds.values()]
    feeds += [feed for found in trainer._eval_feeds.values() for feed in found.values()]
    if trainer._run is not None:
        feeds.append(trainer._run.feed)
    return feeds


def close_data(trainer: Trainer) -> None:
    """Ends the threads and processes that read for an entry point."""
    for feed in open_feeds(trainer):
        feed.close()


# The run


def make_schedule(arguments: Arguments, feed: Feed, validates: bool, at: Position) -> Schedule:
    length = feed.length
    if length == 0:
        raise ValueError(
            "`limit_train_batches` leaves no batch to train on. To evaluate only, call "
            "`trainer.validate`."
        )
    across = arguments.check_val_every_n_epoch is None
    return Schedule(
        epoch_batches=length,
        max_epochs=arguments.epochs_limit,
        max_steps=arguments.steps_limit,
        min_epochs=arguments.min_epochs or 0,
        min_steps=arguments.min_steps or 0,
        log_every=arguments.log_every_n_steps or 50,
        val_batches=val_batches(arguments.val_check_interval, length, across)
        if validates
        else None,
        val_epochs=arguments.check_val_every_n_epoch,
        validates=validates,
        accumulate=arguments.accumulate_grad_batches,
        start_epoch=at.epoch,
        start_step=at.step,
    )


def refuse_for_own_update(arguments: Arguments, task: TaskModule, bus: Bus) -> None:
    """**Raises:** `ValueError` for what belongs to the built step, which such a task replaces."""
    name = f"`{type(task).__name__}` owns its update (it overrides `train_step`), so"
    if Precision.named(arguments.precision) != Precision():
        raise ValueError(f"{name} `precision={arguments.precision!r}` has no effect. Cast there.")
    if arguments.accumulate_grad_batches > 1:
        raise ValueError(
            f"{name} `accumulate_grad_batches={arguments.accumulate_grad_batches}` has no effect. "
            "Accumulate there."
        )
    if arguments.gradient_clip_val is not None:
        raise ValueError(
            f"{name} `gradient_clip_val={arguments.gradient_clip_val}` has no effect. Use "
            "`optax.clip_by_global_norm` there."
        )
    for callback in bus.callbacks:
        for hook in ("wrap_optimizer", "inside_step", "accept_step"):
            if overrides(callback, hook):
                raise ValueError(
                    f"{name} the hook `{hook}` of `{type(callback).__name__}` is never called. "
                    "Remove the callback."
                )


def build_fit(trainer: Trainer, source: TaskSource, given: Any, feed: Feed) -> FitRun:
    """Everything about a fit that is known before the first array is computed."""
    arguments, bus, task = trainer._arguments, trainer._bus, source.task
    if owns_update(task):
        refuse_for_own_update(arguments, task, bus)
    if arguments.detect_anomaly and bus.judges:
        raise ValueError(
            f"`detect_anomaly=True` ends the run at the first NaN, and "
            f"`{type(bus.judges[0]).__name__}` goes on after it. Remove one of the two."
        )
    run = make_run(trainer, source, given, feed)
    if not arguments.barebones:
        announce(run.placement, run.paths, [leaf.shape for leaf in run.like])
    _check_divides(run.placement, feed)
    run.plan(trainer._schedule, bus.needs_state)
    check_names(trainer, run)
    return run


def check_agreement(trainer: Trainer) -> None:
    """**Raises:** `Disagreement` where processes of a job would not run the same fit."""
    from ._checkpoint_manifest import versions
    from ._saver import environment, fixed_configuration

    if processes.count() == 1:
        return
    # By it, checkpoints of this run are told from others.
    trainer._run.id = processes.share(processes.next_topic("run"), trainer._run.id)
    arguments = {
        name: repr(value)
        for name, value in dataclasses.asdict(trainer._arguments).items()
        if value is None or isinstance(value, bool | int | float | str)
    }
    parts = {
        "argument": arguments,
        "version of": versions(),
        "configuration": fixed_configuration(trainer),
        "environment": environment(trainer),
    }
    told = {
        f"{part} `{name}`": json.dumps(value, default=str)
        for part, found in parts.items()
        for name, value in found.items()
    }
    processes.same_for_all("fit", told)


def _check_tensor_rules(task: TaskModule) -> None:
    """**Raises:** `ValueError` where there is nothing to shard over that axis."""
    for _, spec in task.partition_rules():
        if callable(spec) or "tensor" in spec_axes(spec):
            return
    raise ValueError(
        f'`strategy="tensor"` shards by the rules of the task, but no rule of '
        f'`{type(task).__name__}.partition_rules` shards over the axis "tensor". Return such as '
        '`[("ffn/weight", PartitionSpec(None, "tensor"))]` there, or write `strategy="fsdp"`.'
    )


def _check_divides(placement: Placement, feed: Feed) -> None:
    """Warns of batches of which every device would compute all rows."""
    rows = jax.tree.leaves(feed.spec)[0].shape[:1]
    shards = placement.shards
    if rows and rows[0] % shards:
        more = -(-rows[0] // shards) * shards
        warn(
            f"The training batches have {rows[0]} rows, which the mesh {dict(placement.mesh.shape)}"
            f" can't split into {shards} equal parts, so every device computes all of them, which "
            f"is right but saves no time. Write `batch_size={more}`, or `devices=1`."
        )


def make_run(
    trainer: Trainer,
    source: TaskSource,
    given: Any,
    feed: Any,
    placement: Placement | None = None,
) -> FitRun:
    """The step of a fit, and what it needs. `given` is the task, or the function that makes it;
    `feed` is a `Feed`, or what stands for one; `placement` is by default on the trainer's
    devices."""
    arguments, bus, task = trainer._arguments, trainer._bus, source.task
    concrete = given if isinstance(given, TaskModule) else task
    tx = call_configured(lambda: task_optimizer(concrete), task, "configure_optimizers")
    if not owns_update(task):
        import optax

        tx = optax.with_extra_args_support(bus.wrap_optimizer(trainer, tx))
    placement = trainer._placement_for(task) if placement is None else placement
    if arguments.strategy == "tensor":
        _check_tensor_rules(task)
    step = TrainStep(
        spec=trainable_spec(task),
        tx=tx,
        precision=trainer.precision,
        bus=bus,
        collect=not arguments.barebones,
        placement=placement if placement.mesh.size > 1 else None,
    )
    return FitRun(
        source=source,
        step=step,
        placement=placement,
        feed=feed,
        key=jax.random.key(arguments.seed),
        counts_skipped=bool(bus.judges),
        accumulate=arguments.accumulate_grad_batches,
        steps_per_dispatch=arguments.steps_per_dispatch,
        on_recompile=arguments.on_recompile,
        detect_anomaly=arguments.detect_anomaly,
        compiler_options=trainer._compiler_options,
    )


def check_names(trainer: Trainer, run: FitRun) -> None:
    """Traces the evaluation steps, and looks up what callbacks monitor."""
    collected = {} if trainer._arguments.barebones else run.metrics_like
    known = {f"train/{name}" for name in collected}
    known |= {f"{name}_epoch" for name in known}
    known |= set(trainer._bus.provides())
    state = run.abstract_state()
    task = eqx.nn.inference_mode(state.task)
    step = EvalStep("validation", trainer.precision)
    for name, feed in trainer._val_feeds.items():
        found = abstract_outputs(step, task, feed.spec)
        known |= {f"val/{name}/{metric}" if name else f"val/{metric}" for metric in found}
    check_monitors(trainer._bus.monitors(), known)


def make_stream(trainer: Trainer, run: FitRun) -> MetricStream:
    if trainer._arguments.barebones:
        return NoStream()
    return MetricStream(run.take_metrics, trainer.log_every_n_steps, trainer._deliver)


def hyperparameters(trainer: Trainer, task: TaskModule) -> dict[str, Any]:
    """What is logged once a run: the task's, and what of the Trainer's changes results."""
    arguments = trainer._arguments
    total = trainer.estimated_stepping_batches
    return {
        "task": type(task).__qualname__,
        **task.hyperparameters(),
        "seed": arguments.seed,
        "precision": str(arguments.precision),
        "accumulate_grad_batches": arguments.accumulate_grad_batches,
        "total_steps": None if math.isinf(total) else int(total),
    }
