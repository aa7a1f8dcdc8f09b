"""One mesh, and where each array of a run lives on it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

Spec = PartitionSpec | Callable[[tuple[int, ...], Mesh], PartitionSpec]
Rule = tuple[str, Spec]
"""A regular expression on a leaf's path, and how a leaf that it finds is sharded."""

AXES = ("data", "fsdp", "tensor")
DATA_AXES = ("data", "fsdp")
"""The axes over which a batch is split."""


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
                f"`mesh` has an unknown axis `{axis}`; the axes are {AXES}.{_nearest_axis(axis)}"
            )


def fsdp(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Shards the largest axis that the mesh's `fsdp` axis divides; small leaves stay whole."""
    size = mesh.shape.get("fsdp", 1)
    axes = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or not axes or math.prod(shape) < 2**10:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * largest, "fsdp")


STRATEGIES: dict[str, tuple[Rule, ...]] = {"auto": (), "ddp": (), "fsdp": ((r".*", fsdp),)}


def strategy_rules(strategy: str | Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a strategy's name, or the rules themselves."""
    if not isinstance(strategy, str):
        for rule in strategy if isinstance(strategy, list | tuple) else [strategy]:
            _check_rule(rule, "`strategy`")
        return tuple(strategy)
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(strategy, STRATEGIES, n=1)
        hint = f" Did you mean `{near[0]!r}`?" if near else ""
        raise ValueError(
            f"`strategy={strategy!r}` is unknown; it is one of {sorted(STRATEGIES)}, or a list of "
            f"`(regex on the leaf's path, PartitionSpec)`.{hint}"
        )
    return STRATEGIES[strategy]


def _check_rule(rule: Any, whose: str) -> None:
    is_pair = isinstance(rule, list | tuple) and len(rule) == 2
    if not (
        is_pair
        and isinstance(rule[0], str)
        and (isinstance(rule[1], PartitionSpec) or callable(rule[1]))
    ):
        raise TypeError(
            f"{whose} has the rule {rule!r}. A rule is a pair of a regular expression on a "
            'leaf\'s path and a `PartitionSpec`: `("head/weight", PartitionSpec("tensor"))`.'
        )
    for axis in () if callable(rule[1]) else spec_axes(rule[1]):
        if axis not in AXES:
            raise ValueError(
                f'{whose} shards `{rule[0]}` over an unknown axis "{axis}"; the axes are {AXES}.'
                f"{_nearest_axis(axis)}"
            )


def _nearest_axis(axis: str) -> str:
    near = difflib.get_close_matches(axis, AXES, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def spec_axes(spec: Iterable[Any]) -> list[str]:
    """The names of the mesh's axes in a `PartitionSpec`."""
    entries = [entry for entry in spec if entry is not None]
    return [axis for e in entries for axis in (e if isinstance(e, tuple) else (e,))]


def _check_divides(
    sharding: NamedSharding, path: str, shape: tuple[int, ...], pattern: str
) -> None:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        raise ValueError(
            f"The rule `{pattern}` shards `{path}` of shape {list(shape)} as {sharding.spec} over "
            f"the mesh {dict(sharding.mesh.shape)}, whose sizes do not divide it. Shard another "
            "axis, or put a rule with `PartitionSpec()` for this leaf before it."
        ) from None


def leaf_path(path: Any) -> str:
    """`task/net/layers/0/weight`: how rules, checkpoints and messages name a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Placement:
    """Where arrays live: parameters by rules, batches split over the data axes."""

    def __init__(self, mesh: Mesh, rules: Sequence[Rule] = ()):
        for rule in rules:
            _check_rule(rule, "`partition_rules`")
        self.mesh = mesh
        self.rules = tuple(rules)
        self.shards = math.prod(mesh.shape.get(axis, 1) for axis in DATA_AXES)
        single = mesh.size == 1
        device = mesh.devices.flat[0]
        axes = tuple(axis for axis in DATA_AXES if axis in mesh.shape)
        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec(axes))
        self.replicated = SingleDeviceSharding(device) if single else whole
        self.split = SingleDeviceSharding(device) if single else split
        # Takes numpy arrays to one device in a fifth of the time of `device_put`.
        self._carry = jax.jit(list, out_shardings=self.split) if single else None

    def of_leaf(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """The sharding of one leaf of the state: that of the first rule that finds its path."""
        if self.mesh.size == 1:
            return self.replicated
        for pattern, spec in self.rules:
            if re.search(pattern, path):
                found = spec(shape, self.mesh) if callable(spec) else spec
                if len(found) <= len(shape):
                    sharding = NamedSharding(self.mesh, self._present(found))
                    _check_divides(sharding, path, shape, pattern)
                    return sharding
        return self.replicated

    def _present(self, spec: PartitionSpec) -> PartitionSpec:
        """Without the axes that this mesh lacks: what is sharded over them is whole here."""

        def kept(entry: Any) -> Any:
            axes = tuple(axis for axis in spec_axes([entry]) if axis in self.mesh.shape)
            return axes[0] if len(axes) == 1 else axes or None

        return PartitionSpec(*map(kept, spec))

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
        return jax.tree.unflatten(structure, jax.device_put(leaves, sharding))


def _lies(leaf: Any, sharding: jax.sharding.Sharding) -> bool:
    return isinstance(leaf, jax.Array) and (
        leaf.sharding is sharding
        or leaf.sharding == sharding
        or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    )
