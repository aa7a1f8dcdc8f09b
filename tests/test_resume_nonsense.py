"""A checkpoint whose checksums are right, and which says nonsense of the run: refused with a
sentence, wherever that stands."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from naming import named
from tasks import Classifier, quiet, rows

from jaxlightning import (
    CheckpointError,
    CheckpointMismatch,
    DataLoader,
    TaskModule,
    load_arrays,
    load_weights,
)
from jaxlightning._checkpoint_manifest import commit_of
from jaxlightning.callbacks import EarlyStopping, ModelCheckpoint
from jaxlightning.loggers import JSONLLogger

LAST = "step=4"
MONITORED = "train/loss_epoch"


def trainer(root):
    saves = ModelCheckpoint(dirpath=root / "saved", filename="{step}", every_n_train_steps=2)
    return quiet(
        enable_checkpointing=None,
        callbacks=[saves, EarlyStopping(MONITORED, patience=9)],
        logger=JSONLLogger(root, name="logs", version="one"),
        max_epochs=2,
    )


def fit(root, task=None, **arguments):
    run = trainer(root)
    path = root / "saved" / LAST
    run.fit(task or Classifier(), DataLoader(rows(16), 8), ckpt_path=path, **arguments)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    trainer(root).fit(Classifier(), DataLoader(rows(16), 8))
    assert (root / "saved" / LAST / "COMMIT").exists()
    return root


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def forge(root, change):
    """Changes what the checkpoint says, and makes its checksum right."""
    path = root / "saved" / LAST
    content = json.loads((path / "manifest.json").read_text())
    change(content["metadata"])
    encoded = json.dumps(content).encode()
    (path / "manifest.json").write_bytes(encoded)
    (path / "COMMIT").write_bytes(commit_of(encoded))
    return path


MISSING = object()
NONSENSE = [
    ("position", MISSING),
    ("position", {"step": "4"}),
    ("position", {"step": -1}),
    ("position", {"step": 2**80}),
    ("position", {"last": 1}),
    ("position", {"phase": "sleeping"}),
    ("position", {"__class__": "x"}),
    ("loaders", 3),
    ("loaders", {"position": {"total_batches": None}, "data": {}}),
    ("loaders", {"position": {"finished": True}, "data": {}}),
    ("loaders", {"position": {}, "data": "x"}),
    ("fixed", [1]),
    ("callbacks", ["EarlyStopping"]),
    ("callbacks", {"early": 3}),
    ("data", 3),
    ("iterator", {"~array": [1]}),
    ("iterator", {"~bytes": "x"}),
    ("stream", {"boundary": 0}),
    ("stream", {"boundary": 4, "ended": None, "open": [], "epoch": None}),
    ("stream", {"boundary": 4, "ended": 3, "open": None, "epoch": None}),
    ("loggers", {"kind": 3}),
    ("loggers", [3]),
    ("metrics", [1]),
    ("metrics", {"train/loss": "small"}),
    ("metrics", {"train/loss": [[1], [2, 3]]}),
    ("run", None),
    ("rewind", 3),
    ("rewind", [1, 2]),
    ("stop", 3),
]


@pytest.mark.parametrize(("entry", "value"), NONSENSE, ids=named)
def test_nonsense_is_refused_with_a_sentence(root, entry, value):
    def change(metadata):
        if value is MISSING:
            del metadata[entry]
        elif entry == "callbacks" and isinstance(value, dict):
            (key,) = [key for key in metadata["callbacks"] if key.startswith("EarlyStopping")]
            metadata["callbacks"][key] = value["early"]
        else:
            metadata[entry] = value

    path = forge(root, change)
    expected = rf"^`{re.escape(str(path))}` is intact, but what it says of the run makes no sense"
    with pytest.raises(CheckpointError, match=expected) as caught:
        fit(root)
    assert f"To take its weights alone: `load_weights({str(path)!r}, task)`." in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    assert load_weights(path, Classifier()) is not None


def test_as_it_was_written_it_goes_on(root):
    forge(root, lambda metadata: None)
    assert fit(root).global_step == 4


def test_the_best_of_a_folder_that_says_nonsense(root):
    forge(root, lambda metadata: metadata.update(callbacks=[3]))
    run = trainer(root)
    with pytest.raises(CheckpointError, match="makes no sense here: AttributeError"):
        run.validate(Classifier(), DataLoader(rows(16), 8), ckpt_path="best")


def test_what_is_raised_can_be_caught_by_its_public_name(root):
    class Other(Classifier):
        more: jax.Array

        def __init__(self):
            super().__init__()
            self.more = jax.numpy.zeros(2)

    advice = r"`warm_start\(path, task, include=\.\.\.\)`"
    with (
        pytest.warns(UserWarning, match="not bit for bit"),
        pytest.raises(CheckpointMismatch, match=advice),
    ):
        fit(root, Other(), allow_changes=True)
    assert issubclass(CheckpointMismatch, CheckpointError)
    assert issubclass(Other, TaskModule)
    found = load_arrays(root / "saved" / LAST, include="^task/")
    assert found
    assert all(isinstance(array, np.ndarray) for array in found.values())
