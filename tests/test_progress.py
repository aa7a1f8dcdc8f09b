"""The bar: what it shows, how rarely, and that a step costs next to nothing."""

import io
import sys
from types import SimpleNamespace

import jax
import pytest
from jaxlightning.callbacks._announce import announce  # type: ignore[import-not-found]
from steps import Regression, batches  # type: ignore[import-not-found]

from jaxlightning import Trainer
from jaxlightning.callbacks import TQDMProgressBar, _progress  # type: ignore[attr-defined]


class Clock:
    """A clock that moves when told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(_progress, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(_progress, "_interactive", lambda: True)


def fake_trainer(batches=1000, **changes):
    values = dict(
        current_epoch=0,
        max_epochs=3,
        num_training_batches=batches,
        num_val_batches=[7, 5],
        num_test_batches=[4],
        num_predict_batches=[float("inf")],
        global_step=0,
        sanity_checking=False,
        progress_bar_metrics={"train/loss": 2.0},
    )
    return SimpleNamespace(**(values | changes))


def run_steps(bar, trainer, clock, count, seconds=0.0):
    for i in range(count):
        trainer.global_step += 1
        clock.now += seconds
        bar.on_train_batch_end(trainer, {}, None, i)


def started(trainer, **arguments):
    bar = TQDMProgressBar(**arguments)
    bar.setup(trainer, "fit")
    bar.on_train_epoch_start(trainer)
    return bar


def test_lines_where_nothing_can_be_overwritten(clock, capsys):
    trainer = fake_trainer()
    bar = started(trainer)
    run_steps(bar, trainer, clock, 45, seconds=0.5)
    bar.on_train_end(trainer)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Compiling the steps ..."
    # A line each ten seconds, and the last state.
    assert [line.split(" [")[0] for line in lines[1:]] == [
        "Epoch 0/2: 20/1000",
        "Epoch 0/2: 40/1000",
        "Epoch 0/2: 45/1000",
    ]
    assert "2.00it/s, step 40, train/loss 2]" in lines[2]


def test_short_epochs_do_not_flood_a_log_file(clock, capsys):
    trainer = fake_trainer(10)
    bar = TQDMProgressBar()
    bar.setup(trainer, "fit")
    for epoch in range(50):
        trainer.current_epoch = epoch
        bar.on_train_epoch_start(trainer)
        run_steps(bar, trainer, clock, 10, seconds=0.01)
        bar.on_train_epoch_end(trainer)
    bar.on_train_end(trainer)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("Epoch 49/2: 10/10")


def test_redraws_ten_times_a_second_at_most(clock, terminal, capsys):
    trainer = fake_trainer()
    bar = started(trainer)
    capsys.readouterr()
    drawn = []
    bar._train.show = lambda done, text: drawn.append((done, text))
    run_steps(bar, trainer, clock, 1000, seconds=0.001)
    assert len(drawn) <= 11
    assert drawn[1] == (101, "step 101, train/loss 2")
    bar.on_exception(trainer, RuntimeError())


def test_refresh_rate_counts_batches(clock, terminal, capsys):
    trainer = fake_trainer()
    bar = started(trainer, refresh_rate=7)
    drawn = []
    bar._train.show = lambda done, text: drawn.append(done)
    run_steps(bar, trainer, clock, 30, seconds=1.0)
    assert drawn == [7, 14, 21, 28]
    bar.teardown(trainer, "fit")


def test_a_terminal_gets_a_bar_with_the_latest_metrics(clock, terminal, capsys):
    trainer = fake_trainer(20)
    bar = started(trainer)
    run_steps(bar, trainer, clock, 20, seconds=1.0)
    trainer.progress_bar_metrics |= {"val/loss": 3.25, "train/zebra": 7.0, "train/extra": 8.0}
    bar.on_train_epoch_end(trainer)
    bar.on_train_end(trainer)
    err = capsys.readouterr().err
    assert "Compiling the steps ..." in err
    last = err.split("\r")[-1]
    assert "Epoch 0/2: 100%" in last
    assert "20/20" in last
    # Two of each stage, losses first.
    assert "step 20, train/loss 2, train/zebra 7, val/loss 3.25" in last
    assert "extra" not in last


def test_chosen_metrics(clock, terminal, capsys):
    trainer = fake_trainer(20, progress_bar_metrics={"train/loss": 2.0, "throughput/mfu": 0.4})
    bar = started(trainer, metrics=["throughput/mfu", "val/later"])
    run_steps(bar, trainer, clock, 1)
    bar.teardown(trainer, "fit")
    assert "step 1, throughput/mfu 0.4]" in capsys.readouterr().err


@pytest.mark.parametrize(("leave", "bars"), [(False, 1), (True, 3)])
def test_leave_keeps_the_bar_of_each_epoch(clock, terminal, capsys, leave, bars):
    trainer = fake_trainer(2)
    bar = TQDMProgressBar(leave=leave)
    bar.setup(trainer, "fit")
    for epoch in range(3):
        trainer.current_epoch = epoch
        bar.on_train_epoch_start(trainer)
        run_steps(bar, trainer, clock, 2, seconds=1.0)
        bar.on_train_epoch_end(trainer)
    bar.on_train_end(trainer)
    assert capsys.readouterr().err.count("\n") == bars


def test_evaluations_count_the_batches_of_all_loaders(clock, terminal, capsys):
    trainer = fake_trainer()
    bar = started(trainer)
    bar.on_validation_start(trainer)
    for i in range(12):
        bar.on_validation_batch_end(trainer, None, None, i, 0)
    bar.on_validation_end(trainer)
    bar.teardown(trainer, "fit")
    assert "Validation: 100%" in (err := capsys.readouterr().err)
    assert "12/12" in err
    bar.setup(trainer, "test")
    bar.on_test_start(trainer)
    bar.on_test_batch_end(trainer, None, None, 0, 0)
    bar.on_test_end(trainer)
    bar.on_predict_start(trainer)
    bar.on_predict_batch_end(trainer, None, None, 0, 0)
    bar.on_predict_end(trainer)
    err = capsys.readouterr().err
    assert "1/4" in err
    assert "Prediction: 1it" in err


def test_one_bar_for_the_whole_fit_goes_on_where_the_run_was_resumed(clock, capsys):
    trainer = fake_trainer(10, global_step=25, estimated_stepping_batches=60)
    bar = TQDMProgressBar(whole=True)
    bar.setup(trainer, "fit")
    for epoch in (2, 3):
        trainer.current_epoch = epoch
        bar.on_train_epoch_start(trainer)
        run_steps(bar, trainer, clock, 10, seconds=1.0)
        bar.on_train_epoch_end(trainer)
    bar.on_train_end(trainer)
    lines = capsys.readouterr().err.splitlines()
    # The rate is that of this process: 20 steps in 20 s.
    assert lines[1] == "Training: 35/60 [00:10<00:25,  1.00it/s, train/loss 2]"
    assert lines[-1] == "Training: 45/60 [00:20<00:15,  1.00it/s, train/loss 2]"


def test_without_a_limit_of_epochs_the_bar_counts_them_only(clock, capsys):
    bar = started(fake_trainer(max_epochs=-1))
    bar.on_train_epoch_end(fake_trainer(max_epochs=-1))
    bar.teardown(fake_trainer(), "fit")
    assert capsys.readouterr().err.splitlines()[-1].startswith("Epoch 0: 0/1000")


def test_the_sanity_check_is_called_so(clock, terminal, capsys):
    bar = TQDMProgressBar()
    trainer = fake_trainer(sanity_checking=True)
    bar.setup(trainer, "fit")
    bar.on_validation_start(trainer)
    bar.on_validation_end(trainer)
    assert "Sanity check" in capsys.readouterr().err


def test_zero_shows_nothing(clock, capsys):
    trainer = fake_trainer()
    bar = started(trainer, refresh_rate=0)
    run_steps(bar, trainer, clock, 5, seconds=100.0)
    bar.on_validation_start(trainer)
    bar.on_validation_batch_end(trainer, None, None, 0, 0)
    bar.on_validation_end(trainer)
    bar.on_train_end(trainer)
    assert capsys.readouterr().err == ""


def test_other_processes_show_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    trainer = fake_trainer()
    bar = started(trainer)
    run_steps(bar, trainer, clock, 5, seconds=100.0)
    bar.on_train_end(trainer)
    assert capsys.readouterr().err == ""


def test_messages_do_not_run_into_the_bar(clock, terminal, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    trainer = fake_trainer()
    bar = started(trainer)
    run_steps(bar, trainer, clock, 1)
    announce("a message")
    bar.teardown(trainer, "fit")
    before, _ = screen.getvalue().split("a message\n")
    assert before.endswith("\r")


def test_a_step_between_redraws_touches_nothing_of_the_trainer(clock):
    trainer = fake_trainer()
    bar = started(trainer)
    bar.on_train_batch_end(trainer, {}, None, 0)
    touched = []

    class Untouchable:
        def __getattr__(self, name):
            touched.append(name)

    for i in range(1, 100):
        bar.on_train_batch_end(Untouchable(), {}, Untouchable(), i)
    assert touched == []
    bar.teardown(trainer, "fit")


def test_in_a_fit(capsys):
    data = list(batches(6))
    trainer = Trainer(
        max_epochs=2,
        devices=1,
        log_every_n_steps=3,
        callbacks=[TQDMProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression.initial(), data, data[:2])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Compiling the steps ..."
    loss = trainer.callback_metrics["train/loss"]
    assert lines[-1].startswith("Epoch 1/1: 6/6")
    assert f"step 12, train/loss {loss:.4g}" in lines[-1]


def test_refuses_nonsense():
    with pytest.raises(ValueError, match=r"`TQDMProgressBar\(refresh_rate=-1\)` has to be"):
        TQDMProgressBar(-1)
