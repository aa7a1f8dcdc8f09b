import datetime
import json
import re

import jax
import pytest
from fake_trainer import FakeTrainer  # type: ignore[import-not-found]
from jax.experimental import multihost_utils
from jaxlightning.callbacks._timer import parse_duration  # type: ignore[import-not-found]

from jaxlightning._callback import Bus, Callback
from jaxlightning.callbacks import Timer
from jaxlightning.callbacks import _timer as module


class Clock(Callback):
    """A clock that moves by `step` seconds a step, and by `validation` seconds a validation."""

    def __init__(self, monkeypatch, step=10.0, validation=0.0):
        self.now, self.step, self.validation = 1000.0, step, validation
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.now += self.step

    def on_validation_start(self, trainer):
        self.now += 1000.0  # belongs to no stage but training: the timer comes after

    def on_validation_end(self, trainer):
        self.now += self.validation


# Durations


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("00:00:00:30", 30),
        ("01:02:03:04", 93784),
        ("100:00:00:00", 8640000),
        (datetime.timedelta(minutes=5), 300),
        ({"hours": 1, "seconds": 1}, 3601),
        ({"minutes": 0.5}, 30),
    ],
)
def test_durations(duration, seconds):
    assert parse_duration(duration).total_seconds() == seconds


@pytest.mark.parametrize(
    ("duration", "error", "says"),
    [
        ("12:00", ValueError, '`duration="12:00"` is no duration. Write `duration="00:12:00:00"`'),
        ("00:25:00:00", ValueError, "hours below 24, minutes and seconds below 60"),
        ("00:00:60:00", ValueError, "is no duration"),
        ("1h", ValueError, "is no duration"),
        (3600, TypeError, "`duration` is a `int`."),
        ({"hour": 1}, ValueError, "has the key `hour`, which is no unit of time"),
        ({"hour": 1}, ValueError, "Did you mean `hours`"),
        ("00:00:00:00", ValueError, "has to be longer than nothing"),
        (datetime.timedelta(seconds=-1), ValueError, "has to be longer than nothing"),
    ],
)
def test_bad_durations_are_refused(duration, error, says):
    with pytest.raises(error, match=re.escape(says)):
        parse_duration(duration)


def test_the_argument_is_named():
    with pytest.raises(ValueError, match=re.escape('`duration="1h"` is no duration')):
        Timer("1h")
    with pytest.raises(TypeError, match=re.escape('Write `max_time="00:12:00:00"`')):
        parse_duration(5, "max_time")


def test_bad_intervals_are_refused():
    with pytest.raises(ValueError, match=re.escape('Write `"step"` or `"epoch"`.')):
        Timer("00:00:01:00", interval="batch")


# Runs


@pytest.mark.parametrize(
    ("duration", "interval", "steps"),
    [
        ("00:00:00:25", "step", 3),
        ("00:00:00:30", "step", 3),
        ("00:00:00:31", "step", 4),
        ("00:00:00:25", "epoch", 4),
        ("00:00:00:41", "epoch", 8),
        (None, "step", 12),
    ],
)
def test_stops_the_fit(monkeypatch, duration, interval, steps):
    trainer = FakeTrainer(Clock(monkeypatch), Timer(duration, interval), epochs=3).fit()
    assert trainer.global_step == steps
    if duration is not None:
        elapsed = f"The time limit of {parse_duration(duration)} was reached."
        assert trainer.stop_reason == elapsed


def test_measures_each_stage(monkeypatch):
    clock, timer = Clock(monkeypatch, step=10.0, validation=3.0), Timer()
    # Told last, the clock moves after the timer has begun a validation, and ended it.
    trainer = FakeTrainer(timer, clock, epochs=2, validation=lambda step: {"val/loss": 0.0}).fit()
    assert timer.time_elapsed("train") == 2 * (4 * 10.0 + 1000.0 + 3.0)
    assert timer.time_elapsed("validate") == 2 * 1000.0
    assert timer.time_elapsed("test") == 0.0
    assert timer.time_remaining() is None
    trainer.bus.on_test_start(trainer)
    clock.now += 7.0
    trainer.bus.on_test_end(trainer)
    clock.now += 100.0
    assert timer.time_elapsed("test") == 7.0


def test_time_survives_a_resume(monkeypatch):
    clock = Clock(monkeypatch)
    first = Timer("00:00:01:00")
    FakeTrainer(first, clock, batches=4).fit()
    assert (first.time_elapsed(), first.time_remaining()) == (40.0, 20.0)
    state = json.loads(json.dumps(first.state_dict()))
    clock.now += 1e6  # the time between the two processes does not count
    second = Timer("00:00:01:00")
    second.load_state_dict(state)
    trainer = FakeTrainer(clock, second, batches=20, global_step=4, batch_idx=0).fit()
    assert trainer.global_step == 6
    third = Timer("00:00:01:00")
    third.load_state_dict(second.state_dict())
    over = FakeTrainer(clock, third, global_step=6)
    over.fit()
    assert over.stop_reason is not None
    assert over.global_step == 6


def test_the_state_is_right_in_the_middle_of_a_fit(monkeypatch):
    clock, timer = Clock(monkeypatch), Timer("00:01:00:00")
    trainer = FakeTrainer(clock, timer)
    timer.on_train_start(trainer)
    clock.now += 12.0
    assert timer.state_dict() == {"time_elapsed": {"train": 12.0}}
    timer.on_exception(trainer, RuntimeError())
    clock.now += 100.0
    assert timer.time_elapsed() == 12.0


def test_another_fit_begins_anew(monkeypatch):
    timer = Timer()
    trainer = FakeTrainer(Clock(monkeypatch), timer).fit()
    trainer.global_step = trainer.current_epoch = 0
    trainer.fit()
    assert timer.time_elapsed() == 40.0


def test_processes_agree_where_a_log_interval_ends(monkeypatch):
    asked = []

    def broadcast(value):
        asked.append(bool(value))
        return value

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    timer = Timer("00:00:00:25")
    trainer = FakeTrainer(Clock(monkeypatch), timer, batches=20, log_every_n_steps=4).fit()
    # The time was up after 3 steps.
    assert trainer.global_step == 4
    assert asked == [True]


def test_state_keys():
    timers = [Timer(), Timer("00:00:00:02"), Timer("00:00:00:01", interval="epoch")]
    assert len(Bus(timers).state_dict()) == 3
    # More time after a resume does not make up for what was spent.
    assert Timer("00:00:00:01").state_key == Timer("00:00:00:02").state_key
