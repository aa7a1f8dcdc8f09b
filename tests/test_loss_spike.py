"""A spike is noticed when it should be, and what is wrong with it is said before the first step."""

import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from spikes import (
    Noisy,
    assert_same_runs,
    batches,
    reference,
    rewinding,
    trainer,
)
from tasks import quiet, refused, says

from jaxlightning.callbacks import LossSpike, ModelCheckpoint

# When it is noticed


def watching(**arguments):
    """A `LossSpike`, and what it asks of a trainer that logs every 10 steps."""
    spike = LossSpike(**arguments)
    asked = []
    trainer = SimpleNamespace(
        callbacks=[ModelCheckpoint()],
        fast_dev_run=False,
        log_every_n_steps=10,
        rewind=lambda step, reason: asked.append((step, reason)),
    )
    spike.setup(trainer, "fit")
    return spike, trainer, asked


def tell(spike, trainer, values, start=0):
    for number, value in enumerate(values, start + 1):
        spike.on_log(trainer, {"train/loss": value}, 10 * number)


QUIET = [2.0, 2.1, 1.9, 2.05, 1.95]


def test_the_threshold_is_that_of_the_median_and_its_deviation():
    spike, trainer, _ = watching(window=5, deviations=4, min_rise=0.0)
    tell(spike, trainer, QUIET[:4])
    assert spike.threshold is None
    tell(spike, trainer, QUIET[4:], start=4)
    median = statistics.median(QUIET)
    mad = statistics.median([abs(x - median) for x in QUIET])
    np.testing.assert_allclose(spike.threshold, median + 4 * 1.4826 * mad, rtol=1e-12)
    tell(spike, trainer, [np.nextafter(spike.threshold, 0)], start=5)
    with pytest.warns(UserWarning, match=r"^`train/loss` = 2\.\d+ in steps 61 to 70; above 2\.\d+"):
        tell(spike, trainer, [np.nextafter(spike.threshold, 9)], start=6)


def test_in_a_quiet_stretch_a_small_rise_is_none():
    spike, trainer, _ = watching(window=4)
    tell(spike, trainer, [2.0] * 4)
    assert spike.threshold == pytest.approx(2.2)
    tell(spike, trainer, [2.19], start=4)
    with pytest.warns(UserWarning, match=r"= 2\.21 in steps 51 to 60; above 2\.2 is a spike"):
        tell(spike, trainer, [2.21], start=5)


def test_an_outlier_does_not_raise_the_bar_and_a_new_level_does():
    spike, trainer, _ = watching(window=6)
    tell(spike, trainer, [2.0] * 6)
    with pytest.warns(UserWarning, match="= 50 in"):
        tell(spike, trainer, [50.0], start=6)
    assert spike.threshold == pytest.approx(2.2)
    tell(spike, trainer, [2.0], start=7)
    with pytest.warns(UserWarning, match="= 4 in") as caught:
        tell(spike, trainer, [4.0] * 6, start=8)
    assert len(caught) == 1  # of a spike, not of each of its intervals
    assert spike.threshold == pytest.approx(4.4)


def test_falling_losses_are_no_spike_and_too_few_are_not_judged():
    spike, trainer, asked = watching(window=4, action="rewind")
    tell(spike, trainer, [9.0, 90.0, 1.0])
    tell(spike, trainer, [8.0 / n for n in range(1, 20)], start=3)
    assert asked == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_interval_on(value):
    spike, trainer, asked = watching(action="rewind")
    tell(spike, trainer, [2.0, value])
    assert [step for step, _ in asked] == [10]
    assert asked[0][1].startswith(f"`train/loss` = {value} in steps 11 to 20. It began after step")
    assert list(spike._values) == [2.0]


def test_patience_counts_intervals_in_a_row():
    spike, trainer, asked = watching(window=12, patience=3, action="rewind")
    tell(spike, trainer, [2.0] * 12 + [9.0, 9.0, 2.0, 9.0, 9.0])
    assert asked == []
    tell(spike, trainer, [9.0], start=17)
    assert [step for step, _ in asked] == [150]  # before the first of the three
    tell(spike, trainer, [9.0], start=18)
    assert len(asked) == 1


def test_steps_before():
    spike, trainer, asked = watching(window=4, steps_before=25, action="rewind")
    tell(spike, trainer, [2.0] * 4 + [9.0])
    assert asked[0][0] == 15
    spike, trainer, asked = watching(steps_before=25, action="rewind")
    tell(spike, trainer, [np.nan])
    assert asked[0][0] == 0


def test_its_state_goes_on():
    one, trainer, _ = watching(window=4, patience=2)
    tell(one, trainer, [2.0, 2.1, 2.2, 2.3, 9.0])
    other, trainer, _ = watching(window=4, patience=2)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    with pytest.warns(UserWarning, match="It began after step 40"):
        tell(other, trainer, [9.0], start=5)


# In a run


def test_a_spike_is_warned_of_and_nothing_else_changes(tmp_path):
    data = batches(poisoned=[12])
    one = trainer(tmp_path / "a", LossSpike(window=3))
    with pytest.warns(UserWarning, match="in steps 13 to 14; above .* It began after step 12") as w:
        one.fit(Noisy.initial(), data)
    assert len(w) == 1
    other = reference(tmp_path / "b", data)
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))


def test_no_checkpoint_is_old_enough(tmp_path):
    data = batches(poisoned=[12, 13, 14, 15, 16])
    saves = {"every_n_train_steps": 16}
    spike = rewinding()
    one = trainer(tmp_path / "a", spike, saves=saves)
    with pytest.warns(UserWarning, match="^`train/loss` = ") as caught:
        one.fit(Noisy.initial(), data)
    assert len(caught) == 1  # of the spike, not of each of its intervals
    message = str(caught[0].message)
    assert (
        "To go back, a checkpoint of step 12 or before is needed, and this run has none" in message
    )
    assert f"`{tmp_path / 'a/checkpoints'}`" in message
    assert "keep older ones: `ModelCheckpoint(every_n_train_steps=100, save_top_k=-1)`" in message
    assert spike.rewinds == 0
    other = reference(tmp_path / "b", data, saves=saves)
    assert_same_runs(one, other, (tmp_path / "a", tmp_path / "b"))


def test_there_is_an_end_to_it(tmp_path):
    data = batches(60, poisoned=range(12, 60))
    one = trainer(tmp_path, rewinding(max_rewinds=2))
    with pytest.raises(
        RuntimeError, match="A loss spike, after 2 rewinds already: `train/loss`"
    ) as e:
        one.fit(Noisy.initial(), data)
    assert "Lower the learning rate, or clip with `gradient_clip_val=1.0`" in str(e.value)
    assert "`LossSpike(max_rewinds=4)`" in str(e.value)
    assert one._run.position.batches == 24
    # The same command meets the same end; one that is allowed more goes on from there.
    with pytest.raises(RuntimeError, match="after 2 rewinds already"):
        trainer(tmp_path, rewinding(max_rewinds=2)).fit(Noisy.initial(), data, resume="auto")
    with pytest.raises(RuntimeError, match="after 4 rewinds already"):
        trainer(tmp_path, rewinding(max_rewinds=4)).fit(Noisy.initial(), data, resume="auto")


# Refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"action": "skip"}, r'`LossSpike\(action="skip"\)` is not known. Write `action="warn"`'),
        ({"monitor": "val/loss"}, "has to be a metric of the training step"),
        ({"monitor": "train/loss_epoch"}, "has to be a metric of the training step"),
        ({"window": 2}, r"`LossSpike\(window=2\)` has to be an integer of at least 3"),
        ({"window": 9.5}, "has to be an integer"),
        ({"patience": 0}, r"`LossSpike\(patience=0\)` has to be an integer of at least 1"),
        (
            {"steps_before": -1},
            r"`LossSpike\(steps_before=-1\)` has to be an integer of at least 0",
        ),
        ({"max_rewinds": 0}, r"`LossSpike\(max_rewinds=0\)` has to be an integer of at least 1"),
        (
            {"window": 4, "patience": 3},
            r"Write a `patience` of at most half .*window=6, patience=3",
        ),
        ({"deviations": -1}, "`deviations` of `LossSpike` has to be at least 0, not -1"),
        ({"min_rise": np.nan}, "`min_rise` of `LossSpike` has to be at least 0, not nan"),
    ],
)
def test_wrong_arguments(arguments, says, unchecked_types):
    with pytest.raises(ValueError, match=says):
        LossSpike(**arguments)


def test_what_is_known_to_be_wrong_before_the_first_step(tmp_path):
    def said(one):
        return says(refused(ValueError, Noisy.initial(), batches(), trainer=one))

    message = said(quiet(callbacks=rewinding()))
    assert "checkpoints, but no callback saves any (`enable_checkpointing=False`)" in message
    assert "Add `ModelCheckpoint(every_n_train_steps=100, save_top_k=-1)`" in message
    assert '`LossSpike(action="warn")`' in message
    message = said(trainer(tmp_path, rewinding(), saves={"save_weights_only": True}))
    assert "but `ModelCheckpoint` saves weights only" in message
    message = said(trainer(tmp_path, rewinding(monitor="train/lost")))
    assert "`monitor='train/lost'` is a metric that no step of this run produces" in message


@pytest.mark.filterwarnings("ignore:The training loss is nan")
def test_a_trial_run_is_left_alone():
    one = quiet(enable_checkpointing=None, fast_dev_run=3, callbacks=rewinding())
    one.fit(Noisy.initial(), batches(poisoned=[1], poison=np.nan))
    assert one.global_step == 3
