"""A rewound run is the run that never met the batches it skips, wherever it is killed."""

import os
import signal

import numpy as np
import pytest
from spikes import (
    EPOCH,
    Epochs,
    Kills,
    Noisy,
    Stream,
    assert_same_runs,
    batches,
    log,
    reference,
    rewinding,
    trainer,
    without,
)
from steps import assert_bitwise  # type: ignore[import-not-found]

from jaxlightning import Callback
from jaxlightning._checkpoint import find_checkpoints
from jaxlightning.callbacks import EarlyStopping, ModelCheckpoint, Timer
from jaxlightning.loggers import JSONLLogger

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.mark.parametrize(
    ("how", "per_step", "poison"),
    [
        ({}, 1, 1e3),
        ({}, 1, np.nan),
        ({"accumulate_grad_batches": 2}, 2, 1e3),
        ({"steps_per_dispatch": 3}, 1, 1e3),
    ],
    ids=["high", "nan", "accumulation", "blocks"],
)
@pytest.mark.filterwarnings("ignore:The training loss is nan")
def test_a_rewound_run_is_the_run_that_never_met_the_batches(
    tmp_path, capsys, how, per_step, poison
):
    # Step 13 is poisoned, and step 16 delivers that. So steps 13 to 16 are undone.
    data = batches(EPOCH * per_step, [12 * per_step], poison)
    spike = rewinding()
    one = trainer(tmp_path / "a", spike, **how)
    noise = 0.0 if how or np.isnan(poison) else 0.01
    trained = one.fit(Noisy.initial(noise), data)
    said = capsys.readouterr().err
    batch, skipped = 16 * per_step, 4 * per_step
    assert f"Went back 4 steps to step 12, `{tmp_path / 'a/checkpoints/epoch=0-step=12'}`" in said
    assert f"on after batch {batch} of epoch 0: {skipped} batches are skipped" in said
    assert "Deleted" not in said  # that of step 16 was never taken
    assert spike.rewinds == 1
    left = without(data, 12 * per_step, 16 * per_step)
    other = reference(tmp_path / "b", left, noise, **how)
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))
    assert int(trained.seen) == (EPOCH - 4) * per_step
    assert one.checkpoint_callback.state_dict() == other.checkpoint_callback.state_dict()


def test_the_reference_can_be_made_by_hand(tmp_path):
    """Fit to the checkpoint, then a fit from it with other data."""
    data = batches(poisoned=[12])
    one = trainer(tmp_path / "a", rewinding())
    one.fit(Noisy.initial(), data)
    trainer(tmp_path / "b", max_steps=12, max_epochs=-1).fit(Noisy.initial(), Epochs(data))
    other = trainer(tmp_path / "b")
    left = without(data, 12, 16)
    other.fit(Noisy.initial(), Epochs(left), ckpt_path=tmp_path / "b/checkpoints/epoch=0-step=12")
    assert_bitwise(one.state.task, other.state.task)
    assert_bitwise(one.state.opt_state, other.state.opt_state)


def test_what_falls_due_at_the_end_of_an_epoch_happens_to_the_state_gone_back_to(tmp_path):
    """The epoch's last batch is poisoned: its validation is that of the rewound state."""
    first, second = batches(poisoned=[EPOCH - 1]), batches(seed=1)
    validation = batches(2, seed=2)
    stops = [EarlyStopping(m, patience=9) for m in ("val/loss", "train/loss")]
    one = trainer(tmp_path / "a", rewinding(), *stops, max_epochs=2)
    one.fit(Noisy.initial(), Epochs(first, second), validation)
    left = Epochs(first[:20], second)
    other = trainer(tmp_path / "b", max_epochs=2)
    other.fit(Noisy.initial(), left, validation)
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))
    assert log(tmp_path / "a").count("val/loss") == 2


def test_across_the_end_of_an_epoch(tmp_path, capsys):
    """What the checkpoint had seen of its epoch, and what is left of the next one, are one epoch:
    every step is part of one aggregate."""
    first, second, third = batches(poisoned=[23]), batches(poisoned=[0], seed=1), batches(seed=2)
    one = trainer(tmp_path / "a", rewinding(window=4, patience=2), max_epochs=3)
    one.fit(Noisy.initial(), Epochs(first, second, third))
    assert "to step 20" in (said := capsys.readouterr().err)
    assert "on after batch 4 of epoch 1: 8 batches are skipped" in said
    left = Epochs([*first[:20], *second[4:]], third)
    other = trainer(tmp_path / "b", max_epochs=2)
    other.fit(Noisy.initial(), left)
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))
    assert log(tmp_path / "a").count("train/loss_epoch") == 2


@pytest.mark.parametrize("stateful", [True, False])
def test_an_iterator_simply_goes_on(tmp_path, stateful):
    """Also where the spike is noticed at what would have been the last step."""
    data = batches(poisoned=[14])
    one = trainer(tmp_path / "a", rewinding(), max_steps=16)
    one.fit(Noisy.initial(), Stream(data, stateful))
    left = without(data, 12, 16)
    other = reference(tmp_path / "b", Stream(left, stateful), max_steps=16)
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))


# Killed


POINTS = {
    "in the spike, before it is noticed": ("step", 19),
    "when it has been noticed": ("log", 20),
    "when what came after the checkpoint has been deleted": ("load", 20),
    "before the rewound run is saved": ("save", 12, 2),
    "just after it was saved": ("checkpoint", 12, 2),
    "later on": ("step", 15, 2),
    "at the next checkpoint": ("save", 16, 2),
}
LONG = {"window": 6, "patience": 3}


@pytest.fixture(scope="module")
def data():
    return batches(28, poisoned=range(12, 18))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """It rewinds at step 20, with the spike's six steps, which step 16 lies in the middle of."""
    folder = tmp_path_factory.mktemp("whole")
    one = trainer(folder, rewinding(**LONG))
    one.fit(Noisy.initial(), data)
    return one, folder


def test_checkpoints_taken_in_the_spike_are_deleted(tmp_path, whole, data):
    one, folder = whole
    other = reference(tmp_path, without(data, 12, 20))
    assert_same_runs(one, other, (folder, tmp_path))
    found = find_checkpoints(folder / "checkpoints")
    assert [e.step for e in found] == [4, 8, 12, 16, 20]
    assert [e.metadata["position"]["batches"] for e in found] == [4, 8, 20, 24, 28]


EXCEPTIONS = ["when it has been noticed", "when what came after the checkpoint has been deleted"]


@pytest.mark.parametrize(
    ("point", "save_on_exception"),
    [(point, False) for point in POINTS] + [(point, True) for point in EXCEPTIONS],
)
def test_wherever_it_is_killed_around_a_rewind(tmp_path, whole, data, point, save_on_exception):
    saves = {"save_on_exception": save_on_exception}
    killed = trainer(tmp_path, rewinding(**LONG), Kills(*POINTS[point]), saves=saves)
    with pytest.raises(SystemExit, match="killed"):
        killed.fit(Noisy.initial(), data)
    again = trainer(tmp_path, rewinding(**LONG), saves=saves)
    again.fit(Noisy.initial(), data, resume="auto")
    assert_same_runs(again, whole[0], (tmp_path, whole[1]))
    assert again.callbacks[0].state_dict() == whole[0].callbacks[0].state_dict()
    found = [find_checkpoints(f / "checkpoints") for f in (tmp_path, whole[1])]
    assert [e.path.name for e in found[0]] == [e.path.name for e in found[1]]


def test_a_signal_at_the_step_that_rewinds(tmp_path, whole, data):
    class Terminates(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 20:
                os.kill(os.getpid(), signal.SIGTERM)

    killed = trainer(tmp_path, rewinding(**LONG), Terminates())
    with pytest.raises(SystemExit):
        killed.fit(Noisy.initial(), data)
    again = trainer(tmp_path, rewinding(**LONG))
    again.fit(Noisy.initial(), data, resume="auto")
    assert_same_runs(again, whole[0], (tmp_path, whole[1]))
    assert again.callbacks[0].rewinds == 1


# Where to, and what else is undone


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    class Damages(Callback):
        def on_train_batch_end(self, one, *_):
            if one.global_step == 15:
                one.wait_for_checkpoints()
                file = tmp_path / "a/checkpoints/epoch=0-step=12/arrays-00000-of-00001.safetensors"
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)

    data = batches(poisoned=[12])
    one = trainer(tmp_path / "a", rewinding(), Damages())
    with pytest.warns(UserWarning, match="A damaged checkpoint is passed over: .*epoch=0-step=12"):
        one.fit(Noisy.initial(), data)
    assert "Went back 8 steps to step 8" in (said := capsys.readouterr().err)
    assert "Deleted, as they were taken in between: `" in said
    other = reference(tmp_path / "b", without(data, 8, 16))
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))


def test_another_runs_checkpoints_are_neither_used_nor_deleted(tmp_path):
    former = trainer(tmp_path / "a", max_steps=18, saves={"every_n_train_steps": 6})
    former.fit(Noisy.initial(), batches(seed=7))
    folder = tmp_path / "a/checkpoints"
    of_former = {e.path.name for e in find_checkpoints(folder)}
    assert of_former == {"epoch=0-step=6", "epoch=0-step=12", "epoch=0-step=18"}
    data = batches(poisoned=[13])
    one = trainer(tmp_path / "a", rewinding(), logger=JSONLLogger(tmp_path / "a1", version=0))
    one.fit(Noisy.initial(), data)
    other = reference(tmp_path / "b", without(data, 12, 16))
    assert_same_runs(one, other, (tmp_path / "a1", tmp_path / "b"))
    found = {e.path.name: e for e in find_checkpoints(folder)}
    assert of_former < set(found)
    runs = {found[name].metadata["run"] for name in of_former}
    assert len(runs) == 1
    assert one._run.id not in runs


def test_the_checkpoint_may_lie_in_the_folder_of_another_callback(tmp_path):
    """A resume looks into the first one's, so that is where the rewound run is saved."""
    data = batches(poisoned=[13])
    other_folder = tmp_path / "other"

    def make(*callbacks):
        often = ModelCheckpoint(other_folder, every_n_train_steps=2, save_top_k=-1)
        rarely = ModelCheckpoint(tmp_path / "a/checkpoints", every_n_train_steps=8, save_top_k=-1)
        return trainer(tmp_path / "a", callbacks=[rewinding(), rarely, often, *callbacks])

    one = make(Kills("step", 15))
    with pytest.raises(SystemExit):
        one.fit(Noisy.initial(), data)
    assert [e.step for e in find_checkpoints(other_folder)] == [2, 4, 6, 8, 10, 12, 14]
    assert [e.path.name for e in find_checkpoints(tmp_path / "a/checkpoints")] == [
        "epoch=0-step=8",
        "rewound-step_0000000012",
    ]
    again = make()
    again.fit(Noisy.initial(), data, resume="auto")
    other = reference(tmp_path / "b", without(data, 12, 14), saves={"every_n_train_steps": 2})
    assert_same_runs(again, other, (tmp_path / "a", tmp_path / "b"))


def test_what_is_kept_agrees_with_what_is_there(tmp_path):
    """Step 16's was the best, and took the place of step 4's; both are gone after the rewind."""
    data = batches(28, poisoned=range(17, 20))
    saves = {"monitor": "train/loss", "save_top_k": 2}
    one = trainer(tmp_path, rewinding(window=4, steps_before=6), saves=saves)
    seen = []

    class Looks(Callback):
        def on_checkpoint(self, trainer, point):
            if trainer.callbacks[0].rewinds == 1 and not seen:
                kept = trainer.checkpoint_callback.best_k_models
                there = [str(e.path) for e in find_checkpoints(tmp_path / "checkpoints")]
                seen.append((trainer.global_step, sorted(kept), sorted(there)))

    one = trainer(tmp_path, rewinding(window=4, steps_before=6), Looks(), saves=saves)
    one.fit(Noisy.initial(), data)
    (step, kept, there) = seen[0]
    assert kept == there == [str(tmp_path / f"checkpoints/epoch=0-step={step}")]
    kept = one.checkpoint_callback.best_k_models
    assert all(os.path.exists(path) for path in kept)
    assert len(kept) == 2
    assert one.checkpoint_callback.best_model_path in kept


def test_a_stop_that_was_asked_for_since_is_undone(tmp_path):
    class Stops(Callback):
        asked = 0

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 14 and not self.asked:
                self.asked += 1
                trainer.stop("enough")

    one = trainer(tmp_path / "a", rewinding(), Stops(), min_steps=18)
    one.fit(Noisy.initial(), batches(poisoned=[12]))
    assert (one.global_step, one.should_stop, one.stop_reason) == (20, False, None)


def test_time_that_was_spent_stays_spent():
    timer = Timer()
    timer._spent = {"train": 30.0}
    timer.take_back({"time_elapsed": {"train": 10.0}})
    assert timer.time_elapsed() == 30.0


def test_a_request_of_ones_own(tmp_path, capsys):
    """The lower one of two counts, and loggers see the steps once."""

    class Asks(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 15 and trainer._run.position.batches == 15:
                trainer.rewind(13, "No.")
                trainer.rewind(9, "I do not like it.")
                trainer.rewind(12, "No.")

    one = trainer(tmp_path / "a", Asks())
    one.fit(Noisy.initial(), batches())
    assert "I do not like it. Went back 7 steps to step 8" in capsys.readouterr().err
    other = reference(tmp_path / "b", without(batches(), 8, 15))
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(RuntimeError, match="`rewind` takes a fit back, and none is under way"):
        one.rewind(3, "No.")


def test_what_was_known_of_metrics_is_known_after_a_resume(tmp_path):
    """A monitor that is asked at the end of an epoch, of a validation before the resume."""
    data, validation = batches(), batches(2, seed=2)

    def make(*callbacks):
        stops = EarlyStopping("val/loss", check_on_train_epoch_end=True)
        return trainer(tmp_path, stops, *callbacks, val_check_interval=16)

    with pytest.raises(SystemExit):
        make(Kills("step", 22)).fit(Noisy.initial(), data, validation)
    again = make()
    again.fit(Noisy.initial(), data, validation, resume="auto")
    assert again.callbacks[0].best_score == again.callback_metrics["val/loss"]
