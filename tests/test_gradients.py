"""Clipping against numpy; norms against numpy, per part, under skipped steps and float16."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxlightning.callbacks._gradients import squares_by_part  # type: ignore[import-not-found]
from steps import Regression, batches, quiet_trainer, start  # type: ignore[import-not-found]

from jaxlightning.callbacks import GradientClipping, GradientNormMonitor, SkipNonFinite


def gradient(task, batch):
    """By hand, in float64."""
    x, y = batch["x"].astype(np.float64), batch["y"].astype(np.float64)
    error = x @ np.asarray(task.weight, np.float64) + float(task.bias) - y
    return 2 * error @ x / len(y), 2 * error.mean()


def step_of_sgd(callback, batch):
    _, step, state = start([callback], tx=optax.sgd(1.0))
    after, metrics = step(state, batch)
    return [
        np.asarray(state.task.weight - after.task.weight),
        np.asarray(state.task.bias - after.task.bias),
    ], metrics


@pytest.mark.parametrize("val", [0.1, 1e6])
def test_clipping_by_norm(val):
    batch = next(batches(1))
    (dw, db), _ = step_of_sgd(GradientClipping(val), batch)
    gw, gb = gradient(Regression.initial(), batch)
    scale = min(1.0, val / np.sqrt((gw**2).sum() + gb**2))
    np.testing.assert_allclose(dw, gw * scale, rtol=2e-5)
    np.testing.assert_allclose(db, gb * scale, rtol=2e-5)


def test_clipping_by_value():
    batch = next(batches(1))
    (dw, db), _ = step_of_sgd(GradientClipping(0.5, "value"), batch)
    gw, gb = gradient(Regression.initial(), batch)
    np.testing.assert_allclose(dw, gw.clip(-0.5, 0.5), rtol=2e-5)
    np.testing.assert_allclose(db, np.clip(gb, -0.5, 0.5), rtol=2e-5)


def test_a_whole_run_equals_optax_alone():
    _, step, state = start([GradientClipping(0.3)])
    params, static = eqx.partition(Regression.initial(), eqx.is_inexact_array)
    tx = optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.05, momentum=0.9))
    opt_state = tx.init(params)

    @jax.jit
    def by_hand(params, opt_state, batch):
        def loss(params):
            task = eqx.combine(params, static)
            return jnp.mean((batch["x"] @ task.weight + task.bias - batch["y"]) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches(20):
        state, _ = step(state, batch)
        params, opt_state = by_hand(params, opt_state, batch)
    np.testing.assert_allclose(state.task.weight, params.weight, rtol=1e-5)
    np.testing.assert_allclose(state.task.bias, params.bias, rtol=1e-5)


def test_norms_by_part_are_those_before_clipping():
    batch = next(batches(1))
    _, step, state = start([GradientClipping(1e-3), GradientNormMonitor()])
    _, metrics = step(state, batch)
    gw, gb = gradient(state.task, batch)
    expected = {
        "grad_norm": np.sqrt((gw**2).sum() + gb**2),
        "grad_norm_max": np.sqrt((gw**2).sum() + gb**2),
        "grad_norm/weight": np.sqrt((gw**2).sum()),
        "grad_norm/bias": abs(gb),
    }
    found = {name: float(metric.compute()) for name, metric in metrics.items() if name != "loss"}
    assert found == pytest.approx(expected, rel=1e-5)


def test_depth_groups_by_path():
    tree = {"net": [jnp.full(3, 2.0), jnp.ones(())], "head": jnp.full((2, 2), -1.0)}
    floats = lambda depth: {k: float(v) for k, v in squares_by_part(tree, depth).items()}
    assert floats(0) == {"": 17.0}
    assert floats(1) == {"net": 13.0, "head": 4.0}
    assert floats(2) == {"net/0": 12.0, "net/1": 1.0, "head": 4.0}


def test_narrow_gradients_are_squared_in_float32():
    big = {"w": jnp.full(4, 1000.0, jnp.float16)}
    assert float(squares_by_part(big, 1)["w"]) == 4e6


def test_only_global_norms_without_parts():
    _, step, state = start([GradientNormMonitor(depth=0)])
    _, metrics = step(state, next(batches(1)))
    assert set(metrics) == {"loss", "grad_norm", "grad_norm_max"}


def test_refused_steps_do_not_count_but_unguarded_ones_show():
    monitor = GradientNormMonitor(depth=0)
    _, step, state = start([SkipNonFinite(), monitor])
    state, good = step(state, next(batches(1)))
    _, bad = step(state, next(batches(1, poisoned=[0])))
    both = good["grad_norm"].merge(bad["grad_norm"])
    assert float(both.compute()) == float(good["grad_norm"].compute())
    assert float(bad["grad_norm_max"].value) == -np.inf
    _, step, state = start([monitor])
    _, unguarded = step(state, next(batches(1, poisoned=[0])))
    assert np.isnan(unguarded["grad_norm"].compute())


def test_float16_overflow_does_not_count():
    _, step, state = start([GradientNormMonitor()], precision="16-mixed")
    batch = next(batches(1))
    state = eqx.tree_at(lambda s: s.loss_scale.scale, state, jnp.float32(8.0))
    _, fine = step(state, batch)
    _, overflow = step(state, {"x": batch["x"] * 1e3, "y": batch["y"]})
    assert float(fine["grad_norm"].weight) == 1
    assert float(overflow["grad_norm"].weight) == 0


def test_in_a_fit():
    trainer = quiet_trainer([GradientNormMonitor()], gradient_clip_val=0.1, log_every_n_steps=4)
    data = list(batches(12))
    trainer.fit(Regression.initial(), data)
    _, step, state = start([GradientClipping(0.1), GradientNormMonitor()])
    norms = []
    for batch in data:
        state, metrics = step(state, batch)
        norms.append(float(metrics["grad_norm"].compute()))
    found = trainer.callback_metrics
    assert found["train/grad_norm"] == pytest.approx(np.mean(norms[8:]), rel=1e-5)
    assert found["train/grad_norm_max"] == pytest.approx(max(norms[8:]), rel=1e-5)
    assert found["train/grad_norm_epoch"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert found["train/grad_norm_max_epoch"] == pytest.approx(max(norms), rel=1e-5)


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="`val=0`: it has to be a positive number"):
        GradientClipping(0)
    with pytest.raises(ValueError, match="positive number"):
        GradientClipping(float("nan"))
    with pytest.raises(ValueError, match="Did you mean `norm`"):
        GradientClipping(1.0, "norms")
    with pytest.raises(ValueError, match="`depth=-1` has to be 0 or a positive integer"):
        GradientNormMonitor(depth=-1)


def test_a_name_that_the_task_uses_too_is_refused():
    class Named(Regression):
        def training_step(self, batch, *, key):
            loss, _, after = super().training_step(batch, key=key)
            return loss, {"grad_norm": loss}, after

    begin = Regression.initial()
    task = Named(begin.weight, begin.bias, begin.seen)
    with pytest.raises(ValueError, match=r"Both the task and a callback's .* `grad_norm`\. Rename"):
        quiet_trainer([GradientNormMonitor()]).fit(task, list(batches(2)))
