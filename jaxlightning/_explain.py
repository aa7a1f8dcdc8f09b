"""How a run's state is sharded, leaf by leaf, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._init import TaskSource, call_configured, state_builder
from ._optim import task_optimizer
from ._say import say, warn
from ._step import TRAIN, TrainStep, owns_update, step_key
from ._task import TaskModule, trainable_spec
from .parallel import Placement, leaf_path, spec_axes
from .parallel._rules import SMALL

if TYPE_CHECKING:
    from ._trainer import Trainer


class Leaf(NamedTuple):
    """One array of the state, and its place."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int
    """Of the whole array."""
    bytes_a_device: int
    why: str

    @property
    def is_replicated(self) -> bool:
        return self.bytes_a_device == self.bytes


class Sharding(NamedTuple):
    """How a state is sharded. `str()` gives a table."""

    mesh: dict[str, int]
    leaves: list[Leaf]
    gradients: str
    """How gradients are taken: a sentence."""

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def bytes_a_device(self) -> int:
        return sum(leaf.bytes_a_device for leaf in self.leaves)

    def __str__(self) -> str:
        head = ("leaf", "shape", "spec", "bytes a device", "why")
        rows = [
            (
                leaf.path,
                f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]",
                _text(leaf.spec),
                f"{leaf.bytes_a_device:,}",
                leaf.why,
            )
            for leaf in self.leaves
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        whole, part = self.bytes, self.bytes_a_device
        lines.append(
            f"{part:,} bytes a device of {whole:,} ({part / max(whole, 1):.1%}), mesh {self.mesh}"
        )
        return "\n".join([*lines, self.gradients])


def explain_sharding(
    trainer: Trainer, task: Any, batch: PyTree | None = None, warn_above: int = 2**26
) -> Sharding:
    """As `Trainer.explain_sharding`, which documents it."""
    source = TaskSource(task)
    abstract = source.task
    placement = trainer._placement_for(abstract)
    concrete = task if isinstance(task, TaskModule) else abstract
    tx = call_configured(lambda: task_optimizer(concrete), abstract, "configure_optimizers")
    spec, precision = trainable_spec(abstract), trainer.precision
    build = state_builder(source, spec, tx, precision, counts_skipped=False)
    state = eqx.filter_eval_shape(build, source.given, jax.random.key(0))
    found = jax.tree_util.tree_flatten_with_path(eqx.filter(state, _is_abstract))[0]
    paths = [leaf_path(path) for path, _ in found]
    placement.check_rules(paths)
    leaves = [_leaf(placement, path, x) for path, (_, x) in zip(paths, found, strict=True)]
    for leaf in leaves if placement.mesh.size > 1 else ():
        if leaf.is_replicated and leaf.bytes > warn_above:
            warn(
                f"`{leaf.path}` is whole on each of {placement.mesh.size} devices, and takes "
                f'{leaf.bytes:,} bytes there: {leaf.why}. Shard it with `strategy="fsdp"` or a '
                "rule of its own."
            )
    step = TrainStep(spec, optax.with_extra_args_support(tx), precision, placement=placement)
    how = "Without a batch, it is unknown how gradients are taken; pass `batch=`."
    if owns_update(abstract):
        how = "The task owns its update, and shards it by itself."
    elif placement.mesh.size == 1:
        how = "There is one device."
    elif batch is not None:
        how = _gradients(step, state.task, batch)
    return Sharding(dict(placement.mesh.shape), leaves, how)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _leaf(placement: Placement, path: str, x: jax.ShapeDtypeStruct) -> Leaf:
    mesh = placement.mesh
    spec, patterns = placement.explained(path, x.shape)
    whole = x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        whole = jax.eval_shape(jax.random.key_data, x)
    size = whole.size * whole.dtype.itemsize
    share = math.prod(NamedSharding(mesh, spec).shard_shape(x.shape)) if x.size else 0
    part = size * share // x.size if x.size else 0
    return Leaf(
        path=path,
        shape=x.shape,
        dtype=str(x.dtype),
        spec=spec,
        bytes=size,
        bytes_a_device=part,
        why=_why(placement, x.shape, spec, patterns),
    )


def _why(
    placement: Placement, shape: tuple[int, ...], spec: PartitionSpec, patterns: list[str]
) -> str:
    if placement.mesh.size == 1:
        return "one device"
    if patterns:
        return " and ".join(p if p == "fsdp" else f"rule `{p}`" for p in patterns)
    size = placement.mesh.shape.get("fsdp", 1)
    if size == 1 or not any(pattern == ".*" for pattern, _ in placement.rules):
        return "no rule"
    if math.prod(shape) < SMALL:
        return f"small: fewer than {SMALL:,} numbers"
    return f"no axis that {size} divides"


def _gradients(step: TrainStep, task: TaskModule, batch: PyTree) -> str:
    from ._per_shard import draws_on_shards
    from .data._loader import abstract
    from .parallel._randomness import NotByRows

    assert step.placement is not None
    shards = step.placement.shards
    name = type(task).__name__
    if shards == 1:
        return "Gradients are those of the whole batch, which is not split."
    if not task.independent_examples:
        return (
            f"Gradients are taken of the whole batch at once, and reduced wherever they are made, "
            f"in micro-batches and scans too: `{name}` does not say `independent_examples = True`."
        )
    try:
        draws_on_shards(step, task, abstract(batch), step_key(jax.random.key(0), TRAIN, 0))
    except NotByRows as reason:
        return (
            f"Gradients are reduced wherever they are made, in micro-batches and scans too: "
            f"`{name}` {reason}."
        )
    return f"Gradients are taken on each of {shards} shards of the batch, and reduced once a step."


def announce(placement: Placement, paths: list[str], shapes: list[tuple[int, ...]]) -> None:
    """Says how much of a state FSDP shards, where it does."""
    size = placement.mesh.shape.get("fsdp", 1)
    if size == 1:
        return
    numbers = [math.prod(shape) for shape in shapes]
    sharded = [
        "fsdp" in spec_axes(placement.explained(path, shape)[0])
        for path, shape in zip(paths, shapes, strict=True)
    ]
    share = sum(n for n, is_sharded in zip(numbers, sharded, strict=True) if is_sharded)
    say(
        f"FSDP over {size} devices shards {sum(sharded)} of {len(paths)} arrays, "
        f"{share / max(sum(numbers), 1):.1%} of the state; the small ones, and those whose axes "
        f"{size} does not divide, stay whole (`trainer.explain_sharding(task)` lists them)."
    )


def _text(spec: PartitionSpec) -> str:
    return f"({', '.join('-' if e is None else str(e) for e in spec)})" if len(spec) else "whole"
