"""What becomes of signals, besides that a run is saved (which `test_kills.py` tests)."""

import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jobs import JOB, environment
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader, DataModule, _signals
from jaxlightning._checkpoint import find_checkpoints
from jaxlightning.callbacks import LambdaCallback, ModelCheckpoint


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture(autouse=True)
def handlers():
    """Those of this process are the same afterwards."""
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def on_step(step, act):
    def hook(trainer, *_):
        if trainer.global_step == step:
            act()

    return LambdaCallback(on_train_batch_end=hook)


def fit(folder, *callbacks, data=None, resume=None, **arguments):
    """Two epochs of five steps, saved only where a signal says so."""
    if "enable_checkpointing" not in arguments:
        arguments["enable_checkpointing"] = None
        callbacks = [ModelCheckpoint(dirpath=folder, save_top_k=0), *callbacks]
    trainer = quiet(max_epochs=2, default_root_dir=folder, callbacks=callbacks, **arguments)
    trainer.fit(Classifier(), data or DataLoader(rows(40), 8), resume=resume)
    return trainer


def saved(folder):
    return [entry.path.name for entry in find_checkpoints(folder)]


# Handlers of the user's


def mine(signum, frame):
    raise AssertionError("not to be called")


class ReplacesInSetup(DataModule):
    def setup(self, stage):
        signal.signal(signal.SIGTERM, mine)

    def train_dataloader(self):
        return DataLoader(rows(40), 8)


def test_a_handler_that_replaces_ours_is_noticed_once(tmp_path):
    with pytest.warns(UserWarning, match="became the handler of SIGTERM") as caught:
        fit(tmp_path, data=ReplacesInSetup())
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "`test_signals.mine` became the handler of SIGTERM during the run, so that a SIGTERM no "
        "longer saves it. Install that handler before `fit`, which calls it after saving, or have "
        "it call the handler it replaces, which `signal.signal` returns."
    )
    assert signal.getsignal(signal.SIGTERM) is mine  # it stays


@pytest.mark.parametrize("handler", [signal.SIG_DFL, print])
def test_one_that_replaces_ours_later_is_noticed_at_the_next_epoch(tmp_path, handler):
    replaces = on_step(2, lambda: signal.signal(signal.SIGINT, handler))
    name = "builtins.print" if handler is print else "signal.SIG_DFL"
    with pytest.warns(UserWarning, match=f"`{name}` became the handler of SIGINT"):
        fit(tmp_path, replaces)


def test_a_handler_from_before_is_called_once_all_is_saved(tmp_path):
    found = []
    handler = lambda signum, frame: found.append((signum, saved(tmp_path)))
    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, on_step(3, lambda: send("SIGTERM")))
    assert stop.value.code == 143
    assert found == [(signal.SIGTERM, ["interrupted-step_0000000003"])]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_it_may_end_the_process_in_its_own_way(tmp_path):
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(7))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, on_step(3, lambda: send("SIGTERM")))
    assert stop.value.code == 7


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_ignored_signal_stays_ignored(tmp_path, name):
    """As in a shell's background job."""
    signal.signal(getattr(signal, name), signal.SIG_IGN)
    trainer = fit(tmp_path, on_step(3, lambda: send(name)))
    assert trainer.global_step == 10
    assert signal.getsignal(getattr(signal, name)) == signal.SIG_IGN


# Where there is nothing to save yet, or any more


class Downloads(DataModule):
    def __init__(self, where):
        self.where, self.reached = where, []

    def _at(self, where):
        self.reached.append(where)
        if where == self.where:
            send("SIGTERM")
            self.reached.append("after")

    def prepare_data(self):
        self._at("prepare_data")

    def setup(self, stage):
        self._at("setup")

    def train_dataloader(self):
        self._at("train_dataloader")
        return DataLoader(rows(40), 8)


@pytest.mark.parametrize("where", ["prepare_data", "setup", "train_dataloader"])
def test_before_there_is_a_run_it_ends_at_once(tmp_path, where, capfd):
    data = Downloads(where)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, data=data)
    assert stop.value.code == 143
    assert data.reached[-1] == where
    assert saved(tmp_path) == []
    assert "SIGTERM: no step was taken, so there was nothing to save." in capfd.readouterr().err


def test_one_in_the_last_moments_is_not_lost(tmp_path, capfd):
    late = LambdaCallback(teardown=lambda trainer, stage: send("SIGTERM"))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, late)
    assert stop.value.code == 143
    assert "it arrived when the run was over and all was saved" in capfd.readouterr().err


def test_an_evaluation_ends_after_the_batch():
    seen = []

    def hook(trainer, outputs, batch, batch_idx, dataloader_idx):
        seen.append(batch_idx)
        if batch_idx == 2:
            send("SIGTERM")

    trainer = quiet(callbacks=LambdaCallback(on_test_batch_end=hook))
    with pytest.raises(SystemExit) as stop:
        trainer.test(Classifier(), DataLoader(rows(40), 8))
    assert stop.value.code == 143
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_one_that_saves_nothing_does_not_say_that_it_does(entry, capfd):
    stage = {"validate": "validation"}.get(entry, entry)
    strikes = LambdaCallback(**{f"on_{stage}_batch_end": lambda *_: send("SIGINT")})
    with pytest.raises(SystemExit) as stop:
        getattr(quiet(callbacks=strikes), entry)(Classifier(), DataLoader(rows(40), 8))
    assert stop.value.code == 130
    assert capfd.readouterr().err.strip() == (
        "SIGINT: stopping after this batch. Once more stops at once."
    )


def test_neither_does_a_fit_without_checkpoints(tmp_path, capfd):
    with pytest.raises(SystemExit):
        fit(tmp_path, on_step(3, lambda: send("SIGINT")), enable_checkpointing=False)
    assert "SIGINT: stopping after this batch." in capfd.readouterr().err


def test_an_evaluation_within_a_fit_says_that_the_fit_is_saved(tmp_path, capfd):
    def evaluates():
        strikes = LambdaCallback(on_test_batch_end=lambda *_: send("SIGINT"))
        quiet(callbacks=strikes).test(Classifier(), DataLoader(rows(40), 8))

    with pytest.raises(SystemExit):
        fit(tmp_path, on_step(3, evaluates))
    said = capfd.readouterr().err
    assert "SIGINT: saving after this step." in said
    assert "SIGINT: saved step 3 to" in said


@pytest.mark.parametrize("resume", [None, "auto"])
def test_how_to_go_on(tmp_path, resume, capfd):
    with pytest.raises(SystemExit):
        fit(tmp_path, on_step(3, lambda: send("SIGTERM")), resume=resume)
    path = tmp_path / "interrupted-step_0000000003"
    how = "The same command goes on from there."
    if resume is None:
        how = (
            'To go on, run the same command with `fit(..., resume="auto")` or '
            f"`fit(..., ckpt_path='{path}')`."
        )
    assert f"SIGTERM: saved step 3 to `{path}`. {how}\n" in capfd.readouterr().err


def test_nothing_is_saved_twice(tmp_path, capfd):
    with pytest.raises(SystemExit):
        fit(tmp_path, on_step(3, lambda: send("SIGTERM")))
    commit = tmp_path / "interrupted-step_0000000003" / "COMMIT"
    before = commit.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        fit(tmp_path, LambdaCallback(on_fit_start=lambda _: send("SIGTERM")), resume="auto")
    assert commit.stat().st_mtime_ns == before
    assert capfd.readouterr().err.count("SIGTERM: saved step 3 to") == 2


def test_what_a_signal_left_goes_when_the_run_that_goes_on_has_saved(tmp_path):
    with pytest.raises(SystemExit):
        fit(tmp_path, on_step(3, lambda: send("SIGTERM")))
    saves = lambda trainer: trainer.save_checkpoint(tmp_path / "another_step=0")
    fit(tmp_path, LambdaCallback(on_fit_start=saves))  # another run
    assert saved(tmp_path) == ["another_step=0", "interrupted-step_0000000003"]
    shutil.rmtree(tmp_path / "another_step=0")  # or that run would go on, which saved last
    with pytest.raises(SystemExit):
        fit(tmp_path, on_step(7, lambda: send("SIGTERM")), resume="auto")
    assert "interrupted-step_0000000003" not in saved(tmp_path)


# A second SIGINT


def test_a_second_sigint_stops_at_once_and_saves_nothing(tmp_path, capfd):
    reached = []

    def twice():
        send("SIGINT")
        reached.append("after the first")
        send("SIGINT")
        reached.append("after the second")

    saves = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True)
    with pytest.raises(KeyboardInterrupt, match="second SIGINT"):
        fit(tmp_path, saves, on_step(3, twice), enable_checkpointing=None)
    assert reached == ["after the first"]
    assert saved(tmp_path) == []
    assert "Once more stops at once" in capfd.readouterr().err


def test_a_sigint_after_a_sigterm_does_not(tmp_path):
    def both():
        send("SIGTERM")
        send("SIGINT")

    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, on_step(3, both))
    assert stop.value.code == 143
    assert saved(tmp_path) == ["interrupted-step_0000000003"]


def test_a_second_sigint_does_not_wait_for_the_save_under_way(jobs, whole, tmp_path):
    """Of a disk that never answers."""
    job = jobs.start(tmp_path, "--signal", "SIGINT", "--step", 7, "--where", "step", "--stuck-disk")
    assert job.strike(signal.SIGINT, "stuck")
    assert job.wait() == -signal.SIGINT, job.err
    assert "second SIGINT: stopped without saving" in job.err
    # The save of step 5 may have been under way itself.
    assert saved(tmp_path / "checkpoints")[-1] in ("epoch=0-step=4", "epoch=0-step=5")
    resumed = jobs.run(tmp_path)
    assert resumed.code == 0, resumed.err
    assert resumed.result == whole("mlp")


# SLURM


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Makes this a SLURM job with a `scontrol` of the given script; returns what it noted."""

    def make(script="", **variables):
        folder = tmp_path / "bin"
        folder.mkdir()
        if script is not None:
            command = folder / "scontrol"
            command.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
            command.chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        for name, value in {"SLURM_JOB_ID": "42", "PATH": path, **variables}.items():
            monkeypatch.setenv(name, value)
        return folder / "calls"

    return make


def test_sigusr1_requeues_the_job_and_it_goes_on(tmp_path, slurm, jobs, whole):
    calls = slurm()
    command = [sys.executable, str(JOB), str(tmp_path / "run")]
    strike = ["--signal", "SIGUSR1", "--step", "7"]
    options = {"capture_output": True, "text": True, "env": environment(jobs.folder / "cache")}
    cut = subprocess.run([*command, *strike], **options)
    assert cut.returncode == 138, cut.stderr
    assert calls.read_text() == "requeue 42\n"
    assert "SIGUSR1: saved step 7" in cut.stderr
    assert "The SLURM job 42 was requeued." in cut.stderr
    resumed = jobs.run(tmp_path / "run")
    assert resumed.result == whole("mlp")


def usr1(folder, **arguments):
    with pytest.raises(SystemExit) as stop:
        fit(folder, on_step(3, lambda: send("SIGUSR1")), **arguments)
    assert stop.value.code == 138


def test_a_job_of_an_array_is_requeued_by_its_own_name(tmp_path, slurm):
    calls = slurm(SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="3")
    usr1(tmp_path)
    assert calls.read_text() == "requeue 40_3\n"


def test_a_job_that_cannot_be_requeued_says_so(tmp_path, slurm, capfd):
    slurm("echo 'Requeue is disabled' >&2; exit 1")
    usr1(tmp_path)
    assert saved(tmp_path) == ["interrupted-step_0000000003"]
    assert capfd.readouterr().err.endswith(
        "The SLURM job 42 was NOT requeued, `scontrol requeue 42` failed: exit status 1: Requeue "
        "is disabled. Submit it again to go on.\n"
    )


def test_a_machine_without_scontrol_says_so(tmp_path, slurm, capfd):
    slurm(None, PATH=str(tmp_path))
    usr1(tmp_path)
    assert "failed: there is no `scontrol` on the `PATH`." in capfd.readouterr().err


def test_a_job_that_would_start_anew_is_not_requeued(tmp_path, slurm, capfd):
    calls = slurm()
    usr1(tmp_path, enable_checkpointing=False)
    assert not calls.exists()
    assert "was not requeued: nothing was saved, so it would start anew" in capfd.readouterr().err


def test_only_the_first_process_requeues(tmp_path, slurm, monkeypatch):
    calls = slurm()
    another = SimpleNamespace(is_main=lambda: False, count=lambda: 1)
    of_another = lambda: monkeypatch.setattr(_signals, "processes", another)
    strikes = on_step(3, lambda: (of_another(), send("SIGUSR1")))
    with pytest.raises(SystemExit):
        fit(tmp_path, strikes)
    assert not calls.exists()


def test_sigusr1_is_left_alone_outside_slurm_or_with_a_handler(tmp_path, slurm, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = []
    looks = LambdaCallback(on_train_start=lambda _: found.append(signal.getsignal(signal.SIGUSR1)))
    fit(tmp_path, looks)
    slurm()
    signal.signal(signal.SIGUSR1, mine)
    fit(tmp_path, looks)
    assert found == [signal.SIG_DFL, mine]
