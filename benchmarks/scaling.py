"""What more devices cost: work and talk of each, and the loop around a step.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --devices 1,2 --steps 100

For 1 to 8 virtual CPU devices, DDP and FSDP, weak scaling (as many rows for each device) and
strong scaling (as many in all): FLOPs a device, bytes of collectives a step, bytes that a device
holds of the state, and microseconds a step that the Trainer's loop takes beyond the compiled step
called by hand, a median over rounds that take turns. Every case runs in a process of its own, with
its devices. Virtual devices share the processor, so times of the step itself say nothing about
scaling, and are not printed. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxlightning import Callback, DataLoader, Trainer
from jaxlightning._fit import RUN_AHEAD
from jaxlightning._flops import analyse_flops
from jaxlightning.parallel._collectives import collectives, total_bytes

from ._task import Classifier

ROWS, FEATURES = 64, 32
"""Rows for each device in weak scaling, and for all of them in strong scaling."""


class Timed(Callback):
    """Seconds of the second epoch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        jax.block_until_ready(trainer._run.leaves)
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        jax.block_until_ready(trainer._run.leaves)
        self.seconds = time.perf_counter() - self._start


def measure(strategy: str, scaling: str, steps: int, rounds: int) -> dict[str, Any]:
    """One case, on the devices of this process."""
    devices = jax.device_count()
    rows = ROWS * (devices if scaling == "weak" else 1)
    random = np.random.default_rng(0)
    data = {
        "x": random.normal(size=(rows, FEATURES)).astype(np.float32),
        "y": random.integers(0, 10, rows).astype(np.int32),
    }
    batch = next(iter(DataLoader(data, rows)))

    def fit() -> tuple[Trainer, float]:
        timed = Timed()
        trainer = Trainer(
            max_epochs=2,
            strategy=strategy,
            mesh={"fsdp" if strategy == "fsdp" else "data": devices},
            callbacks=timed,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        placed = trainer._placement.put(batch)
        net = eqx.nn.MLP(FEATURES, 10, 128, depth=2, key=jax.random.key(0))
        trainer.fit(Independent(net), [placed] * steps)
        return trainer, timed.seconds

    over = []
    for _ in range(rounds):
        trainer, seconds = fit()
        run = trainer._run
        (program,) = run.program._compiled.values()
        leaves, arguments = run.leaves, jax.tree.leaves(trainer._placement.put(batch))
        for _ in range(2):
            start = time.perf_counter()
            ahead: deque[Any] = deque()
            for _ in range(steps):
                leaves, outputs = program(leaves, arguments)
                ahead.append(outputs)
                if len(ahead) > RUN_AHEAD:  # As the Trainer: XLA does not bound it on CPUs.
                    jax.block_until_ready(ahead.popleft())
            jax.block_until_ready((leaves, outputs))
            by_hand = time.perf_counter() - start
        over.append((seconds - by_hand) / steps * 1e6)
    held = [leaf.addressable_shards[0].data.nbytes for leaf in leaves]
    found = collectives(program)
    return {
        "benchmark": "scaling",
        "case": f"{strategy}_{scaling}",
        "devices": devices,
        "rows": rows,
        "flops_a_device": analyse_flops(trainer.train_step_jaxpr()).total // devices,
        "collective_bytes": total_bytes(found),
        "collectives": {c.kind: sum(d.kind == c.kind for d in found) for c in found},
        "state_bytes_a_device": sum(held),
        "loop_us_over_by_hand": round(statistics.median(over), 1),
    }


class Independent(Classifier):
    """The benchmarks' task, whose examples do not see each other."""

    independent_examples = True


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.case:
        strategy, scaling = arguments.case.split("_")
        print(json.dumps(measure(strategy, scaling, arguments.steps, arguments.rounds)))
        return
    for strategy in ("ddp", "fsdp"):
        for scaling in ("weak", "strong"):
            for devices in arguments.devices.split(","):
                command = [sys.executable, "-m", "benchmarks.scaling"]
                command += ["--case", f"{strategy}_{scaling}"]
                command += ["--steps", str(arguments.steps), "--rounds", str(arguments.rounds)]
                here = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
                done = subprocess.run(
                    command, env=os.environ | here, stdout=subprocess.PIPE, text=True, check=True
                )
                print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
