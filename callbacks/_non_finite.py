"""Steps with NaN or infinite gradients: refused, counted, and in the end fatal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from jaxlightning._callback import Callback, InsideStep
from jaxlightning._metrics import Metric, Sum, namespace

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class LongestStreak(Metric):
    """The longest run of refused steps: its length, and the number of its last step.

    Computes an array, which loggers and progress bars leave out. Steps count from 1; float32 is
    exact up to 2²⁴ of them.
    """

    length: Float[ArrayLike, ""]
    last: Float[ArrayLike, ""]

    def merge(self, other: LongestStreak) -> LongestStreak:
        self._check(other)
        xp = namespace(self, other)
        longer = xp.greater_equal(other.length, self.length)
        pairs = (self.length, other.length), (self.last, other.last)
        return LongestStreak(*(xp.where(longer, new, old) for old, new in pairs))

    def compute(self) -> Float[ArrayLike, " 2"]:
        return namespace(self).stack([self.length, self.last])


class SkipNonFinite(Callback):
    """Refuses steps whose loss or gradient is NaN or infinite.

    Such a step leaves parameters, optimizer state, averages and buffers bitwise as they were; what
    it measured counts only where its loss is finite. The step's number and the data advance. It is
    counted on the device, and logged as `train/skipped`. Overflows that float16's loss scale is
    there to catch are not counted. (`optax.apply_if_finite` is no alternative: it writes the NaN
    in the end.)

    **Arguments:**

    - `max_in_a_row`: this many refused steps one after the other end the run.

    **Raises:** `FloatingPointError` at the log boundary that finds `max_in_a_row` in a row.
    """

    def __init__(self, max_in_a_row: int = 10):
        if not isinstance(max_in_a_row, int) or max_in_a_row < 1:
            raise ValueError(
                f"`max_in_a_row={max_in_a_row!r}` has to be a positive integer: how many steps "
                "one after the other may be refused before the run ends."
            )
        self.max_in_a_row = max_in_a_row

    def accept_step(self, view: InsideStep) -> Bool[Array, ""]:
        return jnp.isfinite(view.loss) & all_finite(view.grads)

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        if view.skipped is None:
            return {}
        in_a_row = view.skipped.in_a_row
        length = in_a_row.astype(jnp.float32)
        last = jnp.where(in_a_row > 0, view.step + 1, 0).astype(jnp.float32)
        return {"skipped": Sum.of(in_a_row > 0), "skipped_steps": LongestStreak(length, last)}

    def on_log(self, trainer: Trainer, metrics: dict[str, Any], step: int) -> None:
        length, last = map(int, metrics.get("train/skipped_steps", (0, 0)))
        if length < self.max_in_a_row:
            return
        steps = f"steps {last - length + 1} to {last}" if length > 1 else f"step {last}"
        raise FloatingPointError(
            f"In {length} steps in a row the loss or a gradient was NaN or infinite: global "
            f"{steps}. Their updates were refused, so the task is as it was before them. Lower "
            "the learning rate, clip with `gradient_clip_val=1.0`, or find the operation with "
            "`Trainer(detect_anomaly=True)` and without this callback; to bear more, raise "
            f"`SkipNonFinite(max_in_a_row={self.max_in_a_row})`."
        )


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry of every leaf is. A norm would not do: squares overflow earlier."""
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite
