"""The dtypes of parameters, compute and output, and the dynamic loss scale."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import Classifier, assert_close, quiet, rows

from jaxlightning import Callback, DataLoader, Mean, Precision, TaskModule, buffer
from jaxlightning._state import LossScale


class Spies(TaskModule):
    """Notes, while it is traced, in which dtypes its method sees what."""

    weight: jax.Array
    running: jax.Array = buffer()
    seen: list = eqx.field(static=True, default_factory=list)

    def training_step(self, batch, *, key):
        self.seen.append((self.weight.dtype.name, batch["x"].dtype.name, self.running.dtype.name))
        return Mean.over(jnp.square(batch["x"] @ self.weight))

    def predict_step(self, batch, *, key):
        return batch["x"] @ self.weight

    def configure_optimizers(self):
        return optax.adam(0.1)

    def __hash__(self):
        return id(self)


@pytest.mark.parametrize(
    ("precision", "params", "compute", "output"),
    [
        ("32-true", "float32", "float32", "float32"),
        ("bf16-mixed", "float32", "bfloat16", "float32"),
        ("bf16-true", "bfloat16", "bfloat16", "float32"),
        ("16-mixed", "float32", "float16", "float32"),
        (Precision(jnp.float32, jnp.bfloat16, jnp.bfloat16), "float32", "bfloat16", "bfloat16"),
    ],
)
def test_dtypes_apart(precision, params, compute, output):
    task = Spies(jnp.ones(6), jnp.float32(0.0))
    data = DataLoader({"x": rows(16)["x"]}, 8)
    trainer = quiet(max_epochs=1, precision=precision)
    trained = trainer.fit(task, data)
    assert trained.weight.dtype == params
    moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.shape == (6,)]
    assert {x.dtype.name for x in moments} == {params}
    # Buffers keep their dtype.
    assert {found for found in task.seen} == {(compute, compute, "float32")}
    assert trainer.callback_metrics["train/loss_epoch"] > 0
    assert trainer.predict(trained, data).dtype == output


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.05), ("16-mixed", 0.01)])
def test_close_to_full_precision(precision, tolerance):
    data = DataLoader(rows(), 8)
    full = quiet(max_epochs=2).fit(Classifier(), data)
    low = quiet(max_epochs=2, precision=precision).fit(Classifier(), data)
    assert_close(full, low, tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_cancels_where_nothing_overflows(accumulate):
    """In float32 with scaling on, it is a power of two: gradients are bitwise those without."""
    scaled = Precision(scale_loss=True)
    data, options = DataLoader(rows(), 8), {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    plain = quiet(**options).fit(Classifier(), data)
    assert_close(plain, quiet(precision=scaled, **options).fit(Classifier(), data), 1e-6)


class Overflows(TaskModule):
    """Whose gradient overflows float16 in batches that say so."""

    weight: jax.Array
    count: jax.Array = buffer()

    def training_step(self, batch, *, key):
        after = eqx.tree_at(lambda t: t.count, self, self.count + 1)
        return Mean.over(batch["x"] * self.weight), {}, after

    def configure_optimizers(self):
        return optax.adam(0.1)


def test_an_overflow_changes_nothing_but_the_scale():
    x = np.array([1.0, 1.0, 3e4, 1.0], np.float32)
    states = []

    class Keeps(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            states.append(jax.tree.map(jnp.copy, eqx.filter(trainer.state, eqx.is_array)))

    trainer = quiet(max_epochs=1, precision="16-mixed", callbacks=Keeps())
    trainer.fit(Overflows(jnp.float32(1.0), jnp.int32(0)), DataLoader({"x": x}, 1))
    scales = [float(s.loss_scale.scale) for s in states]
    assert scales == [2.0**16 / 2, 2.0**16 / 4, 2.0**16 / 8, 2.0**16 / 16] or scales[2] < scales[1]
    before, after = states[1], states[2]
    for a, b in zip(jax.tree.leaves(before.task), jax.tree.leaves(after.task), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(before.opt_state), jax.tree.leaves(after.opt_state), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 3


def test_the_scale_grows_after_enough_good_steps():
    scale = LossScale(jnp.float32(8.0), jnp.int32(0))
    for _ in range(3):
        scale = scale.adjusted(jnp.bool_(True), growth_interval=3)
    assert (float(scale.scale), int(scale.good_steps)) == (16.0, 0)
    scale = scale.adjusted(jnp.bool_(False))
    assert float(scale.scale) == 8.0


def test_double_precision_as_it_is_advised():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        trainer = quiet(max_epochs=1, precision=Precision(*[jnp.float64] * 3))
        task = trainer.fit(Classifier(), DataLoader(rows(40), 8))
        assert task.net.layers[0].weight.dtype == jnp.float64
        assert trainer.predict(task, DataLoader(rows(40), 8)).dtype == jnp.float64
    finally:
        jax.config.update("jax_enable_x64", before)


def test_masked_sums_do_not_overflow_float16():
    """Totals and weights are float32, whatever the compute dtype: 4,000 rows of loss 100."""
    data = {"x": np.full((4000, 1), 100.0, np.float32)}

    class Sums(TaskModule):
        weight: jax.Array

        def training_step(self, batch, *, key):
            return Mean.over(batch["x"] * self.weight)

        def configure_optimizers(self):
            return optax.sgd(0.0)

    trainer = quiet(max_epochs=1, precision="16-mixed")
    trainer.fit(Sums(jnp.ones((1, 1))), DataLoader(data, 4000))
    found = trainer.validate(dataloaders=DataLoader(data, 4000))
    assert found["val/loss"] == pytest.approx(100.0)


def test_inputs_may_keep_more_digits_than_the_computation():
    """1234.5 has no bfloat16: the nearest is 1232."""

    class Targets(TaskModule):
        weight: jax.Array

        def training_step(self, batch, *, key):
            return Mean.over(batch["y"] + 0 * self.weight.astype(batch["y"].dtype))

        def configure_optimizers(self):
            return optax.sgd(0.0)

    data = DataLoader({"y": np.full((8, 1), 1234.5, np.float32)}, 8)
    exact = Precision(compute=jnp.bfloat16, inputs=jnp.float32)
    for precision, expected in (("bf16-mixed", 1232.0), (exact, 1234.5)):
        trainer = quiet(max_epochs=1, precision=precision)
        trainer.fit(Targets(jnp.ones((1, 1))), data)
        assert trainer.callback_metrics["train/loss_epoch"] == expected
