"""Lowers the learning rate when a metric stops improving."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ._announce import announce
from ._learning_rate import scale_updates
from ._monitored import MonitorCallback, badness, check_at_least

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class PlateauState(eqx.Module):
    """What `ReduceLROnPlateau` keeps in the optimizer's state."""

    factor: Float[Array, ""]
    owner: str = eqx.field(static=True)
    """The callback's `state_key`: there may be several."""


def scale_by_plateau(owner: str) -> optax.GradientTransformation:
    """Scales updates by a factor that only the host changes."""

    def init(params: PyTree) -> PlateauState:
        return PlateauState(jnp.float32(1.0), owner)

    def update(
        updates: PyTree, state: PlateauState, params: PyTree | None = None
    ) -> tuple[PyTree, PlateauState]:
        return scale_updates(updates, state.factor), state

    return optax.GradientTransformation(init, update)


class ReduceLROnPlateau(MonitorCallback):
    """Multiplies the learning rate by `factor` after `patience` checks without improvement.

        Trainer(callbacks=[ReduceLROnPlateau("val/loss", factor=0.5, patience=3)])

    The rule is PyTorch's: `patience` checks pass, the next one reduces; during the `cooldown`
    after that nothing is counted. NaN is no improvement. The learning rate's factor is an array in
    the optimizer's state, which the host replaces, so nothing is compiled again, and a checkpoint
    holds it.
    """

    def __init__(
        self,
        monitor: str,
        *,
        mode: str = "min",
        factor: int | float = 0.1,
        patience: int = 10,
        threshold: int | float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_factor: int | float = 0.0,
        verbose: bool = False,
        check_on_train_epoch_end: bool | None = None,
    ):
        """
        - `monitor`, `mode`: the metric's name, and whether it should fall (`"min"`) or rise.
        - `factor`: what the learning rate is multiplied by, in (0, 1).
        - `patience`: how many checks in a row may pass without improvement.
        - `threshold`: how much is an improvement, as a share of the best value so far
          (`threshold_mode="rel"`) or by itself (`"abs"`).
        - `cooldown`: how many checks after a reduction are not counted.
        - `min_factor`: the product of all reductions never falls below this.
        - `verbose`: whether to print reductions.
        - `check_on_train_epoch_end`: whether to check at the end of an epoch rather than of a
          validation; by default, where the metric is new.
        """
        super().__init__(monitor, mode, check_on_train_epoch_end)
        if not 0 < factor < 1:
            raise ValueError(
                f"`factor` of `ReduceLROnPlateau` is what the learning rate is multiplied by, and "
                f"has to lie between 0 and 1, not {factor}. Write `factor=0.5` to halve it."
            )
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(
                f'`ReduceLROnPlateau(threshold_mode="{threshold_mode}")` is not known. Write '
                '`"rel"` for a share of the best value, or `"abs"` for a difference.'
            )
        check_at_least("ReduceLROnPlateau", "patience", patience, 0)
        check_at_least("ReduceLROnPlateau", "threshold", threshold, 0)
        check_at_least("ReduceLROnPlateau", "cooldown", cooldown, 0)
        check_at_least("ReduceLROnPlateau", "min_factor", min_factor, 0)
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.min_factor = min_factor
        self.verbose = verbose
        self.reset()

    def reset(self) -> None:
        self.best_score: float | None = None
        self.bad_checks = 0
        self.cooldown_left = 0

    def wrap_optimizer(
        self, trainer: Trainer, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        return optax.chain(tx, scale_by_plateau(self.state_key))

    def judge(self, trainer: Trainer, value: float) -> None:
        if self._improved(value):
            self.best_score, self.bad_checks = value, 0
        else:
            self.bad_checks += 1
        if self.cooldown_left > 0:
            self.cooldown_left -= 1
            self.bad_checks = 0
        if self.bad_checks > self.patience:
            self.bad_checks, self.cooldown_left = 0, self.cooldown
            self._reduce(trainer)

    def _improved(self, value: float) -> bool:
        best = self.best_score
        if best is None:
            return math.isfinite(value)
        margin = self.threshold * (abs(best) if self.threshold_mode == "rel" else 1.0)
        return badness(value, self.mode) < badness(best, self.mode) - margin

    def _reduce(self, trainer: Trainer) -> None:
        before = float(self._find(trainer.state.opt_state).factor)
        after = max(before * self.factor, self.min_factor)
        if after >= before:
            return

        def reduced(node: Any) -> Any:
            if not self._owns(node):
                return node
            # Where the old array was, and of its type: to the compiled step nothing changed.
            array = jax.device_put(jnp.asarray(after, node.factor.dtype), node.factor.sharding)
            return PlateauState(array, node.owner)

        opt_state = jax.tree.map(reduced, trainer.state.opt_state, is_leaf=self._owns)
        trainer.state = trainer.state.replace(opt_state=opt_state)
        if self.verbose:
            announce(
                f"`{self.monitor}` is on a plateau: the learning rate's factor falls from "
                f"{before:.3g} to {after:.3g} at step {trainer.global_step}."
            )

    def _owns(self, node: Any) -> bool:
        return isinstance(node, PlateauState) and node.owner == self.state_key

    def _find(self, opt_state: PyTree) -> PlateauState:
        nodes = jax.tree.leaves(opt_state, is_leaf=self._owns)
        found = [node for node in nodes if self._owns(node)]
        if len(found) != 1:
            raise RuntimeError(
                f"`ReduceLROnPlateau` found {len(found)} learning-rate factors of its own in the "
                "optimizer's state, but needs one. A task that overrides `train_step` has to "
                "update with the Trainer's optimizer for it."
            )
        return found[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self.best_score,
            "bad_checks": self.bad_checks,
            "cooldown_left": self.cooldown_left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score = state["best_score"]
        self.bad_checks = state["bad_checks"]
        self.cooldown_left = state["cooldown_left"]
