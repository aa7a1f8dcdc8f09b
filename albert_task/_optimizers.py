"""The optimizers that ALBERT's tasks know by name, and how each parameter is trained."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxlightning._nearest import nearest
from jaxlightning.parallel import leaf_path

from ._config import AlbertConfig

_PAPER_BATCH = 4096

SCHEDULES = ("linear", "polynomial")


def matrices(params: PyTree) -> PyTree[bool]:
    """Which parameters weight decay is for: weights and embeddings. Not biases, nor what
    normalisation scales by: exactly those that are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class Recipe(NamedTuple):
    """An optimizer by name, its numbers, and which parameters it trains how fast.

    ALBERT's own (Lan et al. 2020, section 4.1; google-research/albert), along with
    `Trainer(gradient_clip_val=1.0)`:

        Recipe("lamb_reference", learning_rate=1.76e-3, batch_size=512, schedule="polynomial",
               warmup_steps=3125, total_steps=125_000, b2=0.999)
    """

    optimizer: str = "adamw"
    """`"adamw_reference"` and `"lamb_reference"` do not correct moments for bias, as
    google-research/albert; `"adamw"` and `"lamb"` do. `"lamb"` leaves vectors unscaled, and
    `"adafactor"` does not scale updates by the size of parameters, both unlike optax's."""
    learning_rate: float = 1e-3
    """The peak."""
    weight_decay: float = 0.01
    warmup_steps: int = 0
    """Over which the learning rate rises linearly from 0."""
    total_steps: int | None = None
    """At which it has fallen to 0; `None`: it stays at the peak."""
    b1: float | None = None
    """Decay of the first moment, or momentum. `None`: 0.9, and 0.95 of Muon's matrices."""
    b2: float | None = None
    """Decay of the second moment. `None`: 0.98, for a few thousand steps. The paper's runs are
    longer, and have 0.999."""
    eps: float = 1e-6
    """Of AdamW and LAMB."""
    schedule: str = "linear"
    """`"linear"`: falls from the peak at the end of the warm-up. `"polynomial"`, the reference's:
    falls from step 0 on, with the exponent `power`, and the warm-up takes its place before."""
    power: float | None = None
    """`None`: 1."""
    batch_size: int | None = None
    """Rows in a batch: `learning_rate` is then meant for 4,096, and scaled by the square root."""
    layer_decay: float = 1.0
    """Each stage further from the output learns so many times as fast: heads and pooler 1, the
    last group of layers 1 `layer_decay`, …, the embeddings the most. Layers that share their
    weights have one rate."""
    frozen: tuple[str, ...] = ()
    """Regular expressions of paths that are not trained: `("embeddings", "groups/0")`."""
    unfreeze_every: int = 0
    """Gradual unfreezing (Howard and Ruder 2018): after so many steps each, another stage begins
    to learn, heads and pooler first. 0: all learn from the start."""

    @property
    def peak(self) -> float:
        """The highest learning rate, for the batch in use."""
        if self.batch_size is None:
            return self.learning_rate
        return self.learning_rate * math.sqrt(self.batch_size / _PAPER_BATCH)

    @property
    def momentum(self) -> float:
        """`b1`, or what it is by default."""
        return 0.9 if self.b1 is None else self.b1

    @property
    def second(self) -> float:
        """`b2`, or what it is by default."""
        return 0.98 if self.b2 is None else self.b2

    def build(self, groups: int = 1) -> optax.GradientTransformation:
        """Decay is decoupled and scaled by the learning rate, whatever the optimizer. Moments are
        in float32 also where parameters are in 16 bits, in which 0.999 would be 1.

        **Arguments:**

        - `groups`: how many groups of layers the model has, for `layer_decay` and gradual
          unfreezing.

        **Raises:** `ValueError` for an unknown name, or numbers that cannot be.
        """
        self.check()
        parts = [
            _in_float32(_DIRECTIONS[self.optimizer](self)),
            optax.add_decayed_weights(self.weight_decay, mask=matrices),
        ]
        if self.optimizer in _ADAPTED:
            # As in google-research/albert, vectors are neither decayed nor rescaled by their
            # norms, as `optax.lamb` would.
            parts.append(optax.masked(optax.scale_by_trust_ratio(), matrices))
        # Injected, so that the learning rate is in the optimizer's state, to be logged.
        scale = optax.inject_hyperparams(optax.scale_by_learning_rate)
        parts.append(scale(learning_rate=self._schedule()))
        if self.layer_decay != 1 or self.unfreeze_every:
            parts.append(_by_stage(self, groups))
        return optax.chain(*parts)

    def _schedule(self) -> optax.ScalarOrSchedule:
        peak, warmup, total = self.peak, self.warmup_steps, self.total_steps
        if self.schedule == "polynomial":
            assert total is not None
            fall = optax.polynomial_schedule(peak, 0.0, self.power or 1.0, total)
            if not warmup:
                return fall
            rise = optax.linear_schedule(0.0, peak, warmup)
            return lambda step: jnp.where(step < warmup, rise(step), fall(step))
        constant = peak if total is None else optax.linear_schedule(peak, 0.0, total - warmup)
        if not warmup:
            return constant
        rise = optax.linear_schedule(0.0, peak, warmup)
        return rise if total is None else optax.join_schedules([rise, constant], [warmup])

    def freezes(self, path: str) -> bool:
        """Whether the parameter at `path` is never trained."""
        return any(re.search(pattern, path) for pattern in self.frozen)

    def table(self, task: PyTree) -> list[Trained]:
        """How each parameter of `task` is trained, in its order."""
        groups = task.config.num_hidden_groups
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(task):
            if not eqx.is_inexact_array(leaf):
                continue
            name, matrix = leaf_path(path), leaf.ndim > 1
            trained, stage = not self.freezes(name), _stage(name, groups)
            rows.append(
                Trained(
                    name,
                    tuple(leaf.shape),
                    trained,
                    decays=trained and matrix and self.weight_decay > 0,
                    adapts=trained and matrix and self.optimizer in _ADAPTED,
                    rate=self.peak * self.layer_decay**stage if trained else 0.0,
                    from_step=stage * self.unfreeze_every,
                )
            )
        return rows

    def describe(self, task: PyTree) -> str:
        """`table`, for people."""
        rows = self.table(task)
        width = max(len(row.path) for row in rows)
        lines = [f"{'parameter':<{width}}  {'shape':>14}  decays  adapts      rate  from step"]
        for row in rows:
            shape = "×".join(map(str, row.shape))
            yes = ["yes" if flag else "no" for flag in (row.decays, row.adapts)]
            rate = f"{row.rate:.2e}" if row.trained else "frozen"
            lines.append(
                f"{row.path:<{width}}  {shape:>14}  {yes[0]:>6}  {yes[1]:>6}  {rate:>8}  "
                f"{row.from_step:>9}"
            )
        return "\n".join(lines)

    def check(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in known:
                listed = ", ".join(f"`{choice}`" for choice in known)
                raise ValueError(
                    f"`{name}={value!r}` is unknown; it is one of {listed}."
                    f"{nearest(str(value), known)}"
                )
        for name, (holds, words) in _WITHIN.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"`{name}={value!r}` has to be a number.")
            if not (math.isfinite(value) and holds(value)):
                raise ValueError(f"`{name}={value}` has to be {words}.")
        if isinstance(self.frozen, str):
            raise TypeError(
                f"`frozen={self.frozen!r}` has to be a tuple of regular expressions: "
                f"`frozen=({self.frozen!r},)`."
            )
        if self.power is not None and self.schedule != "polynomial":
            raise ValueError(
                f"`power={self.power}` is the exponent of the schedule `polynomial`, but this is "
                f"`schedule={self.schedule!r}`. Change one of the two."
            )
        for name in ("b1", "b2"):
            if getattr(self, name) is not None and not has(self.optimizer, name):
                raise ValueError(f"`{self.optimizer}` has no `{name}`. Remove `{name}=`.")
        if self.schedule == "polynomial" and self.total_steps is None:
            raise ValueError(
                "`schedule='polynomial'` falls to 0 at the end of the run. Say where that is: "
                "`total_steps=125_000`."
            )
        if self.total_steps is not None and not self.warmup_steps < self.total_steps:
            raise ValueError(
                f"`warmup_steps={self.warmup_steps}` takes all of `total_steps="
                f"{self.total_steps}`. Write fewer, such as a twentieth."
            )


class Trained(NamedTuple):
    """How one parameter is trained."""

    path: str
    shape: tuple[int, ...]
    trained: bool
    decays: bool
    """Whether weight decay shrinks it."""
    adapts: bool
    """Whether its update is rescaled by the ratio of norms (LAMB)."""
    rate: float
    """The peak of its learning rate."""
    from_step: int
    """The first step in which it learns."""


def _stage(path: str, groups: int) -> int:
    """How far from the output a parameter is."""
    match = re.search(r"(?:^|/)groups/(\d+)/", path)
    if match:
        return groups - int(match[1])
    return groups + 1 if re.search(r"(?:^|/)(embeddings|mapping)/", path) else 0


class StagesState(NamedTuple):
    step: jax.Array


def _by_stage(recipe: Recipe, groups: int) -> optax.GradientTransformation:
    """Slows the updates of each stage, and holds them back until its step."""

    def init(params: PyTree) -> StagesState:
        return StagesState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: StagesState, params: PyTree | None = None) -> Any:
        def scaled(path: Any, leaf: jax.Array) -> jax.Array:
            stage = _stage(leaf_path(path), groups)
            slow = leaf * jnp.asarray(recipe.layer_decay**stage, leaf.dtype)
            learns = state.step >= stage * recipe.unfreeze_every
            return jnp.where(learns, slow, jnp.zeros_like(slow))

        moved = jax.tree_util.tree_map_with_path(scaled, updates)
        return moved, StagesState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on gradients and parameters in float32, where they have less."""

    def widened(tree: PyTree) -> PyTree:
        narrow = lambda x: jnp.finfo(x.dtype).bits < 32
        return jax.tree.map(lambda x: x.astype(jnp.float32) if narrow(x) else x, tree)

    def update(grads: PyTree, state: Any, params: PyTree | None = None) -> Any:
        moved, state = inner.update(widened(grads), state, widened(params))
        return jax.tree.map(lambda x, grad: x.astype(grad.dtype), moved, grads), state

    return optax.GradientTransformation(lambda params: inner.init(widened(params)), update)


class MomentsState(NamedTuple):
    mu: PyTree
    nu: PyTree


def _moments(recipe: Recipe) -> optax.GradientTransformation:
    """Adam's direction without a correction for bias: `AdamWeightDecayOptimizer` and
    `LAMBOptimizer` in google-research/albert."""

    def init(params: PyTree) -> MomentsState:
        return MomentsState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(grads: PyTree, state: MomentsState, params: PyTree | None = None) -> Any:
        b1, b2 = recipe.momentum, recipe.second
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + recipe.eps), mu, nu)
        return direction, MomentsState(mu, nu)

    return optax.GradientTransformation(init, update)


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

    steps = muon(
        1.0,
        beta=0.95 if recipe.b1 is None else recipe.b1,
        adam_b1=recipe.momentum,
        adam_b2=recipe.second,
        muon_weight_dimension_numbers=places,
        consistent_rms=0.2,
    )
    return optax.chain(steps, optax.scale(-1.0))


_DIRECTIONS: dict[str, Callable[[Recipe], optax.GradientTransformation]] = {
    "adamw": lambda r: optax.scale_by_adam(b1=r.momentum, b2=r.second, eps=r.eps),
    "lamb": lambda r: optax.scale_by_adam(b1=r.momentum, b2=r.second, eps=r.eps),
    "adamw_reference": _moments,
    "lamb_reference": _moments,
    "adafactor": lambda r: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "lion": lambda r: optax.scale_by_lion(b1=r.momentum, b2=r.second),
    "sgd": lambda r: optax.trace(r.momentum),
    "muon": _muon,
}
OPTIMIZERS = tuple(_DIRECTIONS)
_ADAPTED = ("lamb", "lamb_reference")
_WITHOUT = {"adafactor": ("b1", "b2"), "sgd": ("b2",)}
"""Numbers that an optimizer does not have."""


def has(optimizer: str, number: str) -> bool:
    """Whether an optimizer has that number, `b1` or `b2`."""
    return number not in _WITHOUT.get(optimizer, ())


_POSITIVE: Any = lambda x: x > 0, "above 0, and finite"
_FROM_0: Any = lambda x: x >= 0, "at least 0, and finite"
_DECAY: Any = lambda x: 0 <= x < 1, "at least 0, and below 1"
_WITHIN = {
    "learning_rate": _POSITIVE,
    "layer_decay": _POSITIVE,
    "power": _POSITIVE,
    "eps": _POSITIVE,
    "weight_decay": _FROM_0,
    "warmup_steps": _FROM_0,
    "unfreeze_every": _FROM_0,
    "b1": _DECAY,
    "b2": _DECAY,
    "batch_size": (lambda x: x >= 1, "at least 1"),
}


def computed_beside(optimizer: str, config: AlbertConfig) -> AlbertConfig:
    """`config` as it can be computed beside an optimizer: `attention="auto"` is XLA's beside Muon.

    Steps with cuDNN's attention and Muon in one program failed as they were run, on an H200 with
    jax 0.11.2 ("cuda_graph_end_capture: capturing stream has unjoined work"); with XLA's attention,
    and with AdamW, they run.
    """
    if optimizer == "muon" and config.attention == "auto":
        return dataclasses.replace(config, attention="xla")
    return config
