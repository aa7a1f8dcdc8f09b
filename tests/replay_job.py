"""A task that fails on one row, in ways to choose from; replayed as `replay_job.py:Fails`."""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent))

from tasks import quiet

from jaxlightning import DataLoader, Mean, TaskModule, buffer
from jaxlightning.callbacks import ExponentialMovingAverage, LearningRateSchedule

BAD = {
    "log": -3.0,
    "nan": np.nan,
    "quotient": 0.0,
    "overflow": 200.0,
    "difference": 200.0,
    "root": 0.0,
}
"""What the bad row holds; in all others are numbers from 1 to 2."""


def data(kind, rows=40, bad=17):
    x = np.random.default_rng(0).uniform(1, 2, size=(rows, 3)).astype(np.float32)
    x[bad] = BAD.get(kind, -1.0)
    return {"x": x}


def loader(kind):
    return DataLoader(data(kind), 4, shuffle=True, allow_nan=True)


def refuse(x):
    if (x < 0).any():
        raise ValueError("no negative numbers")
    return np.float32(0)


def zero_over_zero_where_it_stands_still():
    """A transformation that divides by the gradient's size, which may be 0."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: g / jnp.abs(g), updates), state  # line: optimizer

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Fails(TaskModule):
    """A running mean, dropout, and an operation that does not bear the bad row."""

    w: jax.Array
    dropout: eqx.nn.Dropout
    kind: str = eqx.field(static=True)
    mean: jax.Array = buffer()

    def __init__(self, kind, key=None):
        self.w = jnp.ones(3)
        self.dropout = eqx.nn.Dropout(0.5)
        self.mean = jnp.zeros(3)
        self.kind = kind

    def training_step(self, batch, *, key):
        h = batch["x"] * self.w[None]
        mean = batch["x"].astype(jnp.float32).mean(0)
        task = eqx.tree_at(lambda t: t.mean, self, 0.9 * self.mean + 0.1 * mean)
        hidden = jax.lax.stop_gradient(self.dropout(h, key=key))
        masked = jnp.where(jnp.arange(3)[None] < 2, hidden, -jnp.inf)
        loss = getattr(self, self.kind)(h, batch["x"], key) + jax.nn.softmax(masked).sum(1)
        return Mean.over(loss), {"size": h.mean()}, task

    def log(self, h, x, key):
        return jnp.log(h).sum(1)  # line: log

    def nan(self, h, x, key):
        return h.sum(1)

    def quotient(self, h, x, key):
        return (h / h).sum(1)  # line: quotient

    def overflow(self, h, x, key):
        return jnp.exp(h).sum(1)  # line: overflow

    def difference(self, h, x, key):
        size = self.overflow(h, x, key)
        return size - size  # line: difference

    def root(self, h, x, key):
        return jnp.where(h > 0, jnp.sqrt(h), 0.0).sum(1)  # line: root

    def optimizer(self, h, x, key):
        return jnp.where((x < 0).any(), 0.0, h.sum(1))

    def random(self, h, x, key):
        return h.sum(1) + jnp.log(jax.random.uniform(key) - 0.2)  # line: random

    def callback(self, h, x, key):
        zero = jax.ShapeDtypeStruct((), jnp.float32)
        return h.sum(1) + jax.pure_callback(refuse, zero, x)  # line: callback

    def refused(self, h, x, key):
        return eqx.error_if(h.sum(1), (x < 0).any(), "negative weight!")  # line: refused

    def configure_optimizers(self):
        if self.kind == "optimizer":
            return optax.chain(zero_over_zero_where_it_stands_still(), optax.sgd(0.001))
        return optax.sgd(0.001, momentum=0.5)


def line_of(name):
    """The number of the line that ends with `# line: name`."""
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# line: {name}"))


def wrapped():
    """The run of `test_replay.py` whose optimizer is not the task's alone."""
    callbacks = [ExponentialMovingAverage(0.9), LearningRateSchedule("linear", warmup=2)]
    return quiet(max_epochs=1, callbacks=callbacks, gradient_clip_val=1.0), Fails("log")
