"""Gradients: clipped before the optimizer sees them, and measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxlightning._callback import Callback, InsideStep
from jaxlightning._metrics import Max, Mean
from jaxlightning._nearest import nearest

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

_ALGORITHMS = {"norm": optax.clip_by_global_norm, "value": optax.clip}


class GradientClipping(Callback):
    """Clips the step's gradient, inside the compiled step.

    With accumulation or several devices this is the gradient of the whole global batch, and with
    float16 it is unscaled. `Trainer(gradient_clip_val=...)` is this callback.

    **Arguments:**

    - `val`: the largest norm or the largest absolute value.
    - `algorithm`: `"norm"` scales the whole gradient down to a global norm of `val`; `"value"`
      clips every entry to [-`val`, `val`].
    """

    def __init__(self, val: int | float, algorithm: str = "norm"):
        if algorithm not in _ALGORITHMS:
            raise ValueError(
                f'Gradients cannot be clipped by `algorithm={algorithm!r}`: it is "norm" or '
                f'"value".{nearest(str(algorithm), _ALGORITHMS)}'
            )
        if not (isinstance(val, int | float) and math.isfinite(val) and val > 0):
            raise ValueError(
                f"Gradients cannot be clipped to `val={val!r}`: it has to be a positive number. "
                "To not clip, leave the callback (or `gradient_clip_val`) out."
            )
        self.val = float(val)
        self.algorithm = algorithm

    def wrap_optimizer(
        self, trainer: Trainer, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        return optax.chain(_ALGORITHMS[self.algorithm](self.val), tx)


class GradientNormMonitor(Callback):
    """Logs the gradient's norm, of the whole and of each part, before clipping.

    `train/grad_norm` and `train/grad_norm/{part}` are means over the log interval's steps,
    `train/grad_norm_max` is its largest. They are computed in the step and cost one reading of
    the gradients. Steps that were refused (see [`SkipNonFinite`][]) or whose float16 gradients
    overflowed do not count; otherwise a NaN is shown.

    **Arguments:**

    - `depth`: how many levels of the task's tree name a part; 1 means the task's fields, 0 means
      no parts.
    """

    def __init__(self, depth: int = 1):
        if not isinstance(depth, int) or depth < 0:
            raise ValueError(
                f"`depth={depth!r}` has to be 0 or a positive integer: how many levels of the "
                "task's tree name a part."
            )
        self.depth = depth
        self._overflows = False

    def setup(self, trainer: Trainer, stage: str) -> None:
        self._overflows = trainer.precision.scale_loss

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        squares = squares_by_part(view.grads, self.depth)
        norm = jnp.sqrt(sum(squares.values(), jnp.float32(0.0)))
        counts = jnp.isfinite(norm) if self._overflows else jnp.bool_(True)
        if view.skipped is not None:
            counts &= view.skipped.in_a_row == 0
        found: dict[str, Any] = {
            "grad_norm": Mean.over(norm, where=counts),
            "grad_norm_max": Max.of(norm, where=counts),
        }
        if self.depth:
            for part, square in squares.items():
                found[f"grad_norm/{part}"] = Mean.over(jnp.sqrt(square), where=counts)
        return found


def squares_by_part(tree: PyTree, depth: int) -> dict[str, Float[Array, ""]]:
    """The sum of squares of the leaves of each part, in float32. A part is a path of at most
    `depth` keys, such as `encoder/layers`."""
    squares: dict[str, Float[Array, ""]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        part = jax.tree_util.keystr(path[:depth], simple=True, separator="/")
        size = jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32)))
        squares[part] = squares[part] + size if part in squares else size
    return squares
