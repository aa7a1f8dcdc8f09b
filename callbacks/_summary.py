"""What is about to be trained: parameters, bytes and FLOPs, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxlightning._callback import Callback
from jaxlightning._flops import FlopCount, analyse_flops, mark_parts, submodules
from jaxlightning._precision import Precision
from jaxlightning._state import TrainState
from jaxlightning._step import MicroBatches, TrainStep, owns_update
from jaxlightning._task import TaskModule, trainable_spec

from ._announce import announce

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class ModelSummary(Callback):
    """Prints a table of the task's parts when a fit starts.

    Parameters are all floating-point arrays that are not buffers; some of them may be frozen.
    FLOPs are those of one optimizer step on one global batch, forward and backward, booked to
    the part whose methods do the work. They are counted on the program, not estimated: matrix
    products and convolutions, two operations a multiply-add, loops with their length. Nothing
    runs on the device for it; the step is traced once more. A Flax module is one part.

    **Arguments:**

    - `max_depth`: how many levels of the task's tree are shown; 0 shows totals only, -1 all.
    """

    def __init__(self, max_depth: int = 1):
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(
                f"`ModelSummary(max_depth={max_depth!r})` has to be a number of levels, 0 for "
                "totals only, or -1 for all."
            )
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Trainer) -> None:
        if jax.process_index() == 0:
            flops = analyse_flops(trainer.train_step_jaxpr())
            if trainer.steps_per_dispatch > 1:
                # The program's own loop over steps, of which we want one turn.
                flops = flops._replace(unbounded_loops=flops.unbounded_loops - 1)
            parts = flops_by_part(
                trainer.task,
                trainer.train_batch_spec,
                trainer.precision,
                trainer.accumulate_grad_batches,
            )
            announce(str(summarise(trainer.task, self.max_depth, flops, parts)))


class Part(NamedTuple):
    """One row. Everything counts what is below it too."""

    path: str
    """Where in the task, such as `.encoder.layers[0]`."""
    type: str
    parameters: int
    trainable: int
    buffers: int
    """Entries of arrays that are never trained."""
    bytes: int
    flops: int | None
    """Of one step; `None` where FLOPs are known for the whole only."""


class Summary(NamedTuple):
    """A task in numbers; `str` makes it a table."""

    parts: list[Part]
    total: Part
    flops: FlopCount

    def __str__(self) -> str:
        head = ("part", "type", "parameters", "trainable", "bytes", "FLOPs a step")
        rows = [head, *map(_cells, self.parts), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            texts = [cell.ljust(w) for cell, w in zip(row[:2], widths[:2], strict=True)]
            numbers = [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(texts + numbers))
        rule = "─" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], *([rule] if self.parts else []), lines[-1]]
        return "\n".join(lines + list(self._remarks()))

    def _remarks(self) -> Iterator[str]:
        if self.total.buffers:
            yield f"{self.total.buffers:,} further numbers are buffers, which are never trained."
        if self.flops.recomputed:
            share = self.flops.recomputed / self.flops.total
            yield f"{share:.0%} of the FLOPs are recomputation (`jax.checkpoint`)."
        if self.flops.unbounded_loops:
            yield (
                f"{self.flops.unbounded_loops} loops of unknown length (`while_loop`) are counted "
                "as one turn, so the FLOPs are a lower bound."
            )


def summarise(
    task: TaskModule, max_depth: int, flops: FlopCount, parts: dict[str, int] | None
) -> Summary:
    """Counts a task, whose arrays may be abstract.

    **Arguments:**

    - `max_depth`: see `ModelSummary`.
    - `flops`: those of the whole step.
    - `parts`: FLOPs by path, each booked once; see `flops_by_part`.
    """
    parameters = jax.tree.leaves(TaskModule.trainable(task))
    trained = jax.tree.leaves(trainable_spec(task))
    leaves = [
        (jax.tree_util.keystr(path), leaf, is_parameter, is_trained)
        for (path, leaf), is_parameter, is_trained in zip(
            jax.tree_util.tree_leaves_with_path(task), parameters, trained, strict=True
        )
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    ]

    def part(path: str, node: Any, booked: int | None) -> Part:
        below = [entry for entry in leaves if _is_within(entry[0], path)]
        return Part(
            path=path,
            type=type(node).__name__,
            parameters=sum(leaf.size for _, leaf, ok, _ in below if ok),
            trainable=sum(leaf.size for _, leaf, _, ok in below if ok),
            buffers=sum(leaf.size for _, leaf, ok, _ in below if not ok),
            bytes=sum(_bytes(leaf) for _, leaf, _, _ in below),
            flops=booked,
        )

    rows = []
    for path, node in _levels(task, "", max_depth):
        booked = None
        if parts is not None and _has_methods(node):
            booked = sum(count for name, count in parts.items() if _is_within(name, path))
        rows.append(part(path, node, booked))
    return Summary(rows, part("", task, flops.total)._replace(path="total"), flops)


def flops_by_part(
    task: TaskModule, batch: PyTree, precision: Precision, accumulate: int = 1
) -> dict[str, int] | None:
    """FLOPs of one step on `accumulate` batches like the abstract `batch`, by the innermost part
    whose methods do the work. `None` for a task that owns its update."""
    if owns_update(task):
        return None
    tx = optax.with_extra_args_support(optax.identity())
    state: TrainState = eqx.filter_eval_shape(
        lambda task: TrainState(jnp.int32(0), jax.random.key(0), task, tx.init(None), {}),
        mark_parts(task),
    )
    step = TrainStep(trainable_spec(state.task), tx, precision, collect=False)
    batches = batch if accumulate == 1 else MicroBatches([batch] * accumulate)
    return analyse_flops(step, state, batches).parts


def _levels(node: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth != 0:
        for below, child in submodules(node, path):
            yield below, child
            yield from _levels(child, below, depth - 1)


def _has_methods(node: Any) -> bool:
    """Whether work can be booked to it: parameters in a dict, such as Flax's, do none."""
    is_module = lambda x: isinstance(x, eqx.Module)
    return any(map(is_module, jax.tree.leaves(node, is_leaf=is_module)))


def _is_within(path: str, whole: str) -> bool:
    return path == whole or (path.startswith(whole) and path[len(whole)] in ".[")


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.size * jnp.dtype(leaf.dtype).itemsize


def _cells(part: Part) -> tuple[str, ...]:
    return (
        part.path,
        part.type,
        f"{part.parameters:,}",
        f"{part.trainable:,}",
        scaled(part.bytes, "B"),
        "" if part.flops is None else scaled(part.flops, ""),
    )


def scaled(value: int | float, unit: str) -> str:
    """`value` with three digits and a decimal prefix: `46.7 MB`."""
    prefixes = iter("kMGTPE")
    prefix = ""
    while abs(value) >= 999.5:
        value /= 1000
        prefix = next(prefixes)
    return f"{value:.3g} {prefix}{unit}".rstrip()
