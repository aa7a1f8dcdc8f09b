"""Milliseconds of a checkpoint: how long a training waits for it, and until it is on the disk.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --rounds 3 --cases tiny,albert

Saves four states: twelve large leaves, 300 small and 1,500 tiny ones, and ALBERT-base with AdamW's
moments. `copy` is `jax.tree.map(numpy.array, state)`: each leaf once to new memory of the host,
with which a save has to begin if training may change the state meanwhile. `orbax` is its
`CheckpointManager` with its defaults (`pip install -e '.[peers]'`). All take turns, each begins
another round, and the median over rounds counts. Ours verifies by checksums and waits for the
disk; Orbax does neither for all of what it writes.

Prints one JSON object a line; a table goes to standard error.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ._stores import STORES, Store, machine, seconds


def leaves(count: int, *shape: int) -> PyTree:
    rng = np.random.default_rng(0)
    return {f"leaf {i}": jnp.asarray(rng.random(shape, np.float32)) for i in range(count)}


def albert() -> PyTree:
    """The arrays of ALBERT-base for masked language modelling, and AdamW's moments of them."""
    from albert_task import AlbertConfig, AlbertForMaskedLM

    task = AlbertForMaskedLM.init(AlbertConfig.preset("base"), jax.random.key(0))
    arrays = eqx.filter(task, eqx.is_inexact_array)
    opt_state = optax.adamw(1e-4).init(arrays)
    # Moments of a run are no zeros.
    moments = jax.tree.map(
        lambda x: x + 1e-3 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) if x.ndim else x,
        opt_state,
    )
    return {"params": jax.tree.leaves(arrays), "opt_state": jax.tree.leaves(moments)}


CASES: dict[str, Callable[[], PyTree]] = {
    "large": lambda: leaves(12, 1024, 1024),
    "small": lambda: leaves(300, 64, 64),
    "tiny": lambda: leaves(1500, 16),
    "albert": albert,
}


def fresh(state: PyTree) -> PyTree:
    """As it comes out of a step: new arrays, that have never been on the host."""
    return jax.block_until_ready(jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state))


def copy(state: PyTree) -> float:
    return seconds(lambda: jax.tree.map(np.array, state))


def save(store: Store, step: int, state: PyTree) -> tuple[float, float]:
    """How long a save blocks, and how long it takes in all."""
    blocking = seconds(store.save, step, state)
    return blocking, blocking + seconds(store.wait)


def measure(state: PyTree, names: Sequence[str], rounds: int, root: Path) -> dict[str, PyTree]:
    """Seconds by store, `[(blocking, total), ...]`; of `copy` both are the same."""
    stores = {name: STORES[name](root / name) for name in names}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("copy", *names)}
    order = list(found)
    for step in range(rounds + 1):
        for name in order:
            new = fresh(state)
            gc.collect()
            if name == "copy":
                took = (copy(new),) * 2
            else:
                took = save(stores[name], step, new)
            if step:  # the first round warms up
                found[name].append(took)
        order = order[1:] + order[:1]
    for store in stores.values():
        store.close()
    return found


def report(case: str, state: PyTree, found: dict[str, PyTree]) -> None:
    median = {
        name: [1e3 * statistics.median(took[i] for took in rounds) for i in (0, 1)]
        for name, rounds in found.items()
    }
    arrays = jax.tree.leaves(state)
    about = {
        "benchmark": "checkpoint",
        "case": case,
        "leaves": len(arrays),
        "MiB": round(sum(x.nbytes for x in arrays) / 2**20, 1),
    }
    unit, other = median["copy"][0], median.get("orbax", [0, 0])[1]
    for name, (blocking, total) in median.items():
        row = about | {"store": name, "blocking_ms": round(blocking, 2)}
        row["blocking_to_copy"] = round(blocking / unit, 2)
        if name != "copy":
            row["total_ms"] = round(total, 1)
            if other:
                row["total_to_orbax"] = round(total / other, 2)
        print(json.dumps(row | machine()), flush=True)
        totals = "" if name == "copy" else f"{total:12.1f}"
        print(f"{case:8}{name:8}{blocking:12.2f}{blocking / unit:10.2f}{totals}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=9, help="how often each is measured")
    parser.add_argument("--cases", default="", help=f"some of {', '.join(CASES)}, with commas")
    parser.add_argument("--folder", default=None, help="where to write; by default that for /tmp")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.cases.split(",") if name] or list(CASES)
    for name in chosen:
        if name not in CASES:
            parser.error(f"there is no case `{name}`: {', '.join(CASES)}")
    orbax = importlib.util.find_spec("orbax") is not None
    names = [name for name in STORES if name != "orbax" or orbax]
    print(f"{'case':8}{'':8}{'blocking ms':>12}{'× copy':>10}{'total ms':>12}", file=sys.stderr)
    for case in chosen:
        state = CASES[case]()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            report(case, state, measure(state, names, options.rounds, Path(folder)))


if __name__ == "__main__":
    main()
