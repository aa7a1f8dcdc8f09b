"""What a checkpoint says of logs is on the disk before it, and training does not wait for that."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader
from jaxlightning._checkpoint import SaveFailed, find_checkpoints
from jaxlightning.callbacks import Digest, LambdaCallback, ModelCheckpoint
from jaxlightning.loggers import CSVLogger, JSONLLogger, Logger, TensorBoardLogger

FILES = [CSVLogger, JSONLLogger, TensorBoardLogger]
NAMES = ["metrics.csv", "metrics.jsonl", "events.out", "digests.jsonl"]


def name_of(file):
    """Of an open file, without what is different in each run."""
    name = Path(os.readlink(f"/proc/self/fd/{file}")).name
    return name[:10] if name.startswith("events.out") else name


@pytest.fixture
def syncs(monkeypatch):
    """The files that were made durable, in order, by thread: the training's, and others."""
    found, fsync = {True: [], False: []}, os.fsync

    def syncing(file):
        found[threading.current_thread() is threading.main_thread()].append(name_of(file))
        fsync(file)

    monkeypatch.setattr(os, "fsync", syncing)
    return found


def run(folder, *callbacks, **arguments):
    """Fourteen steps, logged and saved every other one."""
    saves = ModelCheckpoint(dirpath=folder / "saved", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet(
        max_epochs=1,
        log_every_n_steps=2,
        enable_checkpointing=None,
        default_root_dir=folder,
        callbacks=[saves, *callbacks],
        **arguments,
    )
    trainer.fit(Classifier(), DataLoader(rows(56), 4))
    return trainer


def test_logs_are_durable_before_the_commit_and_not_on_the_training_thread(tmp_path, syncs):
    def begin(trainer, *_):
        if trainer.global_step == 6:  # until then the columns of `metrics.csv` were new
            trainer.wait_for_checkpoints()
            syncs[True].clear()
            syncs[False].clear()

    def end(trainer, *_):
        if trainer.global_step == 12:
            trainer.wait_for_checkpoints()
            assert syncs[True] == []

    looks = LambdaCallback(on_train_batch_start=begin, on_train_batch_end=end)
    loggers = [kind(tmp_path, "", 0) for kind in FILES]
    run(tmp_path, looks, Digest(), logger=loggers)
    others = syncs[False]
    commits = [i for i, name in enumerate(others) if name == "COMMIT"]
    assert len(commits) == 4  # of steps 8 to 14
    for start, stop in zip([0, *commits], commits, strict=False):
        assert set(NAMES) <= set(others[start:stop])


def test_without_its_logs_no_checkpoint_is_committed(tmp_path, monkeypatch):
    fsync = os.fsync

    def failing(file):
        if name_of(file) == "metrics.jsonl" and threading.current_thread() is not main:
            raise OSError(5, "Input/output error")
        fsync(file)

    main = threading.main_thread()
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SaveFailed, match="Input/output error"):
        run(tmp_path, logger=[kind(tmp_path, "", 0) for kind in FILES])
    assert find_checkpoints(tmp_path / "saved") == []


def test_all_calls_are_made_and_must_succeed(store):
    made = []

    def fails():
        made.append("fails")
        raise OSError(5, "Input/output error")

    store.save(1, {"x": np.ones(2)}, {}, before_commit=[lambda: made.append("a"), fails])
    with pytest.raises(SaveFailed, match="Input/output error"):
        store.wait()
    assert sorted(made) == ["a", "fails"]
    assert store.entries() == []


@pytest.mark.parametrize("kind", FILES)
def test_a_save_that_was_begun_can_be_finished_whatever_became_of_the_file(kind, tmp_path, syncs):
    open_files = lambda: sorted(os.listdir("/proc/self/fd"))
    before = open_files()
    logger = kind(tmp_path, "", 0)
    assert logger.begin_save()() is None  # nothing was logged
    logger.log_metrics({"loss": 0.5}, 1)
    finish = logger.begin_save()
    logger.log_metrics({"loss": 0.5, "another column": 1.0}, 2)
    logger.finalize("success")
    syncs[True].clear()
    finish()
    assert len(syncs[True]) == 1
    assert open_files() == before


@pytest.mark.parametrize("kind", [JSONLLogger, TensorBoardLogger])
def test_what_was_begun_holds_what_was_logged_before(kind, tmp_path):
    logger = kind(tmp_path, "", 0)
    logger.log_metrics({"loss": 0.5}, 1)
    finish = logger.begin_save()
    (file,) = tmp_path.glob("version_0/*")
    assert b"loss" in file.read_bytes()  # and not in a buffer of this process
    finish()
    logger.finalize("success")


def test_a_logger_of_ones_own_saves_at_once():
    class Own(Logger):
        saved = 0

        def log_hyperparams(self, params): ...

        def log_metrics(self, metrics, step): ...

        def save(self):
            self.saved += 1

    logger = Own()
    finish = logger.begin_save()
    assert logger.saved == 1
    finish()
    assert logger.saved == 1
