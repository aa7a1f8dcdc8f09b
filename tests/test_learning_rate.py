import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_trainer import FakeTrainer, holder  # type: ignore[import-not-found]

from jaxlightning._callback import InsideStep
from jaxlightning.callbacks import LearningRateMonitor, LearningRateSchedule, ReduceLROnPlateau

RECORDED = json.loads((Path(__file__).parent / "torch_callbacks.json").read_text())["one_cycle"]


def curve(schedule, run_steps, length):
    factor = jax.jit(schedule.factor(run_steps))
    return np.array([factor(jnp.int32(step)) for step in range(length)])


def optax_curve(schedule, length):
    with jax.numpy_dtype_promotion("standard"):
        return np.array([schedule(step) for step in range(length)])


def hand(schedule, total, warmup=0, **options):
    """The formulas of the docstring, in numpy."""
    n = np.arange(total + 5)
    after = np.maximum(n - warmup, 0)
    p = np.minimum(after / (total - warmup), 1.0)
    end = options.get("end", 0.0)
    decay = {
        "constant": lambda: np.ones_like(p),
        "linear": lambda: 1 + (end - 1) * p,
        "cosine": lambda: end + (1 - end) * (1 + np.cos(np.pi * p)) / 2,
        "polynomial": lambda: end + (1 - end) * (1 - p) ** options["power"],
        "exponential": lambda: end**p,
        "inverse_sqrt": lambda: np.sqrt(warmup / (warmup + after)),
    }[schedule]()
    ramp = np.minimum(n / warmup, 1.0) if warmup else 1.0
    first = options.get("warmup_from", 0.0)
    return (first + (1 - first) * ramp) * decay


# Curves


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("constant", {}),
        ("linear", {}),
        ("linear", {"end": 0.2}),
        ("cosine", {}),
        ("cosine", {"end": 0.1, "warmup_from": 0.3}),
        ("polynomial", {"power": 2}),
        ("polynomial", {"power": 0.5, "end": 0.05}),
        ("exponential", {"end": 0.01}),
    ],
)
def test_formulas(schedule, options, warmup):
    ours = curve(LearningRateSchedule(schedule, warmup=warmup, **options), 40, 45)
    np.testing.assert_allclose(ours, hand(schedule, 40, warmup, **options), atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (LearningRateSchedule("linear"), optax.linear_schedule(1.0, 0.0, 40)),
        (LearningRateSchedule("cosine", end=0.1), optax.cosine_decay_schedule(1.0, 40, 0.1)),
        (LearningRateSchedule("cosine", warmup=10),
         optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 40)),
        (LearningRateSchedule("polynomial", power=3, end=0.1),
         optax.polynomial_schedule(1.0, 0.1, 3, 40)),
        (LearningRateSchedule("exponential", end=0.01), optax.exponential_decay(
            1.0, 40, 0.01, end_value=0.01)),
        (LearningRateSchedule("exponential", decay=0.9), optax.exponential_decay(1.0, 1, 0.9)),
        (LearningRateSchedule("exponential", decay=0.9, end=0.2),
         optax.exponential_decay(1.0, 1, 0.9, end_value=0.2)),
        (LearningRateSchedule("one_cycle"), optax.cosine_onecycle_schedule(40, 1.0)),
        (LearningRateSchedule("constant", warmup=10, warmup_from=0.1),
         optax.warmup_constant_schedule(0.1, 1.0, 10)),
    ],
)  # fmt: skip
def test_equal_to_optax(ours, reference):
    np.testing.assert_allclose(curve(ours, 40, 45), optax_curve(reference, 45), atol=1e-6)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["arguments"]))
def test_one_cycle_equal_to_torch(case):
    arguments = case["arguments"]
    share, div = arguments.get("pct_start", 0.3), arguments.get("div_factor", 25.0)
    total = arguments["total_steps"]
    # PyTorch's peak and end are those of the last step of each phase, ours of the one after it.
    ours = LearningRateSchedule(
        "one_cycle", warmup=round(share * total) - 1, warmup_from=1 / div,
        end=1 / div / arguments.get("final_div_factor", 1e4),
    )  # fmt: skip
    np.testing.assert_allclose(curve(ours, total - 1, total), case["rates"], atol=1e-6)


def test_inverse_square_root():
    ours = curve(LearningRateSchedule("inverse_sqrt", warmup=16), math.inf, 1000)
    n = np.arange(1000)
    # Vaswani et al.: min(n^-1/2, n W^-3/2), scaled to 1 at its peak.
    paper = np.minimum(1 / np.sqrt(np.maximum(n, 1)), n * 16**-1.5) * 4
    np.testing.assert_allclose(ours, paper, atol=1e-6)
    ours = curve(LearningRateSchedule("inverse_sqrt", timescale=100), math.inf, 301)
    np.testing.assert_allclose(ours[[0, 300]], [1.0, 0.5], atol=1e-6)


def test_a_function_counts_from_the_end_of_the_warm_up():
    with jax.numpy_dtype_promotion("standard"):
        schedule = LearningRateSchedule(lambda step: 0.5 ** (step // 10), warmup=4)
        ours = curve(schedule, math.inf, 30)
    after = np.maximum(np.arange(30) - 4, 0)
    expected = np.minimum(np.arange(30) / 4, 1.0) * 0.5 ** (after // 10)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_shares_of_the_run():
    share = curve(LearningRateSchedule("linear", warmup=0.25), 40, 45)
    steps = curve(LearningRateSchedule("linear", warmup=10), 40, 45)
    given = curve(LearningRateSchedule("linear", warmup=0.25, total_steps=40), math.inf, 45)
    np.testing.assert_array_equal(share, steps)
    np.testing.assert_array_equal(share, given)


# Updates


def test_scales_updates_step_by_step():
    callback = LearningRateSchedule("linear", warmup=2)
    trainer = FakeTrainer(callback, estimated_stepping_batches=6)
    wrap = trainer.bus.wrap_optimizer
    params, grads = {"w": jnp.ones(3), "frozen": None}, {"w": jnp.arange(3.0), "frozen": None}
    tx = wrap(
        trainer, optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1))
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    momentum = np.zeros(3)
    for factor in [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]:
        updates, state = update(grads, state, params)
        momentum = np.arange(3.0) + 0.9 * momentum
        np.testing.assert_allclose(updates["w"], -0.1 * factor * (momentum + 0.1), atol=1e-6)
    assert (state[1].count.dtype, int(state[1].count)) == (jnp.int32, 8)


def test_a_step_that_is_refused_does_not_count():
    callback = LearningRateSchedule("linear")
    tx = callback.wrap_optimizer(FakeTrainer(callback, batches=10), optax.sgd(1.0))
    grads = jnp.ones(2)
    state = tx.init(grads)
    _, after = tx.update(grads, state, grads)
    # `accept_step` keeps the optimizer's state as it was.
    again, _ = tx.update(grads, state, grads)
    then, _ = tx.update(grads, after, grads)
    np.testing.assert_allclose(again, -1.0 * np.ones(2))
    np.testing.assert_allclose(then, -0.9 * np.ones(2), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_updates_keep_their_dtype(dtype):
    callback = LearningRateSchedule(lambda step: 1 / 3)
    tx = callback.wrap_optimizer(FakeTrainer(callback), optax.identity())
    grads = jnp.full(2, 3.0, dtype)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert updates.dtype == dtype
    # In bfloat16 alone, 3 · ⅓ would be 1.00390625.
    np.testing.assert_array_equal(updates.astype(jnp.complex64), np.ones(2))


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: u * value, updates), state

    needs_value = optax.GradientTransformationExtraArgs(lambda params: (), update)
    callback = LearningRateSchedule("constant")
    tx = callback.wrap_optimizer(FakeTrainer(callback), needs_value)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=jnp.float32(3.0))
    np.testing.assert_array_equal(updates, [3.0, 3.0])


# Errors


@pytest.mark.parametrize(
    ("schedule", "options", "says"),
    [
        ("cosin", {}, "Did you mean `cosine`?"),
        ("cosine", {"power": 2}, "has no `power` for 'cosine': that option belongs to ['poly"),
        ("constant", {"end": 0.1}, "has no `end` for 'constant'"),
        ("linear", {"warmup": 1.5}, "For a number of steps write an int: `warmup=1`."),
        ("linear", {"warmup": -5}, "it cannot be negative"),
        ("exponential", {}, '`LearningRateSchedule("exponential", end=0.01)`'),
        ("exponential", {"end": 0}, "above 0, or `decay`"),
        ("inverse_sqrt", {}, '`LearningRateSchedule("inverse_sqrt", warmup=1000)`'),
    ],
)
def test_bad_arguments_are_refused(schedule, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        LearningRateSchedule(schedule, **options)


@pytest.mark.parametrize(
    "callback",
    [
        LearningRateSchedule("cosine"),
        LearningRateSchedule("one_cycle"),
        LearningRateSchedule("constant", warmup=0.1),
        LearningRateSchedule("exponential", end=0.1),
    ],
)
def test_a_run_without_end_is_refused_where_its_length_is_needed(callback):
    trainer = FakeTrainer(callback, estimated_stepping_batches=math.inf)
    with pytest.raises(ValueError, match=re.escape("Write `Trainer(max_steps=10_000)`")):
        callback.wrap_optimizer(trainer, optax.sgd(1.0))


@pytest.mark.parametrize(
    "callback",
    [
        LearningRateSchedule("constant", warmup=10),
        LearningRateSchedule("inverse_sqrt", warmup=10),
        LearningRateSchedule("exponential", decay=0.9),
        LearningRateSchedule("cosine", total_steps=100),
    ],
)
def test_a_run_without_end_is_fine_where_it_is_not(callback):
    trainer = FakeTrainer(callback, estimated_stepping_batches=math.inf)
    tx = callback.wrap_optimizer(trainer, optax.sgd(1.0))
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    first = 0.0 if callback.warmup else -1.0
    np.testing.assert_array_equal(updates, [first, first])


def test_a_fast_dev_run_is_the_beginning_of_a_long_one():
    callback = LearningRateSchedule("cosine", warmup=10)
    trainer = FakeTrainer(callback, estimated_stepping_batches=2, fast_dev_run=True)
    tx = callback.wrap_optimizer(trainer, optax.sgd(1.0))
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    updates, _ = tx.update(jnp.ones(2), state)
    np.testing.assert_allclose(updates, [-0.1, -0.1], rtol=1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
    callback = LearningRateSchedule("cosine", warmup=100)
    with pytest.raises(ValueError, match="leaves nothing of the run's 100"):
        callback.wrap_optimizer(FakeTrainer(callback, batches=100), optax.sgd(1.0))


def test_a_function_that_returns_no_scalar_is_refused():
    callback = LearningRateSchedule(lambda step: jnp.ones(3))
    tx = callback.wrap_optimizer(FakeTrainer(callback), optax.sgd(1.0))
    with pytest.raises(ValueError, match=re.escape("returned an array of shape (3,)")):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# The monitor


def monitored(monitor, *callbacks, optimizer, steps=1):
    """What is logged after some updates."""
    trainer = FakeTrainer(*callbacks, batches=10)
    tx = trainer.bus.wrap_optimizer(trainer, optimizer)
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(params, state, params)
    step = jnp.int32(steps)
    view = InsideStep(step, jnp.float32(0), params, params, params, state, None)
    found = jax.jit(monitor.inside_step)(view)
    return {name: float(metric.compute()) for name, metric in found.items()}


def test_monitor_multiplies_the_base_by_all_factors():
    linear = LearningRateSchedule("linear")
    assert monitored(
        LearningRateMonitor(base=0.5), linear, optimizer=optax.sgd(0.5), steps=4
    ) == {"lr": pytest.approx(0.5 * 0.7)}  # fmt: skip
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    assert monitored(LearningRateMonitor(), linear, optimizer=injected, steps=4) == {
        "lr": pytest.approx(0.5 * 0.7)
    }
    plateau = ReduceLROnPlateau("val/loss", patience=0, factor=0.1)
    trainer = FakeTrainer(linear, plateau, batches=10)
    tx = trainer.bus.wrap_optimizer(trainer, injected)
    trainer.state = holder(tx.init(jnp.ones(2)))
    plateau.judge(trainer, 1.0)
    plateau.judge(trainer, 1.0)
    view = InsideStep(*[jnp.float32(0)] * 5, trainer.state.opt_state, None)
    assert float(LearningRateMonitor().inside_step(view)["lr"].compute()) == pytest.approx(0.05)


def test_monitor_of_an_injected_schedule():
    injected = optax.inject_hyperparams(optax.sgd)(
        learning_rate=lambda count: 1.0 / (1.0 + count.astype(jnp.float32))
    )
    assert monitored(LearningRateMonitor(), optimizer=injected, steps=4) == {
        "lr": pytest.approx(0.25)
    }


def test_monitor_without_a_base_logs_the_factor():
    found = monitored(
        LearningRateMonitor(), LearningRateSchedule("linear"), optimizer=optax.sgd(0.5), steps=6
    )
    assert found == {"lr_factor": pytest.approx(0.5)}


def test_monitor_of_several_optimizers():
    inject = optax.inject_hyperparams(optax.sgd)
    several = optax.partition(
        {"encoder": inject(learning_rate=0.25), "head": inject(learning_rate=0.5)},
        {"encoder": "encoder", "head": "head"},
    )
    found = monitored(
        LearningRateMonitor(), LearningRateSchedule("linear"), optimizer=several, steps=6
    )
    assert found == {"lr/encoder": pytest.approx(0.125), "lr/head": pytest.approx(0.25)}


def test_monitor_without_anything_to_log():
    with pytest.raises(ValueError, match=re.escape("Write `LearningRateMonitor(base=1e-3)`")):
        monitored(LearningRateMonitor(), optimizer=optax.sgd(0.5))
