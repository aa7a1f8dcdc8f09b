"""What ends a run, and what fails while it ends: nothing hides what matters, and all is closed."""

import os
import signal
import subprocess
import sys

import pytest
from jaxlightning.callbacks._announce import announce  # type: ignore[import-not-found]
from jobs import JOB, environment
from tasks import Classifier, notes, quiet, rows, says

import jaxlightning._checkpoint_save as saving
from jaxlightning import Callback, DataLoader, DataModule
from jaxlightning._checkpoint import SaveFailed, find_checkpoints
from jaxlightning._say import say
from jaxlightning._signals import Interrupted, Signals
from jaxlightning.callbacks import LambdaCallback, ModelCheckpoint, TQDMProgressBar
from jaxlightning.loggers import CSVLogger


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


def on_step(step, act):
    def hook(trainer, *_):
        if trainer.global_step == step:
            act()

    return LambdaCallback(on_train_batch_end=hook)


def run(folder, *callbacks, resume=None, **arguments):
    """Two epochs of five steps."""
    trainer = quiet(
        max_epochs=2,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, save_top_k=0), *callbacks],
        enable_checkpointing=None,
        **arguments,
    )
    trainer.fit(Classifier(), DataLoader(rows(40), 8), resume=resume)
    return trainer


def saved(folder):
    return [entry.path.name for entry in find_checkpoints(folder)]


# Messages


def test_ctrl_c_that_also_ends_the_reader_of_stderr_loses_nothing(tmp_path):
    """As in `train.py 2>&1 | tee log`: whatever is written from then on is an error."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, JOB, tmp_path, "--signal", "SIGINT", "--step", "7"]
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=pipe,
            env=environment(tmp_path / "cache"),
            timeout=200,
        )
    assert done.returncode == 130
    assert saved(tmp_path / "checkpoints")[-1] == "interrupted-step_0000000007"


class Unread:
    """A stream that nobody reads any more."""

    def __init__(self, error):
        self.error, self.tried = error, 0

    def write(self, text):
        self.tried += 1
        raise self.error

    def flush(self): ...

    def isatty(self):
        return False


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_message_that_nobody_reads_is_dropped(error, monkeypatch, tmp_path):
    stream = Unread(error)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    say("a message")
    announce("a message")
    run(tmp_path, TQDMProgressBar(leave=True), enable_progress_bar=None)
    assert stream.tried >= 4  # the bar too


# A run within a run


def inner(*, fit=False, **hooks):
    trainer = quiet(max_epochs=1, callbacks=[LambdaCallback(**hooks)])
    verb = trainer.fit if fit else trainer.validate
    return verb(Classifier(), DataLoader(rows(16), 8))


def striking(name):
    return lambda trainer, *_: send(name)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_batch_end"])
@pytest.mark.parametrize("fit", [False, True])
def test_a_signal_in_a_nested_run_saves_the_outer_one(tmp_path, hook, fit, capfd):
    within = "on_train_batch_end" if fit else "on_validation_batch_end"
    reached = []

    def nests(trainer, *_):
        if trainer.global_step == 5:
            inner(fit=fit, **{within: striking("SIGTERM")})
            reached.append("after the inner run")

    later = LambdaCallback(**{hook: lambda trainer, *_: reached.append(trainer.global_step)})
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, LambdaCallback(**{hook: nests}), later)
    assert stop.value.code == 143
    assert saved(tmp_path) == ["interrupted-step_0000000005"]
    assert reached[-1] == 5  # the others have been told of this hook: no resume tells them again
    assert "SIGTERM: saved step 5" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(tmp_path, resume="auto").global_step == 10


def test_a_nested_run_that_is_through_by_then_returns(tmp_path):
    found = []

    def nests(trainer):
        found.append(inner(teardown=striking("SIGTERM")))

    with pytest.raises(SystemExit) as stop:
        run(tmp_path, LambdaCallback(on_train_epoch_end=nests))
    assert stop.value.code == 143
    assert set(found[0]) == {"val/loss", "val/accuracy"}
    assert saved(tmp_path) == ["interrupted-step_0000000005"]


def test_a_second_sigint_in_a_nested_run_stops_both(tmp_path):
    def twice(trainer, *_):
        send("SIGINT")
        send("SIGINT")

    nests = LambdaCallback(on_train_epoch_end=lambda _: inner(on_validation_batch_end=twice))
    saves = ModelCheckpoint(dirpath=tmp_path / "b", save_on_exception=True, every_n_epochs=9)
    with pytest.raises(KeyboardInterrupt, match="second SIGINT"):
        run(tmp_path, nests, saves)
    assert saved(tmp_path) == saved(tmp_path / "b") == []


def test_only_the_outermost_run_requeues_the_job(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr("jaxlightning._signals.requeue", asked.append)
    strikes = {"on_validation_batch_end": striking("SIGUSR1")}
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, LambdaCallback(on_train_epoch_end=lambda _: inner(**strikes)))
    assert stop.value.code == 138
    assert asked == [True]
    assert saved(tmp_path) == ["interrupted-step_0000000005"]


def test_before_the_outer_run_can_be_saved_it_ends_at_once(tmp_path, capfd):
    nests = LambdaCallback(setup=lambda *_: inner(on_validation_batch_end=striking("SIGTERM")))
    reached = LambdaCallback(on_fit_start=lambda _: pytest.fail("It went on."))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, nests, reached)
    assert stop.value.code == 143
    assert "no step was taken, so there was nothing to save" in capfd.readouterr().err


def test_a_run_that_is_over_takes_nothing(tmp_path):
    with Signals() as over:
        handler = signal.getsignal(signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, handler)  # put back by somebody who had kept it
    try:
        with pytest.raises(SystemExit), Signals():
            raise Interrupted(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert over.received is None


# What fails besides


class Fails(Callback):
    """Raises in hooks that end a run."""

    def on_exception(self, trainer, exception):
        raise OSError("disk full")

    def teardown(self, trainer, stage):
        raise RuntimeError("while torn down")


class BadLogger(CSVLogger):
    def finalize(self, status):
        super().finalize(status)
        self.status = status
        raise LookupError("not finalized")


def test_what_fails_after_an_interrupted_save_is_told_and_replaces_nothing(tmp_path, capfd):
    logger = BadLogger(tmp_path / "logs")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, Fails(), on_step(3, lambda: send("SIGTERM")), logger=logger)
    assert stop.value.code == 143
    assert logger.status == "interrupted"
    assert saved(tmp_path) == ["interrupted-step_0000000003"]
    told = capfd.readouterr().err
    for error in ("OSError: disk full", "LookupError: not fin", "RuntimeError: while torn down"):
        assert f"While this was handled, {error}" in told


@pytest.fixture
def full_disk(monkeypatch):
    """Saves fail as long as there is something in it: one element a save."""
    left, publish = [], saving.publish

    def publishing(*paths):
        if left:
            raise OSError(28, left.pop())
        publish(*paths)

    monkeypatch.setattr(saving, "publish", publishing)
    return left


def test_a_save_that_failed_before_does_not_keep_a_signal_from_saving(tmp_path, full_disk, capfd):
    full_disk.append("No space left")
    early = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4)
    with pytest.raises(SaveFailed, match=r"epoch=0-step=4` was not saved .*No space left"):
        run(tmp_path, early, on_step(5, lambda: send("SIGTERM")))
    assert saved(tmp_path) == ["interrupted-step_0000000005"]
    assert "SIGTERM: saved step 5" in capfd.readouterr().err


def test_both_are_told_if_that_fails_too(tmp_path, full_disk):
    full_disk += ["for the second", "for the first"]
    early = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4)
    with pytest.raises(SaveFailed, match="for the first") as caught:
        run(tmp_path, early, on_step(5, lambda: send("SIGTERM")))
    assert "interrupted-step_0000000005` was not saved ([Errno 28] for the second)" in "".join(
        notes(caught.value)
    )


def test_it_keeps_no_exception_from_saving_either(tmp_path, full_disk):
    def fail():
        raise LookupError("in the callback")

    full_disk.append("No space left")
    saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_on_exception=True)
    with pytest.raises(LookupError) as caught:
        run(tmp_path, on_step(5, fail), saves)
    assert [entry.step for entry in find_checkpoints(tmp_path)] == [5]
    assert "step=4` was not saved" in "".join(notes(caught.value))


def test_whatever_keeps_an_interrupted_run_from_being_saved_is_no_success(tmp_path):
    class Fragile(Callback):
        def on_save_checkpoint(self, trainer, checkpoint):
            raise LookupError("no state")

    with pytest.raises(SaveFailed) as caught:
        run(tmp_path, Fragile(), on_step(3, lambda: send("SIGTERM")))
    assert says(caught.value) == "SIGTERM: step 3 could not be saved (no state)."
    assert isinstance(caught.value.__cause__, LookupError)
    assert notes(caught.value) == ["Before that, Interrupted: SIGTERM"]


class TornDown(DataModule):
    def __init__(self):
        self.ended = []

    def train_dataloader(self):
        return DataLoader(rows(40), 8)

    def teardown(self, stage):
        self.ended.append(stage)


def test_a_second_sigint_while_the_last_save_is_awaited_closes_all_at_once(tmp_path, monkeypatch):
    """The rest of the endings run, and nobody waits for the save: not even the process's end."""
    waits = saving.Save.end
    awaited = []

    def waiting(save):
        if not awaited:
            awaited.append(save)
            send("SIGINT")
            send("SIGINT")
        waits(save)

    monkeypatch.setattr(saving.Save, "end", waiting)
    logger, data, ended = BadLogger(tmp_path / "logs"), TornDown(), []
    trainer = quiet(
        max_epochs=1,
        logger=logger,
        enable_checkpointing=None,
        callbacks=[
            ModelCheckpoint(dirpath=tmp_path, save_top_k=0),
            LambdaCallback(
                on_fit_end=lambda trainer: trainer.save_checkpoint(tmp_path / "step=5"),
                teardown=lambda trainer, stage: ended.append(stage),
            ),
        ],
    )
    with pytest.raises(KeyboardInterrupt, match="second SIGINT") as caught:
        trainer.fit(Classifier(), data)
    assert notes(caught.value) == ["While this was handled, LookupError: not finalized"]
    assert (logger.status, ended, data.ended) == ("success", ["fit"], ["fit"])
    assert awaited[0] not in saving._unsettled
    awaited[0]._ended.wait(60)
    run(tmp_path)  # the folder is free


def test_a_trainer_is_free_again_whatever_failed_first(tmp_path, monkeypatch):
    from jaxlightning import _entry

    trainer = quiet(max_epochs=1, default_root_dir=tmp_path)

    def fail(*_):
        raise LookupError("before anything was set up")

    with monkeypatch.context() as patch:
        for name in ("settle_versions", "setting_up.bus_for"):
            patch.setattr(f"{_entry.__name__}.{name}", fail)
        for _ in range(2):
            with pytest.raises(LookupError, match="before anything was set up"):
                trainer.fit(Classifier(), DataLoader(rows(8), 8))
    trainer.fit(Classifier(), DataLoader(rows(8), 8))
    assert trainer.global_step == 1
