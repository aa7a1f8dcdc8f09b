"""Logs the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlightning._callback import Callback, InsideStep
from jaxlightning._metrics import Last

from ._learning_rate import ScheduleState
from ._plateau import PlateauState


def _is_factor(node: Any) -> bool:
    return isinstance(node, ScheduleState | PlateauState)


def _is_injected(node: Any) -> bool:
    """Whether this is a state of `optax.inject_hyperparams` that holds a learning rate."""
    return "learning_rate" in (getattr(node, "hyperparams", None) or ())


def _injected(opt_state: PyTree) -> Iterator[tuple[str, Float[Array, ""]]]:
    """Injected learning rates, by the fields of the task they are for."""
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_injected)[0]
    for path, node in nodes:
        if _is_injected(node):
            fields = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            yield "/".join(fields), jnp.asarray(node.hyperparams["learning_rate"])


class LearningRateMonitor(Callback):
    """Logs `lr`, the learning rate of the latest step.

        Trainer(callbacks=[LearningRateSchedule("cosine"), LearningRateMonitor(base=1e-3)])

    Optax keeps no learning rate that is a mere number, so it is either given as `base`, or the
    optimizer is made by `optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)`. It is
    multiplied by the factors of [`LearningRateSchedule`][] and [`ReduceLROnPlateau`][]. Where no
    learning rate is known, `lr_factor` is logged, the product of those. Several optimizers, one
    for each field of the task, are `lr/{field}`.
    """

    def __init__(self, base: int | float | None = None):
        self.base = base

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        nodes = jax.tree.leaves(view.opt_state, is_leaf=_is_factor)
        factors = [node.factor for node in nodes if _is_factor(node)]
        bases = dict(_injected(view.opt_state))
        if self.base is not None:
            bases = {"": jnp.float32(self.base)}
        if not factors and not bases:
            raise ValueError(
                "`LearningRateMonitor` found no learning rate in the optimizer's state. Write "
                "`LearningRateMonitor(base=1e-3)`, add a `LearningRateSchedule`, or make the "
                "optimizer by `optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)`."
            )
        product = jnp.float32(1.0)
        for factor in factors:
            product *= factor
        if not bases:
            return {"lr_factor": Last.of(product)}
        return {
            f"lr/{field}" if field else "lr": Last.of(base.astype(jnp.float32) * product)
            for field, base in bases.items()
        }
