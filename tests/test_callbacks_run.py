"""The callbacks that decide, in runs of the real Trainer."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import quiet

from jaxlightning import Callback, DataLoader, Mean, TaskModule, Trainer, load_weights
from jaxlightning._checkpoint import find_checkpoints
from jaxlightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    LearningRateSchedule,
    ModelCheckpoint,
    ReduceLROnPlateau,
    Timer,
)

RATE = 0.05


class Line(TaskModule):
    weight: jax.Array = eqx.field(converter=jnp.asarray)

    def training_step(self, batch, *, key):
        return Mean.over((batch["x"] @ self.weight - batch["y"]) ** 2)

    def configure_optimizers(self):
        return optax.sgd(RATE, momentum=0.9)


def data():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(32, 3)).astype(np.float32)
    y = x @ np.float32([1, -2, 3]) + draw.normal(size=32).astype(np.float32)
    arrays = {"x": x, "y": y}
    return DataLoader(arrays, 8, shuffle=True), DataLoader({k: v[:8] for k, v in arrays.items()}, 8)


class Recorder(Callback):
    """The learning rate of each step, and an exception before a step."""

    def __init__(self, crash_at=None):
        self.rates, self.crash_at = {}, crash_at

    def on_log(self, trainer, metrics, step):
        self.rates[step] = metrics["train/lr"]

    def on_train_batch_start(self, trainer, batch, batch_idx):
        if trainer.global_step == self.crash_at:
            raise RuntimeError("killed")


def deciders():
    return [
        ModelCheckpoint(
            monitor="val/loss", save_top_k=2, save_last=True, filename="{epoch}-{val/loss:.3f}"
        ),
        EarlyStopping("val/loss", patience=4),
        ReduceLROnPlateau("val/loss", patience=0, factor=0.5, threshold=0.02),
        LearningRateSchedule("cosine", warmup=8),
        LearningRateMonitor(base=RATE),
    ]


def fit(root, callbacks, epochs=12, resume=None, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"log_every_n_steps": 1, "on_recompile": "raise"} | quiet | arguments
    trainer = Trainer(
        devices=1, default_root_dir=root, callbacks=callbacks, max_epochs=epochs, **arguments
    )
    return trainer, trainer.fit(Line(np.zeros(3, np.float32)), *data(), resume=resume)


def on_disk(root):
    return sorted(entry.path.name for entry in find_checkpoints(root / "checkpoints"))


def state_of(callbacks):
    return [callback.state_dict() for callback in callbacks[:3]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root, callbacks, recorder = tmp_path_factory.mktemp("whole"), deciders(), Recorder()
    trainer, task = fit(root, [*callbacks, recorder])
    return root, trainer, task, callbacks, recorder


def test_they_decide_together(whole):
    root, trainer, _, (saver, stopper, plateau, *_), _ = whole
    assert trainer.num_recompiles == 0
    assert 8 < trainer.global_step <= 48
    assert stopper.best_score == saver.best_model_score
    paths = {*saver.best_k_models, saver.last_model_path}
    assert on_disk(root) == sorted(os.path.basename(path) for path in paths)
    state = trainer.state.opt_state
    reductions = [x for x in jax.tree.leaves(state, is_leaf=_is_factor) if _is_factor(x)]
    assert float(reductions[0].factor) < 1
    assert plateau.best_score is not None


def _is_factor(node):
    return type(node).__name__ == "PlateauState"


def test_the_logged_rate_is_that_of_the_schedule_and_the_plateau(whole):
    _, trainer, _, _, recorder = whole
    steps = np.arange(trainer.global_step)
    p = np.clip((steps - 8) / 40, 0, 1)
    scheduled = RATE * np.minimum(steps / 8, 1) * (1 + np.cos(np.pi * p)) / 2
    logged = np.array([recorder.rates[step + 1] for step in steps])
    halvings = np.log2(scheduled[1:] / logged[1:])
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-4)
    assert (np.diff(np.round(halvings)) >= 0).all()
    assert halvings[-1] > 0.5


@pytest.mark.parametrize("crash_at", [9, 12, 22])
def test_a_resumed_run_decides_the_same(whole, tmp_path, crash_at):
    root, trainer, task, callbacks, _ = whole
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, [*deciders(), Recorder(crash_at)])
    again = deciders()
    resumed, task_again = fit(tmp_path, again, resume="auto")
    assert resumed.global_step == trainer.global_step
    assert resumed.stop_reason == trainer.stop_reason
    np.testing.assert_array_equal(task_again.weight, task.weight)
    assert on_disk(tmp_path) == on_disk(root)
    assert state_of(again) == state_of(callbacks)


def test_blocks_of_steps_save_at_the_same_steps(tmp_path):
    arguments = {"every_n_train_steps": 3, "save_top_k": -1}
    savers = [ModelCheckpoint(**arguments), ModelCheckpoint(**arguments)]
    fit(tmp_path / "a", savers[:1], epochs=3, log_every_n_steps=50)
    fit(tmp_path / "b", savers[1:], epochs=3, log_every_n_steps=50, steps_per_dispatch=4)
    assert on_disk(tmp_path / "a") == on_disk(tmp_path / "b")
    assert [entry.step for entry in find_checkpoints(tmp_path / "b" / "checkpoints")] == [
        3,
        6,
        9,
        12,
    ]


def test_the_best_weights_are_tested(tmp_path):
    # The rate is far too high later on, so the best are not the last.
    diverge = LearningRateSchedule(lambda step: jnp.where(step < 12, 1.0, 30.0))
    saver = ModelCheckpoint(monitor="val/loss", save_weights_only=True)
    trainer, task = fit(tmp_path, [saver, diverge], epochs=6)
    best = load_weights(saver.best_model_path, task)
    loss = float(best.training_step(next(iter(data()[1])), key=None).compute())
    assert loss == pytest.approx(saver.best_model_score, rel=1e-5)
    assert trainer.callback_metrics["val/loss"] > 2 * loss


def test_a_monitor_that_no_step_produces_is_named_before_any_step(tmp_path):
    for callback in (
        ModelCheckpoint(monitor="val/los"),
        ModelCheckpoint(filename="{epoch}-{val/los:.2f}"),
        EarlyStopping("val/los"),
        ReduceLROnPlateau("val/los"),
    ):
        with pytest.raises(ValueError, match=r"Did you mean .*`val/loss`"):
            fit(tmp_path, [callback])


def test_a_run_stops_at_its_time_limit(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    class Clock(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            now[0] += 10.0

    trainer, _ = fit(
        tmp_path, [Clock()], enable_checkpointing=False, max_time="00:00:01:00", epochs=100
    )
    assert trainer.stop_reason == "The time limit of 0:01:00 was reached."
    # Those that the arguments stand for come after those that are given.
    assert trainer.global_step == 6
    assert any(isinstance(callback, Timer) for callback in trainer.callbacks)


def test_fast_dev_run_leaves_nothing_behind(tmp_path):
    trainer, _ = fit(tmp_path, deciders()[1:], fast_dev_run=2)
    assert trainer.global_step == 2
    assert list(tmp_path.iterdir()) == []


def test_a_callback_may_replace_a_checkpoint_in_one_hook(tmp_path):
    """What it deletes is there until what it asked for is on the disk."""

    class Replaces(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            step = trainer.global_step
            trainer.wait_for_checkpoints()
            trainer.save_checkpoint(tmp_path / f"step_{step}")
            if step > 1:
                trainer.delete_checkpoint(tmp_path / f"step_{step - 1}")
                assert (tmp_path / f"step_{step - 1}").is_dir()

    quiet(max_steps=3, callbacks=Replaces()).fit(Line(np.zeros(3, np.float32)), data()[0])
    assert [entry.step for entry in find_checkpoints(tmp_path)] == [3]
