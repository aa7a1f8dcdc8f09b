"""Tasks that own their update, have several optimizers, are frozen in part, or made inside jit."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from naming import named
from tasks import Classifier, arrays, assert_close, assert_same, hand_fit, quiet, rows

from jaxlightning import Callback, DataLoader, Mean, Precision, TaskModule, buffer
from jaxlightning.callbacks import (
    ExponentialMovingAverage,
    GradientNormMonitor,
    LearningRateSchedule,
    ModelCheckpoint,
    SkipNonFinite,
)

DATA = {"x": rows(32)["x"]}


# Tasks that own their update


class Averages(TaskModule):
    """No gradient at all: a weight that follows the mean of the data, and counts."""

    weight: jax.Array
    count: jax.Array = buffer()

    def train_step(self, state, batch, *, key):
        mean = batch["x"].mean(0)
        noise = jax.random.normal(key, mean.shape)
        weight = 0.5 * state.task.weight + 0.5 * mean
        task = eqx.tree_at(
            lambda t: (t.weight, t.count), state.task, (weight, state.task.count + 1)
        )
        return state.replace(task=task), {"mean": mean.sum(), "noise": noise.sum()}

    def validation_step(self, batch, *, key):
        return Mean.over((batch["x"] - self.weight[None]).sum(1))

    def configure_optimizers(self):
        return optax.identity()


def averages():
    return Averages(jnp.zeros(6), jnp.int32(0))


@pytest.mark.parametrize("steps_per_dispatch", [1, 3])
def test_it_gets_the_loop_the_data_the_metrics_and_validation(steps_per_dispatch):
    trainer = quiet(max_epochs=2, steps_per_dispatch=steps_per_dispatch, log_every_n_steps=3)
    trained = trainer.fit(averages(), DataLoader(DATA, 8), DataLoader(DATA, 8))
    expected, means = np.zeros(6, np.float32), []
    for _ in range(2):
        for part in np.split(DATA["x"], 4):
            expected = 0.5 * expected + 0.5 * part.mean(0)
            means.append(part.mean(0).sum())
    np.testing.assert_allclose(trained.weight, expected, rtol=1e-5)
    assert int(trained.count) == trainer.global_step == 8
    found = trainer.callback_metrics
    assert found["train/mean"] == pytest.approx(np.mean(means[3:6]), rel=1e-5)
    assert found["train/mean_epoch"] == pytest.approx(np.mean(means[4:]), rel=1e-5)
    assert found["val/loss"] == pytest.approx((DATA["x"] - expected).sum(1).mean(), rel=1e-4)


def test_it_is_sharded_and_resumed_like_any_other(tmp_path):
    whole = quiet(max_epochs=2).fit(averages(), DataLoader(DATA, 8))
    many = quiet(max_epochs=2, devices=4).fit(averages(), DataLoader(DATA, 8))
    assert_close(many, whole)

    def fit(epochs, **options):
        saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3)
        trainer = quiet(max_epochs=epochs, enable_checkpointing=None, callbacks=saves)
        return trainer.fit(averages(), DataLoader(DATA, 8), **options)

    fit(1)
    assert_same(fit(2, ckpt_path="last"), whole)


class Accepts(Callback):
    def accept_step(self, view):
        return view.loss < 1


HOOKS = [
    (GradientNormMonitor(), "inside_step"),
    (SkipNonFinite(), "inside_step"),
    (ExponentialMovingAverage(), "wrap_optimizer"),
    (LearningRateSchedule("cosine", warmup=0.1), "wrap_optimizer"),
    (Accepts(), "accept_step"),
]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"precision": "bf16-mixed"}, "`precision='bf16-mixed'` has no effect. Cast there."),
        ({"precision": Precision(jnp.bfloat16)}, "has no effect. Cast there."),
        ({"accumulate_grad_batches": 2}, "`accumulate_grad_batches=2` has no effect. Accumulate"),
        ({"gradient_clip_val": 1.0}, "`gradient_clip_val=1.0` has no effect. Use `optax.clip_by_"),
        *(
            ({"callbacks": one}, f"the hook `{hook}` of `{type(one).__name__}` is never called")
            for one, hook in HOOKS
        ),
    ],
    ids=named,
)
def test_what_belongs_to_the_built_step_is_refused_by_name(arguments, says):
    trainer = quiet(max_epochs=1, **arguments)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        trainer.fit(averages(), DataLoader(DATA, 8))
    assert str(caught.value).startswith("`Averages` owns its update (it overrides `train_step`),")
    assert trainer.compile_s == 0


def test_what_it_returns_is_checked():
    class Grows(Averages):
        def train_step(self, state, batch, *, key):
            task = eqx.tree_at(lambda t: t.weight, state.task, jnp.zeros(7))
            return state.replace(task=task), {}

    with pytest.raises(
        ValueError, match=r"leaf `task/weight` .* from float32\[6\] to float32\[7\]"
    ):
        quiet(max_epochs=1).fit(Grows(jnp.zeros(6), jnp.int32(0)), DataLoader(DATA, 8))

    class Forgets(Averages):
        def train_step(self, batch, *, key):
            return batch

    with pytest.raises(TypeError, match=r"Write `def train_step\(self, state, batch, \*, key\)"):
        quiet(max_epochs=1).fit(Forgets(jnp.zeros(6), jnp.int32(0)), DataLoader(DATA, 8))


# Several optimizers


class Pair(TaskModule):
    """Whose two fields have one and the same gradient; with a static field beside them."""

    a: jax.Array
    b: jax.Array
    rate: float = eqx.field(static=True, default=0.5)

    def training_step(self, batch, *, key):
        return Mean.over(batch["x"] @ (self.a + self.b))

    def configure_optimizers(self):
        return {"a": optax.sgd(0.1), "b": optax.sgd(self.rate)}


@pytest.fixture(scope="module")
def pair():
    return quiet(max_epochs=1).fit(Pair(jnp.zeros(6), jnp.zeros(6)), DataLoader(DATA, 8))


def test_an_optimizer_a_field_where_gradients_are_one_array(pair):
    gradient = sum(part.mean(0) for part in np.split(DATA["x"], 4))
    np.testing.assert_allclose(pair.a, -0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(pair.b, -0.5 * gradient, rtol=1e-5)


@pytest.mark.parametrize("make", ["multi_transform", "partition"])
def test_optaxs_own_ways(pair, make):
    class Labelled(Pair):
        def configure_optimizers(self):
            labels = lambda params: eqx.tree_at(
                lambda t: (t.a, t.b), params, ("slow", "fast"), is_leaf=lambda x: x is None
            )
            rates = {"slow": optax.sgd(0.1), "fast": optax.sgd(0.5)}
            return getattr(optax, make)(rates, labels)

    task = Labelled(jnp.zeros(6), jnp.zeros(6))
    assert_close(quiet(max_epochs=1).fit(task, DataLoader(DATA, 8)), pair)


def test_a_frozen_field_needs_no_optimizer():
    class Half(Pair):
        def trainable(self):
            return eqx.tree_at(lambda t: t.b, super().trainable(), False)

        def configure_optimizers(self):
            return {"a": optax.adamw(0.1)}

    trainer = quiet(max_epochs=1)
    trained = trainer.fit(Half(jnp.ones(6), jnp.ones(6)), DataLoader(DATA, 8))
    np.testing.assert_array_equal(trained.b, np.ones(6))
    assert not np.allclose(trained.a, 1.0)
    assert set(trainer.state.opt_state) == {"a"}


# Frozen parameters


def test_trainable_may_be_a_prefix():
    class Head(Classifier):
        def trainable(self):
            everything = jax.tree.map(lambda _: False, self)
            return eqx.tree_at(lambda t: t.net.layers[1], everything, True)

    task = Head()
    trained = quiet(max_epochs=1).fit(task, DataLoader(rows(32), 8))
    assert_same(trained.net.layers[0], task.net.layers[0])
    with pytest.raises(AssertionError):
        assert_same(trained.net.layers[1], task.net.layers[1])


def test_a_buffer_is_never_trained_whatever_trainable_says():
    class Everything(Averages):
        train_step = TaskModule.train_step

        def training_step(self, batch, *, key):
            return Mean.over(batch["x"] @ self.weight)

        def trainable(self):
            return True

        def configure_optimizers(self):
            return optax.sgd(0.1)

    trained = quiet(max_epochs=1).fit(Everything(jnp.zeros(6), jnp.int32(3)), DataLoader(DATA, 8))
    assert int(trained.count) == 3
    assert np.any(trained.weight)


# Tasks that are made inside jit


def test_a_task_of_a_function_trains_like_the_same_task_given():
    """With metrics, dropout and a smaller last batch, on the seed's own key."""
    data = DataLoader(rows(20), 8, shuffle=True)
    inside = quiet(max_epochs=1, seed=3).fit(lambda key: Classifier(dropout=0.3), data)
    outside = quiet(max_epochs=1, seed=3).fit(Classifier(dropout=0.3), data)
    assert_close(inside, outside, 1e-6)


def test_values_that_are_not_there_yet_are_asked_for_in_vain():
    class Looks(Classifier):
        def configure_optimizers(self):
            return optax.sgd(float(jnp.abs(self.net.layers[0].weight).max()))

    quiet(max_epochs=1).fit(Looks(), DataLoader(rows(8), 8))
    with pytest.raises(TypeError, match=r"`Looks\.configure_optimizers` needs the values of arra"):
        quiet(max_epochs=1).fit(lambda key: Looks(key), DataLoader(rows(8), 8))


def test_arrays_that_are_shared_are_tied():
    class Tied(TaskModule):
        shared: eqx.nn.Shared

        def __init__(self):
            key = jax.random.key(0)
            a, b = eqx.nn.Linear(6, 6, key=key), eqx.nn.Linear(6, 6, key=key)
            pair = (a, eqx.tree_at(lambda m: m.weight, b, None, is_leaf=lambda x: x is None))
            pair = (a, b)
            self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

        def training_step(self, batch, *, key):
            a, b = self.shared()
            return Mean.over(jnp.square(jax.vmap(lambda x: b(jnp.tanh(a(x))))(batch["x"])).sum(1))

        def configure_optimizers(self):
            return optax.sgd(0.1)

    task = Tied()
    trained = quiet(max_epochs=1).fit(task, DataLoader(DATA, 8))
    a, b = trained.shared()
    np.testing.assert_array_equal(a.weight, b.weight)
    batches = list(DataLoader(DATA, 8))
    loss = lambda task, batch: task.training_step(batch, key=None).compute()
    expected, _ = hand_fit(task, batches, optax.sgd(0.1), loss)
    assert_close(trained, expected)
    assert len(arrays(trained)) == 3  # one weight, two biases
