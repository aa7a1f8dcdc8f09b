"""Two stores of checkpoints behind the same few verbs: ours, and Orbax's `CheckpointManager` with
its defaults, as its documentation uses it. The latter needs `pip install -e '.[peers]'`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
from jaxtyping import PyTree


class Store(Protocol):
    """A folder of checkpoints that is open for writing."""

    name: ClassVar[str]

    def __init__(self, root: Path): ...

    def save(self, step: int, tree: PyTree) -> None:
        """Returns when training may go on."""

    def wait(self) -> None:
        """Returns when what was saved is on the disk."""

    def close(self) -> None: ...

    @classmethod
    def latest(cls, root: Path, like: PyTree) -> tuple[int, PyTree] | None:
        """The step that a new process would go on from, and what it would load."""

    @classmethod
    def folder(cls, root: Path, step: int) -> Path:
        """Where a step lies."""


class Ours:
    name: ClassVar[str] = "ours"

    def __init__(self, root: Path):
        from jaxlightning._checkpoint import CheckpointStore

        self._store = CheckpointStore(root)

    def save(self, step: int, tree: PyTree) -> None:
        self._store.save(step, tree, {})

    def wait(self) -> None:
        self._store.wait()

    def close(self) -> None:
        self._store.close()

    @classmethod
    def latest(cls, root: Path, like: PyTree) -> tuple[int, PyTree] | None:
        from jaxlightning._checkpoint import restore_latest
        from jaxlightning._checkpoint_read import read_manifest

        found = restore_latest(root, like)
        return None if found is None else (read_manifest(found.path).step, found.tree)

    @classmethod
    def folder(cls, root: Path, step: int) -> Path:
        return root / f"step_{step:010d}"


class Orbax:
    name: ClassVar[str] = "orbax"

    def __init__(self, root: Path):
        self._manager = _orbax().CheckpointManager(root.absolute())

    def save(self, step: int, tree: PyTree) -> None:
        self._manager.save(step, args=_orbax().args.StandardSave(tree))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @classmethod
    def latest(cls, root: Path, like: PyTree) -> tuple[int, PyTree] | None:
        with _orbax().CheckpointManager(root.absolute()) as manager:
            step = manager.latest_step()
            if step is None:
                return None
            abstract = jax.tree.map(_orbax().utils.to_shape_dtype_struct, like)
            return step, manager.restore(step, args=_orbax().args.StandardRestore(abstract))

    @classmethod
    def folder(cls, root: Path, step: int) -> Path:
        return root / str(step)


STORES: dict[str, type[Store]] = {"ours": Ours, "orbax": Orbax}


def _orbax() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint

    for name in ("absl", "asyncio"):  # the latter tells of errors that have been raised already
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return orbax.checkpoint


def seconds(call: Any, *arguments: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what libraries log, print and warn of."""
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


def machine() -> dict[str, Any]:
    """What a result should say of where it was measured."""
    return {
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
