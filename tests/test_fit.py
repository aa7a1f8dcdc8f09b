"""`Trainer.fit` against loops written by hand."""

import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import (
    Classifier,
    TwoLosses,
    arrays,
    assert_close,
    assert_same,
    hand_fit,
    hand_loss,
    quiet,
    rows,
)

from jaxlightning import Callback, DataLoader, Mean, TaskModule, buffer, load_weights
from jaxlightning._checkpoint import read_metadata
from jaxlightning.callbacks import LambdaCallback


class Losses(Callback):
    """Every step's loss, read at once."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def batches_of(data, size, epochs=1, shuffle=False):
    loader = DataLoader(data, size, shuffle=shuffle)
    return [batch for epoch in range(epochs) for batch in loader.batches(epoch)]


def test_equals_a_hand_written_loop():
    data, task, losses = rows(40), Classifier(), Losses()
    trained = quiet(max_epochs=3, callbacks=losses).fit(task, DataLoader(data, 8, shuffle=True))
    net, expected = hand_fit(task.net, batches_of(data, 8, 3, shuffle=True), optax.adam(task.lr))
    np.testing.assert_allclose(losses.seen, expected, atol=1e-6)
    assert_close(trained.net, net)


def test_leaves_the_task_it_was_given_alone():
    task = Classifier()
    before = arrays(task)
    quiet(max_epochs=1).fit(task, DataLoader(rows(), 8))
    for a, b in zip(before, arrays(task), strict=True):
        np.testing.assert_array_equal(a, b)


def test_last_smaller_batch_is_exact_and_announced():
    data, task, losses = rows(21), Classifier(), Losses()
    trainer = quiet(max_epochs=2, callbacks=losses, on_recompile="raise")
    trained = trainer.fit(task, DataLoader(data, 8))
    net, expected = hand_fit(task.net, batches_of(data, 8, 2), optax.adam(task.lr))
    np.testing.assert_allclose(losses.seen, expected, atol=1e-6)
    assert_close(trained.net, net)
    assert trainer.num_recompiles == 0


@pytest.mark.parametrize(
    ("steps", "options", "programs"),
    [
        (2, {}, 1),
        (3, {}, 2),
        (1, {"accumulate_grad_batches": 2}, 1),
        (2, {"accumulate_grad_batches": 2}, 2),
        (2, {"steps_per_dispatch": 4}, 1),
    ],
    ids=str,
)
def test_a_last_smaller_batch_that_is_not_reached_is_not_compiled_for(steps, options, programs):
    trainer = quiet(max_steps=steps, on_recompile="raise", **options)
    trainer.fit(Classifier(), DataLoader(rows(21), 8))
    assert trainer.global_step == steps
    assert len(trainer._run.program._compiled) == programs


@pytest.mark.parametrize(("rows_", "accumulate"), [(32, 4), (28, 3), (40, 3), (21, 2)])
def test_accumulation_is_exact_under_masks(rows_, accumulate):
    """Micro-batches of unequal weight, a smaller last window, a smaller last batch."""
    data, task = rows(rows_), Classifier()
    trainer = quiet(max_epochs=2, accumulate_grad_batches=accumulate, on_recompile="raise")
    trained = trainer.fit(task, DataLoader(data, 4))
    net, _ = hand_fit(task.net, batches_of(data, 4 * accumulate, 2), optax.adam(task.lr))
    assert_close(trained.net, net)


def test_accumulation_is_exact_for_several_means():
    data, task = rows(24), TwoLosses()
    trained = quiet(max_epochs=2, accumulate_grad_batches=3).fit(task, DataLoader(data, 4))

    def loss(net, batch):
        size = jnp.square(jax.vmap(net)(batch["x"])).sum(1)
        weight = (batch["y"] == 0).astype(jnp.float32)
        return hand_loss(net, batch) + 0.1 * (size * weight).sum() / weight.sum()

    net, _ = hand_fit(task.net, batches_of(data, 12, 2), optax.adam(task.lr), loss)
    assert_close(trained.net, net)


@pytest.mark.parametrize("count", [21, 32])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"strategy": "fsdp"}])
def test_several_devices_equal_one(count, options):
    """With masks of unequal weight on the devices, and a last batch that does not divide."""
    data = rows(count)
    one = quiet(max_epochs=2, **{k: v for k, v in options.items() if k != "strategy"})
    mesh = {"data": 2, "fsdp": 2} if "strategy" in options else None
    many = quiet(max_epochs=2, on_recompile="raise", **{"devices": 4, "mesh": mesh, **options})
    validation = DataLoader(data, 8)
    expected = one.fit(Classifier(), DataLoader(data, 8, shuffle=True), validation)
    found = many.fit(Classifier(), DataLoader(data, 8, shuffle=True), validation)
    assert_close(found, expected, 1e-5)
    for name, value in one.callback_metrics.items():
        assert many.callback_metrics[name] == pytest.approx(value, abs=1e-5), name


def test_lazily_initialised_tasks():
    """Sharded from the start, and the same as initialising by hand with the same key."""
    made = []

    def init(key):
        task = Classifier(key)
        made.append(task)
        return task

    trainer = quiet(max_epochs=1, devices=4, mesh={"data": 1, "fsdp": 4}, strategy="fsdp")
    lazy = trainer.fit(init, DataLoader(rows(), 8))
    assert len(made) == 1
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 4), 0)
    eager = quiet(max_epochs=1).fit(Classifier(key), DataLoader(rows(), 8))
    assert_close(lazy, eager, 1e-5)


class Counting(TaskModule):
    """A buffer of each kind."""

    weight: jax.Array
    frozen: jax.Array
    running: jax.Array = buffer()
    seen: jax.Array = buffer()

    def training_step(self, batch, *, key):
        mean = batch["x"].mean()
        after = eqx.tree_at(
            lambda t: (t.running, t.seen),
            self,
            (0.9 * self.running + 0.1 * mean, self.seen + 1),
        )
        loss = jnp.square(batch["x"] @ self.weight + self.frozen.sum() - 1.0)
        return Mean.over(loss), {}, after

    def trainable(self):
        return eqx.tree_at(lambda t: t.frozen, super().trainable(), False)

    def configure_optimizers(self):
        return optax.adamw(0.1, weight_decay=0.1)


def counting():
    return Counting(jnp.ones(6), jnp.ones(2), jnp.float32(0.0), jnp.int32(0))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_advance_and_frozen_parameters_do_not(accumulate):
    data = {"x": rows(32)["x"]}
    trainer = quiet(max_epochs=1, accumulate_grad_batches=accumulate)
    trained = trainer.fit(counting(), DataLoader(data, 4))
    expected = np.float32(0.0)
    for batch in batches_of(data, 4):
        expected = np.float32(0.9) * expected + np.float32(0.1) * batch["x"].mean()
    assert trained.running == pytest.approx(float(expected), abs=1e-6)
    assert int(trained.seen) == 8
    np.testing.assert_array_equal(trained.frozen, np.ones(2))
    assert not np.allclose(trained.weight, 1.0)
    # Only the one trained leaf has slots: first and second moment.
    shapes = [x.shape for x in jax.tree.leaves(trainer.state.opt_state)]
    assert sorted(shapes) == [(), (6,), (6,)]


class Twofold(TaskModule):
    """Several optimizers: one a field."""

    body: eqx.nn.Linear
    head: eqx.nn.Linear

    def training_step(self, batch, *, key):
        out = jax.vmap(lambda x: self.head(jax.nn.tanh(self.body(x))))(batch["x"])
        return Mean.over(jnp.square(out - 1.0))

    def configure_optimizers(self):
        return {"body": optax.sgd(0.1), "head": optax.adam(0.01)}


def twofold():
    a, b = jax.random.split(jax.random.key(1))
    return Twofold(eqx.nn.Linear(6, 4, key=a), eqx.nn.Linear(4, 1, key=b))


def test_several_optimizers():
    data, task = {"x": rows(32)["x"]}, twofold()
    trained = quiet(max_epochs=2).fit(task, DataLoader(data, 8))
    labels = Twofold(body="body", head="head")
    tx = optax.multi_transform({"body": optax.sgd(0.1), "head": optax.adam(0.01)}, labels)
    loss = lambda task, batch: task.training_step(batch, key=None).compute()
    expected, _ = hand_fit(task, batches_of(data, 8, 2), tx, loss)
    assert_close(trained, expected)


def test_blocks_of_steps_equal_single_steps():
    """Whatever cuts the blocks: log interval, validation, a callback, the end of the epoch."""
    data = rows(84)

    class Reads(Callback):
        def needs_state(self, step):
            return step == 4

        def on_checkpoint(self, trainer, point):
            if trainer.global_step == 4:
                self.weights = arrays(trainer.task)

    def fit(steps_per_dispatch):
        reads, losses = Reads(), Losses()
        trainer = quiet(
            max_epochs=2,
            steps_per_dispatch=steps_per_dispatch,
            callbacks=[reads, losses],
            log_every_n_steps=7,
            val_check_interval=9,
            on_recompile="raise",
        )
        task = Classifier(dropout=0.2)
        trained = trainer.fit(task, DataLoader(data, 8, shuffle=True), DataLoader(data, 20))
        return trained, reads.weights, losses.seen, trainer.callback_metrics

    single, weights, losses, metrics = fit(1)
    for k in (5, 50):
        block, block_weights, block_losses, block_metrics = fit(k)
        assert_close(single, block)
        np.testing.assert_allclose(losses, block_losses, atol=1e-6)
        for a, b in zip(weights, block_weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert block_metrics == pytest.approx(metrics, abs=1e-5)


def test_where_blocks_are_cut_changes_no_bit():
    data = rows(64)

    def fit(log_every):
        trainer = quiet(max_epochs=1, steps_per_dispatch=6, log_every_n_steps=log_every)
        return trainer.fit(Classifier(dropout=0.2), DataLoader(data, 8))

    assert_same(fit(100), fit(1))
    assert_same(fit(100), fit(3))


def test_reading_the_state_inside_a_block_is_an_error():
    class Reads(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            trainer.state  # noqa: B018

    trainer = quiet(max_epochs=1, steps_per_dispatch=4, callbacks=Reads())
    with pytest.raises(RuntimeError, match=r"Override `needs_state\(step\)`"):
        trainer.fit(Classifier(), DataLoader(rows(), 8))


def test_logged_metrics_are_exact_over_intervals_and_epochs():
    """Weighed by the mask, over intervals that do not follow the epochs."""
    data, task = rows(40), Classifier()
    logged = {}

    class Logs(Callback):
        def on_log(self, trainer, metrics, step):
            logged[step] = metrics["train/loss"]

        def on_train_epoch_end(self, trainer):
            epochs.append(trainer.callback_metrics["train/loss_epoch"])

    epochs: list = []
    quiet(max_epochs=3, callbacks=Logs(), log_every_n_steps=4).fit(task, DataLoader(data, 8))
    batches = batches_of(data, 8, 3)
    _, losses = hand_fit(task.net, batches, optax.adam(task.lr))
    weights = [b["mask"].sum() for b in batches]
    mean = lambda part: np.average(losses[part], weights=weights[part])
    assert sorted(logged) == [4, 8, 12]
    for step, value in logged.items():
        assert value == pytest.approx(mean(slice(step - 4, step)), abs=1e-6)
    for number, value in enumerate(epochs):
        assert value == pytest.approx(mean(slice(5 * number, 5 * number + 5)), abs=1e-6)


def test_dropout_depends_on_seed_and_step_only():
    data = DataLoader(rows(), 8)
    fit = lambda seed: quiet(max_epochs=1, seed=seed).fit(Classifier(dropout=0.5), data)
    assert_same(fit(3), fit(3))
    with pytest.raises(AssertionError):
        assert_same(fit(3), fit(4))


class Rotation(TaskModule):
    """A complex parameter, which has to reach `target`."""

    weight: jax.Array
    target: complex = eqx.field(static=True, default=2 - 1j)

    def training_step(self, batch, *, key):
        return Mean.over(jnp.abs(self.weight - self.target) ** 2 + 0 * batch["x"][:, 0])

    def configure_optimizers(self):
        return optax.sgd(0.2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_complex_parameters_descend(accumulate):
    trainer = quiet(max_epochs=10, accumulate_grad_batches=accumulate)
    trained = trainer.fit(Rotation(jnp.array(1 + 1j)), DataLoader(rows(), 8))
    np.testing.assert_allclose(trained.weight, 2 - 1j, atol=1e-4)


def test_accumulated_batches_reach_hooks_as_lists():
    sizes = []
    hook = LambdaCallback(on_train_batch_end=lambda _, outputs, batch, i: sizes.append(len(batch)))
    trainer = quiet(max_epochs=1, accumulate_grad_batches=2, callbacks=hook)
    trainer.fit(Classifier(), DataLoader(rows(40), 8))
    assert sizes == [2, 2, 1]


def test_a_signal_ends_one_run_only():
    strike = [signal.SIGINT]

    def interrupt(trainer, outputs, batch, batch_idx):
        if strike:
            os.kill(os.getpid(), strike.pop())

    hook = LambdaCallback(on_train_batch_end=interrupt)
    trainer = quiet(max_epochs=1, callbacks=hook)
    with pytest.raises(SystemExit):
        trainer.fit(Classifier(), DataLoader(rows(40), 8))
    assert trainer.global_step == 1
    trainer.fit(Classifier(), DataLoader(rows(40), 8))
    assert trainer.global_step == 5


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_saves_that_are_asked_for_at_the_very_end(tmp_path, hook):
    save = LambdaCallback(**{hook: lambda trainer: trainer.save_checkpoint(tmp_path / "a")})
    trainer = quiet(max_epochs=1, callbacks=save)
    trained = trainer.fit(Classifier(), DataLoader(rows(), 8))
    assert_same(load_weights(tmp_path / "a", Classifier()), trained)


def test_saves_after_a_fit_are_on_the_disk_on_return(tmp_path):
    for name in ("a", "b"):  # two trainers, one folder
        trainer = quiet(max_epochs=1)
        trained = trainer.fit(Classifier(), DataLoader(rows(), 8))
        trainer.save_checkpoint(tmp_path / name)
        assert_same(load_weights(tmp_path / name, Classifier()), trained)


def test_a_fit_saves_nothing_of_the_failed_one_before(tmp_path):
    class Counts(Callback):
        count, fails = 0, True

        def on_validation_batch_end(self, *_):
            if self.fails:
                raise RuntimeError

        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            self.count += 1
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}")

        def state_dict(self):
            return {"count": self.count}

    counts, data = Counts(), DataLoader(rows(40), 40)
    trainer = quiet(max_epochs=1, num_sanity_val_steps=0, callbacks=counts)
    with pytest.raises(RuntimeError):
        trainer.fit(Classifier(), data, data)
    counts.fails = False
    trainer.fit(Classifier(), data)
    (state,) = read_metadata(tmp_path / "1")["callbacks"].values()
    assert state == {"count": 2}
