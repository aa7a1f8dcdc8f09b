"""What one fit holds: the compiled step, the state as leaves, data, position, metrics."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ._checkpoint_read import field_of
from ._checks import traced
from ._configuration import described
from ._dispatch import Accumulated, Block, Dispatch, Single
from ._init import TaskSource, empty_metrics, state_builder, strong
from ._metrics import Metric
from ._program import Program
from ._schedule import Position, Schedule
from ._state import TrainState
from ._step import TrainStep, owns_update
from .data import DeviceBatch, Feed
from .parallel import Placement, leaf_path, placed

RUN_AHEAD = 4
"""Steps that may be under way on the device before the host waits."""


class StepOutputs(Mapping[str, Any]):
    """One step's metrics, as numbers on the device, made when they are asked for."""

    def __init__(self, leaves: Sequence[jax.Array], structure: Any, index: int | None = None):
        self._leaves, self._structure, self._index = leaves, structure, index
        self._metrics: dict[str, Metric] | None = None

    @property
    def metrics(self) -> dict[str, Metric]:
        if self._metrics is None:
            i = self._index
            leaves = self._leaves if i is None else [leaf[i] for leaf in self._leaves]
            self._metrics = jax.tree.unflatten(self._structure, leaves)
        return self._metrics

    def __getitem__(self, name: str) -> Any:
        return self.metrics[name].compute()

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)


class FitRun:
    """The state of a fit and the programs that advance it.

    The state is held as a list of leaves, because flattening it every step would cost more than
    dispatching the step. Its structure and everything static in it are fixed at construction.
    """

    def __init__(
        self,
        *,
        source: TaskSource,
        step: TrainStep,
        placement: Placement,
        feed: Any,
        key: PRNGKeyArray,
        counts_skipped: bool,
        accumulate: int = 1,
        steps_per_dispatch: int = 1,
        on_recompile: str = "warn",
        detect_anomaly: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.id = uuid.uuid4().hex
        """Told by it, checkpoints of this run, which a resumed run is, differ from others'."""
        self.rewind_request: tuple[int, str] | None = None
        self.feed = feed
        self.placement = placement
        self.position = Position()
        self.train_step = step
        self.inside_block = False
        self.data_state: Any = None
        self.batch_spec = feed.spec
        self._batch_structure = feed.structure
        self._detect_anomaly = detect_anomaly
        self.configuration = {
            # Before anything is traced: what a closure holds may change by it.
            "task": described(eqx.filter(source.task, _is_array, inverse=True)),
            "optimizer": described(step.tx),
        }
        """All of the task and its optimizer that is no array, for `_resume.check_unchanged`."""
        self._dispatch: Dispatch = Single()
        if accumulate > 1:
            self._dispatch = Accumulated(accumulate)
        elif steps_per_dispatch > 1:
            self._dispatch = Block(steps_per_dispatch)
        self._ahead: deque[tuple[int, jax.Array]] = deque()
        """For each dispatch under way the step before it, and something to wait for."""
        self.failed_window: list[DeviceBatch] | None = None
        """The batches with which a dispatch raised, if it was not for its compilation."""

        build = state_builder(
            source, step.spec, step.tx, step.precision, counts_skipped=counts_skipped
        )
        bare = eqx.filter_eval_shape(build, source.given, key)
        self.metrics_like = self._abstract_metrics(bare)
        self._outputs_structure = jax.tree.structure(self.metrics_like)

        def complete(given: PyTree, root: PRNGKeyArray) -> TrainState:
            state = build(given, root)
            if not step.collect:
                return state
            return state.replace(metrics=empty_metrics(self.metrics_like))

        like = eqx.filter_eval_shape(complete, source.given, key)
        arrays, self._static = eqx.partition(like, _is_array)
        found, self.structure = jax.tree_util.tree_flatten_with_path(arrays)
        self.paths = [leaf_path(path) for path, _ in found]
        self.like: list[jax.ShapeDtypeStruct] = [leaf for _, leaf in found]
        placement.check_rules(self.paths)
        self.shardings = placement.of_state(arrays)
        several = placement.mesh.size > 1
        self._state_shardings = self.shardings if several else None
        self._metric_range = _where_metrics_are(arrays)
        first, last = self._metric_range
        self._metrics_structure = jax.tree.structure(arrays.metrics)

        def empties() -> list[jax.Array]:
            return jax.tree.leaves(empty_metrics(self.metrics_like))

        options: dict[str, Any] = {"out_shardings": self.shardings[first:last]} if several else {}
        self._fresh = jax.jit(empties, **options)
        options = {"out_shardings": self.shardings} if several else {}
        self._init = jax.jit(
            lambda given, root: jax.tree.leaves(eqx.filter(complete(given, root), eqx.is_array)),
            **options,
        )
        self._source, self._key = source, key
        self.program = Program(
            "training step",
            self._traced_step,
            donate=not detect_anomaly,
            on_recompile=on_recompile,
            out_shardings=(self.shardings, placement.replicated) if several else None,
            compiler_options=compiler_options,
        )
        self.leaves: list[jax.Array] = []

    # Before the first step

    def _abstract_metrics(self, state: TrainState) -> dict[str, Metric]:
        step = self.train_step._replace(collect=False)
        method = "train_step" if owns_update(state.task) else "training_step"
        with traced(state.task, method, self.batch_spec):
            _, metrics = eqx.filter_eval_shape(step.__call__, state, self.batch_spec)
        return metrics

    def initialise(self) -> None:
        """Builds the first state on the devices."""
        leaves, structure = jax.tree.flatten((self._source.given, self._key))
        at = [self.placement.replicated] * len(leaves)
        given, key = jax.tree.unflatten(structure, placed(leaves, at))
        self.leaves = self._init(given, key)
        self._source.given = None

    def compile(self, poll: Any) -> None:
        """Compiles for every shape the loader announces, but for that of an epoch's last batch
        where the fit ends before. `poll` is called around each."""
        shapes, length = self.feed.shapes, self.feed.length
        if length is not None and not self._schedule.may_end_epoch(self.position, length):
            rows = [{leaf.shape[1:] for leaf in jax.tree.leaves(shape)} for shape in shapes]
            shapes, length = (shapes[:1], None) if rows[1:] == rows[:-1] else (shapes, length)
        for varying in self._dispatch.announced(shapes, length):
            poll()
            self.program.compile(self.leaves or self.abstract_leaves(), self._placed(varying))
        poll()

    def abstract_leaves(self) -> list[jax.ShapeDtypeStruct]:
        if self._state_shardings is None:
            return self.like
        return [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(self.like, self._state_shardings, strict=True)
        ]

    def abstract_state(self) -> TrainState:
        """The state without its values, but with the places they live in."""
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(self.like, self.shardings, strict=True)
        ]
        return self._unflatten(leaves)

    def _placed(self, varying: PyTree) -> PyTree:
        """Abstract batches with the shardings that real ones will have."""
        if self.placement.mesh.size == 1:
            return varying
        of = self.placement.of_batch
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of([x])), varying
        )

    def usual_arguments(self) -> tuple[list[jax.ShapeDtypeStruct], PyTree]:
        """Abstract arguments of the program for batches of the usual shape."""
        varying = self._dispatch.announced(self.feed.shapes[:1], None)[0]
        return self.abstract_leaves(), self._placed(varying)

    def _traced_step(self, leaves: list[jax.Array], varying: PyTree) -> Any:
        state, metrics = self._dispatch.run(
            self.train_step, self._unflatten(leaves), varying, self._batch_structure
        )
        after = self._flatten(jax.tree.map(strong, state))
        outputs = jax.tree.leaves(metrics)
        # Something to wait for that is not donated to the next step.
        return after, outputs or [state.step + 0]

    def _unflatten(self, leaves: Sequence[Any]) -> TrainState:
        return eqx.combine(jax.tree.unflatten(self.structure, leaves), self._static)

    def _flatten(self, state: TrainState) -> list[Any]:
        """**Raises:** `ValueError` where the state has not the structure, shapes and dtypes it
        started with."""
        found, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(state, eqx.is_array))
        leaves = {leaf_path(path): leaf for path, leaf in found}
        missing, extra = set(self.paths) - set(leaves), set(leaves) - set(self.paths)
        if missing or extra:
            raise ValueError(
                "The state changed its structure: "
                f"missing {sorted(missing)[:3]}, new {sorted(extra)[:3]}. A step keeps all leaves."
            )
        for path, like in zip(self.paths, self.like, strict=True):
            leaf = leaves[path]
            if leaf.shape != like.shape or leaf.dtype != like.dtype:
                raise ValueError(
                    f"The leaf `{path}` of the state changed from {like.dtype}{list(like.shape)} "
                    f"to {leaf.dtype}{list(leaf.shape)}. A step keeps shapes and dtypes."
                )
        return [leaves[path] for path in self.paths]

    # Step by step

    def windows(self) -> Iterator[tuple[list[DeviceBatch], bool]]:
        """The rest of the epoch: the batches of one dispatch, and whether they end the epoch."""
        at, dispatch = self.position, self._dispatch
        held: list[DeviceBatch] = []
        most = 1
        for batch, last in self.feed.marked(at.epoch, at.batches):
            if held and not dispatch.fits(held, batch):
                yield held, False
                held = []
            if not held and dispatch.most > 1:
                most = self._most(at)
            held.append(batch)
            if last or len(held) >= most:
                yield held, last
                held = []

    def go_on_with(self, feed: Feed) -> None:
        """Takes the batches of another loader from the next epoch on.

        **Raises:** `ValueError` for batches of another structure.
        """
        if feed.structure != self._batch_structure:
            raise ValueError(
                f"The batches of the reloaded training data have the structure {feed.structure}, "
                f"but those before had {self._batch_structure}. All batches have to be alike."
            )
        feed.wait_s = self.feed.wait_s
        self.feed, self.batch_spec = feed, feed.spec

    def plan(self, schedule: Schedule, needs_state: Any) -> None:
        """Tells where blocks have to end."""
        self._schedule, self._needs_state = schedule, needs_state

    def _most(self, at: Position) -> int:
        most = self._dispatch.most
        if isinstance(self._dispatch, Block):
            return self._schedule.block(at, most, self._needs_state)
        return most

    def dispatch(self, window: list[DeviceBatch]) -> list[jax.Array]:
        """Starts the step, or steps, on these batches. Waits only for one `RUN_AHEAD` ago."""
        varying = self._dispatch.varying(window)
        try:
            if self._detect_anomaly:
                outputs = self._watched(varying)
                self.data_state = window[-1].state
                return outputs
            self.leaves, outputs = self.program(self.leaves, varying)
            self.data_state = window[-1].state
            ahead = self._ahead
            ahead.append((self.position.step, outputs[0]))
            if len(ahead) > RUN_AHEAD:
                ahead[0][1].block_until_ready()
                ahead.popleft()
        except Exception:
            if not self.program.compiling:
                self.failed_window = window
            raise
        return outputs

    def tried(
        self, state: TrainState, window: list[DeviceBatch]
    ) -> tuple[list[jax.Array], StepOutputs]:
        """The leaves after a step, and its metrics; `state`, which is copied, is left alone."""
        leaves = [jnp.copy(leaf) for leaf in self.placed_leaves(self._flatten(state))]
        leaves, outputs = self.program(leaves, self._dispatch.varying(window))
        return leaves, self.outputs(outputs, 0 if self.takes_blocks else None)

    def outputs(self, leaves: list[jax.Array], index: int | None = None) -> StepOutputs:
        return StepOutputs(leaves, self._outputs_structure, index)

    @property
    def accumulates(self) -> bool:
        return isinstance(self._dispatch, Accumulated)

    @property
    def takes_blocks(self) -> bool:
        return isinstance(self._dispatch, Block)

    def _watched(self, varying: PyTree) -> list[jax.Array]:
        before = self.leaves
        after, outputs = self.program(before, varying)
        floats = [x for x in (*after, *outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
        # Infinities are no anomaly: masks and running extrema hold them.
        if any(np.isnan(np.asarray(x)).any() for x in floats):
            step = f"the step after global step {self.position.step}"
            try:
                with jax.debug_nans(True), jax.disable_jit():
                    self._traced_step(before, varying)
            except FloatingPointError as error:
                error.add_note(f"Found by `detect_anomaly` in {step}, run eagerly.")
                raise
            raise FloatingPointError(
                f"NaN appears in {step}, but only when compiled: run eagerly, no operation gives "
                "it."
            )
        self.leaves = after
        return outputs

    def wait(self) -> None:
        """Waits for all steps under way."""
        jax.block_until_ready(self.leaves)
        self._ahead.clear()

    def failed_ahead(self) -> tuple[int, int] | None:
        """The steps before and up to the end of the first dispatch that failed on the device, if
        one did. Waits for the device."""
        for number, (before, outputs) in enumerate(self._ahead):
            try:
                outputs.block_until_ready()
            except Exception:
                following = [*self._ahead][number + 1 :][:1]
                return before, following[0][0] if following else self.position.step
        return None

    # The state

    @property
    def state(self) -> TrainState:
        if self.inside_block:
            raise RuntimeError(
                "`trainer.state` can't be read inside a block of `steps_per_dispatch` steps: only "
                "the state after the block exists. Override `needs_state(step)` of your callback, "
                "so that blocks end where it reads the state."
            )
        if self.leaves and self.leaves[0].is_deleted():
            raise RuntimeError(
                "`trainer.state` is gone: it had been donated to a step that then failed. Load the "
                "latest checkpoint instead."
            )
        return self._unflatten(self.leaves)

    @state.setter
    def state(self, state: TrainState) -> None:
        self.leaves = self.placed_leaves(self._flatten(state))

    def take_back(self, tree: TrainState) -> set[str]:
        """Takes a restored state; what is abstract in it is initialised.

        **Returns:** the fields of the state that are.
        """
        leaves = jax.tree.leaves(eqx.filter(tree, _is_array))
        absent = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
        if absent:
            self.initialise()
            for i in absent:
                leaves[i] = self.leaves[i]
        self.leaves = self.placed_leaves(leaves)
        return {field_of(self.paths[i]) for i in absent}

    def placed_leaves(self, leaves: Sequence[Any]) -> list[jax.Array]:
        return jax.device_put(list(leaves), self.shardings)

    def take_metrics(self) -> dict[str, Metric]:
        """Takes the sums of the open interval out of the state, and starts new ones."""
        first, last = self._metric_range
        taken = self.leaves[first:last]
        self.leaves[first:last] = self._fresh()
        return jax.tree.unflatten(self._metrics_structure, taken)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _where_metrics_are(arrays: TrainState) -> tuple[int, int]:
    """The range of the metrics' leaves in the state's."""
    before = len(jax.tree.leaves((arrays.step, arrays.key, arrays.task, arrays.opt_state)))
    return before, before + len(jax.tree.leaves(arrays.metrics))
