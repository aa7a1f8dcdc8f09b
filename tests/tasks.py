"""Small tasks and loops written by hand, which the tests of the core share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlightning import Accuracy, DataLoader, Mean, TaskModule, Trainer

FEATURES, CLASSES = 6, 3


def rows(count=40, seed=0):
    """A learnable classification of `count` rows, a fifth of them masked out."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, FEATURES)).astype(np.float32)
    y = np.argmax(x[:, :CLASSES] + 0.1 * x[:, CLASSES:], axis=1).astype(np.int32)
    mask = generator.random(count) < 0.8
    return {"x": x, "y": y, "mask": mask}


class Classifier(TaskModule):
    """Dropout, a masked loss, a metric: what makes exactness hard."""

    net: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    lr: float = eqx.field(static=True)

    def __init__(self, key=None, lr=0.05, dropout=0.0):
        key = jax.random.key(0) if key is None else key
        self.net = eqx.nn.MLP(FEATURES, CLASSES, 8, 1, key=key)
        self.dropout = eqx.nn.Dropout(dropout)
        self.lr = lr

    def logits(self, batch, key):
        return jax.vmap(self.net)(self.dropout(batch["x"], key=key))

    def training_step(self, batch, *, key):
        logits = self.logits(batch, key)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        where = batch["mask"]
        return Mean.over(nll, where), {"accuracy": Accuracy.of(logits, batch["y"], where=where)}

    def predict_step(self, batch, *, key):
        return self.logits(batch, key)

    def configure_optimizers(self):
        return optax.adam(self.lr)


class TwoLosses(Classifier):
    """A loss of two Means with different weights."""

    def training_step(self, batch, *, key):
        loss, _ = super().training_step(batch, key=key)
        size = jnp.square(self.logits(batch, key)).sum(1)
        return {"nll": loss, "size": 0.1 * Mean.over(size, batch["y"] == 0)}


class Products(TaskModule):
    """A step takes as many small products in a row as its first number says."""

    weight: jax.Array

    def training_step(self, batch, *, key):
        squash = lambda i, x: jnp.tanh(x @ jax.lax.stop_gradient(self.weight))
        times = batch["x"][0, 0].astype(jnp.int32)
        out = jax.lax.fori_loop(0, times, squash, batch["x"])
        return Mean.over(out + self.weight.sum()), {}

    def configure_optimizers(self):
        return optax.sgd(0.0)


def fit_with_one_slow_step(trainer, slow, steps):
    """A fit of which step `slow` (from 0) takes seconds and each other one next to nothing: what
    the host does meanwhile can be seen, also on a busy machine."""
    x = np.ones((steps, 64, 256), np.float32)
    x[slow] = 10_000
    trainer.fit(Products(jnp.eye(256)), DataLoader({"x": x.reshape(-1, 256)}, 64))


def hand_loss(net, batch):
    """The masked mean of the classifier's loss, in plain JAX."""
    logits = jax.vmap(net)(batch["x"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    weight = batch["mask"].astype(jnp.float32)
    return (nll * weight).sum() / weight.sum()


def hand_fit(net, batches, tx, loss=hand_loss):
    """The loop one would write by hand: the trained net and each step's loss."""
    params, static = eqx.partition(net, eqx.is_inexact_array)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), batch))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses = []
    for batch in batches:
        params, opt_state, value = step(params, opt_state, batch)
        losses.append(float(value))
    return eqx.combine(params, static), losses


def quiet(**arguments):
    """A Trainer that writes nothing and shows nothing, on one device."""
    defaults = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**defaults | arguments)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]


def assert_close(a, b, tolerance=2e-6):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def assert_same(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)


def refused(error, task, train=None, val=None, trainer=None, **arguments):
    """The error of a fit, of which nothing has been compiled, let alone computed."""
    trainer = trainer or quiet(max_epochs=1, **arguments)
    with pytest.raises(error) as caught:
        trainer.fit(task, DataLoader(rows(8), 4) if train is None else train, val)
    assert trainer.global_step == trainer.compile_s == 0
    assert trainer._run is None or not trainer._run.leaves
    return caught.value


def says(error):
    return str(error.args[0])


def notes(error):
    return [note for note in error.__notes__ if "JAX has removed its internal frames" not in note]
