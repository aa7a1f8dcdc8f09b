"""What does not fit together is refused, with the differences listed."""

import warnings

import equinox as eqx
import jax
import optax
import pytest
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import DataLoader, _resume, load_weights
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

    with pytest.raises(ValueError, match=r"task: Classifier in the checkpoint, .*Wider now\n") as e:
        trainer(saved).fit(Wider(), loader(), ckpt_path="last")
    assert "in_features" not in str(e.value)  # which is the same in both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointMismatch, match="task/extra"):
            trainer(saved).fit(Wider(), loader(), ckpt_path="last", allow_changes=True)


class Tuned(Classifier):
    """A task whose optimizer and network are given."""

    tx: object = eqx.field(static=True)

    def __init__(self, tx, activation=jax.nn.relu):
        super().__init__()
        self.net = eqx.tree_at(lambda net: net.activation, self.net, activation)
        self.tx = tx

    def configure_optimizers(self):
        return self.tx


def adam(rate=0.01, steps=100, b1=0.9):
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), b1=b1)


@pytest.fixture
def tuned(tmp_path):
    trainer(tmp_path).fit(Tuned(adam()), loader())
    return tmp_path


def test_the_same_configuration_made_anew_is_the_same(tuned):
    longer = trainer(tuned, max_epochs=2)
    longer.fit(Tuned(adam()), loader(), ckpt_path="last")
    assert longer.global_step == 10


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (lambda: Tuned(adam(b1=0.8)), r"scale_by_adam\.update_fn: b1: 0\.9 in the .*, 0\.8 now"),
        (lambda: Tuned(adam(steps=50)), r"decay_steps: 100 in the checkpoint, 50 now"),
        (lambda: Tuned(adam(), jax.nn.tanh), r"activation: relu in the checkpoint, tanh now"),
    ],
)
def test_what_is_static_is_compared_too(tuned, task, line):
    """A restored state would fit these, and the run would be another one without a word."""
    with pytest.raises(ValueError, match=rf"(optimizer|task): .*{line}"):
        trainer(tuned).fit(task(), loader(), ckpt_path="last")


def test_other_decisions_are_another_run(saved):
    with pytest.raises(ValueError, match=r"validation data: batch_size: absent .*, 16 now"):
        trainer(saved).fit(Classifier(), loader(), DataLoader(rows(), 16), ckpt_path="last")
    with pytest.raises(ValueError, match=r"log_every_n_steps: 50 in the checkpoint, 3 now"):
        trainer(saved, log_every_n_steps=3).fit(Classifier(), loader(), ckpt_path="last")


def test_changes_may_be_allowed_and_are_listed(saved):
    longer = trainer(saved, max_epochs=2)
    with pytest.warns(UserWarning, match=r"not bit for bit .*:\n  train data: seed: 0 in the .* 7"):
        longer.fit(Classifier(), loader(seed=7), ckpt_path="last", allow_changes=True)
    assert longer.global_step == 10


def test_other_versions_of_packages_are_warned_of(saved, monkeypatch):
    now = {**_resume.package_versions(), "jax": "9.9"}
    monkeypatch.setattr(_resume, "package_versions", lambda: now)
    with pytest.warns(UserWarning, match=rf"jax: {jax.__version__} in the checkpoint, 9\.9 now"):
        trainer(saved, max_epochs=2).fit(Classifier(), loader(), ckpt_path="last")


def test_rounding_is_warned_of(saved):
    """A run may go on elsewhere."""
    matmul = r"jax_default_matmul_precision: None in the checkpoint, highest now"
    with (
        pytest.warns(UserWarning, match=rf"not bit for bit .*:\n  {matmul}$"),
        jax.default_matmul_precision("highest"),
    ):
        trainer(saved).fit(Classifier(), loader(), ckpt_path="last")
    others = r"deterministic: False in the .*, True now\n  mesh: data: 1 in the checkpoint, 2 now$"
    with pytest.warns(UserWarning, match=rf"not bit for bit .*:\n  {others}"):
        trainer(saved, devices=2, deterministic=True).fit(Classifier(), loader(), ckpt_path="last")


def test_other_random_numbers_are_another_run(saved):
    line = r"\n  jax_threefry_partitionable: True in the checkpoint, False now"
    with pytest.raises(ValueError, match=line), jax.threefry_partitionable(False):
        trainer(saved).fit(Classifier(), loader(), ckpt_path="last")


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'write `resume="auto"`'):
        trainer(tmp_path).fit(Classifier(), loader(), ckpt_path="last")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        trainer(tmp_path).fit(Classifier(), loader(), ckpt_path="best")
    assert trainer(tmp_path).fit(Classifier(), loader(), resume="auto") is not None


def test_a_checkpoint_that_is_none(tmp_path):
    one = trainer(tmp_path)
    with pytest.raises(FileNotFoundError) as of_fit:
        one.fit(Classifier(), loader(), ckpt_path="nothere")
    instead = (
        '`ckpt_path=\'nothere\'` does not exist. Write the path of a checkpoint, "last" or "best".'
    )
    auto = ' To begin where there is none, write `resume="auto"`.'
    assert str(of_fit.value) == instead + auto
    with pytest.raises(FileNotFoundError) as of_test:
        one.test(Classifier(), loader(), ckpt_path="nothere")
    assert str(of_test.value) == instead
    with pytest.raises(FileNotFoundError, match=r"Write the path of one\.$"):
        one.test(Classifier(), loader(), ckpt_path="last")


def test_contradictions():
    with pytest.raises(ValueError, match=r"contradict each other"):
        quiet(max_epochs=1).fit(Classifier(), loader(), resume="auto", ckpt_path="last")
    with pytest.raises(ValueError, match=r"`resume='last'` is unknown\. Write \"auto\""):
        quiet(max_epochs=1).fit(Classifier(), loader(), resume="last")
    with pytest.raises(ValueError, match=r"this fit starts anew\. Add `resume=\"auto\"` or"):
        quiet(max_epochs=1).fit(Classifier(), loader(), allow_changes=True)


def test_weights_only_cannot_be_resumed(tmp_path):
    one = quiet(max_steps=1)
    one.fit(Classifier(), loader())
    one.save_checkpoint(tmp_path / "weights", weights_only=True)
    for way in ({"ckpt_path": tmp_path / "weights"}, {"ckpt_path": "last"}, {"resume": "auto"}):
        with pytest.raises(ValueError, match="holds weights only"):
            trainer(tmp_path).fit(Classifier(), loader(), **way)


@pytest.mark.parametrize("way", [{"ckpt_path": "last"}, {"resume": "auto"}])
def test_weights_beside_it_do_not_hide_what_a_run_can_go_on_from(saved, way):
    one = trainer(saved / "other")
    one.fit(Classifier(), loader())
    one.save_checkpoint(saved / "weights", weights_only=True)
    again = trainer(saved, max_steps=5)
    again.fit(Classifier(), loader(), **way)
    assert again.global_step == 5
    assert trainer(saved).validate(Classifier(), loader(), ckpt_path="last") == trainer(
        saved
    ).validate(one.task, loader())


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
