"""The average against numpy in float64, and where it is used."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxlightning.callbacks._ema import Averaged, averaged_task  # type: ignore[import-not-found]
from steps import Regression, assert_bitwise, batches, quiet_trainer, start  # type: ignore[import-not-found]
from tasks import quiet

from jaxlightning import load_weights
from jaxlightning._callback import Callback
from jaxlightning._metrics import Mean
from jaxlightning._step import TrainStep
from jaxlightning.callbacks import (
    ExponentialMovingAverage,
    GradientClipping,
    LambdaCallback,
    ModelCheckpoint,
)


def run(callback, count, **how):
    """The state after `count` steps, and the weights after each, the initial ones first."""
    trainer, step, state = start([callback], **how)
    weights = [np.asarray(state.task.weight.astype(jnp.float32), np.float64)]
    for batch in batches(count):
        state, _ = step(state, batch)
        weights.append(np.asarray(state.task.weight.astype(jnp.float32), np.float64))
    trainer.state = state
    return trainer, state, weights


@pytest.mark.parametrize(
    ("decay", "every", "begin"), [(0.9, 1, 0), (0.5, 3, 0), (0.9, 1, 4), (0.7, 2, 5), (0.0, 1, 0)]
)
def test_equals_numpy(decay, every, begin):
    _, state, weights = run(ExponentialMovingAverage(decay, every, begin), 11)
    average = weights[0]
    for count, weight in enumerate(weights[1:], 1):
        if count <= begin:
            average = weight
        elif count % every == 0:
            average = decay * average + (1 - decay) * weight
    np.testing.assert_allclose(state.opt_state.average.weight, average, rtol=1e-5)


def test_training_itself_does_not_change():
    _, averaged, _ = run(ExponentialMovingAverage(0.9), 8)
    _, step, state = start([])
    for batch in batches(8):
        state, _ = step(state, batch)
    assert_bitwise(averaged.task, state.task)
    assert_bitwise(averaged.opt_state.inner, state.opt_state)


def test_evaluates_the_average_and_the_latest_buffers():
    callback = ExponentialMovingAverage(0.9)
    trainer, state, _ = run(callback, 5)
    task = callback.evaluation_task(trainer, state.task)
    assert isinstance(task, Regression)
    assert_bitwise(task.weight, state.opt_state.average.weight)
    assert int(task.seen) == 5
    assert not np.array_equal(task.weight, state.task.weight)


def test_small_changes_of_bfloat16_parameters_are_not_lost():
    task = Regression.initial(jnp.bfloat16)
    callback = ExponentialMovingAverage(0.999)
    trainer, state, weights = run(callback, 40, task=task, precision="bf16-true")
    assert state.task.weight.dtype == jnp.bfloat16
    assert state.opt_state.average.weight.dtype == jnp.float32
    average = weights[0]
    for weight in weights[1:]:
        average = 0.999 * average + 0.001 * weight
    np.testing.assert_allclose(state.opt_state.average.weight, average, rtol=1e-5)
    assert callback.evaluation_task(trainer, state.task).weight.dtype == jnp.bfloat16


def test_outermost_sees_what_other_callbacks_make_of_the_update():
    callbacks = [ExponentialMovingAverage(0.0), GradientClipping(1e-3)]
    _, step, state = start(callbacks, tx=optax.sgd(1.0))
    state, _ = step(state, next(batches(1)))
    assert isinstance(state.opt_state, Averaged)
    assert_bitwise(state.opt_state.average.weight, state.task.weight)


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda g: -value * g, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    _, step, state = start([ExponentialMovingAverage(0.9)], tx=tx)
    _, plain_step, plain = start([], tx=tx)
    batch = next(batches(1))
    assert_bitwise(step(state, batch)[0].task, plain_step(plain, batch)[0].task)


def test_the_average_and_the_parameters_are_different_buffers():
    _, step, state = start([ExponentialMovingAverage(0.9)])
    donating = eqx.filter_jit(step.__wrapped__, donate="all-except-first")
    assert isinstance(step.__wrapped__, TrainStep)
    after, _ = donating(state, next(batches(1)))
    assert int(after.step) == 1


class Dropped(Regression):
    """Differs in a leaf that is no array between training and inference."""

    dropout: eqx.nn.Dropout = eqx.field(default_factory=lambda: eqx.nn.Dropout(0.5))


def test_swaps_leaf_by_leaf_in_inference_mode_and_with_frozen_leaves():
    task = Dropped(jnp.ones(2), jnp.float32(1.0), jnp.int32(7))
    average = eqx.filter(task, eqx.is_inexact_array)
    average = eqx.tree_at(lambda t: t.weight, average, jnp.full(2, 3.0))
    average = eqx.tree_at(lambda t: t.bias, average, None)
    opt_state = {"deep": [Averaged(jnp.int32(1), average, ())]}
    swapped = averaged_task(eqx.nn.inference_mode(task), opt_state)
    assert np.array_equal(swapped.weight, [3.0, 3.0])
    assert (float(swapped.bias), int(swapped.seen)) == (1.0, 7)
    assert swapped.dropout.inference is True


class Recorder(Callback):
    def __init__(self):
        self.weights = []
        self.validated = []

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.weights.append(np.asarray(trainer.state.task.weight, np.float64))


class Validated(Regression):
    def validation_step(self, batch, *, key):
        return Mean.of(self.weight[0])


@pytest.mark.parametrize("devices", [1, 4])
def test_a_fit_validates_and_returns_the_average(devices):
    recorder = Recorder()
    trainer = quiet_trainer(
        [ExponentialMovingAverage(0.8), recorder],
        devices=devices,
        log_every_n_steps=3,
        max_epochs=2,
    )
    start = Regression.initial()
    task = Validated(start.weight, start.bias, start.seen)
    trained = trainer.fit(task, list(batches(5)), list(batches(2)))
    average = np.asarray(start.weight, np.float64)
    for weight in recorder.weights:
        average = 0.8 * average + 0.2 * weight
    np.testing.assert_allclose(trained.weight, average, rtol=1e-5)
    np.testing.assert_allclose(trainer.state.task.weight, recorder.weights[-1], rtol=1e-6)
    assert trainer.callback_metrics["val/loss"] == pytest.approx(average[0], rel=1e-5)
    assert int(trained.seen) == 10
    # A second evaluation, after the fit.
    assert trainer.validate(dataloaders=list(batches(2)))["val/loss"] == pytest.approx(
        average[0], rel=1e-5
    )


def test_without_an_average_the_task_is_left_alone():
    task = Regression.initial()
    assert averaged_task(task, optax.sgd(1.0).init(task.weight)) is task


def test_refuses_nonsense():
    with pytest.raises(ValueError, match=r"`decay=1\.0` has to be at least 0 and less than 1"):
        ExponentialMovingAverage(1.0)
    with pytest.raises(ValueError, match="`every_n_steps` of at least 1"):
        ExponentialMovingAverage(every_n_steps=0)
    with pytest.raises(ValueError, match="more than one `ExponentialMovingAverage`"):
        start([ExponentialMovingAverage(), ExponentialMovingAverage(0.5)])


def test_weights_alone_are_the_average(tmp_path):
    save = LambdaCallback(
        on_fit_end=lambda trainer: trainer.save_checkpoint(tmp_path / "w", weights_only=True)
    )
    trainer = quiet_trainer([ExponentialMovingAverage(0.9), save])
    trained = trainer.fit(Regression.initial(), list(batches(5)))
    assert_bitwise(load_weights(tmp_path / "w", Regression.initial()), trained)


def test_a_checkpoint_is_evaluated_with_its_average(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss", save_top_k=1)
    trainer = quiet(
        callbacks=[ExponentialMovingAverage(0.8), saves], enable_checkpointing=None, max_epochs=1
    )
    start = Regression.initial()
    task = Validated(start.weight, start.bias, start.seen)
    trained = trainer.fit(task, list(batches(5)), list(batches(2)))
    monitored = trainer.callback_metrics["val/loss"]
    assert monitored != pytest.approx(float(trainer.state.task.weight[0]), rel=1e-3)
    found = trainer.validate(task, list(batches(2)), ckpt_path="best")
    assert found["val/loss"] == pytest.approx(monitored, rel=1e-6)
    loaded = load_weights(saves.best_model_path, task)
    np.testing.assert_array_equal(loaded.weight, trained.weight)
