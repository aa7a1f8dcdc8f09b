"""Fits that fail and leave a capsule, for tests."""

import jax
import pytest
from checkpoints import bits
from replay_job import loader  # type: ignore[import-not-found]
from tasks import quiet

from jaxlightning import Callback
from jaxlightning._capsule import CAPSULE
from jaxlightning._checkpoint_arrays import named_leaves
from jaxlightning._checkpoint_read import load_arrays, read_metadata
from jaxlightning.callbacks import ReplayCapsule


def fail(folder, task, train=None, callbacks=(), error=FloatingPointError, **arguments):
    """A fit that leaves a capsule: its path, the error and the trainer."""
    arguments = {"max_epochs": 1, "log_every_n_steps": 2} | arguments
    capsule = ReplayCapsule(folder / "capsules")
    trainer = quiet(callbacks=[*callbacks, capsule], default_root_dir=folder, **arguments)
    with pytest.raises(error) as caught:
        trainer.fit(task, loader(task.kind) if train is None else train)
    return capsule.path, caught.value, trainer


def content(path):
    return read_metadata(path)[CAPSULE]


def same_state(path, state):
    """Whether a capsule's state has the bits of another one's."""
    kept = load_arrays(path, include="^state/")
    leaves = dict(named_leaves(state.replace(metrics={}, skipped=None)))
    arrays = {f"state/{k}": v for k, v in leaves.items() if isinstance(v, jax.Array)}
    assert kept.keys() == arrays.keys()
    return all(bits(kept[name]) == bits(array) for name, array in arrays.items())


ORDER = loader("log").order(0).tolist()
STEP = ORDER.index(17) // 4 + 1
"""Which step meets the bad row, at one batch a step."""
assert 2 < STEP < 9


class Stops(Callback):
    """Ends a fit after a step, as if it had been killed there."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.stop("here")

    def needs_state(self, step):
        return step == self.step
