import os
import re

import jaxlightning.callbacks._timer as timer_module  # type: ignore[import-not-found]
import pytest
from fake_trainer import FakeTrainer, script  # type: ignore[import-not-found]
from jaxlightning.callbacks._filename import FilenameTemplate  # type: ignore[import-not-found]

from jaxlightning._callback import Bus, Callback
from jaxlightning._checkpoint import CheckpointStore, SaveFailed, find_checkpoints
from jaxlightning.callbacks import ModelCheckpoint


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def names(folder):
    return sorted(entry.path.name for entry in find_checkpoints(folder))


def steps(trainer):
    return [step for step, *_ in trainer.saved]


# Names


@pytest.mark.parametrize(
    ("template", "insert", "expected"),
    [
        ("{epoch}-{step}", True, "epoch=3-step=120"),
        ("{epoch}-{step}", False, "3-120"),
        ("{epoch:02d}-{val/loss:.2f}", True, "epoch=03-val_loss=0.12"),
        ("model-{epoch:02d}-{val/loss:.3f}", False, "model-03-0.123"),
        ("best_{val/acc:.1e}", True, "best_val_acc=-1.5e_07"),
        ("{step:06d}-{train/loss:.2f}", False, "000120-nan"),
        ("{val/loss}", False, "0.1234"),
        ("plain", True, "plain"),
    ],
)
def test_templates(template, insert, expected):
    values = {"epoch": 3, "step": 120, "val/loss": 0.1234, "val/acc": -1.5e7}
    assert FilenameTemplate(template, insert).format(values) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("a/b-{epoch}", "only letters, digits and `._=-` may stand"),
        ("{}", "every field is the name of a metric"),
        ("{epoch!r}", "every field is the name of a metric"),
        ("{epoch", "is no valid template: expected '}'"),
        ("{step:zz}", "is no valid template"),
        ("-{epoch}", "has to begin with a letter, a digit or a field"),
    ],
)
def test_bad_templates_are_refused(template, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ModelCheckpoint(filename=template, auto_insert_metric_name=False)


def test_a_template_cannot_reach_into_objects():
    assert FilenameTemplate("{epoch.__class__}", False).format({"epoch": 3}) == "nan"


def test_template_and_monitor_are_announced_as_monitors():
    saver = ModelCheckpoint(filename="{epoch}-{step}-{val/f1:.2f}", monitor="val/loss")
    assert saver.monitors() == ["val/f1", "val/loss"]


# Where


def test_default_folder_is_the_loggers(tmp_path):
    saver = ModelCheckpoint()
    FakeTrainer(saver, root=tmp_path, log_dir=str(tmp_path / "logs" / "version_0")).fit()
    assert saver.dirpath == str(tmp_path / "logs" / "version_0" / "checkpoints")
    assert names(saver.dirpath) == ["epoch=0-step=4"]
    FakeTrainer(saver, root=tmp_path / "other").fit()
    assert saver.dirpath == str(tmp_path / "other" / "checkpoints")
    assert saver.best_model_path == str(tmp_path / "other" / "checkpoints" / "epoch=0-step=4")


def test_a_folder_that_cannot_be_written_is_found_at_setup(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = FakeTrainer(ModelCheckpoint(tmp_path / "file" / "inside"))
    with pytest.raises(OSError, match="cannot be written"):
        trainer.fit()
    assert trainer.global_step == 0
    FakeTrainer(ModelCheckpoint(tmp_path / "not" / "yet")).bus.setup(trainer, "fit")
    assert not (tmp_path / "not").exists()


# When


@pytest.mark.parametrize(
    ("arguments", "run", "expected"),
    [
        # One epoch is 4 steps.
        ({}, {}, [(4, "epoch"), (8, "epoch"), (12, "epoch")]),
        ({"every_n_epochs": 2}, {}, [(8, "epoch")]),
        ({"every_n_train_steps": 5}, {}, [(5, "step"), (10, "step")]),
        ({"every_n_train_steps": 5, "save_last": True}, {"epochs": 1, "batches": 7},
         [(5, "step"), (7, "epoch")]),
        ({"save_top_k": 0}, {}, []),
        ({"save_top_k": 0, "save_last": True}, {"epochs": 1}, [(4, "epoch")]),
        ({}, {"max_steps": 6}, [(4, "epoch"), (6, "epoch")]),
        ({}, {"fast_dev_run": True}, []),
        # A validation in the middle of the epoch, too.
        ({}, {"val_every": 2, "epochs": 1}, [(2, "step"), (4, "epoch")]),
        ({"save_on_train_epoch_end": True}, {"val_every": 2, "epochs": 1}, [(4, "epoch")]),
        ({"save_on_train_epoch_end": False}, {"val_every": 2, "epochs": 1},
         [(2, "step"), (4, "step")]),
        ({"every_n_epochs": 2}, {"val_every": 2, "epochs": 2}, [(6, "step"), (8, "epoch")]),
    ],
)  # fmt: skip
def test_when_it_saves(tmp_path, arguments, run, expected):
    arguments = {"save_top_k": -1} | arguments
    validation = (lambda step: {"val/loss": 1.0}) if "val_every" in run else None
    run = {"epochs": 3} | run
    trainer = FakeTrainer(
        ModelCheckpoint(**arguments), root=tmp_path, validation=validation, **run
    ).fit()
    assert [(step, point) for step, point, *_ in trainer.saved] == expected


def test_a_score_belongs_to_the_state_it_is_saved_with(tmp_path):
    # Due at 2, 4, 6, 8, validated at 3 and 6: what is due in between waits.
    saver = ModelCheckpoint(monitor="val/loss", every_n_train_steps=2, save_top_k=-1)
    trainer = FakeTrainer(
        saver, root=tmp_path, batches=8, val_every=3, validation=lambda step: {"val/loss": step}
    ).fit()
    assert [(step, point) for step, point, *_ in trainer.saved] == [(3, "step"), (6, "step")]
    assert list(saver.best_k_models.values()) == [3.0, 6.0]


def test_the_latest_is_saved_while_the_best_waits(tmp_path):
    saver = ModelCheckpoint(monitor="val/loss", every_n_train_steps=2, save_last=True)
    trainer = FakeTrainer(
        saver, root=tmp_path, batches=8, val_every=3, validation=lambda step: {"val/loss": step}
    ).fit()
    # 4 and 8 are the latest, 3 is the best; 6 was validated and worse.
    assert steps(trainer) == [2, 3, 4, 6, 8]
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=3", "epoch=0-step=8"]
    assert saver.best_model_path.endswith("step=3")
    assert saver.last_model_path.endswith("step=8")


def test_a_run_that_ends_before_its_first_validation_keeps_its_state(tmp_path):
    saver = ModelCheckpoint(monitor="val/loss")
    FakeTrainer(saver, root=tmp_path, max_steps=3, validation=lambda step: {"val/loss": 1.0}).fit()
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=3"]
    assert saver.best_model_path == ""
    assert saver.best_model_score is None


def test_monitor_of_training_and_weights_only(tmp_path):
    saver = ModelCheckpoint(monitor="train/loss", every_n_train_steps=1, save_weights_only=True)
    trainer = FakeTrainer(
        saver, root=tmp_path, training=lambda step: {"train/loss": abs(step - 3.0)}
    ).fit()
    assert steps(trainer) == [1, 2, 3]
    assert all(weights_only for *_, weights_only in trainer.saved)
    assert saver.best_model_path.endswith("epoch=0-step=3")
    assert saver.best_model_score == 0.0


def test_time_interval(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timer_module.time, "monotonic", lambda: now[0])

    class Clock(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            now[0] += 10.0

    saver = ModelCheckpoint(train_time_interval={"seconds": 25}, save_top_k=-1)
    trainer = FakeTrainer(Clock(), saver, root=tmp_path, batches=10).fit()
    assert steps(trainer) == [3, 6, 9]


def test_blocks_end_where_it_saves():
    saver = ModelCheckpoint(every_n_train_steps=6)
    assert [step for step in range(1, 20) if saver.needs_state(step)] == [6, 12, 18]
    assert not any(ModelCheckpoint().needs_state(step) for step in range(1, 20))


def test_on_exception(tmp_path):
    saver = ModelCheckpoint(save_on_exception=True)
    trainer = FakeTrainer(saver, root=tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(until=2)
    assert [(step, point) for step, point, *_ in trainer.saved] == [(2, "exception")]
    other = FakeTrainer(ModelCheckpoint(), root=tmp_path / "other")
    with pytest.raises(RuntimeError, match="killed"):
        other.fit(until=2)
    assert other.saved == []


def test_validate_alone_changes_nothing(tmp_path):
    saver = ModelCheckpoint(monitor="val/loss")
    trainer = FakeTrainer(saver, root=tmp_path)
    trainer.validate({"val/loss": 0.1})
    assert saver.state_dict()["validated_at"] is None


# Which


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_keeps_the_best(tmp_path, mode, k):
    losses = [0.5, 0.9, 0.3, 0.3, 0.4, 0.7]
    saver = ModelCheckpoint(monitor="val/loss", mode=mode, save_top_k=k)
    FakeTrainer(saver, root=tmp_path, epochs=6, validation=script(losses)).fit()
    sign = 1 if mode == "min" else -1
    # Of equal ones the earlier stays.
    best = sorted(range(6), key=lambda i: (sign * losses[i], i))[:k]
    assert names(tmp_path / "checkpoints") == sorted(f"epoch={i}-step={4 * i + 4}" for i in best)
    assert saver.best_model_path.endswith(f"epoch={best[0]}-step={4 * best[0] + 4}")
    assert saver.best_model_score == losses[best[0]]
    assert saver.kth_value == losses[best[-1]]
    assert saver.kth_best_model_path.endswith(f"epoch={best[-1]}-step={4 * best[-1] + 4}")
    assert sorted(saver.best_k_models.values()) == sorted(losses[i] for i in best)


def test_without_a_monitor_the_latest_is_kept(tmp_path):
    saver = ModelCheckpoint()
    FakeTrainer(saver, root=tmp_path, epochs=3).fit()
    assert names(tmp_path / "checkpoints") == ["epoch=2-step=12"]
    assert saver.best_model_path.endswith("epoch=2-step=12")
    assert saver.best_model_score is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_never_best_and_deletes_nothing(tmp_path, bad, mode):
    saver = ModelCheckpoint(monitor="val/loss", mode=mode)
    FakeTrainer(saver, root=tmp_path, epochs=3, validation=script([0.5, bad, bad])).fit()
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4"]
    assert saver.best_model_score == 0.5


def test_nan_where_there_is_room_gives_way_to_any_score(tmp_path):
    saver = ModelCheckpoint(monitor="val/loss", save_top_k=2)
    losses = [float("nan"), float("nan"), float("nan"), 9.0, 8.0, 8.5]
    trainer = FakeTrainer(saver, root=tmp_path, epochs=3, validation=script(losses)).fit()
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4", "epoch=1-step=8"]
    assert saver.best_model_path == ""
    trainer.epochs = 6
    trainer.fit()
    assert names(tmp_path / "checkpoints") == ["epoch=4-step=20", "epoch=5-step=24"]


def test_the_replaced_one_outlives_a_save_that_fails(tmp_path, monkeypatch):
    def validation(step):
        if step == 8:
            trainer.store.wait()

            def full_disk(file):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "fsync", full_disk)
        return {"val/loss": 1 / step}

    saver = ModelCheckpoint(monitor="val/loss")
    trainer = FakeTrainer(saver, root=tmp_path, epochs=2, validation=validation)
    with pytest.raises(SaveFailed):
        trainer.fit()
    assert [step for step, *_ in trainer.saved] == [4, 8]
    assert trainer.deleted == []
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4"]


def test_names_that_are_taken_get_a_version(tmp_path):
    first = ModelCheckpoint(tmp_path, filename="model", save_top_k=-1)
    second = ModelCheckpoint(tmp_path, filename="model", every_n_train_steps=4)
    trainer = FakeTrainer(first, second, epochs=2).fit()
    assert [name for *_, name, _ in trainer.saved] == ["model", "model-v1", "model-v2", "model-v3"]
    assert names(tmp_path) == ["model-v1", "model-v2", "model-v3"]


def test_the_replaced_one_goes_as_soon_as_the_new_one_is_there(tmp_path):
    trainer = FakeTrainer(ModelCheckpoint(), root=tmp_path, epochs=3)
    real = trainer._save_requested

    def patient():
        real()
        trainer.wait_for_checkpoints()

    trainer._save_requested = patient
    trainer.fit()
    assert trainer.deleted == [(9, "epoch=0-step=4"), (12, "epoch=1-step=8")]


def test_the_end_of_an_epoch_is_ranked_by_its_aggregate(tmp_path):
    saver = ModelCheckpoint(monitor="train/loss")
    training = lambda step: {"train/loss": 9.0, "train/loss_epoch": 3.0}
    FakeTrainer(saver, root=tmp_path, training=training).fit()
    assert saver.best_model_score == 3.0


def test_another_fit_begins_anew(tmp_path):
    saver = ModelCheckpoint(monitor="val/loss")
    trainer = FakeTrainer(saver, root=tmp_path, validation=script([0.5])).fit()
    trainer.global_step = trainer.current_epoch = 0
    trainer.validation = script([0.9])
    trainer.fit()
    assert saver.best_model_score == 0.9
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4", "epoch=0-step=4-v1"]


def test_another_entry_point_leaves_the_folder_as_it_is(tmp_path):
    saver = ModelCheckpoint()
    trainer = FakeTrainer(saver, root=tmp_path).fit()
    trainer.log_dir = str(tmp_path / "version_1")
    trainer.validate({})
    assert saver.best_model_path == str(tmp_path / "checkpoints" / "epoch=0-step=4")
    fresh = ModelCheckpoint()
    FakeTrainer(fresh, root=tmp_path).validate({})
    assert fresh.dirpath == str(tmp_path / "checkpoints")


# Resume


@pytest.mark.parametrize(
    "arguments",
    [
        {"monitor": "val/loss", "save_top_k": 2},
        {"monitor": "val/loss", "save_top_k": 2, "save_last": True, "every_n_train_steps": 3},
        {"monitor": "val/loss", "every_n_train_steps": 3, "save_on_train_epoch_end": True},
        {"save_last": True, "every_n_epochs": 2},
        {"save_top_k": -1},
        {"monitor": "train/loss", "mode": "max", "every_n_train_steps": 2, "save_top_k": 3},
    ],
)
@pytest.mark.parametrize("val_every", [2, 4])
def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, arguments, val_every):
    losses = [0.9, 0.5, 0.7, 0.4, float("nan"), 0.8, 0.3, 0.6, 0.2, 0.45]
    run = {
        "epochs": 5,
        "val_every": val_every,
        "validation": script(losses, val_every),
        "training": lambda step: {"train/loss": (step * 7) % 5 + 0.5},
    }
    whole = ModelCheckpoint(**arguments)
    uninterrupted = FakeTrainer(whole, root=tmp_path / "whole", **run).fit()
    for kill in (3, 4, 5, 8, 11, 14, 18):
        root = tmp_path / f"killed_{kill}"
        first = FakeTrainer(ModelCheckpoint(**arguments), root=root, **run)
        with pytest.raises(RuntimeError, match="killed"):
            first.fit(until=kill)
        found = find_checkpoints(root / "checkpoints")
        if not found:
            continue
        again = ModelCheckpoint(**arguments)
        second = FakeTrainer(again, root=root, **run)
        second.fit(resume=found[-1].path)
        latest = found[-1].step
        assert [s for s in second.saved if s[0] > latest] == [
            s for s in uninterrupted.saved if s[0] > latest
        ]
        assert names(root / "checkpoints") == names(tmp_path / "whole" / "checkpoints")
        assert again.state_dict() | {"replaced": []} == whole.state_dict() | {"replaced": []}


def test_what_a_kill_left_undeleted_is_deleted_after_the_resume(tmp_path, monkeypatch):
    run = {"root": tmp_path, "validation": script([0.9, 0.8, 0.7])}
    trainer = FakeTrainer(ModelCheckpoint(monitor="val/loss"), epochs=2, **run)
    monkeypatch.setattr(trainer, "delete_checkpoint", lambda path: None)
    trainer.fit()
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=4", "epoch=1-step=8"]
    again = FakeTrainer(ModelCheckpoint(monitor="val/loss"), epochs=3, **run)
    again.fit(resume=tmp_path / "checkpoints" / "epoch=1-step=8")
    assert names(tmp_path / "checkpoints") == ["epoch=2-step=12"]


def test_a_run_whose_folder_moved_goes_on_there(tmp_path, capsys):
    run = {"validation": script([0.5, 0.9, 0.4])}
    FakeTrainer(ModelCheckpoint(monitor="val/loss"), root=tmp_path / "a", **run).fit()
    os.rename(tmp_path / "a", tmp_path / "b")
    saver = ModelCheckpoint(monitor="val/loss")
    trainer = FakeTrainer(saver, root=tmp_path / "b", epochs=2, **run)
    trainer.fit(resume=tmp_path / "b" / "checkpoints" / "epoch=0-step=4")
    assert saver.best_model_path == str(tmp_path / "b" / "checkpoints" / "epoch=0-step=4")
    assert capsys.readouterr().out == ""


def test_lost_checkpoints_are_reported(tmp_path, capsys):
    run = {"root": tmp_path, "validation": script([0.5, 0.4, 0.3])}
    FakeTrainer(ModelCheckpoint(monitor="val/loss", save_top_k=2), epochs=2, **run).fit()
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.delete(tmp_path / "checkpoints" / "epoch=0-step=4")
    saver = ModelCheckpoint(monitor="val/loss", save_top_k=2)
    resumed = FakeTrainer(saver, epochs=2, **run)
    resumed.fit(resume=tmp_path / "checkpoints" / "epoch=1-step=8")
    assert "no longer in" in capsys.readouterr().out
    assert [*saver.best_k_models.values()] == [0.4]


# Messages


def test_verbose(tmp_path, capsys):
    saver = ModelCheckpoint(monitor="val/loss", verbose=True)
    FakeTrainer(saver, root=tmp_path, epochs=2, validation=script([0.5, 0.9])).fit()
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Epoch 0, step 4: `val/loss` = 0.5; saving `{saver.best_model_path}`."
    assert second == "Epoch 1, step 8: `val/loss` = 0.9 is not in the top 1."


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "saves by one clock. Write two"),
        ({"every_n_train_steps": 0}, "`every_n_train_steps` of `ModelCheckpoint` has to be at"),
        ({"save_top_k": 3}, '`ModelCheckpoint(monitor="val/loss", save_top_k=3)`'),
        ({"save_top_k": -2}, "or -1 for all"),
        ({"monitor": "val/loss", "mode": "best"}, 'Write `mode="min"` for what should fall'),
        ({"train_time_interval": "5 minutes"}, '`train_time_interval="5 minutes"` is no'),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ModelCheckpoint(**arguments)


def test_state_keys_tell_instances_apart():
    savers = [
        ModelCheckpoint(),
        ModelCheckpoint(monitor="val/loss"),
        ModelCheckpoint(monitor="val/loss", mode="max"),
        ModelCheckpoint(every_n_train_steps=5),
        ModelCheckpoint(train_time_interval={"minutes": 5}),
    ]
    assert len({saver.state_key for saver in savers}) == len(savers)
    Bus(savers)
