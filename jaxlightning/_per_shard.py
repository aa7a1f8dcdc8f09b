"""Gradients taken on each shard of a batch, and reduced once.

Left to the partitioner, the gradients of a step are reduced wherever they are made: in each of its
micro-batches, in each turn of a scan over layers. Here every shard computes its own, in the same
`training_step` on its rows, and they are summed at the end: one reduction of each parameter's
gradient, and one gather of each parameter that is sharded, whatever the step does in between.

That is right where examples do not see each other, which a task says (`independent_examples`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._metrics import Metric
from ._outputs import Outputs
from ._precision import cast_task
from ._task import TaskModule
from .parallel import Placement, leaf_path, spec_axes
from .parallel._context import all_gathered, reduced, scope
from .parallel._randomness import Draw, NotByRows, check_key, draws_by_rows, shard_key
from .parallel._rules import only_axes

if TYPE_CHECKING:
    from ._step import TrainStep

_M = TypeVar("_M", bound=Metric)


def draws_on_shards(
    step: TrainStep, task: TaskModule, batch: PyTree, key: PRNGKeyArray
) -> frozenset[Draw]:
    """Of the draws in `training_step`, those of which each shard makes its rows.

    **Raises:** `NotByRows` where the gradients cannot be taken per shard.
    """
    placement = _placement(step)
    from ._step import MicroBatches

    samples: list[PyTree] = [batch]
    if isinstance(batch, MicroBatches):
        samples = [b for b in (*batch.equal[:1], batch.ragged) if b is not None]
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise NotByRows("runs eagerly")
    check_key(key)
    found: set[Draw] = set()
    params, buffers = eqx.partition(task, step.spec)
    for sample in samples:
        leaves = jax.tree.leaves(sample)
        if placement.of_batch(sample) is not placement.split:
            raise NotByRows(f"has a batch that {placement.shards} shards do not divide")
        rows = leaves[0].shape[0]

        def trace(size: int, rows: int = rows, sample: PyTree = sample) -> Any:
            grown = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((x.shape[0] // rows * size, *x.shape[1:]), x.dtype),
                sample,
            )

            def outputs(params: PyTree, batch: PyTree, key: PRNGKeyArray) -> Any:
                found = step.outputs(params, buffers, batch, key)
                if found.task is not None:
                    raise NotByRows("returns the task with advanced buffers, which see all rows")
                return eqx.filter(found, eqx.is_array)

            return jax.make_jaxpr(outputs)(params, grown, key)

        found |= draws_by_rows(trace, rows, placement.shards)
    return frozenset(found)


def gradients_per_shard(
    step: TrainStep,
    own: frozenset[Draw],
    task: TaskModule,
    batch: PyTree,
    key: PRNGKeyArray,
    scale: Float[Array, ""] | None,
) -> tuple[PyTree, Outputs]:
    """As `TrainStep.gradients`, of the whole batch, each shard of it on its own devices."""
    placement = _placement(step)
    mesh, axes = placement.mesh, placement.data_axes
    specs = placement.specs(task)
    # Gathered in the dtype they are computed in.
    arrays, static = eqx.partition(cast_task(task, step.precision.compute), eqx.is_array)
    found, structure = jax.tree_util.tree_flatten_with_path(arrays)
    paths = [leaf_path(path) for path, _ in found]
    leaves = [leaf for _, leaf in found]
    outer = {path: _gathered_outside(path, specs[path], placement) for path in paths}
    # A leaf that is sharded over an axis that stays automatic is gathered before: of such a one,
    # the partitioner would gather everything for the sake of a gather that is written out.
    leaves = [
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, placement.gathered(specs[path])))
        if outer[path]
        else x
        for path, x in zip(paths, leaves, strict=True)
    ]
    manual = {
        path: PartitionSpec() if outer[path] else only_axes(specs[path], axes) for path in paths
    }
    trained = eqx.partition(task, step.spec)[0]
    trained_paths = [leaf_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(trained)[0]]
    whole, rows = PartitionSpec(), PartitionSpec(axes)
    names: list[str] = []

    def on_a_shard(
        leaves: list[Array], batch: PyTree, data: Array, scale: Float[Array, ""] | None
    ) -> tuple[list[Array], dict[str, Metric]]:
        with scope(placement, specs, per_shard=True):
            mine = eqx.combine(jax.tree.unflatten(structure, leaves), static)
            full = jax.tree_util.tree_map_with_path(
                lambda path, x: _full(x, leaf_path(path), manual, placement), mine
            )
            shard = jax.lax.axis_index(axes).astype(jnp.uint32)
            sum_up = functools.partial(jax.lax.psum, axis_name=axes)
            grads, outputs = step.gradients(
                full, batch, shard_key(data, shard, own), scale, across=sum_up
            )
        names[:] = outputs.terms
        parts = []
        for path, g in zip(trained_paths, jax.tree.leaves(grads), strict=True):
            g = g.astype(like[path])
            if placement.is_stacked(path):  # Reduced over the shards of a layer where gathered.
                over = [axis for axis in axes if axis not in spec_axes(manual[path])]
                parts.append(jax.lax.psum(g, tuple(over)) if over else g)
            else:
                parts.append(reduced(g, manual[path], axes))
        return parts, {name: _merged(metric, axes) for name, metric in outputs.metrics.items()}

    like = dict(zip(trained_paths, (x.dtype for x in jax.tree.leaves(trained)), strict=True))
    split = jax.shard_map(
        on_a_shard,
        mesh=mesh,
        in_specs=([manual[path] for path in paths], rows, whole, whole),
        out_specs=([manual[path] for path in trained_paths], whole),
        axis_names=set(axes),
        check_vma=False,
    )
    parts, metrics = split(leaves, batch, jax.random.key_data(key), scale)
    grads = jax.tree.unflatten(jax.tree.structure(trained), parts)
    # Every term is logged too, by the same name.
    terms: Any = {name: metrics[name] for name in names}
    return grads, Outputs(terms, metrics, None)


def _placement(step: TrainStep) -> Placement:
    assert step.placement is not None
    return step.placement


def _gathered_outside(path: str, spec: PartitionSpec, placement: Placement) -> bool:
    if placement.is_stacked(path):
        return False
    axes = set(spec_axes(spec))
    return bool(axes - set(placement.data_axes)) and bool(axes & set(placement.data_axes))


def _full(x: Any, path: str, manual: dict[str, PartitionSpec], placement: Placement) -> Any:
    if not eqx.is_array(x) or placement.is_stacked(path):
        return x
    return all_gathered(x, manual[path])


def _merged(metric: _M, axes: tuple[str, ...]) -> _M:
    """A metric of all shards from one a shard."""
    if type(metric).merge is Metric.merge:
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), metric)
    parts = jax.tree.map(lambda x: jax.lax.all_gather(x, axes), metric)
    return _folded(parts, jax.tree.leaves(parts)[0].shape[0])


def _folded(parts: _M, count: int) -> _M:
    """The merge of `count` metrics along a leading axis: neighbours first, to keep their order."""
    if count == 1:
        return jax.tree.map(lambda x: x[0], parts)
    pairs, odd = divmod(count, 2)
    first, second = (jax.tree.map(lambda x, i=i: x[i : 2 * pairs : 2], parts) for i in (0, 1))
    merged = jax.vmap(lambda a, b: a.merge(b))(first, second)
    rest = jax.tree.map(lambda x: x[2 * pairs :], parts)
    parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), merged, rest)
    return _folded(parts, pairs + odd)
