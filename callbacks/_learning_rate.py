"""Learning-rate schedules, as a factor on the optimizer's updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from jaxlightning._callback import Callback
from jaxlightning._nearest import nearest

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

Factor = Callable[[Int[Array, ""]], Shaped[Any, ""]]
"""From a number of steps to a factor. Traced."""

_OPTIONS = {
    "constant": (),
    "linear": ("end",),
    "cosine": ("end",),
    "polynomial": ("end", "power"),
    "exponential": ("end", "decay"),
    "inverse_sqrt": ("timescale",),
    "one_cycle": ("end",),
}
"""The schedules, and which options each has besides the warm-up."""


class ScheduleState(eqx.Module):
    """What `LearningRateSchedule` keeps in the optimizer's state."""

    count: Int[Array, ""]
    """Updates scaled so far."""
    factor: Float[Array, ""]
    """The factor of the latest update."""


def scale_updates(updates: PyTree, factor: Float[Array, ""]) -> PyTree:
    """`factor * updates`, computed in at least float32, in the updates' dtypes."""

    def one(u: Array) -> Array:
        dtype = u.dtype if jnp.finfo(u.dtype).bits >= 32 else jnp.float32
        return (u.astype(dtype) * factor.astype(dtype)).astype(u.dtype)

    return jax.tree.map(one, updates)


def scale_by_factor(factor: Factor) -> optax.GradientTransformation:
    """Scales the n-th update, n = 0, 1, …, by `factor(n)`."""

    def init(params: PyTree) -> ScheduleState:
        return ScheduleState(jnp.int32(0), jnp.float32(1.0))

    def update(
        updates: PyTree, state: ScheduleState, params: PyTree | None = None
    ) -> tuple[PyTree, ScheduleState]:
        now = factor(state.count)
        return scale_updates(updates, now), ScheduleState(state.count + 1, now)

    return optax.GradientTransformation(init, update)


class LearningRateSchedule(Callback):
    """Multiplies the learning rate by a factor that depends on the step.

        def configure_optimizers(self):
            return optax.adamw(1e-3)  # the peak

        Trainer(max_epochs=3, callbacks=[LearningRateSchedule("cosine", warmup=0.1)])

    The factor of step n = 0, 1, … is `ramp(n) * decay(max(n - W, 0))`. The ramp rises linearly
    (under `"one_cycle"`, as a cosine) from `warmup_from` at n = 0 to 1 at n = W, the warm-up's
    steps. The decay is, for p = its steps over T - W, T being the run's total steps:

    - `"constant"`: 1;
    - `"linear"`: falls linearly to `end` (default 0) at p = 1, and stays there;
    - `"cosine"`: `end + (1 - end) * (1 + cos(πp)) / 2` (Loshchilov & Hutter 2017);
    - `"polynomial"`: `end + (1 - end) * (1 - p) ** power`;
    - `"exponential"`: `end ** p`; or, given `decay`, `decay ** steps`, but not below `end`;
    - `"inverse_sqrt"`: `sqrt(t / (t + steps))` with t = `timescale`, by default W
      (Vaswani et al. 2017, section 5.3);
    - `"one_cycle"`: as `"cosine"`, with other defaults: `warmup=0.3`, `warmup_from=1/25`,
      `end=4e-6` (Smith & Topin 2018);
    - a function: what it returns for the (traced) number of steps.

    It scales what the optimizer hands out, decoupled weight decay included, which for optax's
    optimizers is the same as scaling their learning rate. The counter is part of the optimizer's
    state: a step that is refused does not count, and a resumed run goes on where it was.
    """

    def __init__(
        self,
        schedule: str | Callable[[Any], Any] = "cosine",
        *,
        warmup: int | float | None = None,
        warmup_from: int | float | None = None,
        end: int | float | None = None,
        power: int | float | None = None,
        decay: int | float | None = None,
        timescale: int | None = None,
        total_steps: int | None = None,
    ):
        """
        - `warmup`: the warm-up's steps as an int, or as a float their share of the run.
        - `warmup_from`: the factor of the first step, if there is a warm-up.
        - `end`, `power`, `decay`, `timescale`: see above. An option that the schedule does not
          have is an error.
        - `total_steps`: T, where it is not to be the whole fit.
        """
        name = schedule if isinstance(schedule, str) else "a function"
        if isinstance(schedule, str) and schedule not in _OPTIONS:
            raise ValueError(
                f'`LearningRateSchedule("{schedule}")` is not known. There are {list(_OPTIONS)}, '
                f"or pass a function from the step to a factor.{nearest(schedule, _OPTIONS)}"
            )
        given = {"end": end, "power": power, "decay": decay, "timescale": timescale}
        for option, value in given.items():
            if value is not None and option not in _OPTIONS.get(name, ()):
                owners = [s for s, options in _OPTIONS.items() if option in options]
                raise ValueError(
                    f"`LearningRateSchedule` has no `{option}` for {name!r}: that option belongs "
                    f"to {owners}. Leave it out."
                )
        cycle = name == "one_cycle"
        self.schedule = schedule
        self.warmup = (0.3 if cycle else 0) if warmup is None else warmup
        self.warmup_from = (1 / 25 if cycle else 0.0) if warmup_from is None else warmup_from
        self.end = end
        self.power = 1.0 if power is None else power
        self.decay = decay
        self.timescale = timescale
        self.total_steps = total_steps
        self._check()

    def _check(self) -> None:
        if isinstance(self.warmup, float) and not 0 <= self.warmup < 1:
            raise ValueError(
                f"`warmup={self.warmup}`, a float, is a share of the run and has to be in [0, 1). "
                f"For a number of steps write an int: `warmup={max(0, int(self.warmup))}`."
            )
        if self.warmup < 0:
            raise ValueError(f"`warmup={self.warmup}` is a number of steps; it cannot be negative.")
        if self.schedule == "exponential" and self.decay is None and not (self.end or 0) > 0:
            raise ValueError(
                'The "exponential" schedule needs `end`, the factor at the end of the run, above '
                "0, or `decay`, the factor from one step to the next: "
                '`LearningRateSchedule("exponential", end=0.01)`.'
            )
        if self.schedule == "inverse_sqrt" and self.timescale is None and not self.warmup:
            raise ValueError(
                'The "inverse_sqrt" schedule falls on the scale of its warm-up, and there is none. '
                'Write `LearningRateSchedule("inverse_sqrt", warmup=1000)`, or `timescale=1000`.'
            )

    def wrap_optimizer(
        self, trainer: Trainer, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        # A `fast_dev_run` is shorter than any warm-up: its steps are the first of a long run.
        steps = 1_000_000 if trainer.fast_dev_run else trainer.estimated_stepping_batches
        return optax.chain(tx, scale_by_factor(self.factor(steps)))

    def factor(self, run_steps: int | float) -> Factor:
        """The schedule of a run of `run_steps` steps, as a function of the step.

        **Raises:** `ValueError` if the schedule needs the run's length and `run_steps` is
        infinite, or if the warm-up takes all of it.
        """
        warmup = self._warmup_steps(run_steps)
        decay = self._decay(run_steps, warmup)
        first, cosine = self.warmup_from, self.schedule == "one_cycle"

        def factor(step: Int[Array, ""]) -> Float[Array, ""]:
            step = jnp.asarray(step)
            after = jnp.asarray(decay(jnp.maximum(step - warmup, 0))).astype(jnp.float32)
            if after.shape != ():
                raise ValueError(
                    f"The schedule's function returned an array of shape {after.shape}. It has to "
                    "return one factor: `lambda step: 0.5 ** (step // 1000)`."
                )
            if not warmup:
                return after
            p = jnp.minimum(step.astype(jnp.float32) / warmup, 1.0)
            if cosine:
                p = (1 - jnp.cos(math.pi * p)) / 2
            return (first + (1 - first) * p) * after

        return factor

    def _warmup_steps(self, run_steps: int | float) -> int:
        if isinstance(self.warmup, int):
            return self.warmup
        return int(self.warmup * self._total(run_steps)) if self.warmup else 0

    def _decay(self, run_steps: int | float, warmup: int) -> Factor:
        """The factor as a function of the steps since the warm-up's end."""
        if callable(self.schedule):
            return self.schedule
        if self.schedule == "constant":
            return lambda steps: 1.0
        if self.schedule == "inverse_sqrt":
            t = float(self.timescale or warmup)
            return lambda steps: jnp.sqrt(t / (t + steps.astype(jnp.float32)))
        if self.schedule == "exponential" and self.decay is not None:
            rate, floor = self.decay, self.end or 0.0
            return lambda steps: jnp.maximum(rate ** steps.astype(jnp.float32), floor)
        total = self._total(run_steps)
        if warmup >= total:
            raise ValueError(
                f"The warm-up of {warmup} steps leaves nothing of the run's {total} to the "
                f'"{self.schedule}" schedule. Write a share, `warmup=0.1`, or train for longer.'
            )
        end = self.end if self.end is not None else 4e-6 if self.schedule == "one_cycle" else 0.0
        shape: dict[str, Callable[[Any], Any]] = {
            "linear": lambda p: end + (1 - end) * (1 - p),
            "polynomial": lambda p: end + (1 - end) * (1 - p) ** self.power,
            "exponential": lambda p: end**p,
        }
        cosine = lambda p: end + (1 - end) * (1 + jnp.cos(math.pi * p)) / 2
        decay = shape.get(self.schedule, cosine)
        span = total - warmup
        return lambda steps: decay(jnp.minimum(steps.astype(jnp.float32) / span, 1.0))

    def _total(self, run_steps: int | float) -> int:
        total = run_steps if self.total_steps is None else self.total_steps
        if math.isinf(total):
            raise ValueError(
                f"`LearningRateSchedule({self.schedule!r}, warmup={self.warmup})` needs to know "
                "how many steps the run has, and nothing says so: no number of steps, nor one of "
                "epochs over data with a length. (A time does not.) Write "
                "`Trainer(max_steps=10_000)`, or tell the schedule alone: "
                "`LearningRateSchedule(..., total_steps=10_000)`."
            )
        return int(total)
