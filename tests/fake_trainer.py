"""A Trainer without training: plays a fit to callbacks, hook by hook, with metrics from a script.

Saves with the real `CheckpointStore`, so that order and safety of saves and deletions are real.
"""

import json
import os
from types import SimpleNamespace

import jax.numpy as jnp

from jaxlightning._callback import Bus
from jaxlightning._checkpoint import CheckpointStore, read_metadata


class FakeTrainer:
    """`validation(step)` and `training(step)` give the metrics that are new after that step."""

    def __init__(
        self,
        *callbacks,
        root=".",
        batches=4,
        epochs=1,
        max_steps=None,
        val_every=None,
        val_epochs=1,
        validation=None,
        training=lambda step: {"train/loss": 1.0 / step},
        **attributes,
    ):
        self.bus = Bus(callbacks)
        self.callbacks = self.bus.callbacks
        self.batches, self.epochs, self.max_steps = batches, epochs, max_steps
        self.val_every, self.val_epochs = val_every or batches, val_epochs
        self.validation, self.training = validation, training
        self.global_step = self.current_epoch = self.batch_idx = 0
        self.is_last_batch = self.should_stop = self.sanity_checking = False
        self.fast_dev_run = False
        self.stop_reason = None
        self.callback_metrics = {}
        self.num_val_batches = [1] if validation else []
        self.default_root_dir, self.log_dir = str(root), None
        self.log_every_n_steps, self.steps_per_dispatch = 50, 1
        self.estimated_stepping_batches = epochs * batches
        self.saved, self.deleted, self.requests = [], [], []
        self.resumed_at = None
        self.store = None
        self.__dict__.update(attributes)

    # What callbacks ask for

    def stop(self, reason, *, remembered=True):
        self.should_stop, self.stop_reason = True, reason

    def save_checkpoint(self, path, weights_only=False):
        """As the Trainer's: a request, which is served after all callbacks have been told."""
        self.requests.append((*os.path.split(path), weights_only))

    def delete_checkpoint(self, path):
        self.deleted.append((self.global_step, os.path.basename(path)))
        self._open_store(os.path.dirname(path)).delete(path)

    def wait_for_checkpoints(self):
        if self.store:
            self.store.wait()

    def _open_store(self, folder):
        self.store = self.store or CheckpointStore(folder)
        return self.store

    def _save_requested(self):
        requests, self.requests = self.requests, []
        for folder, name, weights_only in requests:
            at = [self.global_step, self.current_epoch, self.batch_idx, self.is_last_batch]
            metadata = {"callbacks": self.bus.state_dict(), "at": at, "point": self.point}
            json.dumps(metadata, allow_nan=False)
            store = self._open_store(folder)
            store.save(self.global_step, {"x": jnp.arange(3)}, metadata, name)
            self.saved.append((self.global_step, self.point, name, weights_only))

    # The run

    def fit(self, resume=None, until=None):
        """Trains from the start or from a checkpoint; `until` is a step before which to crash."""
        bus = self.bus
        try:
            bus.setup(self, "fit")
            if resume is not None:
                self._restore(resume)
            bus.on_fit_start(self)
            if self.validation and resume is None:
                self.sanity_checking = True
                self._validate({"val/loss": -100.0, "val/accuracy": 100.0})
                self.callback_metrics.clear()
                self.sanity_checking = False
            bus.on_train_start(self)
            self._train(until)
            self._checkpoint("end")
            bus.on_train_end(self)
            bus.on_fit_end(self)
        except Exception as error:
            self._checkpoint("exception")
            bus.on_exception(self, error)
            raise
        finally:
            bus.teardown(self, "fit")
            if self.store:
                self.store.close()
                self.store = None
        return self

    def validate(self, metrics):
        self.bus.setup(self, "validate")
        self._validate(metrics)
        self.bus.teardown(self, "validate")

    def _restore(self, path):
        metadata = read_metadata(path)
        self.bus.load_state_dict(metadata["callbacks"])
        self.global_step, self.current_epoch, self.batch_idx, self.is_last_batch = metadata["at"]
        self.resumed_at = metadata["point"]

    def _train(self, until):
        while self.current_epoch < self.epochs and not self._over():
            start = self.batch_idx + 1 if self.resumed_at else 0
            if self.resumed_at != "epoch":
                self._train_epoch(start, until)
            self.resumed_at = None
            if self.is_last_batch:
                self.current_epoch += 1
                self.batch_idx = 0

    def _train_epoch(self, start, until):
        for batch_idx in range(start, self.batches):
            self.batch_idx = batch_idx
            if self.global_step == until:
                raise RuntimeError("killed")
            self.global_step += 1
            self.is_last_batch = self.batch_idx == self.batches - 1
            outputs = {}
            self.callback_metrics.update(self.training(self.global_step))
            self.bus.on_train_batch_end(self, outputs, None, self.batch_idx)
            if self._validation_due():
                self._validate(self.validation(self.global_step))
            self._checkpoint("step")
            if self._over():
                break
        self.bus.on_train_epoch_end(self)
        self._checkpoint("epoch")

    def _validation_due(self):
        if not self.validation or (self.current_epoch + 1) % self.val_epochs:
            return False
        return (self.batch_idx + 1) % self.val_every == 0

    def _validate(self, metrics):
        self.bus.on_validation_start(self)
        self.callback_metrics.update(metrics)
        self.bus.on_validation_end(self)

    def _checkpoint(self, point):
        self.point = point
        self.bus.on_checkpoint(self, point)
        self._save_requested()

    def _over(self):
        return self.should_stop or self.global_step == self.max_steps


def holder(opt_state):
    """A stand-in for a `TrainState` that holds an optimizer's state."""

    def replace(**fields):
        return holder(**fields)

    return SimpleNamespace(opt_state=opt_state, replace=replace)


def script(values, every=4):
    """A validation whose k-th call, after step k·every, gives `values[k - 1]` as `val/loss`."""
    return lambda step: {"val/loss": float(values[step // every - 1])}
