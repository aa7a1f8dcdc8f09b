"""The compiled step is what one would have written by hand, operation for operation.

Each task below stands beside its step in plain JAX: the same leaves in the same order, a loss kept
as total and weight, and metrics summed on the device. Both are lowered to StableHLO and compared as
text. Only names differ: of the module, of results, and places in the source.
"""

import difflib
import re
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlightning import Accuracy, Callback, Mean, TaskModule, Trainer

TX = optax.adamw(1e-3)
IMAGES = {
    "x": np.zeros((16, 8), np.float32),
    "y": np.zeros(16, np.int32),
}
TOKENS = {
    "tokens": np.zeros((4, 6), np.int32),
    "targets": np.zeros((4, 6), np.int32),
    "counted": np.ones((4, 6), bool),
    "label": np.zeros(4, np.int32),
}


@pytest.fixture(autouse=True)
def promotes():
    """`optax.adamw` raises a float to an integer's power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


nll = optax.softmax_cross_entropy_with_integer_labels


class Sums(NamedTuple):
    """A mean in parts."""

    total: jax.Array
    weight: jax.Array


class State(NamedTuple):
    step: jax.Array
    key: jax.Array
    task: object
    opt_state: object
    metrics: dict


def mean(parts):
    """Total / weight; 0 where there is no weight, without a NaN in the gradient."""
    weight = jax.lax.stop_gradient(parts.weight)
    return jnp.where(weight == 0, 0.0, parts.total / jnp.where(weight == 0, 1.0, weight))


def key_of(state):
    return jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step)


def added(a, b):
    return jax.tree.map(jnp.add, a, b)


# A classifier


class Classifier(TaskModule):
    net: eqx.nn.MLP

    def training_step(self, batch, *, key):
        logits = jax.vmap(self.net)(batch["x"])
        return Mean.over(nll(logits, batch["y"])), {"accuracy": Accuracy.of(logits, batch["y"])}

    def configure_optimizers(self):
        return TX


def classifier():
    return Classifier(eqx.nn.MLP(8, 4, 16, depth=2, key=jax.random.key(0)))


def classifier_by_hand(batch):
    params, static = eqx.partition(classifier().net, eqx.is_inexact_array)

    def loss_of(params, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch["x"])
        losses = nll(logits, batch["y"])
        parts = Sums(losses.sum(), jnp.float32(losses.size))
        correct = (logits.argmax(-1) == batch["y"]).astype(jnp.float32)
        accuracy = Sums(correct.sum(), jnp.float32(correct.size))
        return 0.0 + mean(parts), {"loss": parts, "accuracy": accuracy}

    def step(state, batch):
        grads, metrics = jax.grad(loss_of, has_aux=True)(state.task, batch)
        updates, opt_state = TX.update(grads, state.opt_state, state.task)
        task = optax.apply_updates(state.task, updates)
        sums = added(state.metrics, metrics)
        return State(state.step + 1, state.key, task, opt_state, sums), metrics

    return step, params, params, loss_of(params, batch)[1]


# Buffers: the running statistics of a BatchNorm


class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self):
        first, last = jax.random.split(jax.random.key(0))
        self.first = eqx.nn.Linear(8, 16, key=first)
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch")
        self.last = eqx.nn.Linear(16, 4, key=last)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jax.nn.relu(x)), state


over_batch = partial(jax.vmap, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


class WithBuffers(TaskModule):
    net: Normed
    state: eqx.nn.State

    def training_step(self, batch, *, key):
        logits, state = over_batch(self.net)(batch["x"], self.state)
        task = eqx.tree_at(lambda task: task.state, self, state)
        return Mean.over(nll(logits, batch["y"])), {}, task

    def configure_optimizers(self):
        return TX


def with_buffers():
    return WithBuffers(*eqx.nn.make_with_state(Normed)())


def with_buffers_by_hand(batch):
    net, buffers = eqx.nn.make_with_state(Normed)()
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss_of(params, buffers, batch):
        logits, buffers = over_batch(eqx.combine(params, static))(batch["x"], buffers)
        losses = nll(logits, batch["y"])
        parts = Sums(losses.sum(), jnp.float32(losses.size))
        return 0.0 + mean(parts), ({"loss": parts}, buffers)

    def step(state, batch):
        params, buffers = state.task
        grads, (metrics, buffers) = jax.grad(loss_of, has_aux=True)(params, buffers, batch)
        updates, opt_state = TX.update(grads, state.opt_state, params)
        task = optax.apply_updates(params, updates), buffers
        sums = added(state.metrics, metrics)
        return State(state.step + 1, state.key, task, opt_state, sums), metrics

    return step, (params, buffers), params, loss_of(params, buffers, batch)[1][0]


# Two losses of different weights, one of them masked, and randomness


class TwoHeads(eqx.Module):
    embedding: eqx.nn.Embedding
    dropout: eqx.nn.Dropout
    tokens: eqx.nn.Linear
    label: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.embedding = eqx.nn.Embedding(11, 8, key=keys[0])
        self.dropout = eqx.nn.Dropout(0.5)
        self.tokens = eqx.nn.Linear(8, 11, key=keys[1])
        self.label = eqx.nn.Linear(8, 2, key=keys[2])

    def __call__(self, tokens, key):
        hidden = self.dropout(jax.vmap(self.embedding)(tokens), key=key)
        return jax.vmap(self.tokens)(hidden), self.label(hidden.mean(0))


class TwoLosses(TaskModule):
    net: TwoHeads

    def training_step(self, batch, *, key):
        keys = jax.random.split(key, len(batch["tokens"]))
        tokens, label = jax.vmap(self.net)(batch["tokens"], keys)
        return {
            "tokens": Mean.over(nll(tokens, batch["targets"]), where=batch["counted"]),
            "label": 0.5 * Mean.over(nll(label, batch["label"])),
        }

    def configure_optimizers(self):
        return TX


def two_losses():
    return TwoLosses(TwoHeads())


def two_losses_by_hand(batch):
    params, static = eqx.partition(TwoHeads(), eqx.is_inexact_array)

    def loss_of(params, batch, key):
        keys = jax.random.split(key, len(batch["tokens"]))
        tokens, label = jax.vmap(eqx.combine(params, static))(batch["tokens"], keys)
        losses, weights = nll(tokens, batch["targets"]), batch["counted"].astype(jnp.float32)
        counted = jnp.where(weights == 0, 0.0, losses) * weights
        parts = {"tokens": Sums(counted.sum(), weights.sum())}
        labels = nll(label, batch["label"])
        parts["label"] = Sums(labels.sum() * 0.5, jnp.float32(labels.size))
        return 0.0 + mean(parts["tokens"]) + mean(parts["label"]), {"loss": parts, **parts}

    def step(state, batch):
        grads, metrics = jax.grad(loss_of, has_aux=True)(state.task, batch, key_of(state))
        updates, opt_state = TX.update(grads, state.opt_state, state.task)
        task = optax.apply_updates(state.task, updates)
        sums = added(state.metrics, metrics)
        return State(state.step + 1, state.key, task, opt_state, sums), metrics

    return step, params, params, loss_of(params, batch, jax.random.key(0))[1]


# The comparison


def lowered_by_hand(by_hand, batch):
    batch = jax.tree.map(jnp.asarray, batch)
    step, task, params, metrics = by_hand(batch)
    state = State(jnp.int32(0), jax.random.key(0), task, TX.init(params), metrics)
    return jax.jit(step, donate_argnums=0).lower(state, batch).as_text()


def lowered_by_trainer(task, batch):
    found = []

    class Keep(Callback):
        def on_train_end(self, trainer):
            found.append(trainer.lower_train_step().as_text())

    Trainer(
        max_steps=1,
        devices=1,
        callbacks=[Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, [batch])
    return found[0]


def without_names(text):
    text = re.sub(r"module @\w+", "module @step", text)
    text = re.sub(r'jax\.result_info = "[^"]*"', "", text)
    return re.sub(r" loc\(.*?\)", "", text)


@pytest.mark.parametrize(
    ("task", "by_hand", "batch"),
    [
        (classifier, classifier_by_hand, IMAGES),
        (with_buffers, with_buffers_by_hand, IMAGES),
        (two_losses, two_losses_by_hand, TOKENS),
    ],
)
def test_the_trainers_step_equals_one_written_by_hand(task, by_hand, batch):
    ours = without_names(lowered_by_trainer(task(), batch))
    hand = without_names(lowered_by_hand(by_hand, batch))
    assert "stablehlo.dot_general" in ours
    difference = list(difflib.unified_diff(hand.splitlines(), ours.splitlines(), lineterm="", n=1))
    assert not difference, "\n".join(difference[:40])
