"""Which batches a step took, from points that a run passed."""

from types import SimpleNamespace

import pytest

from jaxlightning._schedule import Position
from jaxlightning._whereabouts import Whereabouts


class Passing:
    """A run that does nothing but pass through epochs."""

    def __init__(self, accumulate=1):
        self.at = Position()
        self.arguments = SimpleNamespace(accumulate_grad_batches=accumulate)
        self.trainer = SimpleNamespace(_position=self.at, _arguments=self.arguments)
        self.whereabouts = Whereabouts()
        self.taken = {}

    def steps(self, count, batches=None):
        for _ in range(count):
            size = batches or self.arguments.accumulate_grad_batches
            first = self.at.batches
            self.at.advance(size, False)
            self.taken[self.at.step] = (self.at.epoch, first, first + size)

    def mark(self):
        self.whereabouts.mark(self.trainer)

    def end_epoch(self):
        self.mark()
        self.at.end_epoch()
        self.mark()

    def found(self):
        found = {step: self.whereabouts.of(self.trainer, step) for step in self.taken}
        return {step: tuple(batches)[1:] for step, batches in found.items() if batches is not None}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_epochs_of_any_length(accumulate):
    run = Passing(accumulate)
    run.mark()
    for length in (4, 1, 7):
        run.steps(length)
        run.steps(1, 1)  # the last step of an epoch may take fewer
        run.end_epoch()
    run.steps(2)
    assert run.found() == run.taken


def test_what_a_resumed_run_needs_is_saved():
    run = Passing(2)
    run.mark()
    run.steps(3)
    run.end_epoch()
    run.steps(2)
    other = Passing(2)
    other.whereabouts.load_state_dict(run.whereabouts.state_dict())
    other.at.__dict__.update(run.at.__dict__)
    other.taken = dict(run.taken)
    other.mark()
    other.steps(2)
    assert other.found() == other.taken


def test_a_run_that_goes_back_takes_other_batches():
    run = Passing()
    run.mark()
    run.steps(6)
    run.end_epoch()
    run.steps(4)
    run.at.step = 5  # back to step 5, and on with the batches that come now
    run.mark()
    run.steps(3)
    assert run.found() == {step: run.taken[step] for step in range(1, 9)} | {
        step: (1, step - 2, step - 1) for step in (9, 10)
    }
    assert run.found()[6] == (1, 4, 5)


def test_what_is_forgotten_is_not_guessed():
    run = Passing()
    run.mark()
    for _ in range(5):
        run.steps(10)
        run.end_epoch()
    run.whereabouts.forget(34)
    found = run.found()
    assert list(found) == list(range(31, 51))
    assert all(found[step] == run.taken[step] for step in found)
    assert len(run.whereabouts.state_dict()) < 6
