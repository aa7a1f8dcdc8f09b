"""What a fit that fails leaves to be run again: the state before the step, its batch, and why."""

import collections
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsules import ORDER, STEP, Stops, content, fail, same_state  # type: ignore[import-not-found]
from replay_job import Fails, data, line_of, loader  # type: ignore[import-not-found]
from tasks import quiet

from jaxlightning import Callback, TaskModule
from jaxlightning._capsule import CAPSULE, _taken_at
from jaxlightning._capsule_read import ReplayError
from jaxlightning._checkpoint import CheckpointError, CheckpointMismatch, CheckpointStore
from jaxlightning._checkpoint_read import load_arrays
from jaxlightning._fit import FitRun
from jaxlightning._replay import replay
from jaxlightning._schedule import Position
from jaxlightning.callbacks import (
    ExponentialMovingAverage,
    LearningRateSchedule,
    ModelCheckpoint,
    ReplayCapsule,
    SkipNonFinite,
)

# Not finite


@pytest.mark.parametrize(
    ("arguments", "callbacks"),
    [
        ({}, ()),
        ({"accumulate_grad_batches": 2}, ()),
        ({"steps_per_dispatch": 4}, ()),
        pytest.param({"precision": "bf16-mixed"}, (), marks=pytest.mark.long),
        ({"precision": "16-mixed"}, ()),
        (
            {"gradient_clip_val": 1.0},
            (ExponentialMovingAverage(0.9), LearningRateSchedule("linear", warmup=2)),
        ),
    ],
    ids=["plain", "accumulated", "blocks", "bfloat16", "float16", "wrapped"],
)
def test_it_holds_the_state_before_the_step_and_its_batch(tmp_path, arguments, callbacks):
    path, error, trainer = fail(tmp_path, Fails("log"), callbacks=callbacks, **arguments)
    many = arguments.get("accumulate_grad_batches", 1)
    step = (STEP - 1) // many + 1
    assert trainer.global_step > step
    before = quiet(
        max_epochs=1, callbacks=[*callbacks, SkipNonFinite(1), Stops(step - 1)], **arguments
    )
    before.fit(Fails("log"), loader("log"))
    assert before.global_step == step - 1
    assert same_state(path, before.state)
    rows = [ORDER[4 * i : 4 * i + 4] for i in range(many * (step - 1), many * step)]
    batches = [load_arrays(path, include=f"^steps/0/{i}/")[f"steps/0/{i}/x"] for i in range(many)]
    for batch, own in zip(batches, rows, strict=True):
        assert np.array_equal(batch, data("log")["x"][own])
    found = content(path)
    assert found["steps"] == [
        {"step": step, "epoch": 0, "first": many * (step - 1), "stop": many * step, "rows": rows}
    ]
    assert found["batch"]["reproduced"] is True
    (note,) = [note for note in error.__notes__ if "jaxlightning replay" in note]
    assert path in note
    task = (quiet(max_epochs=1, callbacks=list(callbacks), **arguments), Fails("log"))
    again = replay(path, task if callbacks else Fails)
    assert (again.kind, again.group, again.operation.name) == ("nan", "loss", "log")
    assert again.operation.frames[-1].line == line_of("log")


def test_after_several_in_a_row_it_is_the_first(tmp_path):
    train = [{"x": data("log", 4, 0 if i in (3, 6, 7) else slice(0))["x"]} for i in range(12)]
    path, error, _ = fail(tmp_path, Fails("log"), train, [SkipNonFinite(2)])
    assert "global step 7: batch 6 of epoch 0\n  global step 8" in str(error)
    assert content(path)["step"] == 7
    assert content(path)["steps"][0]["rows"] is None
    assert replay(path, Fails).operation.name == "log"


def test_batches_that_are_given_once_are_lost(tmp_path):
    path, error, trainer = fail(tmp_path, Fails("log"), iter(list(loader("log"))), max_steps=9)
    assert "Its batch is not in it: the loader is a `list_iterator`, which gives" in str(
        error.__notes__
    )
    assert same_state(path, trainer.state.replace(step=jnp.int32(STEP - 1)))
    with pytest.raises(ReplayError, match="holds no batch, because the loader is a `list_iter"):
        replay(path, Fails)


class Unsteady:
    """Other batches each time: the bad row only in the second pass, which is the epoch's."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for i in range(10):
            yield data("log", 4, 0 if i == 3 and self.passes == 2 else slice(0))


def test_batches_that_are_others_the_second_time_are_not_passed_off(tmp_path):
    path, error, _ = fail(tmp_path, Fails("log"), Unsteady())
    assert content(path)["batch"]["reproduced"] is False
    assert "the loader does not give the same batches twice" in str(error.__notes__)
    again = replay(path, Fails)
    assert again.kind is None
    assert "operation by operation and compiled, it does not fail. Its loss is" in str(again)
    assert "the loader does not give the same batches twice" in str(again)


Pair = collections.namedtuple("Pair", ["x", "more"])


class OfPairs(Fails):
    def training_step(self, batch, *, key):
        return super().training_step({"x": batch.x}, key=key)


def test_batches_of_a_structure_that_no_file_can_make(tmp_path):
    train = [Pair(batch["x"], [np.zeros(4), None]) for batch in loader("log")]
    path, _, _ = fail(tmp_path, OfPairs("log"), train)
    with pytest.raises(ReplayError, match=r"a `test_replay_capsule.Pair`. Say how .* `\(trainer, "):
        replay(path, OfPairs)
    again = replay(path, (quiet(max_epochs=1), OfPairs("log"), train[0]))
    assert again.operation.name == "log"
    with pytest.raises(ReplayError, match="but the batch that the task came with has"):
        replay(path, (quiet(max_epochs=1), OfPairs("log"), {"x": 0}))


def test_nothing_is_replaced_and_nothing_written_where_nothing_failed(tmp_path):
    first, _, _ = fail(tmp_path, Fails("log"))
    second, _, _ = fail(tmp_path, Fails("log"))
    assert [Path(path).name for path in (first, second)] == [
        f"step_{STEP:010d}", f"step_{STEP:010d}-v1"
    ]  # fmt: skip
    capsule = ReplayCapsule()
    folder = tmp_path / "other"
    trainer = quiet(max_steps=2, callbacks=[capsule], default_root_dir=folder)
    trainer.fit(Fails("log"), loader("log"))
    assert capsule.path is None
    trainer = quiet(fast_dev_run=9, callbacks=[capsule], default_root_dir=folder)
    with pytest.raises(FloatingPointError):
        trainer.fit(Fails("log"), loader("log"))
    assert capsule.path is None
    assert not folder.exists()


def test_a_capsule_that_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / "capsules").write_text("in the way")
    path, error, _ = fail(tmp_path, Fails("log"))
    assert path is None
    assert "NaN or infinite" in str(error)
    assert any("While this was handled, " in note for note in error.__notes__)


def test_capsules_stay_out_of_the_folder_of_checkpoints(tmp_path):
    callbacks = [ReplayCapsule(tmp_path), ModelCheckpoint(tmp_path)]
    trainer = quiet(max_epochs=1, callbacks=callbacks, enable_checkpointing=None)
    with pytest.raises(ValueError, match="is the folder of `ModelCheckpoint`, where a resumed run"):
        trainer.fit(Fails("log"), loader("log"))


def test_without_metrics_nobody_would_hear_of_it():
    trainer = quiet(max_epochs=1, callbacks=[ReplayCapsule()], barebones=True)
    with pytest.raises(ValueError, match="or `ReplayCapsule`, which brings it along"):
        trainer.fit(Fails("log"), loader("log"))


# Errors


@pytest.fixture(scope="module")
def raised(tmp_path_factory):
    """The capsule of a step that raised, whose state is gone, and a checkpoint before it."""
    folder = tmp_path_factory.mktemp("raised")
    saves = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=2)
    arguments = {"enable_checkpointing": None, "error": Exception}
    path, error, _ = fail(folder, Fails("callback"), callbacks=[saves], **arguments)
    return path, error, folder / "checkpoints" / f"step={(STEP - 1) // 2 * 2}"


def test_an_error_in_the_step_keeps_its_batch(raised):
    path, error, saved = raised
    assert "no negative numbers" in str(error)
    assert f"is gone. That of `{saved}` is used instead." in str(error.__notes__)
    assert content(path)["steps"][0]["step"] == STEP
    assert content(path)["steps"][0]["rows"] == [ORDER[4 * STEP - 4 : 4 * STEP]]
    again = replay(path, Fails)
    assert (again.kind, again.operation.name) == ("error", "pure_callback")
    assert again.operation.frames[-1].line == line_of("callback")
    assert "no negative numbers" in again.error
    assert f"The state is that of `{saved}`" in str(again)


def test_the_state_can_be_taken_from_a_checkpoint_that_is_named(raised, tmp_path):
    path, _, saved = raised
    metadata = content(path) | {"checkpoint": None}
    with CheckpointStore(tmp_path) as store:
        tree = {"steps": [[{"x": load_arrays(path)["steps/0/0/x"]}]]}
        store.save(STEP, tree, {CAPSULE: metadata}, wait=True)
    copy = tmp_path / f"step_{STEP:010d}"
    with pytest.raises(ReplayError, match="Name one, if there is, with `--checkpoint PATH`"):
        replay(copy, Fails)
    assert replay(copy, Fails, checkpoint=saved).operation.name == "pure_callback"
    with pytest.raises(CheckpointMismatch):
        replay(copy, Fails, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"^There is no checkpoint"):
        replay(copy, Fails, checkpoint=tmp_path / "nothing")


@pytest.mark.parametrize("named", ["/dev/null", "/nowhere", "a\0b"])
def test_a_checkpoint_that_a_capsule_names_and_that_cannot_be_read(raised, tmp_path, named):
    path, _, _ = raised
    metadata = content(path) | {"checkpoint": named}
    with CheckpointStore(tmp_path) as store:
        tree = {"steps": [[{"x": load_arrays(path)["steps/0/0/x"]}]]}
        copy = store.save(STEP, tree, {CAPSULE: metadata}, wait=True)
    with pytest.raises(ReplayError, match=r"is that of `.*`, which can't be read: .* name it with"):
        replay(copy, Fails)


class Outputs:
    def __init__(self, failed):
        self.failed = failed

    def block_until_ready(self):
        if self.failed:
            raise RuntimeError("the device is gone")


@pytest.mark.parametrize(
    ("failed", "steps"),
    [((), None), ((4,), (4, 6)), ((6, 8), (6, 8)), ((8,), (8, 10))],
)
def test_of_the_dispatches_under_way_the_first_that_failed_is_found(failed, steps):
    """As on a device that tells of it later."""
    ahead = collections.deque((before, Outputs(before in failed)) for before in (4, 6, 8))
    run = SimpleNamespace(_ahead=ahead, position=Position(step=10))
    assert FitRun.failed_ahead(run) == steps


def test_the_batches_of_the_latest_steps_are_counted_back():
    at = Position(step=7, epoch=1, batches=13, window=1)  # the last step took one, not three
    trainer = SimpleNamespace(
        _run=SimpleNamespace(position=at),
        _arguments=SimpleNamespace(accumulate_grad_batches=3),
    )
    found = {step: _taken_at(trainer, step) for step in (8, 7, 6, 5, 3, 2)}
    assert {step: batches and batches[2:] for step, batches in found.items()} == {
        8: (13, 16), 7: (12, 13), 6: (9, 12), 5: (6, 9), 3: (0, 3), 2: None
    }  # fmt: skip


def test_with_detect_anomaly_the_state_is_kept(tmp_path):
    path, _, trainer = fail(tmp_path, Fails("callback"), error=Exception, detect_anomaly=True)
    assert trainer.global_step == STEP - 1
    assert same_state(path, trainer.state)
    assert content(path)["step"] == STEP
    again = replay(path, Fails)
    assert (again.kind, again.operation.name) == ("error", "pure_callback")


def test_of_a_block_all_steps_are_kept(tmp_path):
    """Which of them raised is not known before they are run again."""
    saves = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=4)
    arguments = {"enable_checkpointing": None, "steps_per_dispatch": 4, "log_every_n_steps": 4}
    path, _, _ = fail(tmp_path, Fails("callback"), None, [saves], Exception, **arguments)
    steps = content(path)["steps"]
    assert [entry["step"] for entry in steps] == [5, 6, 7, 8]
    assert [entry["rows"] for entry in steps] == [[ORDER[i : i + 4]] for i in range(16, 32, 4)]
    again = replay(path, Fails)
    assert (again.kind, again.operation.name) == ("error", "pure_callback")
    assert 5 + again.number == STEP
    assert f"Step {STEP} of `Fails`, batch {STEP - 1} of epoch 0" in str(again)
    assert "is that of" in str(again)
    assert "earlier" not in str(again)


def test_what_detect_anomaly_finds_leaves_a_capsule(tmp_path):
    path, error, trainer = fail(tmp_path, Fails("log"), detect_anomaly=True)
    assert "Found by `detect_anomaly`" in str(error.__notes__)
    assert same_state(path, trainer.state)
    assert content(path)["step"] == STEP
    assert replay(path, Fails).operation.name == "log"


class OwnUpdate(TaskModule):
    w: jax.Array

    def train_step(self, state, batch, *, key):
        loss = jnp.log(batch["x"] @ state.task.w).mean()
        task = OwnUpdate(state.task.w + 0.01 * loss)
        return state.replace(task=task), {"loss": loss}

    def configure_optimizers(self):
        import optax

        return optax.identity()


def test_a_task_that_owns_its_update(tmp_path):
    path, _, _ = fail(tmp_path, OwnUpdate(jnp.ones(3)), loader("log"), detect_anomaly=True)
    again = replay(path, (quiet(max_epochs=1), OwnUpdate(jnp.zeros(3))))
    assert (again.kind, again.group, again.operation.name) == ("nan", "task", "log")


def test_errors_that_are_not_the_steps_leave_none(tmp_path):
    class Raises(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            raise ValueError("mine")

    path, _, _ = fail(tmp_path, Fails("log"), callbacks=[Raises()], error=ValueError)
    assert path is None
    ragged = [{"x": np.ones((4, 3))}] * 3 + [{"x": np.ones((4, 2))}]
    path, _, _ = fail(tmp_path, Fails("log"), ragged, error=Exception, on_recompile="ignore")
    assert path is None
