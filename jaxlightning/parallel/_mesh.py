"""One mesh, and where each array of a run lives on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from .._nearest import nearest
from ._rules import (
    AXES,
    DATA_AXES,
    Rule,
    check_rule,
    divides,
    fsdp,
    only_axes,
    spec_axes,
)


def pick_devices(devices: int | str | Sequence[jax.Device | int]) -> list[jax.Device]:
    """The devices that `Trainer(devices=...)` names: `"auto"`, `-1`, a count, or a list of devices
    or of their indices."""
    present = jax.devices()
    if isinstance(devices, str) and devices != "auto":
        raise ValueError(f'`devices={devices!r}` is unknown. Write "auto", a count, or a list.')
    if devices == "auto" or devices == -1:
        return list(present)
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(present):
            raise ValueError(
                f"`devices={devices}`, but JAX sees {len(present)} "
                f"`{present[0].platform}` device{'s' if len(present) > 1 else ''}. Write a number "
                f"from 1 to {len(present)}"
                + (
                    ", or make virtual ones with `JAX_NUM_CPU_DEVICES`."
                    if present[0].platform == "cpu"
                    else "."
                )
            )
        return list(present[:devices])
    if not isinstance(devices, list | tuple) or not devices:
        raise TypeError(f'`devices={devices!r}` is neither "auto" nor a count nor a list.')
    picked = [_one_device(device, present) for device in devices]
    if len(set(picked)) < len(picked):
        raise ValueError(f"`devices={devices!r}` has the same device twice.")
    return picked


def _one_device(device: Any, present: Sequence[jax.Device]) -> jax.Device:
    if isinstance(device, jax.Device):
        return device
    if isinstance(device, int) and 0 <= device < len(present):
        return present[device]
    raise ValueError(
        f"`devices` has the entry {device!r}, which is neither a device of `jax.devices()` nor the "
        f"index of one, from 0 to {len(present) - 1}."
    )


def make_mesh(devices: Sequence[jax.Device], shape: Mapping[str, int] | Mesh | None) -> Mesh:
    """A mesh of named axes. One size may be -1: what the others leave."""
    if isinstance(shape, Mesh):
        _check_axes(shape.axis_names)
        # `jax.make_mesh` gives Explicit axes, for which every operation would have to say how it
        # is sharded.
        automatic = (AxisType.Auto,) * len(shape.axis_names)
        return Mesh(shape.devices, shape.axis_names, axis_types=automatic)
    if not isinstance(shape, Mapping | None):
        raise TypeError(
            f"`mesh={shape!r}` is a `{type(shape).__name__}`. Write the sizes of its axes, such as "
            '`mesh={"data": -1}`, or a `jax.sharding.Mesh`.'
        )
    sizes = dict(shape or {"data": -1})
    _check_axes(sizes)
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
            raise ValueError(
                f"`mesh` has the size {size!r} for its axis `{axis}`. A size is a positive "
                "integer, or -1, which means what the others leave."
            )
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"`mesh={sizes}` does not fit {len(devices)} devices: the product of the sizes has to "
            "be their number. One size may be -1, which means what the others leave."
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    grid = np.asarray(devices, dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check_axes(axes: Iterable[str]) -> None:
    for axis in axes:
        if axis not in AXES:
            raise ValueError(
                f"`mesh` has an unknown axis `{axis}`; the axes are {AXES}.{nearest(axis, AXES)}"
            )


def leaf_path(path: Any) -> str:
    """`task/net/layers/0/weight`: how rules, checkpoints and messages name a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Placement:
    """Where arrays live: parameters by rules, batches split over the data axes.

    **Arguments:**

    - `stacks`: paths in the task of layers that are stacked along a leading axis and gathered one
      by one: that axis `fsdp` does not take.
    """

    def __init__(self, mesh: Mesh, rules: Sequence[Rule] = (), stacks: Sequence[str] = ()):
        for rule in rules:
            check_rule(rule, "`partition_rules`")
        self.mesh = mesh
        self.rules = tuple(rules)
        self.stacks = tuple(stacks)
        self.data_axes = tuple(axis for axis in DATA_AXES if axis in mesh.shape)
        self.shards = math.prod(mesh.shape[axis] for axis in self.data_axes)
        single = mesh.size == 1
        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec(self.data_axes))
        device = mesh.devices.flat[0] if single else None
        self.replicated = SingleDeviceSharding(device) if single else whole
        self.split = SingleDeviceSharding(device) if single else split
        # Takes numpy arrays to one device in a fifth of the time of `device_put`.
        self._carry = jax.jit(list, out_shardings=self.split) if single else None

    def of_leaf(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """The sharding of one leaf of the state: that of the first rule that finds its path, and
        `fsdp`, if it does too, further shards what that leaves whole.

        **Raises:** `ValueError` where the mesh does not divide the leaf.
        """
        if self.mesh.size == 1:
            return self.replicated
        return NamedSharding(self.mesh, self.explained(path, shape)[0])

    def explained(self, path: str, shape: tuple[int, ...]) -> tuple[PartitionSpec, list[str]]:
        """The spec of one leaf, and the patterns of the rules that made it."""
        spec: PartitionSpec | None = None
        patterns = []
        for pattern, rule in self.rules:
            if not re.search(pattern, path):
                continue
            if rule is fsdp:
                further = self._further(path, shape, spec)
                if further != (PartitionSpec() if spec is None else spec):
                    patterns.append("fsdp")
                spec = further
            elif spec is None:
                found = rule(shape, self.mesh) if callable(rule) else rule
                if len(found) <= len(shape):
                    found = only_axes(found, self.mesh.axis_names)
                    if self._divides(found, path, shape, pattern):
                        spec = found
                        patterns.append(pattern)
        return PartitionSpec() if spec is None else spec, patterns

    def is_stacked(self, path: str) -> bool:
        """Whether a leaf is one of stacked layers, or the optimizer's of such a one."""
        return any(f"/{stack}/" in f"/{path}" for stack in self.stacks)

    def _further(
        self, path: str, shape: tuple[int, ...], spec: PartitionSpec | None
    ) -> PartitionSpec:
        given = PartitionSpec() if spec is None else spec
        if not (self.is_stacked(path) and shape):
            return fsdp(shape, self.mesh, given)
        inner = fsdp(shape[1:], self.mesh, PartitionSpec(*given[1:]))
        return PartitionSpec(given[0] if given else None, *inner) if spec_axes(inner) else given

    def _divides(
        self, spec: PartitionSpec, path: str, shape: tuple[int, ...], pattern: str
    ) -> bool:
        if divides(NamedSharding(self.mesh, spec), shape):
            return True
        if path.startswith("opt_state/"):
            # Under a parameter's path, but of another shape: the factors of Adafactor.
            return False
        raise ValueError(
            f"The rule `{pattern}` shards `{path}` of shape {list(shape)} as {spec} over "
            f"the mesh {dict(self.mesh.shape)}, whose sizes do not divide it. Shard another "
            "axis, or put a rule with `PartitionSpec()` for this leaf before it."
        )

    def check_rules(self, paths: Sequence[str]) -> None:
        """**Raises:** `ValueError` for a rule that finds none of `paths`."""
        for pattern, _ in self.rules:
            if not any(re.search(pattern, path) for path in paths):
                some = ", ".join(f"`{path}`" for path in paths[:5])
                raise ValueError(
                    f"The rule `{pattern}` finds no leaf: it is searched for (`re.search`) in the "
                    f"paths of the state, such as {some}. Change it, or take it out."
                )

    def specs(self, task: PyTree) -> dict[str, PartitionSpec]:
        """How the arrays of a task are sharded, by their paths in it."""
        leaves = jax.tree_util.tree_flatten_with_path(task)[0]
        return {
            leaf_path(path): self.explained(f"task/{leaf_path(path)}", x.shape)[0]
            for path, x in leaves
            if hasattr(x, "shape")
        }

    def gathered(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` without the data axes: how a parameter is sharded while it is computed with."""
        return only_axes(spec, [axis for axis in spec_axes(spec) if axis not in DATA_AXES])

    def of_state(self, state: PyTree) -> list[jax.sharding.Sharding]:
        """Shardings of the array leaves of a state, in flattening order."""
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        return [self.of_leaf(leaf_path(path), leaf.shape) for path, leaf in leaves]

    def of_batch(self, batch: PyTree) -> jax.sharding.Sharding:
        """How a batch is placed: split, or, where its size does not divide, whole on every
        device, which is as exact and costs time for the one smaller batch of an epoch."""
        sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
        if any(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(batch)) or not sizes:
            return self.replicated
        return self.split if sizes[0] % self.shards == 0 else self.replicated

    def held_rows(self, size: int) -> tuple[tuple[int, int], ...]:
        """Which rows of a batch of `size` the devices of this process hold: from and to."""
        if size % self.shards:
            return ((0, size),)
        places = self.split.addressable_devices_indices_map((size,)).values()
        bounds = {index[0].indices(size)[:2] for index in places if index is not None}
        return tuple(sorted(bounds))

    def put_rows(
        self, leaves: Sequence[np.ndarray], held: Sequence[tuple[int, int]], size: int
    ) -> list[jax.Array]:
        """A batch of `size` rows on the devices of all processes, from the rows that this one
        holds, one after another."""
        sharding = self.split if size % self.shards == 0 else self.replicated
        begins = np.cumsum([0, *(stop - start for start, stop in held)]).tolist()

        def global_array(leaf: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                bounds = index[0].indices(size)[:2]
                for begin, (start, stop) in zip(begins, held, strict=False):
                    if start <= bounds[0] and bounds[1] <= stop:
                        return leaf[begin + bounds[0] - start : begin + bounds[1] - start]
                raise ValueError(f"Rows {bounds} of a batch are not held here, but {held}.")

            return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, part)

        return list(map(global_array, leaves))

    def put(self, batch: PyTree) -> PyTree:
        """A batch on the devices; what is there already is left alone."""
        sharding = self.of_batch(batch)
        leaves, structure = jax.tree.flatten(batch)
        if all(_lies(leaf, sharding) for leaf in leaves):
            return batch
        for leaf in leaves:
            if isinstance(leaf, np.ndarray):
                # On CPU a device array may alias the numpy buffer, whatever one asks for.
                leaf.flags.writeable = False
        if self._carry is not None and all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return jax.tree.unflatten(structure, self._carry(leaves))
        return jax.tree.unflatten(structure, placed(leaves, [sharding] * len(leaves)))


def placed(leaves: Sequence[Any], shardings: Sequence[jax.sharding.Sharding]) -> list[jax.Array]:
    """Arrays on the devices of `shardings`; in a job of several processes, each of which has all
    of them, on those of all."""
    if all(sharding.is_fully_addressable for sharding in shardings):
        found: list[jax.Array] = jax.device_put(list(leaves), list(shardings))
        return found
    # Not `device_put`: it would compare the values of all processes, on the devices.
    return [_everywhere(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]


def _everywhere(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        if not sharding.is_fully_replicated:
            raise ValueError("PRNG keys are not sharded over processes.")
        data = _everywhere(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _lies(leaf: Any, sharding: jax.sharding.Sharding) -> bool:
    return isinstance(leaf, jax.Array) and (
        leaf.sharding is sharding
        or leaf.sharding == sharding
        or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    )
