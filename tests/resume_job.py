"""A run that tests cut short: `python resume_job.py FOLDER [options]` in a real process.

Prints a line a step, and at the end the hash of the final state and what was logged.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from tasks import Classifier, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning.callbacks import ExponentialMovingAverage, ModelCheckpoint
from jaxlightning.loggers import CSVLogger


class Kills(Callback):
    """Sends this process a signal at a point of the run."""

    def __init__(self, signum, step, where):
        self.signum, self.step, self.where = signum, step, where

    def _strike(self, trainer, where):
        if where == self.where and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self._strike(trainer, "step")

    def on_validation_batch_end(self, trainer, outputs, batch, batch_idx, dataloader_idx):
        if not trainer.sanity_checking:
            self._strike(trainer, "validation")

    def on_sanity_check_start(self, trainer):
        self._strike(trainer, "sanity")

    def on_validation_end(self, trainer):
        if not trainer.sanity_checking:
            self._strike(trainer, "validated")

    def on_train_epoch_end(self, trainer):
        self._strike(trainer, "epoch")


def digest(state):
    """The hash of all bits of a state."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            sha.update(np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes())
    return sha.hexdigest()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--signal", default=None)
    parser.add_argument("--step", type=int, default=-1)
    parser.add_argument("--where", default="step")
    parser.add_argument("--steps-per-dispatch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    options = parser.parse_args()
    callbacks = [
        ExponentialMovingAverage(0.9),
        ModelCheckpoint(
            dirpath=Path(options.folder) / "checkpoints",
            every_n_train_steps=5,
            monitor="train/loss",
            save_top_k=2,
            save_last=True,
        ),
    ]
    if options.signal:
        callbacks.append(Kills(getattr(signal, options.signal), options.step, options.where))
    trainer = quiet(
        max_epochs=3,
        enable_checkpointing=None,
        callbacks=callbacks,
        logger=CSVLogger(options.folder, version="log"),
        default_root_dir=options.folder,
        log_every_n_steps=3,
        val_check_interval=4,
        num_sanity_val_steps=1,
        accumulate_grad_batches=options.accumulate,
        steps_per_dispatch=options.steps_per_dispatch,
    )
    data = rows(44)
    trained = trainer.fit(
        Classifier(dropout=0.3),
        DataLoader(data, 4, shuffle=True, seed=1),
        DataLoader(data, 16),
        resume="auto",
    )
    log = Path(options.folder) / "jaxlightning_logs" / "log" / "metrics.csv"
    best = [Path(path).name for path in trainer.checkpoint_callback.best_k_models]
    result = {
        "state": digest(trainer.state),
        "task": digest(trained),
        "log": log.read_text().splitlines(),
        "best": sorted(best),
        "last": Path(trainer.checkpoint_callback.last_model_path).name,
        "step": trainer.global_step,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
