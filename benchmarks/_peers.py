"""The same loop in other frameworks, as their documentation writes it, with all extras off.

Each function trains an epoch to warm up and one to be timed. Needs `pip install -e '.[peers]'`.
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import optax

from ._workload import BATCH, CLASSES, FEATURES, LEARNING_RATE, WIDTH, Workload, network


def keras(work: Workload) -> float:
    """`Model.fit`, on the JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    class Stopwatch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seconds = time.perf_counter() - self.start  # `logs` was read: nothing runs

    model = keras.Sequential(
        [
            keras.layers.Input((FEATURES,)),
            keras.layers.Dense(WIDTH, activation="relu"),
            keras.layers.Dense(WIDTH, activation="relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    stopwatch = Stopwatch()
    options: dict[str, Any] = {"epochs": 2, "verbose": 0, "callbacks": [stopwatch]}
    if work.from_host:
        model.fit(work.x, work.y, batch_size=BATCH, shuffle=False, **options)
    else:
        batches = ((batch["x"], batch["y"]) for batch in itertools.cycle(work.resident))
        model.fit(batches, steps_per_epoch=work.steps, **options)
    return stopwatch.seconds


def reax(work: Workload) -> float:
    """`reax.Trainer`; the gradient is compiled as a whole, more than its documentation does."""
    import reax

    params, static = eqx.partition(network(), eqx.is_inexact_array)

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params: Any, batch: Any) -> Any:
        x, y = batch
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    class Module(reax.Module):
        def configure_model(self, stage: Any, batch: Any, /) -> None:
            if self.parameters() is None:
                self.set_parameters(params)

        def training_step(self, batch: Any, batch_idx: int, /) -> Any:
            return value_and_grad(self.parameters(), batch)

        def configure_optimizers(self) -> Any:
            tx = optax.adamw(LEARNING_RATE)
            return tx, tx.init(self.parameters())

    class Stopwatch(reax.TrainerListener):
        def on_train_epoch_start(self, trainer: Any, stage: Any, /) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, stage: Any, /) -> None:
            jax.block_until_ready(module.parameters())
            self.seconds = time.perf_counter() - self.start

    module, stopwatch = Module(), Stopwatch()
    trainer = reax.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        listeners=[stopwatch],
    )
    if work.from_host:
        loader = reax.data.ArrayLoader((work.x, work.y), batch_size=BATCH)
    else:  # a dataset of batches, one at a time
        pairs = [(batch["x"], batch["y"]) for batch in work.resident]
        loader = reax.data.ReaxDataLoader(pairs, batch_size=1, collate_fn=lambda batch: batch[0])
    trainer.fit(module, loader, max_epochs=2)
    return stopwatch.seconds


def lightning(work: Workload) -> float:
    """`pytorch_lightning.Trainer(barebones=True)`, on PyTorch."""
    import pytorch_lightning as pl
    import torch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(FEATURES, WIDTH),
                torch.nn.ReLU(),
                torch.nn.Linear(WIDTH, WIDTH),
                torch.nn.ReLU(),
                torch.nn.Linear(WIDTH, CLASSES),
            )

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), LEARNING_RATE)

    class Stopwatch(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    rows = torch.utils.data.TensorDataset(
        torch.from_numpy(work.x), torch.from_numpy(work.y).to(torch.int64)
    )
    loader: Any = torch.utils.data.DataLoader(rows, BATCH)
    if not work.from_host:  # a dataset of batches, one at a time
        loader = torch.utils.data.DataLoader(list(loader), batch_size=None)
    torch.set_num_threads(1)  # more would only wait for each other
    stopwatch = Stopwatch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            barebones=True, accelerator="cpu", devices=1, max_epochs=2, callbacks=[stopwatch]
        )
        trainer.fit(Module(), loader)
    return stopwatch.seconds
