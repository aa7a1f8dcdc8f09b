"""Evaluation: a task and a loader in; exact sums, or predictions, out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ._checks import traced
from ._fit import RUN_AHEAD, StepOutputs
from ._init import empty_metrics
from ._metrics import Metric
from ._precision import Precision
from ._program import Program
from ._step import EvalStep
from ._stream import Sums, merged, read, start_reading
from ._task import TaskModule
from .data import DeviceBatch, Feed
from .parallel import Placement

_PIECE = 64
"""Batches whose sums are added in float32; beyond, on the host in float64."""


class EvalProgram:
    """The compiled evaluation step of one stage for the batches of one loader.

    The sums and the batch's index are kept on the device from batch to batch.
    """

    def __init__(
        self,
        step: EvalStep,
        task: TaskModule,
        feed: Feed,
        placement: Placement,
        on_recompile: str,
        compiler_options: dict[str, Any] | None,
    ):
        self._step = step
        self.feed = feed
        self._batch_structure = feed.structure
        self._placement = placement
        dynamic, self._static = eqx.partition(task, eqx.is_array)
        self._task_structure: Any = jax.tree.structure(dynamic)
        outputs = abstract_outputs(step, task, feed.spec)
        self.predicts = step.stage == "predict"
        self.like: dict[str, Metric] = {} if self.predicts else outputs
        self.structure = jax.tree.structure(outputs)
        several = placement.mesh.size > 1
        whole: dict[str, Any] = {"out_shardings": placement.replicated} if several else {}
        self._fresh = jax.jit(
            lambda: [jnp.int32(0), *jax.tree.leaves(empty_metrics(self.like))], **whole
        )
        # Predictions of several processes are gathered: each of them returns all.
        apart = self.predicts and placement.replicated.is_fully_addressable
        outputs_at = None if apart else placement.replicated
        self.program = Program(
            f"{step.stage} step",
            self._traced,
            donate=True,
            on_recompile=on_recompile,
            out_shardings=(placement.replicated, outputs_at) if several else None,
            compiler_options=compiler_options,
        )

    def fits(self, task: TaskModule, feed: Feed) -> bool:
        """Whether this program can evaluate `task` on such batches: all that is static is the
        same."""
        dynamic, static = eqx.partition(task, eqx.is_array)
        same = bool(jax.tree.structure(dynamic) == self._task_structure)
        same &= feed.structure == self._batch_structure
        same &= jax.tree.leaves(feed.spec) == jax.tree.leaves(self.feed.spec)
        return same and bool(eqx.tree_equal(static, self._static))

    def _traced(self, kept: list[jax.Array], varying: PyTree) -> Any:
        task_leaves, key, batch_leaves = varying
        index, *sums = kept
        task = eqx.combine(jax.tree.unflatten(self._task_structure, task_leaves), self._static)
        batch = jax.tree.unflatten(self._batch_structure, batch_leaves)
        found = self._step(task, key, batch, index)
        if not self.predicts:
            totals = jax.tree.unflatten(jax.tree.structure(self.like), sums)
            sums = jax.tree.leaves({name: m.merge(found[name]) for name, m in totals.items()})
        return [index + 1, *sums], jax.tree.leaves(found)

    def __call__(
        self,
        task: TaskModule,
        key: PRNGKeyArray,
        *,
        limit: int | None,
        before: Callable[[DeviceBatch, int], None],
        after: Callable[[Any, DeviceBatch, int], None],
        poll: Callable[[], None],
    ) -> Iterator[list[jax.Array]]:
        """Evaluates batch by batch; `self.sums` holds the sums after the last one.

        **Yields:** each batch's output leaves: metrics, or predictions.
        """
        task_leaves = jax.tree.leaves(eqx.filter(task, eqx.is_array))
        kept = self._fresh()
        for shape in self.feed.shapes:
            poll()
            leaves = jax.tree.leaves(self._abstract(shape))
            self.program.compile(kept, (task_leaves, key, leaves))
        poll()
        pieces: list[Sums] = []
        ahead: deque[jax.Array] = deque()
        for number, batch in enumerate(self.feed.epoch(0)):
            if limit is not None and number >= limit:
                break
            before(batch, number)
            kept, outputs = self.program(kept, (task_leaves, key, batch.leaves))
            after(outputs, batch, number)
            ahead.append(outputs[0])
            if len(ahead) > RUN_AHEAD:
                ahead.popleft().block_until_ready()
            yield outputs
            poll()
            if (number + 1) % _PIECE == 0:
                pieces.append(self._cut(kept))
                kept = [kept[0], *self._fresh()[1:]]
        self.sums = merged(read([*pieces, self._cut(kept)]))

    def _cut(self, kept: list[jax.Array]) -> Sums:
        sums = jax.tree.unflatten(jax.tree.structure(self.like), kept[1:])
        start_reading(sums)
        return sums

    def _abstract(self, shape: PyTree) -> PyTree:
        if self._placement.mesh.size == 1:
            return shape
        sharding = self._placement.of_batch(shape)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shape
        )

    def outputs(self, leaves: list[jax.Array]) -> Any:
        if self.predicts:
            return jax.tree.unflatten(self.structure, leaves)
        return StepOutputs(leaves, self.structure)

    def predictions(self, leaves: list[Any]) -> PyTree:
        """One batch's predictions on the host."""
        return jax.tree.unflatten(self.structure, list(map(np.asarray, jax.device_get(leaves))))


def abstract_outputs(step: EvalStep, task: TaskModule, batch: PyTree) -> Any:
    """What an evaluation step gives for such a batch, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with traced(task, f"{step.stage}_step", batch):
        return eqx.filter_eval_shape(step.__call__, task, key, batch, 0)


def inference(task: TaskModule) -> TaskModule:
    """The task as it is evaluated: dropout off, running statistics."""
    return eqx.nn.inference_mode(task)


class Evaluator:
    """The evaluation programs of a Trainer, by stage and loader; compiled once, used often."""

    def __init__(
        self,
        placement_for: Callable[[TaskModule], Placement],
        precision: Precision,
        on_recompile: str,
        compiler_options: dict[str, Any] | None,
    ):
        self._placement_for, self._precision = placement_for, precision
        self._options = (on_recompile, compiler_options)
        self._programs: dict[tuple[str, str], EvalProgram] = {}
        self._replaced_compile_s, self._replaced_recompilations = 0.0, 0

    def program(self, stage: str, loader: str, task: TaskModule, feed: Feed) -> EvalProgram:
        found = self._programs.get((stage, loader))
        if found is None or not found.fits(task, feed):
            if found is not None:
                self._replaced_compile_s += found.program.compile_s
                self._replaced_recompilations += found.program.recompilations
            placement = self._placement_for(task)
            several = placement if placement.mesh.size > 1 else None
            step = EvalStep(stage, self._precision, several)
            found = EvalProgram(step, task, feed, placement, *self._options)
            self._programs[stage, loader] = found
        found.feed = feed
        return found

    @property
    def compile_s(self) -> float:
        """Of all programs, those included that were replaced."""
        own = sum(p.program.compile_s for p in self._programs.values())
        return self._replaced_compile_s + own

    @property
    def recompilations(self) -> int:
        own = sum(p.program.recompilations for p in self._programs.values())
        return self._replaced_recompilations + own


def gather(batches: list[PyTree]) -> PyTree:
    """Predictions of all batches as one tree of numpy arrays, example by example."""
    if not batches:
        return None

    def joined(*leaves: np.ndarray) -> np.ndarray:
        return np.concatenate(leaves) if leaves[0].ndim else np.stack(leaves)

    return jax.tree.map(joined, *batches)
