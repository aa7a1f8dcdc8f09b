"""Microseconds a step, beside a hand-written loop: what a framework costs where nothing else does.

    python -m benchmarks.loop_overhead
    python -m benchmarks.loop_overhead --steps 500 --rounds 3 --cases hand_written,barebones

Trains a tiny network for two epochs and times the second. `loop_overhead` gives every case batches
that lie on the device; `loop_overhead_from_host` has it feed them from numpy rows. Cases take
turns, and the median over rounds counts. Other frameworks take part where they are installed
(`pip install -e '.[peers]'`). Prints one JSON object a line; a table goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from jaxlightning import Callback, DataLoader, Trainer

from . import _peers
from ._task import Classifier
from ._workload import BATCH, LEARNING_RATE, Workload, network

Case = Callable[[Workload], float]
"""Trains two epochs, and returns how many seconds the second one took."""


def hand_written(work: Workload) -> float:
    """`jax.jit` with donation, on plain lists of arrays."""
    params = [(layer.weight, layer.bias) for layer in network().layers]
    tx = optax.adamw(LEARNING_RATE)
    opt_state = tx.init(params)

    def loss_of(params: PyTree, batch: PyTree) -> jax.Array:
        *hidden, (weight, bias) = params
        x = batch["x"]
        for w, b in hidden:
            x = jax.nn.relu(x @ w.T + b)
        logits = x @ weight.T + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, opt_state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for _ in range(2):
        start = time.perf_counter()
        for batch in work.batches():
            params, opt_state, loss = step(params, opt_state, batch)
        jax.block_until_ready((params, loss))
    return time.perf_counter() - start


def filter_jit(work: Workload) -> float:
    """The loop of Equinox's documentation."""
    net = network()
    tx = optax.adamw(LEARNING_RATE)
    opt_state = tx.init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_value_and_grad
    def value_and_grad(net: eqx.nn.MLP, batch: PyTree) -> jax.Array:
        logits = jax.vmap(net)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    @eqx.filter_jit
    def step(net: eqx.nn.MLP, opt_state: PyTree, batch: PyTree) -> Any:
        loss, grads = value_and_grad(net, batch)
        params = eqx.filter(net, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(net, updates), opt_state, loss

    for _ in range(2):
        start = time.perf_counter()
        for batch in work.batches():
            net, opt_state, loss = step(net, opt_state, batch)
        jax.block_until_ready((eqx.filter(net, eqx.is_array), loss))
    return time.perf_counter() - start


class Stopwatch(Callback):
    """Times epochs from hooks that cost a step nothing; that of the last one is kept."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        jax.block_until_ready(trainer.state)
        self.seconds = time.perf_counter() - self.start


def _fit(work: Workload, **arguments: Any) -> float:
    stopwatch = Stopwatch()
    callbacks = [stopwatch, *arguments.pop("callbacks", ())]
    trainer = Trainer(max_epochs=2, devices=1, callbacks=callbacks, **arguments)
    rows = {"x": work.x, "y": work.y}
    trainer.fit(Classifier(network()), DataLoader(rows, BATCH) if work.from_host else work.resident)
    return stopwatch.seconds


def barebones(work: Workload) -> float:
    """Our Trainer with everything off."""
    return _fit(work, barebones=True)


def loaded(work: Workload) -> float:
    """Our Trainer with a progress bar, two loggers and checkpoints."""
    from jaxlightning.callbacks import ModelCheckpoint, TQDMProgressBar
    from jaxlightning.loggers import CSVLogger, TensorBoardLogger

    with tempfile.TemporaryDirectory() as folder:
        return _fit(
            work,
            default_root_dir=folder,
            logger=[CSVLogger(folder), TensorBoardLogger(folder)],
            callbacks=[TQDMProgressBar(), ModelCheckpoint()],
            enable_model_summary=False,
        )


def dispatch_50(work: Workload) -> float:
    """As `barebones`, fifty steps a program."""
    return _fit(work, barebones=True, steps_per_dispatch=50)


OURS: dict[str, Case] = {
    case.__name__: case for case in (hand_written, filter_jit, barebones, loaded, dispatch_50)
}
PEERS: dict[str, tuple[str, Case]] = {
    "keras": ("keras", _peers.keras),
    "reax": ("reax", _peers.reax),
    "lightning": ("pytorch_lightning", _peers.lightning),
}


def installed_cases() -> dict[str, Case]:
    """Ours, and the peers that can be imported."""
    found = {name: case for name, (module, case) in PEERS.items() if _installed(module)}
    return OURS | found


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Silences progress bars and notices, and hides from the garbage collector what is there."""
    logging.disable(logging.INFO)
    gc.collect()
    gc.freeze()
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)


def measure(cases: dict[str, Case], work: Workload, rounds: int) -> dict[str, float]:
    """Median microseconds a step of each case; the cases take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            with _undisturbed():
                seconds[name].append(case(work))
    return {name: statistics.median(found) / work.steps * 1e6 for name, found in seconds.items()}


def report(benchmark: str, medians: dict[str, float]) -> None:
    unit = medians["hand_written"]
    print(f"\n{benchmark:25} µs a step   × hand-written   more than it", file=sys.stderr)
    for case, us in medians.items():
        row = {
            "benchmark": benchmark,
            "case": case,
            "us_per_step": round(us, 2),
            "ratio_to_hand_written": round(us / unit, 3),
        }
        print(json.dumps(row), flush=True)
        print(f"{case:25} {us:9.1f} {us / unit:16.2f} {us - unit:+14.1f}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=2000, help="steps in an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="how often each case is run")
    parser.add_argument("--cases", default="", help="some of them only, separated by commas")
    options = parser.parse_args(arguments)
    cases = installed_cases()
    chosen = [name for name in options.cases.split(",") if name]
    for name in chosen:
        if name not in cases:
            parser.error(f"there is no case `{name}`, or it is not installed: {', '.join(cases)}")
    if chosen:
        cases = {name: cases[name] for name in dict.fromkeys(["hand_written", *chosen])}
    for benchmark, from_host in (("loop_overhead", False), ("loop_overhead_from_host", True)):
        work = Workload(options.steps, from_host=from_host)
        report(benchmark, measure(cases, work, options.rounds))


if __name__ == "__main__":
    main()
