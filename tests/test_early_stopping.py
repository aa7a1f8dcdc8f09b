import json
import re
from pathlib import Path

import jax
import pytest
from fake_trainer import FakeTrainer, script  # type: ignore[import-not-found]
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader
from jaxlightning._callback import Bus
from jaxlightning.callbacks import EarlyStopping, ModelCheckpoint

RECORDED = json.loads((Path(__file__).parent / "torch_callbacks.json").read_text())["stopping"]


def stopped(values, **arguments):
    """The callback and the trainer after these values of `val/loss`, one an epoch of 2 steps."""
    callback = EarlyStopping("val/loss", **arguments)
    trainer = FakeTrainer(callback, batches=2, epochs=len(values), validation=script(values, 2))
    return callback, trainer.fit()


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["arguments"]))
def test_decides_as_lightning(case):
    callback = EarlyStopping("val/loss", **case["arguments"])
    decisions = []

    def validation(step):
        if step > 1:
            decisions.append([callback.wait_count, trainer.should_stop])
        return {"val/loss": case["values"][step - 1]}

    trainer = FakeTrainer(callback, batches=1, epochs=len(case["values"]), validation=validation)
    trainer.fit()
    decisions.append([callback.wait_count, trainer.should_stop])
    assert decisions == case["decisions"]


@pytest.mark.parametrize(
    ("values", "arguments", "reason", "message"),
    [
        ([0.5, 0.6, 0.7, 0.8, 0.1], {"patience": 3}, "patience",
         "`val/loss` did not improve by more than 0.0 in the last 3 checks; the best was 0.5."),
        ([0.5, 0.05, 0.01], {"stopping_threshold": 0.1}, "threshold",
         "`val/loss` = 0.05 is better than the threshold 0.1."),
        ([0.5, 7.0, 0.1], {"divergence_threshold": 5.0}, "divergence",
         "`val/loss` = 7 is worse than the threshold 5.0."),
        ([0.5, float("nan"), 0.1], {}, "non_finite", "`val/loss` is nan; the best before was 0.5."),
        ([float("inf"), 0.1], {}, "non_finite", "`val/loss` is inf; there was none before."),
        ([0.5, 0.4, 0.3], {}, None, None),
    ],
)  # fmt: skip
def test_reasons(values, arguments, reason, message):
    callback, trainer = stopped(values, **arguments)
    assert callback.stopping_reason == reason
    assert callback.stopping_message == message == trainer.stop_reason
    assert callback.stopped_epoch == (None if reason is None else trainer.current_epoch - 1)


def test_the_sanity_check_and_other_entry_points_do_not_count():
    # The sanity check of the stand-in gives -100, which nothing would improve on.
    callback, trainer = stopped([0.5, 0.4])
    assert callback.best_score == 0.4
    before = callback.state_dict()
    trainer.validate({"val/loss": float("nan")})
    assert callback.state_dict() == before


def test_fast_dev_run_is_never_stopped():
    callback = EarlyStopping("val/loss", patience=0)
    FakeTrainer(callback, epochs=3, validation=script([float("nan")] * 3), fast_dev_run=True).fit()
    assert callback.stopping_reason is None


@pytest.mark.parametrize(
    ("arguments", "run", "checks"),
    [
        # Which steps of 2 epochs of 4 are judged.
        ({"monitor": "val/loss"}, {}, [4, 8]),
        ({"monitor": "val/loss"}, {"val_every": 2}, [2, 4, 6, 8]),
        ({"monitor": "val/loss", "check_on_train_epoch_end": True}, {"val_every": 2}, [4, 8]),
        ({"monitor": "val/loss"}, {"val_epochs": 2}, [8]),
        ({"monitor": "train/loss"}, {"val_every": 2}, [4, 8]),
        ({"monitor": "train/loss", "check_on_train_epoch_end": False}, {"val_every": 2},
         [2, 4, 6, 8]),
        ({"monitor": "mine"}, {"val_every": 2}, [2, 4, 6, 8]),
        ({"monitor": "mine"}, {"validation": None}, [4, 8]),
    ],
)  # fmt: skip
def test_when_it_checks(monkeypatch, arguments, run, checks):
    seen = []
    monkeypatch.setattr(
        EarlyStopping, "judge", lambda self, trainer, value: seen.append(trainer.global_step)
    )
    run = {"epochs": 2, "validation": lambda step: {"val/loss": 0.0}} | run
    training = lambda step: {"train/loss": 1.0, "mine": 2.0}
    FakeTrainer(EarlyStopping(**arguments), training=training, **run).fit()
    assert seen == checks


def test_the_end_of_an_epoch_judges_its_aggregate():
    callback = EarlyStopping("train/loss", patience=5)
    FakeTrainer(callback, training=lambda step: {"train/loss": 9.0, "train/loss_epoch": 3.0}).fit()
    assert callback.best_score == 3.0


def test_a_missing_metric_is_named():
    trainer = FakeTrainer(
        EarlyStopping("val/los"), validation=lambda step: {"val/loss": 0.1, "val/f1": 0.2}
    )
    with pytest.raises(RuntimeError, match="Did you mean `val/loss`") as caught:
        trainer.fit()
    assert "So far there are ['train/loss', 'val/f1', 'val/loss']" in str(caught.value)
    assert Bus([EarlyStopping("val/los")]).monitors() == ["val/los"]


def test_not_strict():
    callback = EarlyStopping("val/los", strict=False)
    FakeTrainer(callback, validation=lambda step: {"val/loss": 0.1}).fit()
    assert callback.best_score is None
    assert Bus([callback]).monitors() == []


@pytest.mark.parametrize("resumed_after", range(1, 7))
def test_resume(resumed_after):
    values = [0.5, 0.6, 0.4, 0.45, 0.41, 0.43, 0.5, 0.1]
    whole, _ = stopped(values, patience=4)
    first, _ = stopped(values[:resumed_after], patience=4)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = EarlyStopping("val/loss", patience=4)
    second.load_state_dict(state)
    at = {"global_step": 2 * resumed_after, "current_epoch": resumed_after}
    validation = script(values, 2)
    FakeTrainer(second, batches=2, epochs=len(values), validation=validation, **at).fit()
    assert second.state_dict() == whole.state_dict()


def test_a_run_that_was_stopped_stays_so_unless_it_may_wait_longer(tmp_path):
    def fit(patience):
        callbacks = [
            EarlyStopping("val/loss", patience=patience),
            ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True),
        ]
        trainer = quiet(
            max_steps=12, val_check_interval=2, enable_checkpointing=None, callbacks=callbacks
        )
        # With the learning rate 0 nothing improves.
        data = DataLoader(rows(40), 8), DataLoader(rows(8), 8)
        trainer.fit(Classifier(lr=0.0), *data, resume="auto")
        return trainer

    assert fit(1).global_step == 4
    again = fit(1)
    assert again.global_step == 4
    assert "did not improve" in again.stop_reason
    assert fit(2).global_step == 7  # the first validation of the second epoch
    assert fit(2).global_step == 7


def test_another_fit_begins_anew():
    callback, trainer = stopped([0.5, 0.6, 0.7], patience=2)
    assert callback.wait_count == 2
    trainer.global_step = trainer.current_epoch = 0
    trainer.should_stop = False
    trainer.validation = script([0.9, 0.95, 0.8], 2)
    trainer.fit()
    assert (callback.wait_count, callback.best_score) == (0, 0.8)
    assert callback.stopping_reason is None


def test_verbose(capsys):
    stopped([0.5, 0.6, 0.25], verbose=True)
    assert capsys.readouterr().out == (
        "`val/loss` improved to 0.5.\n`val/loss` improved to 0.25, better by 0.25.\n"
    )
    stopped([0.5, 0.6, 0.25])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("only", "says"), [(False, "[process 1] `val/loss` improved to 0.5.\n"), (True, "")]
)
def test_other_processes(capsys, monkeypatch, only, says):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stopped([0.5, 0.6], verbose=True, log_rank_zero_only=only)
    assert capsys.readouterr().out == says


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "auto"}, '`EarlyStopping(mode="auto")` is not known. Write `mode="min"`'),
        ({"patience": -1}, "`patience` of `EarlyStopping` has to be at least 0, not -1."),
        ({"min_delta": -0.1}, "`min_delta` of `EarlyStopping` has to be at least 0, not -0.1."),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        EarlyStopping("val/loss", **arguments)


def test_two_with_the_same_monitor_are_refused():
    with pytest.raises(ValueError, match="the same `state_key`"):
        Bus([EarlyStopping("val/loss"), EarlyStopping("val/loss", patience=9)])
    Bus([EarlyStopping("val/loss"), EarlyStopping("val/loss", mode="max")])
