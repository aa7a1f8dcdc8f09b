"""Seconds from `fit(resume="auto")` to the end of its first step, early in a run and late.

    python -m benchmarks.resume_time
    python -m benchmarks.resume_time --late 20000 --rounds 3

Trains a tiny network for so many steps within one epoch of shuffled rows, really, and goes on from
the checkpoint at its end, in turns from the early one and the late one. The loader's position is
one number, so nothing that was skipped is read: the rows it reads are counted, and the times
should not differ. Most of the time is compilation, which is given apart.

Prints one JSON object a line; a table goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxlightning import Callback, DataLoader, Trainer
from jaxlightning.callbacks import ModelCheckpoint

from ._stores import machine
from ._task import Classifier
from ._workload import BATCH, CLASSES, FEATURES, network


class Rows:
    """Rows that are made when they are asked for, which is written down."""

    def __init__(self, count: int):
        self.count = count
        self.asked: list[np.ndarray] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Int[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
        self.asked.append(rows)
        x = np.sin(rows[:, None] * np.arange(1, FEATURES + 1)).astype(np.float32)
        return {"x": x, "y": (rows % CLASSES).astype(np.int32)}

    def fingerprint(self) -> str:
        return f"{self.count} sines"


class FirstStep(Callback):
    """Notes when the first step of a fit has ended, on the device too."""

    ended: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ended is None:
            jax.block_until_ready(trainer.state)
            self.ended = time.perf_counter()


class Resumed(NamedTuple):
    seconds: float
    compiling: float
    read: int
    """Batches read, besides two looks at the shapes of batches."""
    skipped: int
    """Those of them that come before the step gone on from."""


def fit(folder: Path, steps: int, epoch: int, **how: Any) -> tuple[Trainer, FirstStep, DataLoader]:
    first = FirstStep()
    saves = ModelCheckpoint(folder, every_n_train_steps=steps, save_top_k=-1)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=steps, devices=1, logger=False, callbacks=[first, saves], **quiet)
    loader = DataLoader(Rows(epoch * BATCH), BATCH, shuffle=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        trainer.fit(Classifier(network()), loader, **how)
    return trainer, first, loader


def resume(folder: Path, step: int, epoch: int) -> Resumed:
    """Goes on for one step, and removes what that saved."""
    start = time.perf_counter()
    trainer, first, loader = fit(folder, step + 1, epoch, resume="auto")
    assert first.ended is not None
    for path in folder.glob(f"*step={step + 1}"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    asked = loader.source.asked[2:]
    skipped = sum(np.isin(rows, loader.order(0)[: step * BATCH]).any() for rows in asked)
    return Resumed(first.ended - start, trainer.compile_s, len(asked), int(skipped))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--early", type=int, default=10, help="steps")
    parser.add_argument("--late", type=int, default=100_000, help="steps")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is gone on from")
    options = parser.parse_args(arguments)
    steps = (options.early, options.late)
    epoch = options.late + 1000
    found: dict[int, list[Resumed]] = {step: [] for step in steps}
    with tempfile.TemporaryDirectory() as root:
        folders = {step: Path(root) / str(step) for step in steps}
        for step, folder in folders.items():
            fit(folder, step, epoch)
        for number in range(options.rounds + 1):
            turns = list(folders.items())
            for step, folder in turns if number % 2 else reversed(turns):
                took = resume(folder, step, epoch)
                if number:  # the first round warms up
                    found[step].append(took)
    unit = statistics.median(took.seconds for took in found[options.early])
    print(f"{'from step':>12}{'seconds':>10}{'compiling':>11}{'× early':>9}", file=sys.stderr)
    for step, rounds in found.items():
        seconds = statistics.median(took.seconds for took in rounds)
        compiling = statistics.median(took.compiling for took in rounds)
        row = {
            "benchmark": "resume_time",
            "step": step,
            "seconds_to_first_step": round(seconds, 4),
            "compiling_s": round(compiling, 4),
            "ratio_to_early": round(seconds / unit, 3),
            "batches_read": max(took.read for took in rounds),
            "skipped_batches_read": max(took.skipped for took in rounds),
        }
        print(json.dumps(row | machine()), flush=True)
        print(f"{step:12}{seconds:10.3f}{compiling:11.3f}{seconds / unit:9.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
