"""What the Trainer makes of checkpoints that are damaged, taken by another run, or deep in the
data: through `fit`, with the store's faults."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from tasks import FEATURES, Classifier, assert_same, quiet, rows

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks._faults import files, flips, imposters, removal, truncations
from jaxlightning import DataLoader
from jaxlightning._checkpoint import CheckpointDamaged, CheckpointStore, RunLocked, find_checkpoints
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.loggers import CSVLogger

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def trainer(folder, **arguments):
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1)
    return quiet(**{"enable_checkpointing": None, "callbacks": saves, "max_epochs": 1} | arguments)


def loader():
    return DataLoader(rows(), 4, shuffle=True)


@pytest.fixture(scope="module")
def whole():
    """What the run comes to that nothing happens to."""
    return quiet(max_epochs=1).fit(Classifier(dropout=0.2), loader())


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    trainer(folder, max_steps=6).fit(Classifier(dropout=0.2), loader())
    return folder


@pytest.fixture
def cut(six_steps, tmp_path):
    """The folder of a run of 10 steps that was cut after 6."""
    return Path(shutil.copytree(six_steps, tmp_path / "cut"))


def go_on(folder, **how):
    """The trained task, the steps that were left, and what was warned of."""
    one = trainer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = one.fit(Classifier(dropout=0.2), loader(), **how)
    return trained, [str(w.message) for w in caught if "Damaged" in str(w.message)]


def faults(step):
    _, region, manifest = files(step)
    return {
        "array": flips(region, 9)[-1],
        "manifest": flips(manifest, 9)[4],
        "torn": truncations(region, 20)[9],
        "gone": removal("COMMIT"),
        "empty": imposters("epoch=0-step=99")[0],
    }


@pytest.mark.parametrize("fault", ["array", "manifest", "torn", "gone", "empty"])
def test_the_run_goes_on_from_the_one_before_and_says_so_once(cut, whole, capsys, fault):
    newest = find_checkpoints(cut)[-1]
    assert newest.step == 6
    found = faults(newest.path)[fault]
    found.befall(newest.path).__enter__()
    trained, reports = go_on(cut, resume="auto")
    assert_same(trained, whole)
    (report,) = reports
    used = 6 if fault == "empty" else 4
    assert f"Going on from step {used}" in capsys.readouterr().err
    damaged = "epoch=0-step=99" if fault == "empty" else newest.path.name
    assert report.count(f"`{cut / damaged}` is damaged") == 1
    assert len(list(cut.glob(f".damaged-{damaged}-*"))) == 1
    assert find_checkpoints(cut)[-1].step == 10


@pytest.mark.parametrize("how", [{"resume": "auto"}, {"ckpt_path": "last"}], ids=["auto", "last"])
def test_all_damaged_is_an_error_and_changes_nothing(cut, how):
    for entry in find_checkpoints(cut):
        for region in files(entry.path):
            flips(region, 1)[0].befall(entry.path).__enter__()
    before = sorted(os.listdir(cut))
    with pytest.raises(CheckpointDamaged, match=r"(?s)All checkpoints in .* are damaged, and to"):
        go_on(cut, **how)
    assert sorted(os.listdir(cut)) == before


def test_last_is_the_last_intact_one_and_says_so_once(cut, whole, capsys):
    newest = find_checkpoints(cut)[-1]
    faults(newest.path)["manifest"].befall(newest.path).__enter__()
    trained, reports = go_on(cut, ckpt_path="last")
    assert_same(trained, whole)
    assert len(reports) == 1
    assert "Going on from step 4" in capsys.readouterr().err


def test_a_path_is_meant(cut):
    """Of a checkpoint that was asked for by name no other takes the place."""
    newest = find_checkpoints(cut)[-1]
    faults(newest.path)["array"].befall(newest.path).__enter__()
    with pytest.raises(CheckpointDamaged, match="do not match their checksum"):
        go_on(cut, ckpt_path=newest.path)
    assert newest.path.exists()


# Two runs


def test_a_folder_that_another_run_writes_into_is_refused_before_anything_is_touched(tmp_path):
    folder = tmp_path / "checkpoints"
    log = CSVLogger(tmp_path, version="one")
    trainer(folder, max_steps=6, logger=log, log_every_n_steps=1).fit(Classifier(), loader())
    metrics = Path(log.log_dir) / "metrics.csv"
    lines = metrics.read_text() + "9,a line of the run that is under way\n"
    metrics.write_text(lines)
    with CheckpointStore(folder):
        for how in ({}, {"resume": "auto"}, {"ckpt_path": "last"}):
            second = trainer(folder, logger=CSVLogger(tmp_path, version="one"))
            with pytest.raises(RunLocked, match=rf"in use by .* \({os.getpid()}\)"):
                second.fit(Classifier(), loader(), **how)
            assert second.compile_s == 0
    assert metrics.read_text() == lines


def test_a_folder_is_let_go_of_at_the_end(six_steps):
    with CheckpointStore(six_steps) as store:
        assert store.latest().step == 6


def test_a_fit_that_is_refused_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path / "new", max_steps=-7).fit(Classifier(), loader())
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        trainer(tmp_path / "new").fit(Classifier(), loader(), ckpt_path="last")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"enable_checkpointing": False}])
def test_who_saves_nothing_needs_no_folder(tmp_path, arguments):
    with CheckpointStore(tmp_path / "checkpoints"):
        one = quiet(**{"max_epochs": 1, "default_root_dir": tmp_path} | arguments)
        assert one.fit(Classifier(), loader()) is not None


# Deep in the data


class Source:
    """A million rows that are made when they are asked for, which is written down."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 1_000_000

    def __getitem__(self, rows):
        self.asked.append(np.asarray(rows).tolist())
        x = np.zeros((len(rows), FEATURES), np.float32) + rows[:, None].astype(np.float32) / 1e6
        return {"x": x, "y": (rows % 3).astype(np.int32), "mask": np.ones(len(rows), bool)}

    def fingerprint(self):
        return "a million rows"


def test_resuming_reads_no_batch_that_was_skipped(tmp_path):
    """From deep in an epoch: after the two looks that every run takes at the shapes of batches,
    the rows that come next, and not one of those before."""
    deep, size = 300, 4

    def fit(steps, **how):
        data = DataLoader(Source(), size, shuffle=True, seed=3)
        saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=deep)
        one = quiet(enable_checkpointing=None, callbacks=saves, max_steps=steps)
        one.fit(Classifier(), data, **how)
        return data

    fit(deep)
    data = fit(deep + 3, resume="auto")
    batches = data.order(0)[: (deep + 50) * size].reshape(-1, size).tolist()
    first, second, *asked = data.source.asked
    assert (first, second) == (batches[0], [0, 1, 2, 3])
    assert asked == batches[deep : deep + len(asked)]
    assert len(asked) >= 3
