"""A run that tests cut short: `python resume_job.py FOLDER [options]` in a real process.

Says on stdout what it is about to do (`compile`, `sanity`, `step 3`, `disk`, ...), so that
whoever strikes from outside knows when, and at the end, as JSON, the hash of the final state and
all that was logged and decided. `python resume_job.py --serve` is the fork server of `jobs.py`.
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent))

import tiny_albert
from tasks import Classifier, quiet, rows

from albert_task import AlbertForMaskedLM
from jaxlightning import Callback, DataLoader, DataModule, Mean, TaskModule
from jaxlightning._checkpoint import find_checkpoints
from jaxlightning._program import Program
from jaxlightning.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    ModelCheckpoint,
    ReduceLROnPlateau,
)
from jaxlightning.loggers import CSVLogger, JSONLLogger


def tell(what):
    """At once and whole, from whichever thread."""
    os.write(1, f"{what}\n".encode())


# The tasks


class Normed(eqx.Module):
    norm: eqx.nn.BatchNorm
    net: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="batch", momentum=0.9)
        self.net = eqx.nn.MLP(6, 3, 8, 1, key=key)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.net(x), state


class WithBatchNorm(TaskModule):
    """Running statistics, which are buffers in `eqx.nn.State`."""

    net: Normed
    state: eqx.nn.State

    def training_step(self, batch, *, key):
        run = jax.vmap(self.net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = run(batch["x"], self.state)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return Mean.over(nll), {}, eqx.tree_at(lambda t: t.state, self, state)

    def configure_optimizers(self):
        return optax.adam(0.05)


def mlp():
    return Classifier(dropout=0.3), rows(44)


def batchnorm():
    return WithBatchNorm(*eqx.nn.make_with_state(Normed)(jax.random.key(0))), rows(44)


def albert():
    """Masks are drawn on the device, at every step anew."""
    config = tiny_albert.DROPPING
    recipe = {"optimizer": "adamw", "learning_rate": 0.01, "warmup_steps": 3}
    task = AlbertForMaskedLM.init(config, jax.random.key(0), **recipe)
    return task, {"tokens": tiny_albert.rows(44)}


TASKS = {"mlp": mlp, "batchnorm": batchnorm, "albert": albert}


# Striking from inside, and telling those who strike from outside


class Strikes(Callback):
    """Sends this process a signal at a point of the run, once, and says where the run is."""

    def __init__(self, name, step, where):
        self.signum = None if name is None else getattr(signal, name)
        self.step, self.where = step, where

    def at(self, where, step=None):
        if self.signum is not None and where == self.where and step in (None, self.step):
            signum, self.signum = self.signum, None
            os.kill(os.getpid(), signum)
            return True
        return False

    def soon(self, where):
        threading.Timer(0.05, self.at, (where,)).start()

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        tell(f"step {trainer.global_step}")
        self.at("step", trainer.global_step)
        if self.where == "data" and trainer.global_step == self.step:
            self.soon("data")  # the next batch never comes

    def on_validation_batch_end(self, trainer, outputs, batch, batch_idx, dataloader_idx):
        if not trainer.sanity_checking:
            self.at("validation", trainer.global_step)

    def on_sanity_check_start(self, trainer):
        tell("sanity")
        self.at("sanity", trainer.global_step)

    def on_validation_end(self, trainer):
        if not trainer.sanity_checking:
            self.at("validated", trainer.global_step)

    def on_train_epoch_end(self, trainer):
        self.at("epoch", trainer.global_step)

    def on_fit_end(self, trainer):
        self.at("end")


class Data(DataModule):
    def __init__(self, data, strikes):
        self.data, self.strikes = data, strikes

    def prepare_data(self):
        self.strikes.at("prepare")

    def setup(self, stage):
        self.strikes.at("setup")

    def train_dataloader(self):
        loader = DataLoader(self.data, 4, shuffle=True, seed=1)
        batches = loader.batches
        if self.strikes.where in ("first", "data"):
            loader.batches = lambda epoch, start: self.stalling(batches(epoch, start), start)
        return loader

    def stalling(self, batches, start):
        for number, batch in enumerate(batches, start):
            if self.strikes.where == "first":
                self.strikes.soon("first")
            if self.strikes.where == "first" or number == self.strikes.step:
                time.sleep(1000)
            yield batch

    def val_dataloader(self):
        return DataLoader(self.data, 16)


def patch(strikes, options):
    """Tells of compilations and of each wait for the disk, and slows the latter down, or, once
    there was a strike, has it wait for ever."""
    compile_, fsync = Program.compile, os.fsync
    written = []

    def compiling(program, kept, varying):
        if program._signature(varying) not in program._compiled:
            tell("compile")
            strikes.at("compile")
        return compile_(program, kept, varying)

    def syncing(file):
        tell("disk")
        written.append(file)
        if strikes.step <= len(written):
            strikes.at("disk")
        saves = threading.current_thread() is not threading.main_thread()
        if options.stuck_disk and saves and strikes.signum is None:
            tell("stuck")
            time.sleep(1000)
        time.sleep(options.slow_disk)
        fsync(file)

    Program.compile, os.fsync = compiling, syncing


# The run


def digest(state):
    """The hash of all bits of a state."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            sha.update(np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes())
    return sha.hexdigest()


def parsed(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--task", default="mlp", choices=TASKS)
    parser.add_argument("--signal", default=None)
    parser.add_argument("--step", type=int, default=-1)
    parser.add_argument("--where", default="step")
    parser.add_argument("--steps-per-dispatch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--slow-disk", type=float, default=0.0)
    parser.add_argument("--stuck-disk", action="store_true")
    parser.add_argument("--no-cache", action="store_true")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parsed(arguments)
    # As in a shell's foreground, wherever the tests themselves run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.no_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    strikes = Strikes(options.signal, options.step, options.where)
    patch(strikes, options)
    callbacks = [
        ExponentialMovingAverage(0.9),
        ReduceLROnPlateau("val/loss", patience=0, threshold=0.1, factor=0.5),
        EarlyStopping("val/loss", patience=3, min_delta=0.05),
        ModelCheckpoint(
            dirpath=Path(options.folder) / "checkpoints",
            every_n_train_steps=5,
            monitor="train/loss",
            save_top_k=2,
            save_last=True,
        ),
        strikes,
    ]
    places = (options.folder, "logs", "log")
    trainer = quiet(
        max_epochs=3,
        enable_checkpointing=None,
        callbacks=callbacks,
        logger=[CSVLogger(*places), JSONLLogger(*places)],
        default_root_dir=options.folder,
        log_every_n_steps=3,
        val_check_interval=4,
        num_sanity_val_steps=1,
        accumulate_grad_batches=options.accumulate,
        steps_per_dispatch=options.steps_per_dispatch,
    )
    task, data = TASKS[options.task]()
    trained = trainer.fit(task, datamodule=Data(data, strikes), resume="auto")
    logs = Path(options.folder, "logs", "log")
    saves = trainer.checkpoint_callback
    result = {
        "state": digest(trainer.state),
        "task": digest(trained),
        "csv": list(csv.reader((logs / "metrics.csv").read_text().splitlines())),
        "jsonl": (logs / "metrics.jsonl").read_text().splitlines(),
        "best": sorted(Path(path).name for path in saves.best_k_models),
        "last": Path(saves.last_model_path).name,
        "kept": [entry.path.name for entry in find_checkpoints(saves.dirpath)],
        "decided": [callback.state_dict() for callback in callbacks[1:3]],
        "step": trainer.global_step,
    }
    tell(json.dumps(result))


# The fork server


def serve():
    """For each line of stdin, `{"arguments": [...], "out": FIFO, "err": FILE}`, forks a process
    that has all modules but no backend yet; says its pid, and how it ended."""
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(0)
            for file, descriptor in (("out", 1), ("err", 2)):
                opened = os.open(order[file], os.O_WRONLY | os.O_CREAT)
                os.dup2(opened, descriptor)
                os.close(opened)
            return main(order["arguments"])
        tell(pid)
        tell(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
