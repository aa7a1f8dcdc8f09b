"""Every argument of the Trainer does what its documentation says.

`lightning_arguments.json` is a recording of Lightning's Trainer with the same arguments, made by
`record_lightning_arguments.py`, which says what the letters stand for.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import quiet

from jaxlightning import Callback, DataLoader, DataModule, Mean, TaskModule, Trainer

RECORDED = json.loads((Path(__file__).parent / "lightning_arguments.json").read_text())["runs"]


class Line(TaskModule):
    """The cheapest task there is: its gradient is the mean of the rows."""

    weight: jax.Array = eqx.field(converter=jnp.asarray)

    def training_step(self, batch, *, key):
        return Mean.over(batch["x"] @ self.weight)

    def predict_step(self, batch, *, key):
        return batch["x"] @ self.weight

    def configure_optimizers(self):
        return optax.sgd(0.1)


def line(value=1.0):
    return Line(np.full(3, value, np.float32))


def counted(rows):
    """Rows that can be told apart: row i is i."""
    return {"x": np.tile(np.arange(rows, dtype=np.float32)[:, None], 3)}


class Events(Callback):
    """Writes down what happens, one letter an event, and asks for an end after some steps."""

    def __init__(self, stops_at_step=None):
        self.events = ""
        self.stops_at_step = stops_at_step

    def on_sanity_check_start(self, trainer):
        self.events += "S"

    def on_train_epoch_start(self, trainer):
        self.events += "E"

    def on_train_epoch_end(self, trainer):
        self.events += "X"

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.events += "t"
        if trainer.global_step == self.stops_at_step:
            trainer.stop("asked for")

    def on_validation_start(self, trainer):
        self.events += "" if trainer.sanity_checking else "V"

    def on_validation_batch_end(self, trainer, outputs, batch, batch_idx, dataloader_idx):
        self.events += "v"


class FiveAndThree(DataModule):
    """Five training batches, three of validation."""

    def __init__(self, events):
        self.events = events

    def train_dataloader(self):
        self.events.events += "L"
        return DataLoader(counted(5), 1)

    def val_dataloader(self):
        return DataLoader(counted(3), 1)


def named(arguments):
    return ",".join(f"{name}={value}" for name, value in arguments.items())


# How long, how much, how often: against Lightning


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: named(run["arguments"]))
def test_does_what_lightning_does(run):
    arguments = dict(run["arguments"])
    events = Events(arguments.pop("stops_at_step", None))
    if "barebones" in arguments:
        trainer = Trainer(devices=1, callbacks=events, **arguments)
    else:
        defaults = {"num_sanity_val_steps": None, "callbacks": events}
        trainer = quiet(**defaults | arguments)
    trainer.fit(line(), FiveAndThree(events))
    # We ask for the first training loader before the sanity check, Lightning after it.
    assert events.events.replace("L", "", 1) == run["events"].replace("L", "", 1)
