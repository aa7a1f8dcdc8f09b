"""The loops: each reads from top to bottom. What they call is kept by the Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from ._evaluate import gather, inference
from ._fit import RUN_AHEAD, FitRun
from ._rewind import rewound
from ._say import say, warn
from ._stream import MetricStream, Numbers, computed
from ._task import TaskModule
from .data import DeviceBatch, Feed

if TYPE_CHECKING:
    from ._trainer import Trainer


def fit_loop(trainer: Trainer, run: FitRun, stream: MetricStream) -> None:
    """Trains until the schedule is finished or somebody asked to stop.

    A resumed run enters at the phase in which its checkpoint was taken.
    """
    bus, at = trainer._bus, run.position
    if at.phase == "ended" and at.last:
        at.end_epoch()
    elif at.phase == "ended" and trainer._is_over():
        return
    elif at.phase == "stepped" or rewound(trainer, run, stream):
        settle(trainer, run, stream)
    while at.phase != "epoch" or not trainer._is_over():
        trainer._signals.check()
        if at.phase == "epoch":
            trainer._reload_data()
            bus.on_train_epoch_start(trainer)
            at.phase = "started"
        if not (at.last or trainer._is_over()):
            train_epoch(trainer, run, stream)
        stream_epoch(trainer, stream)
        bus.on_train_epoch_end(trainer)
        at.phase = "ended"
        bus.on_checkpoint(trainer, "epoch")
        trainer._save_requested()
        trainer._signals.poll()
        if not at.last:
            break
        at.end_epoch()


def say_why_stopped(trainer: Trainer, run: FitRun) -> None:
    """Says who ended a fit before its limits were met."""
    if trainer.should_stop and not trainer._schedule.finished(run.position):
        reason = trainer.stop_reason or "`should_stop` was set."
        say(f"The fit was stopped at step {run.position.step}: {reason}")


def train_epoch(trainer: Trainer, run: FitRun, stream: MetricStream) -> None:
    """The steps of an epoch, or what is left of it."""
    bus, at, poll = trainer._bus, run.position, trainer._signals.poll
    for window, last in run.windows():
        if run.takes_blocks:
            run_block(trainer, run, window, last)
        else:
            batch = [b.batch for b in window] if run.accumulates else window[0].batch
            index = at.batches + len(window) - 1
            trainer.batch_idx = index
            bus.on_train_batch_start(trainer, batch, index)
            outputs = run.dispatch(window)
            at.advance(len(window), last)
            bus.on_train_batch_end(trainer, run.outputs(outputs), batch, index)
        settle(trainer, run, stream)
        poll()
        if trainer._is_over():
            return
    if at.batches == 0:
        trainer.stop("The training data is exhausted.", remembered=False)
        warn(
            f"The training data gave no batch in epoch {at.epoch}, so training stops: it is a "
            "one-pass iterator. Pass a `DataLoader`, or something that can be iterated again.",
        )


def run_block(trainer: Trainer, run: FitRun, window: list[DeviceBatch], last: bool) -> None:
    """Several steps in one dispatch; afterwards each gets its hooks, the last one the state."""
    bus, at = trainer._bus, run.position
    outputs = run.dispatch(window)
    run.inside_block = True
    for i, (batch, *_) in enumerate(window):
        is_end = i == len(window) - 1
        trainer.batch_idx = index = at.batches
        bus.on_train_batch_start(trainer, batch, index)
        at.advance(1, last and is_end)
        run.inside_block = not is_end
        bus.on_train_batch_end(trainer, run.outputs(outputs, i), batch, index)


def settle(trainer: Trainer, run: FitRun, stream: MetricStream) -> None:
    """All that a step causes: step ▸ log ▸ validate if due ▸ monitors ▸ checkpoints last.

    Where a log makes somebody ask for a rewind, that comes next, and then what the step that the
    run went back to causes here: nothing is validated or saved that is known to be undone.
    """
    bus, at = trainer._bus, run.position
    stream.after_step(at.step)
    validates = trainer._validation_due()
    # The end of an epoch or of the fit would flush later; a rewind then would find the data closed.
    if validates or bus.needs_state(at.step) or at.last or trainer._is_over():
        stream.flush()
    if run.rewind_request is not None and rewound(trainer, run, stream):
        return settle(trainer, run, stream)
    if validates:
        validate_in_fit(trainer, run)
    at.phase = "settled"
    bus.on_checkpoint(trainer, "step")
    trainer._save_requested()
    if run.rewind_request is not None and rewound(trainer, run, stream):
        settle(trainer, run, stream)


def stream_epoch(trainer: Trainer, stream: MetricStream) -> None:
    """Delivers what is complete, and the epoch's aggregates."""
    numbers = stream.end_epoch(trainer.global_step, keep=not trainer._run.position.last)
    trainer._record(numbers)


def validate_in_fit(trainer: Trainer, run: FitRun, limit: int | None = None) -> None:
    """Validation of the state as it is. With `limit`, the sanity check: nothing is recorded."""
    state = run.state
    task = trainer._bus.evaluation_task(trainer, state.task)
    with trainer._stage_of("sanity_check" if limit is not None else "validate"):
        trainer._callback_states = trainer._bus.state_dict()
        evaluate(trainer, "validation", trainer._val_feeds, task, state.key, limit)
        trainer._callback_states = None


@dataclasses.dataclass(frozen=True)
class _StageHooks:
    """The hooks of one evaluation stage."""

    start: Callable[..., None]
    end: Callable[..., None]
    epoch_start: Callable[..., None]
    epoch_end: Callable[..., None]
    batch_start: Callable[..., None]
    batch_end: Callable[..., None]

    @classmethod
    def of(cls, bus: Any, stage: str) -> _StageHooks:
        names = ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
        return cls(*(getattr(bus, f"on_{stage}_{name}") for name in names))


def evaluate(
    trainer: Trainer,
    stage: str,
    feeds: dict[str, Feed],
    task: TaskModule,
    key: PRNGKeyArray,
    limit: int | None = None,
) -> Numbers:
    """One pass over all loaders of a stage: `"validation"` or `"test"`. Waits for the device."""
    hooks = _StageHooks.of(trainer._bus, stage)
    task = inference(task)
    short = {"validation": "val", "test": "test"}[stage]
    numbers: Numbers = {}
    hooks.start(trainer)
    hooks.epoch_start(trainer)
    for number, (name, feed) in enumerate(feeds.items()):
        program = trainer._evaluator.program(stage, name, task, feed)
        for _ in program(task, key, limit=limit, **_batch_hooks(trainer, hooks, program, number)):
            pass
        numbers |= computed(program.sums, f"{short}/{name}/" if name else f"{short}/")
    if limit is None:
        trainer._record(numbers)
    hooks.epoch_end(trainer)
    hooks.end(trainer)
    return numbers


def predict(
    trainer: Trainer, feeds: dict[str, Feed], task: TaskModule, key: PRNGKeyArray, keep: bool
) -> dict[str, PyTree]:
    """Predictions by loader, as numpy arrays; nothing is kept unless `keep`."""
    hooks = _StageHooks.of(trainer._bus, "predict")
    task = inference(task)
    found: dict[str, PyTree] = {}
    hooks.start(trainer)
    hooks.epoch_start(trainer)
    for number, (name, feed) in enumerate(feeds.items()):
        program = trainer._evaluator.program("predict", name, task, feed)
        batches: list[list[Any]] = []
        for outputs in program(
            task, key, limit=None, **_batch_hooks(trainer, hooks, program, number)
        ):
            if keep:
                batches.append(outputs)
                if len(batches) > RUN_AHEAD:  # read late, so that nobody waits
                    batches[-1 - RUN_AHEAD] = jax.device_get(batches[-1 - RUN_AHEAD])
        read = [program.predictions(b) for b in batches]
        found[name] = gather(read)
    hooks.epoch_end(trainer)
    hooks.end(trainer)
    return found


def _batch_hooks(
    trainer: Trainer, hooks: _StageHooks, program: Any, number: int
) -> dict[str, Callable[..., None]]:
    def before(batch: DeviceBatch, index: int) -> None:
        trainer.batch_idx = index
        hooks.batch_start(trainer, batch.batch, index, number)

    def after(outputs: list[jax.Array], batch: DeviceBatch, index: int) -> None:
        hooks.batch_end(trainer, program.outputs(outputs), batch.batch, index, number)

    return {"before": before, "after": after, "poll": trainer._signals.poll}
