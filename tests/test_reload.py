"""Loaders of a `DataModule` that are asked for again: in later epochs, and on resuming."""

import numpy as np
import pytest
from feeds import Stops
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import Callback, DataLoader, DataModule
from jaxlightning.callbacks import ModelCheckpoint


class Curriculum(DataModule):
    """Whose n-th loader has other rows than the one before, and `grows`: more of them."""

    def __init__(self, grows=4, one_pass=False):
        self.count, self.grows, self.one_pass = 0, grows, one_pass
        self.told: list = []
        self.trainer = None

    def train_dataloader(self):
        self.told.append((self.trainer.current_epoch, self.trainer.global_step, self.count))
        self.count += 1
        loader = DataLoader(rows(8 + self.grows * self.count, seed=self.count), 4, seed=self.count)
        return iter(loader) if self.one_pass else loader

    def val_dataloader(self):
        return DataLoader(rows(4 * self.count), 4)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.told.append(f"load {state['count']}")
        self.count = state["count"]


def fit(module, *callbacks, task=None, options=None, **arguments):
    arguments = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1} | arguments
    trainer = quiet(callbacks=list(callbacks), on_recompile="raise", **arguments)
    module.trainer = trainer
    return trainer.fit(task or Classifier(), module, **(options or {})), trainer


class Watches(Callback):
    def __init__(self):
        self.estimates, self.validated, self.waits = [], [], []

    def on_train_epoch_start(self, trainer):
        self.estimates.append(trainer.estimated_stepping_batches)
        trainer._run.feed.wait_s += 5.0

    def on_validation_epoch_end(self, trainer):
        self.validated.append(trainer.num_val_batches)
        self.waits.append(trainer.data_wait_s)


def test_both_loaders_and_the_plan_are_renewed():
    watches = Watches()
    _, trainer = fit(Curriculum(), watches)
    assert watches.validated == [[1], [2], [3]]
    assert watches.estimates == [3 * 3, 3 + 2 * 4, 3 + 4 + 5]
    assert trainer.global_step == trainer.estimated_stepping_batches == 12
    assert trainer.num_training_batches == 5
    assert [wait >= 5 * n for n, wait in enumerate(watches.waits, 1)] == [True] * 3


def test_validations_follow_the_new_length():
    watches = Watches()
    fit(Curriculum(grows=8), watches, val_check_interval=0.5)
    assert [len(watches.validated), watches.validated[-1]] == [6, [3]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"steps_per_dispatch": 2}, marks=pytest.mark.long),
        pytest.param({"accumulate_grad_batches": 2}, marks=pytest.mark.long),
    ],
)
def test_new_shapes_are_compiled_before_they_come(options):
    """`on_recompile="raise"` here; the last batches have 3, 2, and 1 rows."""
    _, trainer = fit(Curriculum(grows=3), **options)
    assert trainer.num_recompiles == 0


def test_another_structure_is_refused():
    class Changes(Curriculum):
        def train_dataloader(self):
            self.count += 1
            return [rows(4) | ({"z": np.ones(4)} if self.count > 1 else {})]

    with pytest.raises(ValueError, match=r"of the reloaded training data have .*'z'.* but those"):
        fit(Changes())


# Going on


@pytest.fixture(scope="module")
def whole():
    """Runs that nobody interrupts, and what their modules were asked."""
    found = {}

    def of(every, one_pass):
        if (every, one_pass) not in found:
            module = Curriculum(one_pass=one_pass)
            task, _ = fit(module, reload_dataloaders_every_n_epochs=every)
            found[every, one_pass] = task, module.told
        return found[every, one_pass]

    return of


@pytest.mark.parametrize(
    ("every", "one_pass", "cut", "asked"),
    [
        # Batches of an epoch: 3, 4 and 5, when reloaded in each. 7 is the end of the second one.
        (1, False, 5, [(1, 3, 1), (2, 7, 2)]),
        (1, False, 7, [(1, 3, 1), (2, 7, 2)]),
        (1, True, 5, [(1, 3, 1), (2, 7, 2)]),
        (2, False, 4, [(0, 0, 0), (2, 6, 1)]),
        (0, False, 5, [(0, 0, 0)]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*can't be entered in the middle")
def test_a_resumed_run_asks_for_loaders_as_the_whole_one_did(
    tmp_path, whole, every, one_pass, cut, asked
):
    """In the same epoch, at the same step, in the same state of the module."""

    def part(module, *more, **options):
        saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
        arguments = {"reload_dataloaders_every_n_epochs": every, "enable_checkpointing": None}
        return fit(module, saves, *more, **arguments, options=options)[0]

    expected, told = whole(every, one_pass)
    with pytest.raises(InterruptedError):
        part(Curriculum(one_pass=one_pass), Stops(cut + 1))
    resumed = Curriculum(one_pass=one_pass)
    assert_same(part(resumed, resume="auto"), expected)
    count = asked[0][2]
    assert resumed.told == [f"load {count}", asked[0], f"load {count + 1}", *asked[1:]]
    assert told[-len(asked) :] == asked


def test_behind_a_damaged_checkpoint_the_data_is_that_of_the_one_before(tmp_path, whole):
    saves = lambda: ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(InterruptedError):
        fit(Curriculum(), saves(), Stops(5), enable_checkpointing=None)
    for path in tmp_path.glob("*step=*/arrays-*.safetensors"):
        if int(path.parent.name.split("step=")[1].split("-")[0]) > 2:
            path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    resumed = Curriculum()
    with pytest.warns(UserWarning, match="Damaged checkpoints were found"):
        found, _ = fit(resumed, saves(), enable_checkpointing=None, options={"resume": "auto"})
    assert_same(found, whole(1, False)[0])
    assert resumed.told[2:4] == ["load 0", (0, 0, 0)]
