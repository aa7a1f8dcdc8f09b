"""Refused steps: nothing moves, they are counted, and too many of them end the run."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxlightning.callbacks._non_finite import all_finite  # type: ignore[import-not-found]
from steps import Regression, assert_bitwise, batches, quiet_trainer, start  # type: ignore[import-not-found]

from jaxlightning._callback import InsideStep
from jaxlightning._stream import computed, read
from jaxlightning.callbacks import ExponentialMovingAverage, LambdaCallback, SkipNonFinite


def test_a_poisoned_step_leaves_everything_bitwise_and_is_counted():
    _, step, state = start([SkipNonFinite(), ExponentialMovingAverage(0.9)])
    first, second, third = batches(3, poisoned=[1])
    state, _ = step(state, first)
    after, metrics = step(state, second)
    assert_bitwise(after.task, state.task)
    assert_bitwise(after.opt_state, state.opt_state)
    assert int(after.step) == 2
    assert (int(after.skipped.total), int(after.skipped.in_a_row)) == (1, 1)
    assert float(metrics["skipped"].compute()) == 1
    assert float(metrics["loss"].weight) == 0
    after, metrics = step(after, third)
    assert (int(after.skipped.total), int(after.skipped.in_a_row)) == (1, 0)
    assert float(metrics["skipped"].compute()) == 0
    assert not np.array_equal(after.task.weight, state.task.weight)
    assert int(after.task.seen) == 2


def test_equals_a_run_on_the_good_batches_alone():
    _, step, state = start([SkipNonFinite()])
    for batch in batches(12, poisoned=[3, 4, 9]):
        state, _ = step(state, batch)
    _, step, clean = start([SkipNonFinite()])
    for i, batch in enumerate(batches(12)):
        if i not in (3, 4, 9):
            clean, _ = step(clean, batch)
    assert_bitwise(state.task, clean.task)
    assert_bitwise(state.opt_state, clean.opt_state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_each_entry_and_the_loss_are_looked_at(bad):
    def accepts(loss, grads):
        view = InsideStep(jnp.int32(0), jnp.float32(loss), None, grads, None, None, None)
        return bool(SkipNonFinite().accept_step(view))

    good = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    assert accepts(1.0, good)
    assert not accepts(bad, good)
    assert not accepts(1.0, good | {"b": good["b"].at[1, 0].set(bad)})


def test_finite_gradients_whose_squares_overflow_are_fine():
    assert bool(all_finite({"w": jnp.full(2, 1e30)}))
    assert bool(all_finite({}))


def test_float16_overflows_are_not_counted():
    _, step, state = start([SkipNonFinite(max_in_a_row=1)], precision="16-mixed")
    batch = next(batches(1))
    after, metrics = step(state, {"x": batch["x"] * 1e3, "y": batch["y"]})
    assert_bitwise(after.task, state.task)
    assert float(after.loss_scale.scale) == float(state.loss_scale.scale) / 2
    assert int(after.skipped.total) == 0
    assert float(metrics["skipped"].compute()) == 0


def interval(callback, poisoned, count):
    """What `on_log` gets after `count` steps in one log interval."""
    trainer, step, state = start([callback])
    total = None
    for batch in batches(count, poisoned):
        state, metrics = step(state, batch)
        total = metrics if total is None else {k: m.merge(metrics[k]) for k, m in total.items()}
    return trainer, computed(read([total])[0], "train/")


def test_too_many_in_a_row_end_the_run_and_are_named():
    callback = SkipNonFinite(max_in_a_row=3)
    # Two, then three in a row; steps are numbered from 1.
    trainer, metrics = interval(callback, {1, 2, 4, 5, 6}, 9)
    with pytest.raises(
        FloatingPointError, match=r"In 3 steps in a row .* global steps 5 to 7"
    ) as e:
        callback.on_log(trainer, metrics, 8)
    assert "`gradient_clip_val=1.0`" in str(e.value)


def test_fewer_in_a_row_go_on_and_leave_their_count():
    callback = SkipNonFinite(max_in_a_row=3)
    trainer, metrics = interval(callback, {0, 1, 3, 4}, 6)
    callback.on_log(trainer, metrics, 6)
    assert metrics["train/skipped"] == 4
    assert np.array_equal(metrics["train/skipped_steps"], [2, 5])


def test_one_is_named_in_the_singular():
    callback = SkipNonFinite(max_in_a_row=1)
    trainer, metrics = interval(callback, {2}, 4)
    with pytest.raises(FloatingPointError, match="global step 3"):
        callback.on_log(trainer, metrics, 4)


@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_in_a_fit(steps_per_dispatch):
    def fit(poisoned):
        callback = SkipNonFinite(max_in_a_row=3)
        trainer = quiet_trainer(
            [callback], log_every_n_steps=5, steps_per_dispatch=steps_per_dispatch
        )
        return trainer, trainer.fit(Regression.initial(), list(batches(20, poisoned)))

    trainer, task = fit({2, 7, 8})
    assert np.isfinite(task.weight).all()
    assert trainer.callback_metrics["train/skipped_epoch"] == 3
    assert int(trainer.state.skipped.longest) == 2
    with pytest.raises(FloatingPointError, match="global steps 9 to 12") as error:
        fit({2, 8, 9, 10, 11})
    (note,) = error.value.__notes__
    assert "`SkipNonFinite` in its hook `on_log`" in note


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="`max_in_a_row=0` has to be a positive integer"):
        SkipNonFinite(0)


def test_an_interval_of_refused_steps_has_no_loss():
    """Zero would be the best loss there ever was to whoever monitors it."""
    losses = []
    log = LambdaCallback(on_log=lambda trainer, metrics, step: losses.append(metrics["train/loss"]))
    trainer = quiet_trainer([SkipNonFinite(), log], log_every_n_steps=1)
    trainer.fit(Regression.initial(), list(batches(4, {2})))
    assert [np.isfinite(loss) for loss in losses] == [True, True, False, True]
