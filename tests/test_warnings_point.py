"""Warnings are of the user's line, not of one in the library."""

import warnings
from pathlib import Path

import pytest
from tasks import Classifier, quiet, rows

from jaxlightning import Callback, DataLoader, Trainer
from jaxlightning._say import warn
from jaxlightning.callbacks import ModelCheckpoint


def here(caught, message):
    """The line of this file, as it is written, of which `message` was warned."""
    (found,) = [w for w in caught if message in str(w.message)]
    assert found.filename == __file__
    return Path(__file__).read_text().splitlines()[found.lineno - 1].strip()


class Misspelt(Callback):
    def on_train_batch_ends(self, trainer): ...


def test_of_fit(tmp_path):
    arguments = {"enable_checkpointing": None, "default_root_dir": tmp_path, "max_epochs": 2}
    loader = DataLoader(rows(8), 4)
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    quiet(**arguments, callbacks=[saves]).fit(Classifier(), loader)
    (tmp_path / "step=4" / "COMMIT").unlink()
    trainer = quiet(**arguments, callbacks=[saves])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(callbacks=[Misspelt()], logger=False)
        trainer.fit(Classifier(), loader, resume="auto")
        quiet(max_epochs=2).fit(Classifier(), iter(list(loader)))
    resumed = 'trainer.fit(Classifier(), loader, resume="auto")'
    assert here(caught, "Damaged checkpoints were found") == resumed
    hook = "looks like a hook, but there is none"
    assert here(caught, hook) == "Trainer(callbacks=[Misspelt()], logger=False)"
    once = "quiet(max_epochs=2).fit(Classifier(), iter(list(loader)))"
    assert here(caught, "gave no batch in epoch 1") == once


def test_without_a_line_of_the_users_it_is_of_the_outermost(monkeypatch):
    """As on a thread of the library's."""
    monkeypatch.setattr("jaxlightning._say._top_level", lambda frame: "jaxlightning")
    with pytest.warns(UserWarning, match="something") as caught:
        warn("something")
    assert caught[0].filename != __file__
