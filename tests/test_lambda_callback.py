import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_trainer import FakeTrainer  # type: ignore[import-not-found]

from jaxlightning._callback import Bus, Callback, overrides
from jaxlightning.callbacks import LambdaCallback


def test_functions_are_hooks():
    told = []
    callback = LambdaCallback(
        on_train_batch_end=lambda trainer, outputs, batch, i: told.append(("batch", i)),
        on_checkpoint=lambda trainer, point: told.append((point, trainer.global_step)),
        setup=lambda trainer, stage: told.append(stage),
    )
    FakeTrainer(callback, batches=2).fit()
    assert told == [
        "fit", ("batch", 0), ("step", 1), ("batch", 1), ("step", 2), ("epoch", 2), ("end", 2),
    ]  # fmt: skip


def test_what_is_not_given_costs_nothing():
    callback = LambdaCallback(on_log=lambda trainer, metrics, step: None)
    assert overrides(callback, "on_log")
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    assert [name for name in hooks if overrides(callback, name)] == ["on_log"]


def test_instances_do_not_share_their_functions():
    told = []
    first = LambdaCallback(on_fit_start=lambda trainer: told.append(1))
    second = LambdaCallback(on_fit_start=lambda trainer: told.append(2))
    third = LambdaCallback()
    Bus([first, second, third]).on_fit_start(FakeTrainer())
    assert told == [1, 2]
    assert all(isinstance(callback, LambdaCallback) for callback in (first, second, third))
    assert type(first).__qualname__ == "LambdaCallback"


def test_traced_hooks():
    callback = LambdaCallback(
        wrap_optimizer=lambda trainer, tx: optax.chain(tx, optax.scale(0.5)),
        inside_step=lambda view: {"twice": 2 * view.loss},
    )
    trainer = FakeTrainer(callback)
    tx = trainer.bus.wrap_optimizer(trainer, optax.scale(-1.0))
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_array_equal(updates, [-0.5, -0.5])
    assert trainer.bus.observers == [callback]


@pytest.mark.parametrize(
    ("hooks", "says"),
    [
        ({"on_train_epoch_ends": print}, "Did you mean `on_train_epoch_end`"),
        ({"on_before_backward": print}, "`LambdaCallback(on_before_backward=...)` is no hook."),
        ({"state_dict": print}, "is no hook"),
        ({"on_log": 3}, "`LambdaCallback(on_log=...)` got a `int`. Pass a function"),
    ],
)
def test_bad_arguments_are_refused(hooks, says):
    with pytest.raises(TypeError, match=re.escape(says)):
        LambdaCallback(**hooks)


def test_an_error_says_where_it_came_from():
    def fail(trainer):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        FakeTrainer(LambdaCallback(on_train_start=fail)).fit()
    assert "the callback `LambdaCallback` in its hook `on_train_start`" in caught.value.__notes__[0]
