"""A process that saves checkpoints and meets with something:

    python -m benchmarks._checkpoint_job STORE FOLDER leave end | exit | raise | _exit [--held]
    python -m benchmarks._checkpoint_job STORE FOLDER lose end | exit | raise
    python -m benchmarks._checkpoint_job STORE FOLDER full limit | ballast
    python -m benchmarks._checkpoint_job STORE FOLDER hold
    python -m benchmarks._checkpoint_job STORE FOLDER open

Prints one JSON object. `benchmarks.checkpoint_faults` runs it for both stores, and
`tests/test_checkpoint_processes.py` for ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._stores import STORES, Store, seconds

LARGE = 2**23
"""Elements of what is in flight when a process ends, 32 MiB: more than is written at once."""
SMALL = 2**16
"""Elements of what fits on the small file system."""


def tree(step: int, size: int) -> PyTree:
    """Of every step another one, and incompressible."""
    return {"x": jnp.asarray(np.random.default_rng(step).random(size, np.float32))}


def hold_fsync() -> threading.Event:
    """Lets no file reach the disk before the main thread has come to its end; returns the event
    that one waits for that."""
    real, begun = os.fsync, threading.Event()

    def fsync(fd: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            threading.main_thread().join()
        real(fd)

    os.fsync = fsync
    return begun


def leave(store: Store, how: str) -> None:
    """Ends the process in some way while a save is under way, and nobody has waited for it."""
    print(json.dumps({"left": how}), flush=True)
    if how == "exit":
        sys.exit(0)
    if how == "_exit":
        os._exit(0)
    if how == "raise":
        raise RuntimeError("the training failed")


def limit_files(size: int) -> Callable[[], None]:
    """No file may be larger from now on; returns what undoes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(folder: Path) -> Callable[[], None]:
    """Fills a small file system, and returns what frees it again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast.unlink


def attempt(call: Callable[..., Any], *arguments: Any) -> str | None:
    """The error of a call, in a line."""
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None


def full(store: Store, folder: Path, how: str) -> dict[str, Any]:
    """A save on a full disk, and the next one on a disk that has room again."""
    free = limit_files(SMALL) if how == "limit" else fill(folder.parent)
    failed = attempt(store.save, 2, tree(2, SMALL)) or attempt(store.wait)
    rest = sorted(path.name for path in folder.iterdir())
    free()
    told_again = attempt(store.save, 3, tree(3, SMALL)) or attempt(store.wait)
    return {"failed": failed, "left": rest, "next save": told_again}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._checkpoint_job")
    parser.add_argument("store", choices=STORES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("action", choices=["leave", "lose", "full", "hold", "open"])
    parser.add_argument("how", nargs="?", default="")
    parser.add_argument("--held", action="store_true", help="see `hold_fsync`")
    options = parser.parse_args()
    kind = STORES[options.store]
    if options.action == "open":
        opened: list[Store] = []
        took = seconds(lambda: opened.append(kind(options.folder)))
        print(json.dumps({"opened": bool(opened), "seconds": took}), flush=True)
        return
    store = kind(options.folder)
    store.save(1, tree(1, SMALL))
    store.wait()
    if options.action == "hold":
        print(json.dumps({"pid": os.getpid()}), flush=True)
        sys.stdin.read()
        store.close()
    elif options.action == "full":
        print(json.dumps(full(store, options.folder, options.how)), flush=True)
        attempt(store.close)
    else:
        begun = hold_fsync() if options.held else None
        if options.action == "lose":
            limit_files(LARGE)
        store.save(2, tree(2, LARGE))
        if begun is not None:
            begun.wait()
        leave(store, options.how)


if __name__ == "__main__":
    main()
