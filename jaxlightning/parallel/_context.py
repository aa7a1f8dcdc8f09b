"""What a task may say of its arrays' places while it is traced; without a mesh it says nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._nearest import nearest
from ._mesh import Placement, leaf_path
from ._rules import AXES, only_axes, spec_axes

_T = TypeVar("_T")


class _Scope(NamedTuple):
    placement: Placement
    specs: Mapping[str, PartitionSpec]
    """How the task's leaves are sharded, by their paths."""
    per_shard: bool
    """Whether the task runs on one shard of the batch, inside `jax.shard_map`."""

    def constrained(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        spec = only_axes(spec, self.placement.mesh.axis_names)
        if not self.per_shard:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.placement.mesh, spec))
        spec = self.placement.gathered(spec)
        if not spec_axes(spec):
            return x
        mesh = jax.sharding.get_abstract_mesh()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


_scope: ContextVar[_Scope | None] = ContextVar("jaxlightning scope", default=None)


@contextlib.contextmanager
def scope(
    placement: Placement | None, specs: Mapping[str, PartitionSpec], *, per_shard: bool = False
) -> Iterator[None]:
    """Around the tracing of a task's methods: where its arrays live."""
    token = _scope.set(None if placement is None else _Scope(placement, specs, per_shard))
    try:
        yield
    finally:
        _scope.reset(token)


@contextlib.contextmanager
def gathered(placement: Placement | None, task: _T) -> Iterator[tuple[_T, Callable[[_T], _T]]]:
    """The task with what is sharded over the batch's axes gathered, once, while it is computed
    with, but for layers that it gathers itself; and how its gradients are sharded again."""
    if placement is None or placement.mesh.size == 1:
        yield task, lambda grads: grads
        return
    specs = placement.specs(task)

    def placed(tree: _T, place: Callable[[str, PartitionSpec], PartitionSpec | None]) -> _T:
        def one(path: Any, x: Any) -> Any:
            name = leaf_path(path)
            spec = place(name, specs[name]) if name in specs else None
            if spec is None:
                return x
            return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, spec))

        return jax.tree_util.tree_map_with_path(one, tree)

    def before(name: str, spec: PartitionSpec) -> PartitionSpec | None:
        whole = placement.gathered(spec)
        return None if whole == spec or placement.is_stacked(name) else whole

    def after(name: str, spec: PartitionSpec) -> PartitionSpec | None:
        return spec if spec_axes(spec) else None

    with scope(placement, specs):
        yield placed(task, before), lambda grads: placed(grads, after)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Says, inside a task's methods, over which axes of the mesh an activation is sharded.

        x = constrain(x, DATA_AXES, "context")        # (batch, seq, hidden)

    `axes` has an entry for each leading axis of `x`: a name, several, or `None`. Names that the
    mesh of the run lacks are left out, so the same task runs on every mesh and on one device.
    A context-parallel run of a long sequence is this and `Trainer(mesh={"context": 4})`.

    **Raises:** `ValueError` for an unknown axis, or more entries than `x` has axes.
    """
    for axis in spec_axes(axes):
        if axis not in AXES:
            raise ValueError(
                f'`constrain` got the unknown axis "{axis}"; the axes are {AXES}.'
                f"{nearest(axis, AXES)}"
            )
    if len(axes) > x.ndim:
        raise ValueError(
            f"`constrain` got {len(axes)} entries for an array of {x.ndim} axes, of shape "
            f"{x.shape}. Leave out those of axes that it lacks."
        )
    found = _scope.get()
    return x if found is None else found.constrained(x, PartitionSpec(*axes))


def axis_size(axis: str) -> int:
    """The size of an axis of the mesh for which a task's method is traced; 1 where it has none."""
    found = _scope.get()
    return 1 if found is None else found.placement.mesh.shape.get(axis, 1)


def gather_layer(layer: _T, stack: str) -> _T:
    """One layer of a stacked model with its parameters whole, inside the scan over its layers.

        def body(x, layer):
            layer = gather_layer(layer, "blocks")
            return jax.vmap(layer)(x), None
        x, _ = jax.lax.scan(jax.checkpoint(body), x, self.blocks)

    A step gathers sharded parameters at its start. Those of the fields in the task's
    `gathered_in_scan` it leaves sharded: they are gathered here, a layer at a time, and their
    gradients reduced a layer at a time, which bounds what a device holds to one layer. With
    `jax.checkpoint` around the body the backward pass gathers them again, instead of keeping them.

    **Arguments:**

    - `layer`: what the scan hands its body: leaves without their leading axis.
    - `stack`: the path in the task of what is scanned over, such as `"blocks"`.
    """
    found = _scope.get()
    if found is None:
        return layer
    leaves, structure = jax.tree_util.tree_flatten_with_path(layer)
    gathered = []
    for path, x in leaves:
        name = f"{stack}/{leaf_path(path)}"
        spec = PartitionSpec(*found.specs.get(name, PartitionSpec())[1:])
        if not spec_axes(spec):
            gathered.append(x)
        elif found.per_shard:
            gathered.append(all_gathered(x, only_axes(spec, found.placement.data_axes)))
        else:
            gathered.append(found.constrained(x, found.placement.gathered(spec)))
    return jax.tree.unflatten(structure, gathered)


def all_gathered(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The whole of what is sharded by `spec`, inside `jax.shard_map`."""
    for axis, entry in enumerate(spec):
        if entry is not None:
            x = jax.lax.all_gather(x, entry, axis=axis, tiled=True)
    return x


def reduced(x: jax.Array, spec: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """The sum over the shards of a batch, inside `jax.shard_map`: of what is sharded by `spec`
    each shard gets its part."""
    for axis, entry in enumerate(spec):
        if entry is not None:
            x = jax.lax.psum_scatter(x, entry, scatter_dimension=axis, tiled=True)
    rest = tuple(axis for axis in axes if axis not in spec_axes(spec))
    return jax.lax.psum(x, rest) if rest else x
