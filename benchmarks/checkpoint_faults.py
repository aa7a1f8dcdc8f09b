"""What becomes of checkpoints when something goes wrong: in our store, and in Orbax's
`CheckpointManager` with its defaults (`pip install -e '.[peers]'`).

    python -m benchmarks.checkpoint_faults
    python -m benchmarks.checkpoint_faults --flips 100 --stores ours

Each fault befalls the newest of two checkpoints, or a process that saves; then one asks for the
latest and loads it, as a run does that goes on. What can come of it:

    detected    an error, or a warning and the checkpoint before it
    harmless    what was asked for, and all its values right
    silent      wrong values, an older checkpoint or none, and not a word
    lost        a save that is not there, and nothing that says so

The faults are those of `tests/test_checkpoint_faults.py` and `tests/test_checkpoint_processes.py`.
Prints one JSON object a line, with a count of each outcome; a table goes to standard error.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._checkpoint_job import LARGE, SMALL, tree
from ._faults import Fault, files, flips, imposters, removal, renamed, truncations
from ._stores import STORES, Store, silenced

Outcomes = Mapping[str, int]


def state(step: int) -> PyTree:
    """Incompressible, as parameters are."""
    rng = np.random.default_rng(step)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    return {
        "embedding": normal(512, 64),
        "layers": [{"weight": normal(64, 64), "bias": normal(64)} for _ in range(3)],
        "half": normal(64, 64).astype(jnp.bfloat16),
        "count": jnp.int32(step),
    }


def load(kind: type[Store], root: Path, states: Mapping[int, PyTree]) -> str:
    """What comes of asking for the latest checkpoint and loading it."""
    newest = max(states)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with silenced():
                found = kind.latest(root, states[newest])
        except Exception:
            return "detected"
    if found is None:
        return "silent"
    step, loaded = found
    right = step in states and _same(loaded, states[step])
    if right and step == newest:
        return "harmless"
    # Orbax logs and warns of much; a word that names damage counts.
    told = any("damage" in str(warning.message).lower() for warning in caught)
    return "detected" if right and told else "silent"


def _same(one: PyTree, other: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and _bits(a) == _bits(b) for a, b in pairs)


def _bits(array: Any) -> bytes:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array).tobytes()


class Folder:
    """Two checkpoints of a store, of steps 1 and 2, which faults may befall one after the other."""

    def __init__(self, kind: type[Store], root: Path):
        self.kind, self.root = kind, root
        self.states = {step: state(step) for step in (1, 2)}
        with silenced():
            store = kind(root)
            for step, saved in self.states.items():
                store.save(step, saved)
                store.wait()
            store.close()
        self.newest = kind.folder(root, 2)

    def outcome(self, fault: Fault) -> str:
        with fault.befall(self.newest) as where:
            found = load(self.kind, self.root, self.states)
            for hidden in self.root.glob(".damaged-*"):  # where ours sets aside what is damaged
                os.rename(hidden, where)
        return found

    def outcomes(self, faults: Iterable[Fault]) -> Outcomes:
        return collections.Counter(map(self.outcome, faults))


def file_rows(kind: type[Store], root: Path, count: int) -> Iterator[tuple[str, Outcomes]]:
    """Faults of files and folders."""
    folder = Folder(kind, root)
    regions = files(folder.newest)
    largest = max(regions, key=lambda region: region.stop)
    others = [region for region in regions if region != largest]
    yield "a bit flipped in the largest file", folder.outcomes(flips(largest, count))
    spread = [fault for region in others for fault in flips(region, -(-count // len(others)))]
    yield "a bit flipped in another file", folder.outcomes(spread)
    yield "the largest file cut off", folder.outcomes(truncations(largest, 20))
    yield "a file removed", folder.outcomes(removal(region.file) for region in regions)
    higher = folder.kind.folder(root, 99).name
    for fault in [renamed(higher), *imposters(higher)]:
        yield fault.name, folder.outcomes([fault])
    with contextlib.ExitStack() as stack:
        for step in (1, 2):
            where = kind.folder(root, step)
            for region in files(where):
                stack.enter_context(flips(region, 1)[0].befall(where))
        yield "every file of every step damaged", {load(kind, root, folder.states): 1}


def job(kind: type[Store], root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a process that saves, and what it printed."""
    done = subprocess.run(_command(kind, root, *arguments), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}


def _command(kind: type[Store], root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks._checkpoint_job", kind.name, str(root), *arguments]


def process_rows(kind: type[Store], root: Path) -> Iterator[tuple[str, Outcomes]]:
    """Faults of processes that save."""
    sizes = {1: tree(1, SMALL), 2: tree(2, LARGE), 3: tree(3, SMALL)}

    def there(folder: Path, step: int) -> bool:
        return load(kind, folder, {step: sizes[step]}) == "harmless"

    for how, title in (("end", "ends"), ("exit", "calls `sys.exit`"), ("raise", "raises")):
        folder = root / how
        job(kind, folder, "leave", how)
        saved = there(folder, 2)
        yield f"the script {title} during a save", {"harmless" if saved else "lost": 1}
    folder = root / "_exit"
    job(kind, folder, "leave", "_exit")
    intact = there(folder, 1) or there(folder, 2)
    yield "the process is gone during a save", {"harmless" if intact else "silent": 1}
    code, _ = job(kind, root / "lose", "lose", "end")
    yield "a save fails, and the script ends", {"detected" if code else "lost": 1}
    folder = root / "full"
    _, found = job(kind, folder, "full", "limit")
    yield "a save on a full disk", {"detected" if found["failed"] else "lost": 1}
    told = "detected" if found["next save"] else "lost"
    yield "the next save, with room again", {"harmless" if there(folder, 3) else told: 1}
    yield "a second run in the folder", {_second_run(kind, root / "two"): 1}


def _second_run(kind: type[Store], folder: Path) -> str:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = _command(kind, folder, "hold")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes) as first:
        assert first.stdout is not None
        first.stdout.readline()
        code, _ = job(kind, folder, "open")
        first.kill()
    return "detected" if code else "silent"


def state_rows(kind: type[Store], root: Path) -> Iterator[tuple[str, Outcomes]]:
    """States that are unusual."""
    float32 = {"x": jnp.arange(4, dtype=jnp.float32) + 0.5}
    cases: dict[str, tuple[PyTree, PyTree]] = {
        "leaves `a.b` and `b` of `a`": ({"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}},) * 2,
        "an array without elements": ({"x": jnp.zeros((0, 3)), "y": jnp.ones(2)},) * 2,
        "a PRNG key": ({"x": jax.random.key(3, impl="rbg")},) * 2,
        "restored into another dtype": (float32, {"x": jnp.zeros(4, jnp.int32)}),
        "restored into another shape": (float32, {"x": jnp.zeros(3)}),
    }
    for number, (title, (saved, like)) in enumerate(cases.items()):
        yield title, {_round_trip(kind, root / str(number), saved, like): 1}


def _round_trip(kind: type[Store], root: Path, saved: PyTree, like: PyTree) -> str:
    try:
        with silenced():
            store = kind(root)
            store.save(1, saved)
            store.wait()
            store.close()
            found = kind.latest(root, like)
    except Exception:
        return "detected"
    return "harmless" if found is not None and _same(found[1], saved) else "silent"


def rows(kind: type[Store], flips_of_each: int) -> Iterator[tuple[str, Outcomes]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        yield from file_rows(kind, root / "files" / "run", flips_of_each)
        yield from process_rows(kind, root / "processes")
        yield from state_rows(kind, root / "states")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_faults", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--flips", type=int, default=40, help="bits in the largest file, and others"
    )
    parser.add_argument("--stores", default="", help=f"some of {', '.join(STORES)}, with commas")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.stores.split(",") if name] or list(STORES)
    if "orbax" in chosen and importlib.util.find_spec("orbax") is None:
        chosen.remove("orbax")
    found: dict[str, dict[str, Outcomes]] = {}
    for name in chosen:
        for fault, outcomes in rows(STORES[name], options.flips):
            found.setdefault(fault, {})[name] = outcomes
    print(f"\n{'':42}" + "".join(f"{name:26}" for name in chosen), file=sys.stderr)
    for fault, by_store in found.items():
        row = {"benchmark": "checkpoint_faults", "fault": fault} | by_store
        print(json.dumps(row | {"versions": versions(chosen)}), flush=True)
        cells = (_cell(by_store[name]) for name in chosen)
        print(f"{fault:42}" + "".join(f"{cell:26}" for cell in cells), file=sys.stderr)


def _cell(outcomes: Outcomes) -> str:
    ordered = [f"{outcomes[name]} {name}" for name in OUTCOMES if outcomes.get(name)]
    return ordered[0].split()[1] if sum(outcomes.values()) == 1 else ", ".join(ordered)


OUTCOMES = ("detected", "harmless", "silent", "lost")


def versions(names: Sequence[str]) -> dict[str, str]:
    packages = {"ours": "jaxlightning", "orbax": "orbax-checkpoint"}
    return {packages[name]: importlib.metadata.version(packages[name]) for name in names}


if __name__ == "__main__":
    main()
