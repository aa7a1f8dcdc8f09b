"""Every argument of the Trainer does what its documentation says.

`lightning_arguments.json` is a recording of Lightning's Trainer with the same arguments, made by
`record_lightning_arguments.py`, which says what the letters stand for.
"""

import json
import warnings
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import assert_same, quiet

from jaxlightning import (
    Callback,
    DataLoader,
    DataModule,
    Mean,
    RecompilationWarning,
    TaskModule,
    Trainer,
)
from jaxlightning._program import Program, compiler_options
from jaxlightning.callbacks import (
    GradientClipping,
    ModelCheckpoint,
    ModelSummary,
    Profiler,
    Timer,
    TQDMProgressBar,
)
from jaxlightning.loggers import CSVLogger, TensorBoardLogger

RECORDED = json.loads((Path(__file__).parent / "lightning_arguments.json").read_text())["runs"]


class Line(TaskModule):
    """The cheapest task there is: its gradient is the mean of the rows."""

    weight: jax.Array = eqx.field(converter=jnp.asarray)

    def training_step(self, batch, *, key):
        return Mean.over(batch["x"] @ self.weight)

    def predict_step(self, batch, *, key):
        return batch["x"] @ self.weight

    def configure_optimizers(self):
        return optax.sgd(0.1)


def line(value=1.0):
    return Line(np.full(3, value, np.float32))


def counted(rows):
    """Rows that can be told apart: row i is i."""
    return {"x": np.tile(np.arange(rows, dtype=np.float32)[:, None], 3)}


class Events(Callback):
    """Writes down what happens, one letter an event, and asks for an end after some steps."""

    def __init__(self, stops_at_step=None):
        self.events = ""
        self.stops_at_step = stops_at_step

    def on_sanity_check_start(self, trainer):
        self.events += "S"

    def on_train_epoch_start(self, trainer):
        self.events += "E"

    def on_train_epoch_end(self, trainer):
        self.events += "X"

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.events += "t"
        if trainer.global_step == self.stops_at_step:
            trainer.stop("asked for")

    def on_validation_start(self, trainer):
        self.events += "" if trainer.sanity_checking else "V"

    def on_validation_batch_end(self, trainer, outputs, batch, batch_idx, dataloader_idx):
        self.events += "v"


class FiveAndThree(DataModule):
    """Five training batches, three of validation."""

    def __init__(self, events):
        self.events = events

    def train_dataloader(self):
        self.events.events += "L"
        return DataLoader(counted(5), 1)

    def val_dataloader(self):
        return DataLoader(counted(3), 1)


def named(arguments):
    return ",".join(f"{name}={value}" for name, value in arguments.items())


# How long, how much, how often: against Lightning


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: named(run["arguments"]))
def test_does_what_lightning_does(run):
    arguments = dict(run["arguments"])
    events = Events(arguments.pop("stops_at_step", None))
    if "barebones" in arguments:
        trainer = Trainer(devices=1, callbacks=events, **arguments)
    else:
        defaults = {"num_sanity_val_steps": None, "callbacks": events}
        trainer = quiet(**defaults | arguments)
    trainer.fit(line(), FiveAndThree(events))
    # We ask for the first training loader before the sanity check, Lightning after it.
    assert events.events.replace("L", "", 1) == run["events"].replace("L", "", 1)


@pytest.mark.long
def test_a_time_limit_alone_means_no_limit_on_epochs(monkeypatch):
    """Else 1000 epochs are the limit, as in Lightning."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    class Clock(Callback):
        def on_train_epoch_end(self, trainer):
            now[0] += 1.0

    one = [jax.device_put(counted(1), jax.devices()[0])]
    with_limit = quiet(max_time={"seconds": 1200}, callbacks=Clock())
    with_limit.fit(line(), one)
    assert with_limit.stop_reason is not None
    assert with_limit.current_epoch == 1201  # the clock is looked at after a step
    without = quiet()
    without.fit(line(), one)
    assert without.current_epoch == 1000


# How much data


class Rows(Callback):
    """Writes down which rows of `counted` were taken, stage by stage."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, batch, batch_idx):
        self.train.append(int(batch["x"][0, 0]))

    def on_validation_batch_start(self, trainer, batch, batch_idx, dataloader_idx):
        self.val.append(int(batch["x"][0, 0]))


@pytest.mark.parametrize(("overfit", "used"), [(2, [0, 1]), (0.5, [0, 1, 2]), (0.01, [0])])
def test_overfit_batches_are_the_first_unshuffled_and_validated_on(overfit, used):
    seen = Rows()
    trainer = quiet(max_epochs=2, overfit_batches=overfit, callbacks=seen)
    trainer.fit(line(), DataLoader(counted(6), 1, shuffle=True), DataLoader(counted(9), 1))
    assert seen.train == seen.val == used * 2


@pytest.mark.parametrize(("limit", "used"), [(2, 2), (99, 5), (0.5, 2), (1.0, 5), (0.01, 1)])
def test_limits_of_testing_and_predicting(limit, used):
    trainer = quiet(limit_test_batches=limit, limit_predict_batches=limit)
    data = DataLoader(counted(5), 1)
    np.testing.assert_array_equal(trainer.predict(line(), data), 3 * np.arange(used))
    assert trainer.test(line(), data)["test/loss"] == 3 * np.arange(used).mean()


@pytest.mark.parametrize(
    ("stage", "name"), [("validate", "val"), ("test", "test"), ("predict", "predict")]
)
@pytest.mark.parametrize("limit", [0, 0.0])
def test_an_evaluation_limited_to_nothing_is_an_error(stage, name, limit):
    trainer = quiet(**{f"limit_{name}_batches": limit})
    with pytest.raises(
        ValueError, match=rf"`{stage}` has nothing to do: .* `limit_{name}_batches`"
    ):
        getattr(trainer, stage)(line(), DataLoader(counted(2), 1))


def test_a_fit_limited_to_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"`limit_train_batches` leaves no batch to train on"):
        quiet(limit_train_batches=0).fit(line(), DataLoader(counted(2), 1))


def test_loaders_are_reloaded_of_a_data_module_only():
    trainer = quiet(max_epochs=1, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(
        ValueError, match=r"`reload_dataloaders_every_n_epochs` asks a `DataModule`"
    ):
        trainer.fit(line(), DataLoader(counted(2), 1))


def test_an_interval_longer_than_an_epoch_is_an_error():
    trainer = quiet(max_epochs=1, val_check_interval=6)
    with pytest.raises(
        ValueError, match=r"`val_check_interval=6` is more than the 5 batches .*None`"
    ):
        trainer.fit(line(), FiveAndThree(Events()))


# When what happens


class Told(Callback):
    """What `explain_schedule` foretells, as it happens."""

    def __init__(self, reads_state_at=None):
        self.events, self.logged = [], set()
        self.reads_state_at = reads_state_at

    def needs_state(self, step):
        return step == self.reads_state_at

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.events.append((trainer.global_step, ["step", "on_train_batch_end"]))

    def on_log(self, trainer, metrics, step):
        self.logged.add(step)

    def on_validation_start(self, trainer):
        self.events[-1][1].append("validate")

    def on_train_epoch_end(self, trainer):
        self.events[-1][1].append("on_train_epoch_end")

    def on_checkpoint(self, trainer, point):
        if point != "end":
            self.events[-1][1].append(f"on_checkpoint('{point}')")


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "log_every_n_steps": 3, "accumulate_grad_batches": 2},
        {"max_steps": 7, "val_check_interval": 2},
        {"max_epochs": 3, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"max_epochs": 2, "steps_per_dispatch": 3, "log_every_n_steps": 4},
        {"max_steps": 9, "steps_per_dispatch": 4, "val_check_interval": 3},
    ],
    ids=named,
)
def test_the_schedule_that_is_explained_is_what_happens(arguments):
    told = Told(reads_state_at=2)
    trainer = quiet(**{"log_every_n_steps": 2, "callbacks": told} | arguments)
    trainer.fit(line(), FiveAndThree(Events()))
    expected = []
    for step, events in told.events:
        at = 2 + (events[2:3] == ["validate"]) - ("validate" in events[2:3])
        logs = ["log"] if step in told.logged else []
        expected.append(f"step {step}: {' ▸ '.join([*events[:at], *logs, *events[at:]])}")
    assert trainer.explain_schedule(100).splitlines() == expected
    assert trainer.explain_schedule(3).splitlines() == expected[:3]


def test_the_schedule_goes_on_from_where_the_fit_is():
    class Asks(Callback):
        plans: ClassVar = {}

        def _ask(self, trainer):
            self.plans[trainer.global_step] = trainer.explain_schedule(2).splitlines()

        def on_train_start(self, trainer):
            self._ask(trainer)

        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self._ask(trainer)

        def on_train_epoch_end(self, trainer):
            self._ask(trainer)

    trainer = quiet(max_epochs=3, max_steps=11, callbacks=Asks(), log_every_n_steps=50)
    trainer.fit(line(), FiveAndThree(Events()))
    whole = trainer.explain_schedule(99).splitlines()
    assert len(whole) == 11
    expected = {0: whole[:2], 3: whole[3:5], 5: whole[5:7], 10: whole[10:]}
    assert {step: Asks.plans[step] for step in expected} == expected
    with pytest.raises(
        RuntimeError, match=r"`explain_schedule` needs to know the data\. Call it aft"
    ):
        quiet().explain_schedule(3)


# The step


@pytest.mark.parametrize(
    ("algorithm", "by"), [(None, "norm"), ("norm", "norm"), ("value", "value")]
)
def test_gradients_are_clipped_as_asked(algorithm, by):
    """The gradient of a row of `counted` is the row: two of them by hand."""
    trainer = quiet(max_epochs=1, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    trained = trainer.fit(line(0.0), DataLoader(counted(2), 1))
    clipped = 0.5 if by == "value" else 0.5 / np.sqrt(3)
    np.testing.assert_allclose(trained.weight, np.full(3, -0.1 * clipped), rtol=1e-6)
    found = [c for c in trainer.callbacks if isinstance(c, GradientClipping)]
    assert len(found) == 1


class Shrinks(Line):
    """Whose loss is not a number once the weight has gone below zero."""

    def training_step(self, batch, *, key):
        return Mean.over(jnp.sqrt(batch["x"] @ self.weight))


def test_an_anomaly_is_named_with_its_operation_and_step():
    data = DataLoader({"x": np.array([[1.0], [1], [-1], [1]], np.float32)}, 1)
    trainer = quiet(max_epochs=1, detect_anomaly=True)
    with pytest.raises(FloatingPointError, match=r"nan.*in sqrt") as caught:
        trainer.fit(Shrinks(np.ones(1, np.float32)), data)
    notes = " ".join(caught.value.__notes__)
    assert "Found by `detect_anomaly` in the step after global step 2, run eagerly." in notes
    # The state before that step is still there.
    assert np.isfinite(trainer.task.weight).all()
    assert trainer.global_step == 2


def test_without_an_anomaly_its_detection_changes_nothing():
    fit = lambda **arguments: quiet(max_epochs=2, **arguments).fit(
        line(), DataLoader(counted(5), 2)
    )
    assert_same(fit(detect_anomaly=True), fit())


def test_infinity_is_no_anomaly():
    class Masked(Line):
        def training_step(self, batch, *, key):
            found = jnp.where(jnp.arange(3) == 0, -jnp.inf, self.weight)
            return Mean.over(batch["x"] @ self.weight), {"least": Mean.of(found.min())}

    trainer = quiet(max_epochs=1, detect_anomaly=True)
    trainer.fit(Masked(np.ones(3, np.float32)), DataLoader(counted(2), 1))
    assert trainer.callback_metrics["train/least_epoch"] == -np.inf


class Unannounced:
    """Batches of four, four, two and four rows, of which nobody was told."""

    def __iter__(self):
        yield from ({"x": np.ones((size, 3), np.float32)} for size in (4, 4, 2, 4, 2))


def test_a_recompilation_is_explained_counted_and_warned_of_once():
    trainer = quiet(max_epochs=1)
    with pytest.warns(RecompilationWarning, match=r"float32\[4,3\] -> float32\[2,3\]") as caught:
        trainer.fit(line(), Unannounced())
    assert len(caught) == trainer.num_recompiles == 1


def test_a_recompilation_may_be_an_error_or_nothing():
    with pytest.raises(RuntimeError, match=r"training step has to be compiled again.*\n.*4,3.*2,3"):
        quiet(max_epochs=1, on_recompile="raise").fit(line(), Unannounced())
    ignoring = quiet(max_epochs=1, on_recompile="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignoring.fit(line(), Unannounced())
    assert ignoring.num_recompiles == 1


def test_the_seed_is_that_of_a_task_initialised_inside():
    init = lambda key: Line(jax.random.normal(key, (3,)))
    fit = lambda seed: quiet(max_epochs=0, seed=seed).fit(init, DataLoader(counted(2), 1))
    assert_same(fit(1), fit(1))
    assert not np.array_equal(fit(1).weight, fit(2).weight)


def test_deterministic_is_told_to_the_compiler_where_it_matters():
    assert compiler_options(True, "gpu") == {"xla_gpu_deterministic_ops": True}
    assert compiler_options(True, "cpu") is compiler_options(False, "gpu") is None
    # XLA knows the option, and gets what it is told.
    for option, known in (("xla_gpu_deterministic_ops", True), ("xla_gpu_determinstic", False)):
        double = lambda kept, varying: [2 * kept[0]]
        program = Program("step", double, donate=False, compiler_options={option: True})
        if known:
            assert program.compile([jnp.ones(2)], ()) is not None
        else:
            with pytest.raises(RuntimeError, match="No such compile option"):
                program.compile([jnp.ones(2)], ())
    fit = lambda: quiet(max_epochs=1, deterministic=True).fit(line(), DataLoader(counted(5), 2))
    assert_same(fit(), fit())


# What listens


def kinds(callbacks):
    return {type(callback) for callback in callbacks}


def test_what_is_switched_on_by_default_and_off_by_its_switch(tmp_path):
    switches = {
        "enable_progress_bar": TQDMProgressBar,
        "enable_model_summary": ModelSummary,
        "enable_checkpointing": ModelCheckpoint,
    }
    usual = Trainer(default_root_dir=tmp_path)
    assert kinds(usual.callbacks) == set(switches.values())
    assert isinstance(usual.logger, TensorBoardLogger)
    for switch, kind in switches.items():
        assert kinds(Trainer(**{switch: False}).callbacks) == set(switches.values()) - {kind}
    assert Trainer(logger=False).loggers == []
    own = [TQDMProgressBar(), ModelSummary(), ModelCheckpoint()]
    assert sorted(map(id, Trainer(callbacks=own).callbacks)) == sorted(map(id, own))


def test_a_profiler_is_a_callback_or_jaxs():
    heard = Events()
    quiet(max_epochs=1, profiler=heard).fit(line(), DataLoader(counted(2), 1))
    assert heard.events == "EttX"
    assert Profiler in kinds(quiet(profiler="jax").callbacks)


def test_a_time_limit_is_a_timer():
    assert Timer in kinds(quiet(max_time={"hours": 1}).callbacks)


def written(folder):
    return sorted({path.relative_to(folder).parts[0] for path in folder.rglob("*")})


def test_files_go_to_the_root_folder_or_to_the_current_one(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    show_nothing = {"enable_progress_bar": False, "enable_model_summary": False}
    for root in (there, None):
        trainer = Trainer(max_epochs=1, devices=1, default_root_dir=root, **show_nothing)
        trainer.fit(line(), DataLoader(counted(2), 1))
        assert Path(trainer.log_dir).is_relative_to(root or here)
    assert written(there) == written(here) == ["jaxlightning_logs"]
    version = there / "jaxlightning_logs" / "version_0"
    assert [path.name for path in version.iterdir() if path.is_dir()] == ["checkpoints"]
    quiet(max_epochs=1, default_root_dir=tmp_path / "nowhere").fit(
        line(), DataLoader(counted(2), 1)
    )
    assert not (tmp_path / "nowhere").exists()


def test_several_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = quiet(max_epochs=1, logger=loggers)
    trainer.fit(line(), DataLoader(counted(2), 1))
    assert trainer.loggers == loggers
    names = {path.name.split(".")[0] for path in Path(trainer.log_dir).iterdir()}
    assert {"metrics", "events"} <= names
