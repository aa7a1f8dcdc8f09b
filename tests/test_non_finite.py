"""Refused steps: nothing moves, they are counted, and too many of them end the run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlightning.callbacks._non_finite import all_finite  # type: ignore[import-not-found]
from steps import Regression, assert_bitwise, batches, quiet_trainer, start  # type: ignore[import-not-found]
from tasks import Classifier, TwoLosses, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning._callback import InsideStep
from jaxlightning._state import LossScale
from jaxlightning.callbacks import (
    ExponentialMovingAverage,
    LambdaCallback,
    ModelCheckpoint,
    ReplayCapsule,
    SkipNonFinite,
)


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
    def accepts(loss, grads, updates=None):
        view = InsideStep(jnp.int32(0), jnp.float32(loss), None, grads, updates, None, None)
        return bool(SkipNonFinite().accept_step(view))

    good = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    assert accepts(1.0, good)
    assert not accepts(bad, good)
    poisoned = good | {"b": good["b"].at[1, 0].set(bad)}
    assert not accepts(1.0, poisoned)
    assert not accepts(1.0, good, poisoned)


def test_finite_gradients_whose_squares_overflow_are_fine():
    assert bool(all_finite({"w": jnp.full(2, 1e30)}))
    assert bool(all_finite({}))


def test_float16_overflows_are_not_counted():
    _, step, state = start([SkipNonFinite(max_in_a_row=1)], precision="16-mixed")
    batch = next(batches(1))
    after, metrics = step(state, {"x": batch["x"] * 10, "y": batch["y"]})
    assert_bitwise(after.task, state.task)
    assert float(after.loss_scale.scale) == float(state.loss_scale.scale) / 2
    assert int(after.skipped.total) == 0
    assert float(metrics["skipped"].compute()) == 0


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_what_no_loss_scale_mends_is_counted_in_float16(scale):
    """A loss that is no number, and gradients that overflow at the smallest scale."""
    _, step, state = start([SkipNonFinite()], precision="16-mixed")
    state = state.replace(loss_scale=LossScale(jnp.float32(scale), jnp.int32(3)))
    batch = next(batches(1, {0}))
    after, metrics = step(state, batch)
    assert_bitwise((after.task, after.loss_scale), (state.task, state.loss_scale))
    assert int(after.skipped.total) == float(metrics["skipped"].compute()) == 1
    if scale == 1.0:  # the loss is finite, and its derivative of 8e4 no float16
        after, _ = step(state, {"x": np.eye(2, 2, dtype=np.float32) * 200, "y": np.ones(2)})
        assert int(after.skipped.total) == 1


def fit(poisoned, count=20, k=3, callbacks=(), **arguments):
    """A fit over poisoned batches: the error that ended it, if any, and the trainer."""
    arguments = {"log_every_n_steps": 5, "max_epochs": 1} | arguments
    trainer = quiet_trainer([SkipNonFinite(max_in_a_row=k), *callbacks], **arguments)
    try:
        trainer.fit(Regression.initial(), list(batches(count, poisoned)))
    except FloatingPointError as error:
        return error, trainer
    return None, trainer


def named(error):
    """The steps and batches that an error lists."""
    return re.findall(r"global step (\d+): (.*)", str(error))


@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_fewer_in_a_row_go_on_and_leave_their_count(steps_per_dispatch, capsys):
    error, trainer = fit({2, 7, 8}, steps_per_dispatch=steps_per_dispatch)
    assert error is None
    assert np.isfinite(trainer.state.task.weight).all()
    assert trainer.callback_metrics["train/skipped_epoch"] == 3
    assert not [name for name in trainer.callback_metrics if "skipped_steps" in name]
    assert capsys.readouterr().out == (
        "A step was refused whose loss, gradient or update is NaN or infinite: global step 3: "
        "batch 2 of epoch 0. It is not told again; `train/skipped` counts such steps.\n"
    )
    assert int(trainer.state.skipped.longest) == 2


@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_too_many_in_a_row_end_the_run_and_are_named(steps_per_dispatch):
    # Two, then three in a row; steps are numbered from 1. Metrics come an interval late.
    error, trainer = fit({2, 3, 8, 9, 10}, steps_per_dispatch=steps_per_dispatch)
    assert named(error) == [(str(i + 1), f"batch {i} of epoch 0") for i in (8, 9, 10)]
    assert "In 3 steps in a row the loss, a gradient or an update was NaN" in str(error)
    assert "`gradient_clip_val=1.0`" in str(error)
    assert "the callback `ReplayCapsule()`" in str(error)
    (note,) = error.__notes__
    assert "`SkipNonFinite` in its hook `on_log`" in note
    assert trainer.global_step > 14


def test_advice_is_for_the_callbacks_at_hand(tmp_path):
    capsule = ReplayCapsule(tmp_path)
    both, _ = fit({2, 3}, k=2, callbacks=[capsule])
    assert "with `gradient_clip_val=1.0`. To bear more, raise `SkipNonFinite(max_in_a_row=2)`." in (
        str(both)
    )
    assert "add the callback" not in str(both)
    alone = quiet_trainer([capsule], log_every_n_steps=5, max_epochs=1)
    with pytest.raises(FloatingPointError) as error:
        alone.fit(Regression.initial(), list(batches(8, {2})))
    assert "by `SkipNonFinite(max_in_a_row=1)`, which it brings along. To pass over" in (
        str(error.value)
    )
    assert "add the callback" not in str(error.value)
    assert "raise" not in str(error.value)


def test_the_first_refused_step_is_told_without_waiting_and_with_its_rows(capsys):
    x = np.ones((32, 2), np.float32)
    x[[9, 13]] = np.nan
    told = []

    class Listens(Callback):
        def on_log(self, trainer, metrics, step):
            assert not set(metrics) & {"train/skipped_steps"}
            told.append((trainer.global_step, step, capsys.readouterr().out))

    trainer = quiet_trainer([SkipNonFinite(), Listens()], log_every_n_steps=2, max_epochs=1)
    trainer.fit(Regression.initial(), DataLoader({"x": x, "y": x[:, 0]}, 4, allow_nan=True))
    # Of the interval that ends with step 4, when the next one ends.
    assert told[0] == (4, 2, "")
    assert told[1] == (
        6,
        4,
        "2 steps were refused, among them one whose loss, gradient or update is NaN or infinite: "
        "global step 3: batch 2 of epoch 0 (rows 8, 9, 10, 11). It is not told again; "
        "`train/skipped` counts such steps.\n",
    )
    assert {out for _, _, out in told[2:]} == {""}


def test_the_state_at_the_error_is_that_before_the_streak():
    """Whatever came after it: good batches, and a streak that is shorter."""
    ema = ExponentialMovingAverage(0.9)
    error, trainer = fit({8, 9, 10, 13}, count=30, callbacks=[ema])
    _, step, state = start([SkipNonFinite(), ExponentialMovingAverage(0.9)])
    for batch in batches(8):
        state, _ = step(state, batch)
    assert error is not None
    assert trainer.global_step == 20
    assert_bitwise(trainer.state.task, state.task)
    assert_bitwise(trainer.state.opt_state, state.opt_state)


def test_a_streak_in_an_interval_that_the_fit_cuts_short_is_not_missed():
    error, _ = fit({6, 7}, count=9, k=2, log_every_n_steps=50)
    assert named(error) == [("7", "batch 6 of epoch 0"), ("8", "batch 7 of epoch 0")]
    assert "`SkipNonFinite` in its hook `on_train_epoch_end`" in error.__notes__[0]


def test_one_is_named_in_the_singular_and_of_many_only_the_first():
    error, _ = fit({2}, count=4, k=1)
    assert "In a step the loss, a gradient or an update was NaN or infinite:\n" in str(error)
    error, _ = fit(set(range(2, 20)), k=15)
    assert len(named(error)) == 10
    assert "\n  and 5 more\n" in str(error)


class Unsized:
    """As many batches as an epoch happens to have."""

    def __init__(self, *lengths, poisoned):
        self.lengths, self.poisoned, self.epoch = lengths, poisoned, -1

    def __iter__(self):
        self.epoch += 1
        epoch = max(self.epoch - 1, 0)  # the first epoch is opened once more, to look at it
        for index, batch in enumerate(batches(self.lengths[epoch])):
            bad = (epoch, index) in self.poisoned
            yield jax.tree.map(lambda x: x * np.nan, batch) if bad else batch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_are_named_across_epochs_without_a_length(accumulate):
    poisoned = {(1, 3), (1, 4), (2, 0), (2, 1)}
    trainer = quiet_trainer(
        [SkipNonFinite(2)],
        max_epochs=4,
        log_every_n_steps=50 if accumulate == 1 else 4,
        accumulate_grad_batches=accumulate,
        on_recompile="ignore",
    )
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(Regression.initial(), Unsized(4, 5, 3, 4, poisoned=poisoned))
    # Of the second epoch's batches the accumulated steps take three, and then two.
    expected = {
        1: [("8", "batch 3 of epoch 1"), ("9", "batch 4 of epoch 1")],
        3: [("4", "batches 3 to 4 of epoch 1"), ("5", "batches 0 to 2 of epoch 2")],
    }
    assert named(error.value) == expected[accumulate]


def test_rows_of_a_data_loader_are_named():
    data = {"x": np.ones((40, 2), np.float32), "y": np.zeros(40, np.float32)}
    data["x"][17] = np.nan
    loader = DataLoader(data, 4, shuffle=True, seed=3, allow_nan=True)
    trainer = quiet_trainer([SkipNonFinite(1)], log_every_n_steps=1)
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(Regression.initial(), loader)
    index = loader.order(0).tolist().index(17) // 4
    rows = ", ".join(map(str, loader.order(0)[index * 4 : index * 4 + 4]))
    assert named(error.value) == [(str(index + 1), f"batch {index} of epoch 0 (rows {rows})")]
    trainer = quiet_trainer([SkipNonFinite(1)], log_every_n_steps=1, accumulate_grad_batches=10)
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(Regression.initial(), loader)
    rows = ", ".join(map(str, loader.order(0)[:8]))
    assert named(error.value) == [("1", f"batches 0 to 9 of epoch 0 (rows {rows}, and 32 more)")]


class Epochwise:
    """Six batches an epoch, to be entered anywhere, with others poisoned in each."""

    def __init__(self, poisoned):
        self.poisoned = poisoned

    def __len__(self):
        return 6

    def batches(self, epoch, start=0):
        yield from list(batches(6, self.poisoned.get(epoch, ())))[start:]


def test_a_streak_across_epochs_and_a_resume_is_found_and_named(tmp_path):
    loader = Epochwise({0: {4, 5}, 1: {0, 1}})

    def run(**where):
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        arguments = {"max_epochs": 3, "log_every_n_steps": 5, "enable_checkpointing": None}
        trainer = quiet(callbacks=[SkipNonFinite(4), saves], **arguments)
        with pytest.raises(FloatingPointError) as error:
            trainer.fit(Regression.initial(), loader, **where)
        return error.value, trainer

    error, whole = run()
    assert named(error) == [
        ("5", "batch 4 of epoch 0"),
        ("6", "batch 5 of epoch 0"),
        ("7", "batch 0 of epoch 1"),
        ("8", "batch 1 of epoch 1"),
    ]
    for step in (5, 6, 7, 9):
        again, resumed = run(ckpt_path=tmp_path / f"step={step}")
        assert str(again) == str(error)
        a, b = resumed.state, whole.state
        assert_bitwise((a.task, a.opt_state, a.skipped), (b.task, b.opt_state, b.skipped))


def test_a_checkpoint_of_the_error_can_be_gone_on_from(tmp_path):
    """Whoever does has been told: only a new streak ends the run again."""

    def run(poisoned, **where):
        saves = ModelCheckpoint(tmp_path, "{step}", save_on_exception=True, save_top_k=0)
        arguments = {"max_epochs": 3, "log_every_n_steps": 4, "enable_checkpointing": None}
        trainer = quiet(callbacks=[SkipNonFinite(2), saves], **arguments)
        try:
            trainer.fit(Regression.initial(), Epochwise(poisoned), **where)
        except FloatingPointError as error:
            return named(error), trainer
        return None, trainer

    found, first = run({0: {1, 2}})
    assert found == [("2", "batch 1 of epoch 0"), ("3", "batch 2 of epoch 0")]
    last = tmp_path / f"step={first.global_step}"
    found, second = run({0: {1, 2}}, ckpt_path=last)
    assert found is None
    assert second.global_step == 18
    # What came between the streak and the error had been refused as well, what came after not.
    assert int(second.state.skipped.total) == first.global_step - 1
    found, _ = run({0: {1, 2}, 2: {2, 3}}, ckpt_path=last)
    assert found == [("15", "batch 2 of epoch 2"), ("16", "batch 3 of epoch 2")]


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


# A loss that nobody looks after


@pytest.mark.parametrize(
    ("bad", "steps"), [(np.nan, 3), (np.nan, 20), (np.inf, 1)], ids=["part", "intervals", "inf"]
)
def test_a_loss_that_is_not_finite_is_warned_of_once_a_fit(bad, steps):
    columns = {"x": np.ones((4, 2), np.float32), "y": np.full(4, bad, np.float32)}
    data = DataLoader(columns, 2, allow_nan=True)
    trainer = quiet_trainer([], max_steps=steps, log_every_n_steps=5)
    for _ in range(2):
        with pytest.warns(UserWarning, match="The training loss is") as caught:
            trainer.fit(Regression.initial(), data)
        assert [str(warning.message) for warning in caught] == [
            f"The training loss is {bad}. `Trainer(detect_anomaly=True)` "
            "says in which operation NaN appears; the callback `SkipNonFinite()` refuses such "
            "steps, and `ReplayCapsule()` keeps one for `jaxlightning replay`."
        ]


@pytest.mark.parametrize("task", [Classifier, TwoLosses])
def test_a_loss_over_nothing_is_logged_as_nan_and_not_warned_of(task):
    data = rows(8) | {"mask": np.zeros(8, bool), "y": np.ones(8, np.int32)}
    trainer = quiet(max_epochs=2, log_every_n_steps=1)
    trainer.fit(task(), DataLoader(data, 4))
    assert np.isnan(trainer.callback_metrics["train/loss"])


def test_neither_is_one_of_refused_steps():
    trainer = quiet(max_epochs=1, log_every_n_steps=1, callbacks=SkipNonFinite(max_in_a_row=9))
    data = DataLoader(rows(8) | {"x": np.full((8, 6), np.nan, np.float32)}, 4, allow_nan=True)
    trainer.fit(Classifier(), data)
    assert np.isnan(trainer.callback_metrics["train/loss"])
