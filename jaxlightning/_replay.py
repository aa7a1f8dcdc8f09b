"""Runs the step of a replay capsule again, and says in which operation it fails."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ._callback import Bus, Callback, InsideStep, overrides
from ._capsule_read import Capsule, ReplayError
from ._dispatch import Single
from ._fit import FitRun
from ._init import TaskSource, empty_metrics
from ._operation import OperationFailed
from ._provenance import Taint, Value, given, run_watched
from ._replay_report import Replayed, raised
from ._schedule import Schedule
from ._setup import bus_for, make_run
from ._state import TrainState
from ._task import NotOfHyperparameters, TaskModule
from ._weights import with_tuples
from .data import DeviceBatch, Feed
from .parallel import leaf_path

_TRACED = ("wrap_optimizer", "inside_step")


def replay(
    folder: str | os.PathLike[str],
    task: Any,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Replayed:
    """Runs a failed step again, operation by operation, and finds where it fails.

        print(replay("runs/a/capsules/step_0000000042", Classifier))

    What is not finite is followed back from the loss, or else the gradients, or else the
    optimizer's updates, to the operation that made it; what the program discards itself is none
    of it.

    **Arguments:**

    - `folder`: what `ReplayCapsule` wrote. Nothing is imported because it names it.
    - `task`: the task's class, which is made of the stored hyper-parameters; a function
      `key -> task`; or `(trainer, task)` as in the run, where the optimizer is wrapped by
      callbacks. `(trainer, task, batch)` also says the structure of batches, where those are not
      made of dicts, lists and tuples.
    - `checkpoint`: where the state comes from, if the capsule has none; by default the checkpoint
      that it names. It may be of an earlier step, which is then said.

    **Raises:** `ReplayError` where the step can't be run, `CheckpointError` where the capsule is
    damaged or of another state.
    """
    capsule = Capsule(folder)
    trainer, source, sample = _ingredients(task, capsule)
    batches = capsule.batches(sample)
    with _callbacks_untold():
        return _replayed(capsule, trainer, source, batches, checkpoint)


def _replayed(
    capsule: Capsule, trainer: Any, source: Any, batches: list[list[PyTree]], checkpoint: Any
) -> Replayed:
    run = _rebuilt(trainer, source, capsule, [batch for step in batches for batch in step])
    like = eqx.tree_at(lambda state: state.metrics, run.abstract_state(), {})
    state, notes = capsule.state(like, batches, checkpoint)
    state = state.replace(metrics=empty_metrics(run.metrics_like))
    held = list(run.feed.epoch(0))
    found = Replayed(capsule, tuple(notes))
    for number, step in enumerate(batches):
        window, held = held[: len(step)], held[len(step) :]
        found = _one_step(run, state, window, found._replace(number=number))
        if found.failed or number == len(batches) - 1:
            break
        state = run._unflatten(run.tried(state, window)[0])
    return found


@contextlib.contextmanager
def _callbacks_untold() -> Iterator[None]:
    """Keeps JAX from logging, with two tracebacks each time, what a callback raises: the step is
    run for that, and on the way to the operation it raises several times."""
    logger = logging.getLogger("jax._src.callback")

    def is_else(record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith("callback failed")

    logger.addFilter(is_else)
    try:
        yield
    finally:
        logger.removeFilter(is_else)


# The run, built as a fit builds it


def _ingredients(task: Any, capsule: Capsule) -> tuple[Any, Any, PyTree]:
    """The Trainer, what `fit` would get as its task, and a batch or `None`."""
    from ._trainer import Trainer

    sample = None
    if isinstance(task, tuple):
        if len(task) not in (2, 3) or not isinstance(task[0], Trainer):
            kinds = ", ".join(type(item).__name__ for item in task)
            raise ReplayError(
                f"The task is a tuple of ({kinds}). Return `(trainer, task)`, or `(trainer, task, "
                "batch)`."
            )
        trainer, task, *rest = task
        sample = rest[0] if rest else None
        _check_configured_alike(trainer, capsule)
    else:
        try:
            trainer = Trainer(
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **capsule.arguments(),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ReplayError(
                f"`{capsule.path}` was written by a Trainer that there can't be: {error}"
            ) from error
    if isinstance(task, type) and issubclass(task, TaskModule):
        task = _made_of_hyperparameters(task, capsule)
    return trainer, task, sample


def _made_of_hyperparameters(kind: type[TaskModule], capsule: Capsule) -> Callable[..., TaskModule]:
    """**Raises:** `ReplayError` for another class than the capsule's; what is returned, for one
    that takes more than hyper-parameters."""
    name = kind.__name__
    if kind.__qualname__ != capsule.task:
        raise ReplayError(
            f"The capsule `{capsule.path}` is of `{capsule.task}`, and not of "
            f"`{kind.__qualname__}`. Name that class; if it was renamed, write "
            f"`def make(key): return {name}(...)` and `--task f.py:make`."
        )
    hyperparameters = with_tuples(capsule.hyperparameters)

    def make(key: PRNGKeyArray) -> TaskModule:
        try:
            return kind.from_hyperparameters(hyperparameters, key)
        except NotOfHyperparameters as error:
            raise ReplayError(
                f"`{name}` can't be made of the capsule's hyper-parameters "
                f"{sorted(hyperparameters)} alone, since it has to be called with "
                f"`{error.argument}`. In the file of the task, which is `f.py` here, write `def "
                f"make(key): return {name}(...)`, as the run has it, and `--task f.py:make`."
            ) from error

    return make


def _check_configured_alike(trainer: Any, capsule: Capsule) -> None:
    """**Raises:** `ReplayError` where the Trainer would compute something else."""
    then = capsule.arguments()
    now = {name: getattr(trainer, name) for name in then}
    for values in (then, now):
        values["precision"] = values["precision"].names()
    changed = [
        f"\n  {name}: {then[name]!r} in the capsule, {now[name]!r} here"
        for name in then
        if name != "seed" and now[name] != then[name]  # the root key is part of the state
    ]
    if changed:
        raise ReplayError(
            f"The Trainer differs from that of the run:{''.join(changed)}\nReturn `(trainer, "
            "task)` with the run's own arguments."
        )


_SHOWN = 3


class _Batches(list[Any]):
    allow_nan = True


def _rebuilt(trainer: Any, task: Any, capsule: Capsule, batches: list[PyTree]) -> FitRun:
    source = TaskSource(task)
    trainer._begin_fit()
    trainer._schedule = Schedule(None, max_steps=capsule.total_steps)
    # Without judges, what is not finite goes on into the new state, where one can see it.
    kept = [c for c in bus_for(trainer, source.task).callbacks if not overrides(c, "accept_step")]
    trainer._bus = Bus(kept)
    for callback in kept:
        if any(overrides(callback, hook) for hook in _TRACED):
            callback.setup(trainer, "fit")
    feed = Feed(_Batches(batches), trainer._placement, name="capsule")
    return make_run(trainer, source, task, feed)


# The step, operation by operation


class _Probe(Callback):
    """Looks at what a step computes before anybody judges it."""

    view: InsideStep | None = None

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        self.view = view
        return {}


class Target(NamedTuple):
    """Something that should be finite: what it is, its path within that, and its value."""

    group: str
    path: str
    value: Value


def _one_step(
    run: FitRun, state: TrainState, window: list[DeviceBatch], found: Replayed
) -> Replayed:
    try:
        targets = _watched(run, state, window, found)
    except OperationFailed as failure:
        # Who raises says why. How a library gets there is nobody's concern.
        operation = failure.operation._replace(frames=failure.operation.frames[-1:])
        return found._replace(kind="error", operation=operation, error=raised(failure.__cause__))
    blamed = _blamed(targets)
    if blamed is not None:
        return _explained(found, *blamed)
    try:
        leaves, outputs = run.tried(state, window)
        loss = float(outputs["loss"]) if "loss" in outputs else None
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        anomalous = any(bool(jnp.isnan(leaf).any()) for leaf in floats)
    except Exception as error:
        return found._replace(kind="compiled", error=raised(error))
    if anomalous or (loss is not None and not np.isfinite(loss)):
        return found._replace(kind="compiled", loss=loss)
    return found._replace(kind=None, loss=loss)


def _watched(
    run: FitRun, state: TrainState, window: list[DeviceBatch], found: Replayed
) -> list[Target]:
    """All that a step computes, of which each value knows why it is not finite, if it is not."""
    dispatch = Single() if run.takes_blocks else run._dispatch
    probe = _Probe()
    bus = Bus([*run.train_step.bus.callbacks, probe])
    step = run.train_step._replace(collect=False, bus=bus)

    def computed(leaves: list[jax.Array], varying: PyTree) -> dict[str, PyTree]:
        after, metrics = dispatch.run(step, run._unflatten(leaves), varying, run._batch_structure)
        view = probe.view
        seen: dict[str, PyTree] = {}
        if view is not None:
            seen = {"loss": view.loss, "gradient": view.grads, "update": view.updates}
            seen["optimizer"] = view.opt_state
        seen |= {"task": after.task, "metric": metrics}
        return {group: eqx.filter(tree, eqx.is_array) for group, tree in seen.items()}

    leaves = run.placed_leaves(run._flatten(state))
    names = [f"`{path}` of the state before the step" for path in run.paths]
    given_leaves = list(map(given, leaves, names))
    varying = dispatch.varying(window)
    named = dispatch.varying([_named(batch, i, found) for i, batch in enumerate(window)])
    given_batch = list(map(given, jax.tree.leaves(varying), jax.tree.leaves(named)))
    program, like = jax.make_jaxpr(computed, return_shape=True)(leaves, varying)
    values = run_watched(program, [*given_leaves, *given_batch])
    paths = jax.tree_util.tree_flatten_with_path(like)[0]
    return [
        Target(path[0].key, leaf_path(path[1:]), value)
        for (path, _), value in zip(paths, values, strict=True)
    ]


def _named(batch: DeviceBatch, number: int, found: Replayed) -> DeviceBatch:
    """`batch` with what its leaves are called, by the place in them, instead of them."""
    rows = found.capsule.rows[found.number]
    own = None if rows is None else rows[number]

    def name(path: str) -> Callable[[list[int]], str]:
        def at(place: list[int]) -> str:
            row = ""
            if own is not None and place and place[0] < len(own):
                row = f", which is row {own[place[0]]} of the source"
            return f"`{path}` of the batch at {place}{row}"

        return at

    paths = jax.tree_util.tree_flatten_with_path(batch.batch)[0]
    names: list[Any] = [name(leaf_path(path)) for path, _ in paths]
    return batch._replace(leaves=names)


_GROUPS = ("loss", "gradient", "update", "optimizer", "task", "metric")
"""In the order in which a step computes them: where the loss is NaN, so is what follows."""
_ANY_INFINITY = ("loss", "gradient", "update")
"""Elsewhere infinities may be meant: running extrema start with them."""


def _blamed(targets: Sequence[Target]) -> tuple[str, Target, list[Taint]] | None:
    """The kind of trouble, the first target that has it, and where it came into being."""
    for group in _GROUPS:
        for kind in ("nan", "inf") if group in _ANY_INFINITY else ("nan",):
            bad = [
                target
                for target in targets
                if target.group == group and getattr(target.value.taint, kind, False)
            ]
            taints = [target.value.taint for target in bad if target.value.taint is not None]
            if taints:
                everything = Taint(kind == "nan", kind == "inf", taints)
                return kind, bad[0], everything.origins(kind)
    return None


def _explained(found: Replayed, kind: str, target: Target, origins: list[Taint]) -> Replayed:
    first = origins[0]
    infinities: list[Taint] = []
    if kind == "nan" and first.operation is not None:
        parents = [parent for parent in first.parents if parent.inf]
        infinities = Taint(False, True, parents).origins("inf") if parents else []
        # A maximum starts with a constant -inf. Where there is another, that is not it.
        infinities = [taint for taint in infinities if taint.operation] or infinities
    return found._replace(
        kind=kind,
        group=target.group,
        path=target.path,
        operation=first.operation,
        given=first.given,
        infinities=tuple(infinities[:_SHOWN]),
        others=len(origins) - 1,
    )
