"""A small task and a hand-written loop over the real `TrainStep`, for tests of traced hooks."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlightning import Trainer
from jaxlightning._callback import Bus
from jaxlightning._metrics import Mean
from jaxlightning._optim import task_optimizer
from jaxlightning._precision import Precision
from jaxlightning._state import LossScale, Skipped, TrainState
from jaxlightning._step import TrainStep
from jaxlightning._task import TaskModule, buffer, trainable_spec


class Regression(TaskModule):
    """Least squares with momentum, and a buffer that counts the steps."""

    weight: jax.Array
    bias: jax.Array
    seen: jax.Array = buffer()

    @classmethod
    def initial(cls, dtype=jnp.float32):
        return cls(jnp.asarray([1.0, -2.0], dtype), jnp.asarray(0.5, dtype), jnp.int32(0))

    def training_step(self, batch, *, key):
        out = batch["x"] @ self.weight + self.bias
        task = eqx.tree_at(lambda t: t.seen, self, self.seen + 1)
        return Mean.over((out - batch["y"]) ** 2), {}, task

    def configure_optimizers(self):
        return optax.sgd(0.05, momentum=0.9)


def batches(count, poisoned=()):
    """Batches of four examples; those in `poisoned` hold a NaN."""
    rng = np.random.default_rng(0)
    for i in range(count):
        x, y = rng.normal(size=(4, 2)), rng.normal(size=4)
        if i in poisoned:
            x[1, 0] = np.nan
        yield {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def start(callbacks, task=None, precision="32-true", tx=None):
    """`(trainer, jitted step, state)` for `callbacks`, as the Trainer makes them."""
    task = Regression.initial() if task is None else task
    bus, precision = Bus(callbacks), Precision.named(precision)
    trainer = SimpleNamespace(callbacks=callbacks, precision=precision, state=None, barebones=False)
    for callback in callbacks:
        callback.setup(trainer, "fit")
    tx = bus.wrap_optimizer(trainer, tx or task_optimizer(task))
    spec = trainable_spec(task)
    step = TrainStep(spec, optax.with_extra_args_support(tx), precision, bus, collect=False)
    state = TrainState(
        jnp.int32(0),
        jax.random.key(0),
        task,
        tx.init(eqx.filter(task, spec)),
        {},
        LossScale.initial() if precision.scale_loss else None,
        Skipped.none() if bus.judges else None,
    )
    return trainer, eqx.filter_jit(step), state


def quiet_trainer(callbacks, **arguments):
    """A real Trainer of one epoch that leaves nothing behind and says nothing."""
    arguments = dict(max_epochs=1, devices=1) | arguments
    return Trainer(
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def arrays(tree):
    """The array leaves of a tree as numpy arrays."""
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def assert_bitwise(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
