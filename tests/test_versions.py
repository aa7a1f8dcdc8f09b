"""A run that is gone on with logs where it logged, wherever its checkpoints are."""

from pathlib import Path

import pytest
from tasks import Classifier, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.loggers import CSVLogger, JSONLLogger


class Killed(Callback):
    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            raise KeyboardInterrupt


def trainer(root, dirpath=None, callbacks=(), loggers=(CSVLogger, JSONLLogger)):
    saves = ModelCheckpoint(dirpath, monitor="train/loss", every_n_train_steps=2, save_top_k=-1)
    return quiet(
        max_epochs=2,
        logger=[kind(root) for kind in loggers],
        default_root_dir=root,
        log_every_n_steps=2,
        enable_checkpointing=None,
        callbacks=[saves, *callbacks],
    )


def loader():
    return DataLoader(rows(), 8, shuffle=True)


def killed(root, dirpath=None):
    """The folder of checkpoints that a run left when it ended after its seventh step."""
    one = trainer(root, dirpath, [Killed()])
    with pytest.raises(KeyboardInterrupt):
        one.fit(Classifier(), loader())
    return Path(one.checkpoint_callback.dirpath)


def logs(one):
    return [(Path(x.log_dir) / x.file_name).read_text() for x in one.loggers]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    one = trainer(tmp_path_factory.mktemp("whole"))
    one.fit(Classifier(), loader())
    return logs(one), [Path(path).name for path in one.checkpoint_callback.best_k_models]


@pytest.mark.parametrize("way", ["auto", "last", "path"])
@pytest.mark.parametrize("own_folder", [False, True])
def test_it_goes_on_in_its_version(tmp_path, whole, way, own_folder):
    dirpath = tmp_path / "elsewhere" if own_folder else None
    # Runs before and after it, with and without checkpoints of their own.
    trainer(tmp_path, tmp_path / "other").fit(Classifier(), loader())
    folder = killed(tmp_path, dirpath)
    later = quiet(max_steps=1, logger=CSVLogger(tmp_path))
    later.fit(Classifier(), loader())
    assert later.log_dir.endswith("version_2")
    again = trainer(tmp_path, dirpath)
    arguments = {
        "auto": {"resume": "auto"},
        "last": {"ckpt_path": "last"},
        "path": {"ckpt_path": folder / "epoch=1-step=6"},
    }[way]
    again.fit(Classifier(), loader(), **arguments)
    assert again.log_dir.endswith("version_1")
    assert (logs(again), [Path(p).name for p in again.checkpoint_callback.best_k_models]) == whole


def test_the_best_one_is_found_by_a_new_process(tmp_path):
    folder = killed(tmp_path)
    again = trainer(tmp_path)
    again.fit(Classifier(), loader(), ckpt_path="best")
    assert again.log_dir == str(folder.parent)
    assert again.global_step == 10
    fresh = trainer(tmp_path)
    assert "val/loss" in fresh.validate(Classifier(), loader(), ckpt_path="best")


def test_a_moved_run_goes_on_where_it_is_and_another_root_is_another_run(tmp_path, whole):
    (tmp_path / "old").mkdir()
    folder = killed(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new" / folder.relative_to(tmp_path / "old") / "epoch=1-step=6"
    elsewhere = trainer(tmp_path / "third")
    elsewhere.fit(Classifier(), loader(), ckpt_path=moved)
    assert elsewhere.log_dir == str(tmp_path / "third" / "jaxlightning_logs" / "version_0")
    again = trainer(tmp_path / "new")
    again.fit(Classifier(), loader(), ckpt_path=moved)
    assert again.log_dir == str(moved.parent.parent)
    assert logs(again) == whole[0]


def test_loggers_of_several_names_go_on_together(tmp_path):
    """Only the first one's folder has the checkpoints."""

    def two(*callbacks):
        loggers = [CSVLogger(tmp_path, "a"), JSONLLogger(tmp_path, "b")]
        saves = ModelCheckpoint(every_n_train_steps=2)
        return quiet(
            max_epochs=2,
            logger=loggers,
            log_every_n_steps=2,
            enable_checkpointing=None,
            callbacks=[saves, *callbacks],
        )

    other = JSONLLogger(tmp_path, "b")
    other.log_metrics({"x": 1}, 1)
    other.finalize("success")
    with pytest.raises(KeyboardInterrupt):
        two(Killed()).fit(Classifier(), loader())
    again = two()
    again.fit(Classifier(), loader(), resume="auto")
    assert [Path(x.log_dir).relative_to(tmp_path) for x in again.loggers] == [
        Path("a/version_0"),
        Path("b/version_1"),
    ]


def test_a_version_that_was_given_stays(tmp_path):
    killed(tmp_path)
    again = quiet(
        max_epochs=2,
        logger=CSVLogger(tmp_path, version="mine"),
        log_every_n_steps=2,
        enable_checkpointing=None,
        callbacks=ModelCheckpoint(monitor="train/loss", every_n_train_steps=2),
    )
    again.fit(Classifier(), loader(), resume="auto")
    assert again.log_dir.endswith("mine")
