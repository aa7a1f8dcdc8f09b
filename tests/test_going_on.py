"""What a run that is gone on with asks, reads and calls: no more and no less than it would have."""

import numpy as np
import pytest
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import Callback, DataLoader, DataModule
from jaxlightning.callbacks import ModelCheckpoint

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
    assert "asked to stop, and is again: It is enough." in capsys.readouterr().err
    assert_same(again.task, whole.task)


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
        self.signals = signals

    def batches(self, epoch, start=0):
        if epoch == 1 and start == 0 and self.signals:
            self.signals[0].received = 15
        return super().batches(epoch, start)


def test_the_start_of_an_epoch_is_told_once(tmp_path):
    signals = []
    counts = Counts()
    cut = trainer(tmp_path, counts)
    signals.append(cut._signals)
    with pytest.raises(SystemExit):
        cut.fit(Classifier(), Slow(signals))
    assert (cut.global_step, counts.starts) == (6, 2)
    counts = Counts()
    trainer(tmp_path, counts).fit(Classifier(), Slow([]), resume="auto")
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
