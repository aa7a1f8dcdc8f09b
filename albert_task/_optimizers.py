"""The optimizers that ALBERT's tasks know by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from jaxlightning._checks import nearest


def matrices(params: PyTree) -> PyTree[bool]:
    """Which parameters weight decay is for: weights and embeddings. Not biases, nor what
    normalisation scales by: exactly those that are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class Recipe(NamedTuple):
    """An optimizer by name, and its numbers."""

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    """The peak."""
    weight_decay: float = 0.01
    warmup_steps: int = 0
    """Over which the learning rate rises linearly from 0."""
    total_steps: int | None = None
    """At which it has fallen linearly to 0; `None`: it stays at the peak."""
    b1: float = 0.9
    b2: float = 0.98
    """For a few thousand steps. The paper's runs are longer, and have 0.999."""
    eps: float = 1e-6

    def build(self) -> optax.GradientTransformation:
        """Decay is decoupled and scaled by the learning rate, whatever the optimizer.

        **Raises:** `ValueError` for an unknown name, or numbers that cannot be.
        """
        self.check()
        parts = [
            _DIRECTIONS[self.optimizer](self),
            optax.add_decayed_weights(self.weight_decay, mask=matrices),
        ]
        if self.optimizer == "lamb":
            # As in google-research/albert, vectors are neither decayed nor rescaled by their
            # norms, as `optax.lamb` would; unlike there, moments are corrected for bias.
            parts.append(optax.masked(optax.scale_by_trust_ratio(), matrices))
        # Injected, so that the learning rate is in the optimizer's state, to be logged.
        scale = optax.inject_hyperparams(optax.scale_by_learning_rate)
        return optax.chain(*parts, scale(learning_rate=self._schedule()))

    def _schedule(self) -> optax.ScalarOrSchedule:
        peak, warmup, total = self.learning_rate, self.warmup_steps, self.total_steps
        fall = peak if total is None else optax.linear_schedule(peak, 0.0, total - warmup)
        if not warmup:
            return fall
        rise = optax.linear_schedule(0.0, peak, warmup)
        return rise if total is None else optax.join_schedules([rise, fall], [warmup])

    def check(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            listed = ", ".join(f"`{name}`" for name in OPTIMIZERS)
            raise ValueError(
                f"`optimizer={self.optimizer!r}` is unknown; it is one of {listed}."
                f"{nearest(str(self.optimizer), OPTIMIZERS)}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate={self.learning_rate}` has to be above 0.")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}={getattr(self, name)}` has to be at least 0.")
        if self.total_steps is not None and not self.warmup_steps < self.total_steps:
            raise ValueError(
                f"`warmup_steps={self.warmup_steps}` takes all of `total_steps="
                f"{self.total_steps}`. Write fewer, such as a twentieth."
            )


def _muon(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the layers' matrices, Adam for embeddings and vectors.

    An update has a root mean square of 0.2, about Adam's, so that one learning rate serves both
    (Liu et al. 2025, "Muon is scalable for LLM training").
    """
    from optax.contrib import MuonDimensionNumbers, muon

    def places(params: PyTree) -> PyTree:
        def of(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
            embeds = "embeddings" in jax.tree_util.keystr(path)
            return MuonDimensionNumbers() if leaf.ndim == 2 and not embeds else None

        return jax.tree_util.tree_map_with_path(of, params)

    moments = {"adam_b1": recipe.b1, "adam_b2": recipe.b2}
    steps = muon(1.0, muon_weight_dimension_numbers=places, consistent_rms=0.2, **moments)
    return optax.chain(steps, optax.scale(-1.0))


_DIRECTIONS: dict[str, Callable[[Recipe], optax.GradientTransformation]] = {
    "adamw": lambda r: optax.scale_by_adam(b1=r.b1, b2=r.b2, eps=r.eps),
    "lamb": lambda r: optax.scale_by_adam(b1=r.b1, b2=r.b2, eps=r.eps),
    "adafactor": lambda r: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "lion": lambda r: optax.scale_by_lion(b1=r.b1, b2=r.b2),
    "sgd": lambda r: optax.trace(r.b1),
    "muon": _muon,
}
OPTIMIZERS = tuple(_DIRECTIONS)
