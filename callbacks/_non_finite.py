"""Steps that are not finite: refused, counted, and in the end fatal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from jaxlightning._callback import Callback, InsideStep
from jaxlightning._listing import listed
from jaxlightning._metrics import Metric, Sum, namespace
from jaxlightning._whereabouts import StepBatches, Whereabouts, described

from ._announce import announce

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

_SHOWN = 10


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


class NonFiniteSteps(FloatingPointError):
    """So many refused steps in a row that the run ends. All of them met the state as it is now."""

    def __init__(self, message: str, first: int, batches: StepBatches | None):
        super().__init__(message)
        self.first = first
        """The number of the first of these steps."""
        self.batches = batches
        """Its batches, unless nobody knows."""


class SkipNonFinite(Callback):
    """Refuses steps whose loss, gradient or update is NaN or infinite.

    Such a step leaves parameters, optimizer state, averages and buffers bitwise as they were; what
    it measured counts only where its loss is finite. The step's number and the data advance. It is
    counted on the device, and logged as `train/skipped`; the first is told, with its batch, when
    the host hears of it. Overflows that float16's loss scale is there to catch are not counted.
    (`optax.apply_if_finite` is no alternative: it writes the NaN in the end.)

    After `max_in_a_row` of them, one after the other, nothing is taken any more, whatever batches
    follow until the host hears of it: the run ends with the state before the first of them.

    **Arguments:**

    - `max_in_a_row`: this many refused steps one after the other end the run.

    **Raises:** `FloatingPointError` at the log boundary, or the end of the epoch, that finds
    `max_in_a_row` in a row. It names their batches.
    """

    max_in_a_row: int
    guards_capsule = False
    """Whether it is there for a `ReplayCapsule` only, and the user has not heard of it."""

    def __init__(self, max_in_a_row: int = 10):
        if not isinstance(max_in_a_row, int) or max_in_a_row < 1:
            raise ValueError(
                f"`max_in_a_row={max_in_a_row!r}` has to be a positive integer: how many steps "
                "one after the other may be refused before the run ends."
            )
        self.max_in_a_row = max_in_a_row
        self._whereabouts = Whereabouts()
        self._reported = 0
        self._told = False

    # In the step

    def accept_step(self, view: InsideStep) -> Bool[Array, ""]:
        return jnp.isfinite(view.loss) & all_finite((view.grads, view.updates))

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        if view.skipped is None:
            return {}
        in_a_row, longest = view.skipped.in_a_row, view.skipped.longest
        refused = in_a_row > 0
        # Steps that were refused only because too many had been are no part of a streak.
        counts = refused & (longest <= self.max_in_a_row)
        length = jnp.where(counts, in_a_row, 0).astype(jnp.float32)
        last = jnp.where(counts, view.step + 1, 0).astype(jnp.float32)
        return {"skipped": Sum.of(refused), "skipped_steps": LongestStreak(length, last)}

    # On the host

    def setup(self, trainer: Trainer, stage: str) -> None:
        if stage == "fit" and trainer.barebones:
            raise ValueError(
                "`barebones=True` reads no metrics, so nobody would hear of refused steps. Remove "
                "`SkipNonFinite`, or `ReplayCapsule`, which brings it along; or write "
                "`barebones=False`."
            )

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.global_step == 0:
            self._whereabouts, self._reported, self._told = Whereabouts(), 0, False
        self._whereabouts.mark(trainer)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self._whereabouts.mark(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self._whereabouts.mark(trainer)
        # A last interval that is cut short by the end of the fit is never delivered.
        self._look_at(trainer, trainer.callback_metrics, "_epoch")

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        # A run that went back goes on with other batches than it took then, and saves at once.
        self._whereabouts.mark(trainer)

    def on_log(self, trainer: Trainer, metrics: dict[str, Any], step: int) -> None:
        trainer.callback_metrics.pop("train/skipped_steps", None)
        self._look_at(trainer, metrics, "")
        self._whereabouts.forget(step - self.max_in_a_row)

    def _look_at(self, trainer: Trainer, metrics: dict[str, Any], suffix: str) -> None:
        # It is for this callback alone, and no number that anybody monitors.
        streak = metrics.pop(f"train/skipped_steps{suffix}", None)
        length, last = map(int, (0, 0) if streak is None else streak)
        self._end_after(trainer, length, last)
        if length and not self._told:
            self._told = True
            self._tell(trainer, int(metrics[f"train/skipped{suffix}"]), last - length + 1)

    def _tell(self, trainer: Trainer, count: int, step: int) -> None:
        where = _line(trainer, step, self._whereabouts.of(trainer, step))
        what = "A step was refused" if count == 1 else f"{count} steps were refused, among them one"
        announce(
            f"{what} whose loss, gradient or update is NaN or infinite: {where}. It is not told "
            "again; `train/skipped` counts such steps."
        )

    def _end_after(self, trainer: Trainer, length: int, last: int) -> None:
        """**Raises:** `NonFiniteSteps` where the longest streak is one that ends the run."""
        if length < self.max_in_a_row or last <= self._reported:
            return
        first = last - length + 1
        # Whoever goes on from a checkpoint that is saved now has been told of these.
        self._reported = trainer.global_step
        state = trainer.state
        if state.skipped is not None:
            trainer.state = state.replace(skipped=state.skipped.forgotten())
        of = self._whereabouts.of
        lines = [_line(trainer, step, of(trainer, step)) for step in range(first, last + 1)]
        many, found = length > 1, listed(lines, most=_SHOWN)
        raise NonFiniteSteps(
            f"In {f'{length} steps in a row' if many else 'a step'} the loss, a gradient or an "
            f"update was NaN or infinite:{found}\n{'They were' if many else 'It was'} refused, so "
            f"the task is as it was before {'them' if many else 'it'}. Look at the data, lower the "
            "learning rate, or clip with `gradient_clip_val=1.0`. "
            + self._what_else({type(callback).__name__ for callback in trainer.callbacks}),
            first,
            of(trainer, first),
        )

    def _what_else(self, callbacks: set[str]) -> str:
        if self.guards_capsule:
            return (
                "The callback `ReplayCapsule` ends a run at the first such step, by "
                "`SkipNonFinite(max_in_a_row=1)`, which it brings along. To pass over such steps, "
                "add `SkipNonFinite()` yourself: up to 10 in a row then do not end the run."
            )
        see = "To see in which operation it appears, add the callback `ReplayCapsule()`; t"
        bear = f"o bear more, raise `SkipNonFinite(max_in_a_row={self.max_in_a_row})`."
        return ("T" if "ReplayCapsule" in callbacks else see) + bear

    def state_dict(self) -> dict[str, Any]:
        return {"whereabouts": self._whereabouts.state_dict(), "reported": self._reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._whereabouts.load_state_dict(state["whereabouts"])
        self._reported = state["reported"]


def _line(trainer: Trainer, step: int, batches: StepBatches | None) -> str:
    where = "" if batches is None else f": {described(trainer, batches)}"
    return f"global step {step}{where}"


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry of every leaf is. A norm would not do: squares overflow earlier."""
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite
