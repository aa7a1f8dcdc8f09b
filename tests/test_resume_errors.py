"""What does not fit together is refused, with the differences listed."""

import jax
import pytest
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import DataLoader, load_weights
from jaxlightning.callbacks import EarlyStopping, ModelCheckpoint


def trainer(folder, **arguments):
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1)
    return quiet(**{"enable_checkpointing": None, "callbacks": saves, "max_epochs": 1} | arguments)


def loader(seed=0, size=8):
    return DataLoader(rows(), size, shuffle=True, seed=seed)


@pytest.fixture
def saved(tmp_path):
    trainer(tmp_path).fit(Classifier(), loader())
    return tmp_path


def test_a_changed_loader(saved):
    with pytest.raises(ValueError, match=r"train data: seed: 0 in the checkpoint, 7 now"):
        trainer(saved).fit(Classifier(), loader(seed=7), ckpt_path="last")
    with pytest.raises(ValueError, match=r"train data: batch_size: 8 in the checkpoint, 4 now"):
        trainer(saved).fit(Classifier(), loader(size=4), ckpt_path="last")


def test_a_changed_trainer(saved):
    with pytest.raises(ValueError, match="seed: 0 in the checkpoint, 3 now"):
        trainer(saved, seed=3).fit(Classifier(), loader(), resume="auto")


def test_a_changed_model(saved):
    from jaxlightning._checkpoint_read import CheckpointMismatch

    class Wider(Classifier):
        extra: object = None

        def __init__(self):
            super().__init__()
            self.extra = self.net.layers[0].weight + 1

    with pytest.raises(CheckpointMismatch, match="task/extra"):
        trainer(saved).fit(Wider(), loader(), ckpt_path="last")


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'write `resume="auto"`'):
        trainer(tmp_path).fit(Classifier(), loader(), ckpt_path="last")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        trainer(tmp_path).fit(Classifier(), loader(), ckpt_path=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        trainer(tmp_path).fit(Classifier(), loader(), ckpt_path="best")
    assert trainer(tmp_path).fit(Classifier(), loader(), resume="auto") is not None


def test_contradictions():
    with pytest.raises(ValueError, match=r"contradict each other"):
        quiet(max_epochs=1).fit(Classifier(), loader(), resume="auto", ckpt_path="last")
    with pytest.raises(ValueError, match=r"`resume='last'` is unknown\. Write \"auto\""):
        quiet(max_epochs=1).fit(Classifier(), loader(), resume="last")


def test_weights_only_cannot_be_resumed(tmp_path):
    one = trainer(tmp_path)
    one.fit(Classifier(), loader())
    one.save_checkpoint(tmp_path / "weights", weights_only=True)
    one.wait_for_checkpoints()
    one._saver.close()
    for way in ({"ckpt_path": tmp_path / "weights"}, {"resume": "auto"}):
        with pytest.raises(ValueError, match="holds weights only"):
            trainer(tmp_path).fit(Classifier(), loader(), **way)


def test_a_callback_that_is_gone_is_told_of(saved):
    """`EarlyStopping` with another monitor is another one, and would start from zero silently."""
    stopping = EarlyStopping("train/loss", patience=9)
    folder = saved / "stopping"
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=2)
    quiet(enable_checkpointing=None, callbacks=[saves, stopping], max_epochs=1).fit(
        Classifier(), loader()
    )
    with pytest.warns(UserWarning, match=r"does not have: `EarlyStopping.*train/loss"):
        trainer(folder, max_epochs=2, callbacks=ModelCheckpoint(dirpath=folder)).fit(
            Classifier(), loader(), ckpt_path="last"
        )


def test_weights_with_keys_are_loaded(tmp_path):
    class Keyed(Classifier):
        own: jax.Array

        def __init__(self):
            super().__init__()
            self.own = jax.random.key(3)

    task = Keyed()
    one = quiet(max_steps=1)
    trained = one.fit(task, loader())
    one.save_checkpoint(tmp_path / "weights", weights_only=True)
    loaded = load_weights(tmp_path / "weights", task)
    assert (jax.random.key_data(loaded.own) == jax.random.key_data(trained.own)).all()
    assert_same(loaded, trained)


def test_more_epochs_than_before(saved):
    """A longer run is the same run: the limits may be raised."""
    longer = trainer(saved, max_epochs=2)
    longer.fit(Classifier(), loader(), ckpt_path="last")
    whole = quiet(max_epochs=2)
    whole.fit(Classifier(), loader())
    assert longer.global_step == whole.global_step == 10
    assert longer.callback_metrics == whole.callback_metrics
