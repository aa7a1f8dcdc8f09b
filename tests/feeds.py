"""Small loaders, and a feed of their batches on virtual devices."""

import jax
import numpy as np

from jaxlightning import Callback
from jaxlightning.data import Feed
from jaxlightning.parallel import Placement, make_mesh


def batch_of(value, rows=2):
    return {"x": np.full((rows, 1), value, np.float32)}


def feed(loader, devices=1, **arguments):
    placement = Placement(make_mesh(jax.devices()[:devices], None))
    return Feed(loader, placement, name="training", **arguments)


def values(batches):
    """What each `batch_of` a number holds."""
    return [float(batch.leaves[0][0, 0]) for batch in batches]


class Numbers:
    """An iterable of `count` batches, without a length; counts what it was asked for."""

    def __init__(self, count):
        self.count = count
        self.iterations = self.read = 0

    def __iter__(self):
        self.iterations += 1
        for i in range(self.count):
            self.read += 1
            yield batch_of(i)


class Stateful(Numbers):
    """As Grain has them: iterators with `get_state` and `set_state`."""

    def __iter__(self):
        self.iterations += 1
        return StatefulIterator(self)


class StatefulIterator:
    def __init__(self, of, state=dict):
        self.of, self.at = of, {"next": 0}

    def __iter__(self):
        return self

    def __next__(self):
        if self.at["next"] >= self.of.count:
            raise StopIteration
        self.of.read += 1
        self.at["next"] += 1
        return batch_of(self.at["next"] - 1)

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = dict(state)


class Stops(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise InterruptedError("as asked")
