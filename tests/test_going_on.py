"""What a run that is gone on with asks, reads and calls: no more and no less than it would have."""

import signal
import threading
import warnings

import equinox as eqx
import jax
import numpy as np
import pytest
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import Callback, CheckpointMismatch, DataLoader, DataModule
from jaxlightning.callbacks import (
    ExponentialMovingAverage,
    LearningRateSchedule,
    ModelCheckpoint,
    SkipNonFinite,
)

DATA = rows(48)


def trainer(folder, *callbacks, **arguments):
    saves = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_on_exception=True)
    arguments = {"max_epochs": 3, "enable_checkpointing": None} | arguments
    return quiet(callbacks=[saves, *callbacks], **arguments)


def loader():
    return DataLoader(DATA, 8, shuffle=True)


class Stopped(BaseException):
    pass


class StopsAt(Callback):
    """Raises in a hook, as a signal does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stopped


# Requests to stop


class AsksOnce(Callback):
    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.stop("It is enough.")


def test_a_request_to_stop_is_remembered(tmp_path, capsys):
    """It waits for `min_steps`, and the callback does not ask again."""
    whole = trainer(tmp_path / "whole", AsksOnce(), min_steps=8)
    whole.fit(Classifier(), loader())
    assert whole.global_step == 8
    with pytest.raises(Stopped):
        trainer(tmp_path / "cut", AsksOnce(), StopsAt(5), min_steps=8).fit(Classifier(), loader())
    again = trainer(tmp_path / "cut", AsksOnce(), min_steps=8)
    again.fit(Classifier(), loader(), resume="auto")
    assert again.global_step == 8
    assert again.stop_reason == "It is enough."
    said = capsys.readouterr().err
    assert "asked to stop, and is again: It is enough." in said
    assert said.count("The fit was stopped at step 8: It is enough.") == 2
    assert_same(again.task, whole.task)


def test_a_longer_run_has_another_schedule_unless_it_has_a_length(tmp_path):
    of = lambda epochs, **more: trainer(
        tmp_path, LearningRateSchedule("cosine", **more), max_epochs=epochs
    )
    of(1).fit(Classifier(), loader())
    with pytest.raises(
        ValueError, match=r"its own length: `LearningRateSchedule\(\.\.\., total_st"
    ):
        of(2).fit(Classifier(), loader(), resume="auto")
    steps = len(loader())
    longer = of(2, total_steps=steps)
    longer.fit(Classifier(), loader(), resume="auto")
    assert longer.global_step == 2 * steps


def test_what_met_its_limits_was_not_stopped(tmp_path, capsys):
    whole = trainer(tmp_path, AsksOnce(), max_steps=3)
    whole.fit(Classifier(), loader())
    assert whole.should_stop
    assert "stopped" not in capsys.readouterr().err


# Which checkpoint


def test_of_two_runs_in_a_folder_the_one_that_saved_last_goes_on(tmp_path):
    trainer(tmp_path).fit(Classifier(), loader())
    other = Classifier(key=jax.random.key(1))
    with pytest.raises(Stopped):
        trainer(tmp_path, StopsAt(5)).fit(other, loader())
    whole = quiet(max_epochs=3).fit(other, loader())
    for way in ({"resume": "auto"}, {"ckpt_path": "last"}):
        again = trainer(tmp_path)
        assert_same(again.fit(other, loader(), **way), whole)


def test_the_latest_is_looked_for_in_all_folders(tmp_path, capsys):
    def two(*callbacks):
        rare = ModelCheckpoint(tmp_path / "rare", every_n_train_steps=6)
        often = ModelCheckpoint(tmp_path / "often", every_n_train_steps=2)
        return quiet(max_epochs=3, enable_checkpointing=None, callbacks=[rare, often, *callbacks])

    with pytest.raises(Stopped):
        two(StopsAt(9)).fit(Classifier(), loader())
    again = two()
    again.fit(Classifier(), loader(), resume="auto")
    assert "Going on from step 8, " in capsys.readouterr().err
    assert again.global_step == 18


def test_what_there_is_to_say(tmp_path, capsys):
    trainer(tmp_path).fit(Classifier(), loader(), resume="auto")
    assert f"There is no checkpoint in `{tmp_path}`, so the run begins." in capsys.readouterr().err
    trainer(tmp_path).fit(Classifier(), loader(), resume="auto")
    assert "Nothing is left to train: its limits are met." in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Write `resume=\"auto\"`"):
        trainer(tmp_path).fit(Classifier(), loader(), ckpt_path="auto")


# Changes on purpose


@pytest.mark.parametrize(
    ("added", "anew"),
    [
        ({"callbacks": [SkipNonFinite()]}, "metrics, skipped"),
        ({"gradient_clip_val": 1.0}, "opt_state"),
        ({"callbacks": [ExponentialMovingAverage(0.9)]}, "opt_state"),
    ],
)
def test_what_a_message_advises_can_be_added(tmp_path, capsys, added, anew):
    """Or whoever met the NaN could not go on from before it."""
    added = dict(added)
    with pytest.raises(Stopped):
        trainer(tmp_path, StopsAt(5)).fit(Classifier(dropout=0.3), loader())
    callbacks = added.pop("callbacks", [])
    changed = lambda: trainer(tmp_path, *callbacks, **added)
    with pytest.raises((ValueError, CheckpointMismatch)):
        changed().fit(Classifier(dropout=0.3), loader(), resume="auto")
    again = changed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.fit(Classifier(dropout=0.1), loader(), resume="auto", allow_changes=True)
    assert f"Begun anew, as it was changed since the checkpoint: {anew}." in capsys.readouterr().err
    assert again.global_step == 18


def test_parameters_that_do_not_fit_are_refused_all_the_same(tmp_path):
    class Other(Classifier):
        def __init__(self):
            super().__init__()
            self.net = eqx.nn.MLP(6, 3, 9, 1, key=jax.random.key(0))

    trainer(tmp_path, max_steps=2).fit(Classifier(), loader())
    other = trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointMismatch, match="task/net/layers/0/weight"):
            other.fit(Other(), loader(), resume="auto", allow_changes=True)


# Hooks


class Counts(Callback):
    def __init__(self):
        self.starts = 0

    def on_train_epoch_start(self, trainer):
        self.starts += 1

    def state_dict(self):
        return {"starts": self.starts}

    def load_state_dict(self, state):
        self.starts = state["starts"]


class Slow(DataLoader):
    """Whose second epoch's first batch is waited for, in vain, when a signal comes."""

    def __init__(self, signals):
        super().__init__(DATA, 8, shuffle=True)
        self.signals, self.given_up = signals, threading.Event()

    def batches(self, epoch, start=0):
        if epoch == 1:
            self.signals.received = signal.SIGTERM
            self.given_up.wait(60)
        yield from super().batches(epoch, start)


def test_the_start_of_an_epoch_is_told_once(tmp_path):
    counts = Counts()
    cut = trainer(tmp_path, counts)
    slow = Slow(cut._signals)
    with pytest.raises(SystemExit):
        cut.fit(Classifier(), slow)
    slow.given_up.set()
    assert (cut.global_step, counts.starts) == (6, 2)
    counts = Counts()
    trainer(tmp_path, counts).fit(Classifier(), loader(), resume="auto", allow_changes=True)
    assert counts.starts == 3


# Data


class Numbered:
    """An iterator with a state, one of whose batches may be poisoned."""

    def __init__(self, poisoned=None):
        self.at, self.poisoned = 0, poisoned

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 6:
            raise StopIteration
        batch = {
            name: column[self.at * 8 : self.at * 8 + 8].copy() for name, column in DATA.items()
        }
        if self.at == self.poisoned:
            batch["x"][:] = np.nan
        self.at += 1
        return batch

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def test_a_batch_whose_step_failed_has_not_been_taken(tmp_path):
    with pytest.raises(FloatingPointError):
        trainer(tmp_path, max_steps=6, detect_anomaly=True).fit(Classifier(), Numbered(3))
    again = trainer(tmp_path, max_steps=6)
    again.fit(Classifier(), Numbered(), resume="auto")
    whole = quiet(max_steps=6)
    whole.fit(Classifier(), Numbered())
    assert again.global_step == whole.global_step == 6
    assert_same(again.task, whole.task)


class Reshuffled:
    """An iterable that gives its batches in another order each time it is iterated."""

    def __init__(self):
        self.times = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.times += 1
        for at in np.random.default_rng(self.times).permutation(6):
            yield {name: column[at * 8 : at * 8 + 8] for name, column in DATA.items()}


def test_an_iterable_without_epochs_is_warned_of_at_their_boundary(tmp_path):
    trainer(tmp_path, max_epochs=1).fit(Classifier(), Reshuffled())
    with pytest.warns(
        UserWarning, match=r"`Reshuffled`, which does not know of epochs: .* epoch 1"
    ):
        trainer(tmp_path, max_epochs=2).fit(Classifier(), Reshuffled(), resume="auto")


class Reloads(DataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


def test_loaders_that_are_replaced_are_let_go_of(monkeypatch):
    from jaxlightning.data import Feed

    closed = []
    close = Feed.close
    monkeypatch.setattr(Feed, "close", lambda feed: (closed.append(feed), close(feed)))
    seen = []

    class Sees(Callback):
        def on_train_epoch_start(self, trainer):
            seen.append((trainer._run.feed, *trainer._val_feeds.values(), len(closed)))

    one = quiet(max_epochs=3, reload_dataloaders_every_n_epochs=1, callbacks=Sees())
    one.fit(Classifier(), Reloads())
    assert [entry[-1] for entry in seen] == [0, 2, 4]
    assert closed[:4] == [*seen[0][:2][::-1], *seen[1][:2][::-1]]
