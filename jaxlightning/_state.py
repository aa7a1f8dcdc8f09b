"""Everything that changes during training, in one pytree."""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from ._metrics import Metric
from ._task import TaskModule


class LossScale(eqx.Module):
    """The dynamic loss scale of `precision="16-mixed"` (Micikevicius et al. 2018, section 3.2).

    Halved when a gradient overflows, doubled after 2,000 steps without overflow.
    """

    LEAST: ClassVar[float] = 1.0

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]

    @classmethod
    def initial(cls) -> LossScale:
        return cls(jnp.float32(2.0**16), jnp.int32(0))

    def adjusted(self, finite: Shaped[Array, ""], growth_interval: int = 2000) -> LossScale:
        grow = finite & (self.good_steps + 1 >= growth_interval)
        scale = jnp.where(finite, jnp.where(grow, self.scale * 2, self.scale), self.scale / 2)
        good_steps = jnp.where(finite & ~grow, self.good_steps + 1, 0)
        return LossScale(jnp.clip(scale, self.LEAST, 2.0**24), good_steps)


class Skipped(eqx.Module):
    """How many steps were refused by `Callback.accept_step`, counted on the device."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]
    longest: Int[Array, ""]
    """Of all streaks; what ends a run once it is too long."""

    @classmethod
    def none(cls) -> Skipped:
        return cls(jnp.int32(0), jnp.int32(0), jnp.int32(0))

    def counted(self, accepted: Shaped[Array, ""]) -> Skipped:
        in_a_row = jnp.where(accepted, 0, self.in_a_row + 1)
        total = self.total + jnp.where(accepted, 0, 1)
        return Skipped(total, in_a_row, jnp.maximum(self.longest, in_a_row))

    def forgotten(self) -> Skipped:
        """After the run has been told: streaks begin anew."""
        return Skipped(self.total, jnp.zeros_like(self.in_a_row), jnp.zeros_like(self.longest))


class TrainState(eqx.Module):
    """The state that a training step maps to the next one.

    Saved, sharded and donated as a whole. Randomness is a function of `key` and `step`: the key
    itself never changes.
    """

    step: Int[Array, ""]
    """Optimizer steps taken."""
    key: PRNGKeyArray
    """The root key of the run."""
    task: TaskModule
    """Parameters and buffers, and all that is static about them."""
    opt_state: PyTree
    metrics: dict[str, Metric]
    """Sums over the open log interval."""
    loss_scale: LossScale | None = None
    skipped: Skipped | None = None

    def replace(self, **fields: Any) -> TrainState:
        """A copy with some fields replaced."""
        present = {name: getattr(self, name) for name in self.__dataclass_fields__}
        unknown = sorted(set(fields) - set(present))
        if unknown:
            raise TypeError(f"`TrainState` has no field `{unknown[0]}`; it has {list(present)}.")
        return TrainState(**(present | fields))
