"""A run with a spike, and what it is compared with: for the tests of rewinding."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from steps import assert_bitwise  # type: ignore[import-not-found]
from tasks import quiet

from jaxlightning import Callback, Mean, TaskModule
from jaxlightning._task import buffer
from jaxlightning.callbacks import LossSpike, ModelCheckpoint
from jaxlightning.loggers import JSONLLogger

EPOCH = 24


class Noisy(TaskModule):
    """Least squares with momentum, a buffer, and noise if asked for, which compiles slowly."""

    weight: jax.Array
    seen: jax.Array = buffer()
    noise: float = eqx.field(static=True, default=0.0)

    @classmethod
    def initial(cls, noise=0.0):
        return cls(jnp.asarray([1.0, -2.0]), jnp.int32(0), noise)

    def training_step(self, batch, *, key):
        out = batch["x"] @ self.weight
        if self.noise:
            out += self.noise * jax.random.normal(key, out.shape)
        task = eqx.tree_at(lambda t: t.seen, self, self.seen + 1)
        return Mean.over((out - batch["y"]) ** 2 + 1), {}, task

    def validation_step(self, batch, *, key):
        return Mean.over((batch["x"] @ self.weight - batch["y"]) ** 2)

    def configure_optimizers(self):
        return optax.sgd(0.01, momentum=0.9)


def batches(count=EPOCH, poisoned=(), poison=1e3, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        x = rng.normal(size=(4, 2)).astype(np.float32)
        y = x @ np.asarray([1.1, -1.9], np.float32)
        made.append({"x": x, "y": y * np.float32(poison) if number in poisoned else y})
    return made


def without(made, first, last):
    return [*made[:first], *made[last:]]


class Epochs:
    """A loader whose epochs are lists of batches, of any length."""

    def __init__(self, *epochs):
        self.epochs = epochs

    def batches(self, epoch, start=0):
        return iter(self.epochs[epoch][start:])


def trainer(folder, *callbacks, saves=None, **arguments):
    every = {"every_n_train_steps": 4, "save_top_k": -1}
    saver = ModelCheckpoint(Path(folder) / "checkpoints", **every | (saves or {}))
    defaults = {
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "enable_checkpointing": None,
        "logger": JSONLLogger(folder, version=0),
        "default_root_dir": folder,
        "callbacks": [*callbacks, saver],
    }
    return quiet(**defaults | arguments)


def rewinding(**arguments):
    return LossSpike(**{"action": "rewind", "window": 3} | arguments)


def log(folder):
    return (Path(folder) / "jaxlightning_logs/version_0/metrics.jsonl").read_text()


def assert_same_runs(one, other, folders):
    """In every bit of the state, and in all that was logged."""
    assert one.global_step == other.global_step
    names = jax.tree.structure(eqx.filter(one.state, eqx.is_array))
    assert names == jax.tree.structure(eqx.filter(other.state, eqx.is_array))
    keyless = [eqx.tree_at(lambda s: s.key, x.state, None) for x in (one, other)]
    assert_bitwise(*keyless)
    assert one.callback_metrics == other.callback_metrics
    assert log(folders[0]) == log(folders[1]) != ""


def reference(folder, data, noise=0.0, **arguments):
    """A run on `data` that has no `LossSpike`, and that rewinds nothing."""
    one = trainer(folder, **arguments)
    one.fit(Noisy.initial(noise), data)
    return one


class Kills(Callback):
    """Ends the process, so to speak, the first time that a hook is called at a step."""

    def __init__(self, hook, step, times=1, error=SystemExit):
        self.hook, self.step, self.left, self.error = hook, step, times, error

    def _strike(self, trainer, hook):
        if hook == self.hook and trainer.global_step == self.step:
            self.left -= 1
            if self.left == 0:
                raise self.error("killed")

    def on_train_batch_end(self, trainer, *_):
        self._strike(trainer, "step")

    def on_log(self, trainer, metrics, step):
        self._strike(trainer, "log")

    def on_load_checkpoint(self, trainer, checkpoint):
        self._strike(trainer, "load")

    def on_save_checkpoint(self, trainer, checkpoint):
        self._strike(trainer, "save")

    def on_checkpoint(self, trainer, point):
        self._strike(trainer, "checkpoint")


class Stream:
    """A one-pass iterator that knows where it is."""

    def __init__(self, made, stateful):
        self.made, self.at = made, 0
        if stateful:
            self.get_state = lambda: {"at": self.at}
            self.set_state = lambda state: setattr(self, "at", state["at"])

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.made):
            raise StopIteration
        self.at += 1
        return self.made[self.at - 1]
