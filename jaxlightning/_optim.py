"""The optimizer of a run: what the task configures, as one optax transformation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from ._nearest import nearest
from ._task import TaskModule


def per_field(
    optimizers: dict[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One optimizer for each field of a task; their states are kept in a dict by field.

    {"encoder": optax.adamw(1e-5), "head": optax.adamw(1e-3)}
    """
    txs = {name: optax.with_extra_args_support(tx) for name, tx in optimizers.items()}

    def init(params: PyTree) -> dict[str, Any]:
        _check_fields(params, set(txs))
        return {name: tx.init(getattr(params, name)) for name, tx in txs.items()}

    def update(
        updates: PyTree, state: dict[str, Any], params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, dict[str, Any]]:
        new_state = {}
        for name, tx in txs.items():
            of = None if params is None else getattr(params, name)
            part, new_state[name] = tx.update(getattr(updates, name), state[name], of, **extra)
            updates = _with_field(updates, name, part)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _with_field(tree: Any, name: str, value: Any) -> Any:
    # By name, not by identity: gradients of two fields may be one and the same array.
    children, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is not tree
    )
    return jax.tree.unflatten(
        structure, [value if path[0].name == name else child for path, child in children]
    )


def _check_fields(params: PyTree, names: set[str]) -> None:
    trained = {
        field.name
        for field in dataclasses.fields(params)
        if not field.metadata.get("static") and jax.tree.leaves(getattr(params, field.name))
    }
    unknown, uncovered = sorted(names - trained), sorted(trained - names)
    if unknown:
        raise ValueError(
            f"`configure_optimizers` has an optimizer for `{unknown[0]}`, which is no field with "
            f"trainable leaves; those are {sorted(trained)}.{nearest(unknown[0], trained)}"
        )
    if uncovered:
        raise ValueError(
            f"`configure_optimizers` has no optimizer for the field `{uncovered[0]}`. Add one, or "
            "freeze the field in `trainable()`."
        )


def task_optimizer(task: TaskModule) -> optax.GradientTransformationExtraArgs:
    """`task.configure_optimizers()` as one transformation."""
    configured = task.configure_optimizers()
    parts = configured if isinstance(configured, dict) else {"": configured}
    for name, part in parts.items():
        if not (hasattr(part, "init") and hasattr(part, "update")):
            raise TypeError(
                f"`{type(task).__name__}.configure_optimizers` returned a "
                f"`{type(part).__name__}`{f' as `{name}`' if name else ''}. Return an optax "
                "transformation such as `optax.adamw(1e-3)`, or a dict from field names to "
                "transformations. Schedules are callbacks: `LearningRateSchedule`."
            )
    if isinstance(configured, dict):
        configured = per_field(configured)
    return optax.with_extra_args_support(configured)
