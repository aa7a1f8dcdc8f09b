import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_trainer import FakeTrainer, holder, script  # type: ignore[import-not-found]
from jaxlightning.callbacks._plateau import PlateauState  # type: ignore[import-not-found]

from jaxlightning._callback import Bus
from jaxlightning.callbacks import LearningRateSchedule, ReduceLROnPlateau

RECORDED = json.loads((Path(__file__).parent / "torch_callbacks.json").read_text())["plateau"]


def rmsprop_with_decay(learning_rate):
    """Like `optax.adamw`, whose bias correction strict promotion does not allow."""
    return optax.chain(
        optax.scale_by_rms(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(learning_rate),
    )


def factor(trainer):
    is_ours = lambda node: isinstance(node, PlateauState)
    nodes = jax.tree.leaves(trainer.state.opt_state, is_leaf=is_ours)
    return [float(node.factor) for node in nodes if is_ours(node)]


def run(callback, values, **attributes):
    """The factor after each value of `val/loss`, and the trainer."""
    found = []

    def validation(step):
        if step > 1:
            found.append(factor(trainer)[0])
        return {"val/loss": values[step - 1]}

    trainer = FakeTrainer(
        callback, batches=1, epochs=len(values), validation=validation, **attributes
    )
    tx = trainer.bus.wrap_optimizer(trainer, optax.adam(1e-3))
    trainer.state = holder(tx.init({"w": jnp.ones(3)}))
    trainer.fit()
    return [*found, factor(trainer)[0]], trainer


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["arguments"]))
def test_reduces_as_torch(case):
    arguments = dict(case["arguments"])
    arguments["min_factor"] = arguments.pop("min_lr", 0.0)
    factors, _ = run(ReduceLROnPlateau("val/loss", **arguments), case["values"])
    # PyTorch makes no reduction that is smaller than its `eps`.
    np.testing.assert_allclose(factors, case["rates"], rtol=1e-6, atol=1e-8)


def test_nan_is_no_improvement_and_infinity_no_best():
    nan, inf = float("nan"), float("inf")
    factors, _ = run(
        ReduceLROnPlateau("val/loss", patience=1, factor=0.5), [1.0, nan, -inf, 0.5, nan, 0.4]
    )
    assert factors == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    factors, _ = run(ReduceLROnPlateau("val/loss", patience=1, factor=0.5), [nan, nan, 9.0, 8.0])
    assert factors == [1.0, 0.5, 0.5, 0.5]


def test_a_relative_threshold_asks_for_more_of_a_negative_metric_too():
    # 5 % better than -1 is -1.05.
    arguments = {"patience": 0, "threshold": 0.05, "factor": 0.5}
    assert run(ReduceLROnPlateau("val/loss", **arguments), [-1.0, -1.04])[0] == [1.0, 0.5]
    assert run(ReduceLROnPlateau("val/loss", **arguments), [-1.0, -1.06])[0] == [1.0, 1.0]


def test_updates_are_those_of_the_optimizer_with_the_reduced_rate():
    callback = ReduceLROnPlateau("val/loss", patience=0, factor=0.25)
    trainer = FakeTrainer(callback, global_step=1)
    params, grads = {"w": jnp.arange(3.0)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    tx = trainer.bus.wrap_optimizer(trainer, rmsprop_with_decay(1e-2))
    trainer.state = holder(tx.init(params))
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params)

    reference = optax.inject_hyperparams(rmsprop_with_decay)(learning_rate=1e-2)
    expected_state = reference.init(params)
    for value, rate in [(1.0, 1e-2), (2.0, 1e-2), (2.0, 2.5e-3), (2.0, 6.25e-4)]:
        updates, opt_state = update(grads, trainer.state.opt_state, params)
        trainer.state = holder(opt_state)
        expected_state.hyperparams["learning_rate"] = jnp.float32(rate)
        expected, expected_state = reference.update(grads, expected_state, params)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
        callback.judge(trainer, value)
    assert len(traces) == 1


def test_the_new_factor_lies_where_the_old_one_did():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    callback = ReduceLROnPlateau("val/loss", patience=0)
    trainer = FakeTrainer(callback)
    tx = trainer.bus.wrap_optimizer(trainer, optax.sgd(0.1))
    state = jax.device_put(tx.init(jnp.ones(3)), everywhere)
    trainer.state = holder(state)
    callback.judge(trainer, 1.0)
    callback.judge(trainer, 1.0)
    assert jax.tree.structure(trainer.state.opt_state) == jax.tree.structure(state)
    (before,), (after,) = jax.tree.leaves(state), jax.tree.leaves(trainer.state.opt_state)
    assert after.sharding == before.sharding
    assert (after.dtype, after.weak_type) == (before.dtype, before.weak_type)
    assert float(after) == pytest.approx(0.1)


def test_bfloat16_updates_keep_their_dtype():
    callback = ReduceLROnPlateau("val/loss")
    tx = callback.wrap_optimizer(FakeTrainer(callback), optax.sgd(0.1))
    grads = jnp.ones(3, jnp.bfloat16)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert updates.dtype == jnp.bfloat16


def test_several_keep_to_their_own_factor():
    first = ReduceLROnPlateau("val/loss", patience=0, factor=0.5)
    second = ReduceLROnPlateau("train/loss", patience=0, factor=0.1)
    trainer = FakeTrainer(first, LearningRateSchedule("linear"), second)
    tx = trainer.bus.wrap_optimizer(trainer, optax.sgd(0.1))
    trainer.state = holder(tx.init(jnp.ones(3)))
    for value in (1.0, 2.0, 2.0):
        first.judge(trainer, value)
    second.judge(trainer, 1.0)
    assert factor(trainer) == [0.25, 1.0]


@pytest.mark.parametrize("resumed_after", range(1, 10))
def test_resume(resumed_after):
    values = [0.5, 0.6, 0.55, 0.7, 0.4, 0.45, 0.45, 0.6, 0.6, 0.6]
    arguments = {"patience": 1, "factor": 0.5, "cooldown": 1}
    factors, _ = run(ReduceLROnPlateau("val/loss", **arguments), values)
    first = ReduceLROnPlateau("val/loss", **arguments)
    _, trainer = run(first, values[:resumed_after])
    second = ReduceLROnPlateau("val/loss", **arguments)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    at = {"global_step": resumed_after, "current_epoch": resumed_after}
    resumed = FakeTrainer(second, batches=1, epochs=len(values), validation=script(values, 1), **at)
    resumed.state = trainer.state  # the optimizer's state is restored as a whole
    resumed.fit()
    assert factor(resumed) == [factors[-1]]


def test_another_fit_begins_anew():
    callback = ReduceLROnPlateau("val/loss", patience=2)
    run(callback, [0.5, 0.6, 0.6])
    assert callback.bad_checks == 2
    assert run(callback, [0.9, 0.95])[0] == [1.0, 1.0]
    assert callback.bad_checks == 1


def test_verbose(capsys):
    run(ReduceLROnPlateau("val/loss", patience=0, factor=0.5, verbose=True), [1.0, 1.0])
    assert capsys.readouterr().out == (
        "`val/loss` is on a plateau: the learning rate's factor falls from 1 to 0.5 at step 2.\n"
    )


def test_an_optimizer_that_was_not_wrapped_is_an_error():
    callback = ReduceLROnPlateau("val/loss", patience=0)
    trainer = FakeTrainer(callback)
    trainer.state = holder(optax.sgd(0.1).init(jnp.ones(3)))
    callback.judge(trainer, 1.0)
    with pytest.raises(RuntimeError, match="found 0 learning-rate factors of its own"):
        callback.judge(trainer, 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"factor": 1.5}, "Write `factor=0.5` to halve it."),
        ({"factor": 0}, "has to lie between 0 and 1, not 0"),
        ({"threshold_mode": "relative"}, 'Write `"rel"` for a share of the best value'),
        ({"patience": -1}, "`patience` of `ReduceLROnPlateau` has to be at least 0"),
        ({"threshold": -1}, "`threshold` of `ReduceLROnPlateau` has to be at least 0"),
        ({"cooldown": -1}, "`cooldown` of `ReduceLROnPlateau` has to be at least 0"),
        ({"min_factor": -0.1}, "`min_factor` of `ReduceLROnPlateau` has to be at least 0"),
        ({"mode": "down"}, '`ReduceLROnPlateau(mode="down")` is not known'),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ReduceLROnPlateau("val/loss", **arguments)


def test_it_is_a_monitor():
    assert Bus([ReduceLROnPlateau("val/loss")]).monitors() == ["val/loss"]
