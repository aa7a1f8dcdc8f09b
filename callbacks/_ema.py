"""An exponential moving average of the parameters, kept beside them on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jaxlightning._callback import Callback

if TYPE_CHECKING:
    from jaxlightning._task import TaskModule
    from jaxlightning._trainer import Trainer


class Averaged(NamedTuple):
    """The state of the averaging optimizer: the average, and the state of the one it wraps."""

    updates: Int[Array, ""]
    """How many there were. Refused steps are none."""
    average: PyTree
    """In the structure of the trainable parameters; at least float32."""
    inner: PyTree


class ExponentialMovingAverage(Callback):
    """Averages the parameters over the steps; what is evaluated and returned is the average.

        average = decay · average + (1 − decay) · parameters        after every n-th update

    The average is part of the optimizer's state: computed inside the compiled step, sharded like
    the parameters, saved and restored with them, and bitwise unchanged by a refused step. It is
    kept in float32 if parameters are narrower, or small changes would be rounded away. Validation,
    test and `fit`'s return value use it; training goes on with the parameters. Buffers, such as
    batch-norm statistics, are not averaged: they are those of the parameters.

    **Arguments:**

    - `decay`: how much of the average is kept; it looks back about 1 / (1 − decay) updates.
    - `every_n_steps`: average every n-th update only.
    - `start_step`: until then the average is the parameters themselves, so that it does not drag
      the initialisation along.
    """

    outermost = True

    def __init__(self, decay: int | float = 0.999, every_n_steps: int = 1, start_step: int = 0):
        if not 0 <= decay < 1:
            raise ValueError(
                f"`decay={decay!r}` has to be at least 0 and less than 1, such as 0.999: the "
                "average is `decay * average + (1 - decay) * parameters`."
            )
        if every_n_steps < 1 or start_step < 0:
            raise ValueError(
                "`ExponentialMovingAverage` takes `every_n_steps` of at least 1 and `start_step` "
                f"of at least 0, not {every_n_steps!r} and {start_step!r}."
            )
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step

    def setup(self, trainer: Trainer, stage: str) -> None:
        if sum(isinstance(c, ExponentialMovingAverage) for c in trainer.callbacks) > 1:
            raise ValueError(
                "`callbacks` has more than one `ExponentialMovingAverage`, but only one average "
                "can be evaluated and returned. Leave one."
            )

    def wrap_optimizer(
        self, trainer: Trainer, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        return average_parameters(tx, self.decay, self.every_n_steps, self.start_step)

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        checkpoint["evaluated"] = "opt_state/average"

    def evaluation_task(self, trainer: Trainer, task: TaskModule) -> TaskModule:
        return averaged_task(task, trainer.state.opt_state)


def average_parameters(
    tx: optax.GradientTransformation,
    decay: int | float,
    every_n_steps: int = 1,
    start_step: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, which also averages what its updates make of the parameters.

    Its state is an `Averaged`. It has to be the outermost transformation, or the average would
    follow other parameters than those that are trained.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Averaged:
        # A copy, because the same buffer in two places of the state could not be donated.
        average = jax.tree.map(lambda p: jnp.copy(_widened(p)), params)
        return Averaged(jnp.int32(0), average, tx.init(params))

    def update(
        updates: PyTree, state: Averaged, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Averaged]:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        count = state.updates + 1
        averages = (count > start_step) & (count % every_n_steps == 0)
        copies = count <= start_step

        def one(average: Array, new: Array) -> Array:
            new = _widened(new)
            mixed = decay * average + (1 - decay) * new
            return jnp.where(copies, new, jnp.where(averages, mixed, average))

        new = optax.apply_updates(params, updates)
        return updates, Averaged(count, jax.tree.map(one, state.average, new), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def averaged_task(task: TaskModule, opt_state: PyTree) -> TaskModule:
    """`task` with the average found in `opt_state` in place of its trained parameters, in their
    dtypes. Without one, `task` itself."""
    is_averaged = lambda node: isinstance(node, Averaged)
    is_none = lambda node: node is None
    for node in jax.tree.leaves(opt_state, is_leaf=is_averaged):
        if is_averaged(node):
            # Leaf by leaf, because a task in inference mode may differ in static fields.
            leaves, structure = jax.tree.flatten(task, is_leaf=is_none)
            averages = jax.tree.leaves(node.average, is_leaf=is_none)
            pairs = zip(leaves, averages, strict=True)
            swapped = [old if new is None else new.astype(old.dtype) for old, new in pairs]
            return jax.tree.unflatten(structure, swapped)
    return task
