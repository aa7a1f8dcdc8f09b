"""Checkpoints that cannot lie: saved behind the training's back, committed wholly or not at all,
and verified bit by bit when they are read.

    with CheckpointStore("runs/a") as store:
        store.save(step, state, {"epoch": 3})           # waits for the copy to the host only
    tree, metadata, path = restore_latest("runs/a", like=state)

`_checkpoint_manifest` says what the bytes mean, `_checkpoint_arrays` where they come from,
`_checkpoint_save` and `_checkpoint_files` how they get to the disk, `_checkpoint_read` how back.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from ._checkpoint_arrays import snapshot
from ._checkpoint_files import (
    DAMAGED,
    TEMPORARY,
    CheckpointDamaged,
    CheckpointError,
    RunLock,
    RunLocked,
    check_writable,
    discard,
    has_signs_of_checkpoint,
    identity,
    lock_if_free,
    publish,
    set_aside,
    sweep,
)
from ._checkpoint_manifest import NAME, Manifest, plain
from ._checkpoint_read import (
    CheckpointMismatch,
    load_arrays,
    read_checkpoint,
    read_manifest,
    read_metadata,
    verify_checkpoint,
)
from ._checkpoint_save import Save, SaveFailed, export_weights, let_saves_end
from ._say import warn
from .parallel import _processes as processes

__all__ = [
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointStore",
    "Entry",
    "Restored",
    "RunLocked",
    "SaveFailed",
    "check_writable",
    "export_weights",
    "find_checkpoints",
    "latest_checkpoint",
    "load_arrays",
    "read_by_all",
    "read_checkpoint",
    "read_metadata",
    "restore_latest",
    "verify_checkpoint",
]


class Entry(NamedTuple):
    """A checkpoint in a folder of checkpoints."""

    path: Path
    step: int
    serial: int
    saved_at: str
    metadata: Mapping[str, Any]


class Restored(NamedTuple):
    tree: PyTree
    metadata: dict[str, Any]
    path: Path


# Finding


def find_checkpoints(root: str | os.PathLike[str]) -> list[Entry]:
    """The committed checkpoints in a folder, by step, and the later saved last of the same step,
    whatever the clock said.

    A folder without a `COMMIT` that matches is none. The arrays are not read.
    """
    return _sorted_out(Path(root))[0]


def _sorted_out(root: Path) -> tuple[list[Entry], dict[Path, str]]:
    """The checkpoints in `root`, and those that are damaged, with the reason."""
    entries, damaged = [], {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        while looks_like_checkpoint(path):
            folder = identity(path)
            try:
                manifest = read_manifest(path)
            except CheckpointError as error:
                if identity(path) != folder:  # deleted or replaced meanwhile, by a run
                    continue
                if not isinstance(error, CheckpointDamaged):
                    raise
                damaged[path] = str(error)
            else:
                about = (manifest.step, manifest.serial, manifest.saved_at, manifest.metadata)
                entries.append(Entry(path, *about))
            break
    return sorted(entries, key=lambda entry: (entry.step, entry.serial, entry.saved_at)), damaged


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a folder is, was or pretends to be a checkpoint: other things may lie beside it."""
    named = path.is_dir() and NAME.fullmatch(path.name)
    return bool(named) and has_signs_of_checkpoint(path)


def restore_latest(
    root: str | os.PathLike[str],
    like: PyTree,
    among: Callable[[Entry], bool] = lambda entry: True,
    optional: Collection[str] = (),
) -> Restored | None:
    """The checkpoint of the highest step that is intact; `None` where there never was one.

    Only of those `among` which it is looked for: others are passed over without a word.

    Damaged ones on the way are reported by a warning and set aside as `.damaged-*`. If nothing
    is left it is a `CheckpointDamaged`, never a silent fresh start. A checkpoint that is intact
    and does not fit `like` is a `CheckpointMismatch` (see `read_checkpoint`, also for `optional`).
    """
    root = Path(root).absolute()
    if not root.is_dir():
        return None
    let_saves_end(root)
    with lock_if_free(root) as ours:
        if ours and processes.is_main():
            _recover(root)
    processes.all_or_none(processes.next_topic("recovered"), None)
    entries, damaged = _sorted_out(root)
    for entry in filter(among, reversed(entries)):
        folder = identity(entry.path)
        try:
            tree, metadata = read_by_all(entry.path, like, optional)
        except CheckpointError as error:
            if identity(entry.path) != folder:  # deleted or replaced meanwhile, by a run
                return restore_latest(root, like, among, optional)
            if not isinstance(error, CheckpointDamaged):
                raise
            damaged[entry.path] = str(error)
            continue
        if damaged:
            _report(root, damaged, entry.path)
        return Restored(tree, metadata, entry.path)
    _refuse_all_damaged(root, damaged)
    return None


def read_by_all(
    path: Path, like: PyTree, optional: Collection[str] = ()
) -> tuple[PyTree, dict[str, Any]]:
    """As `read_checkpoint`, in all processes of a job or in none: what is damaged for one of them,
    which reads its part only, is damaged for all."""
    error: CheckpointError | None = None
    try:
        found = read_checkpoint(path, like, optional)
    except CheckpointError as failure:
        error = failure
    told = processes.all_or_none(processes.next_topic("read"), error)
    if error is not None:
        raise error
    if told is not None:
        raise CheckpointDamaged(f"`{path}` can't be read by all processes: {told}")
    return found


def latest_checkpoint(
    root: str | os.PathLike[str], among: Callable[[Entry], bool] = lambda entry: True
) -> Entry | None:
    """As `restore_latest` finds it, with the same report, but by its manifest: arrays are not
    read, and so not verified."""
    root = Path(root).absolute()
    found, damaged = _sorted_out(root)
    entries = list(filter(among, found))
    if not entries:
        _refuse_all_damaged(root, damaged)
        return None
    if damaged:
        _report(root, damaged, entries[-1].path)
    return entries[-1]


def _refuse_all_damaged(root: Path, damaged: dict[Path, str]) -> None:
    damaged |= {path: f"`{path}` was set aside before." for path in root.glob(f"{DAMAGED}*")}
    if damaged:
        raise CheckpointDamaged(
            f"All checkpoints in `{root}` are damaged, and to begin anew without a word would "
            f"lose the run:{_reasons(damaged)}\nMove them away or delete them to start afresh."
        )


def _report(root: Path, damaged: Mapping[Path, str], used: Path) -> None:
    """Sets damaged checkpoints aside, if nobody else may be writing here, and warns of them."""
    with lock_if_free(root) as free:
        ours = free and processes.is_main()
        # It may have been replaced since by a run that has ended meanwhile.
        hidden = [set_aside(path) for path in damaged if ours and _is_damaged(path)]
    warn(_damage_report(damaged, hidden, used))


def _is_damaged(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return isinstance(error, CheckpointDamaged)
    return False


def _damage_report(damaged: Mapping[Path, str], hidden: list[Path | None], used: Path) -> str:
    kept = [f"`{path.name}`" for path in hidden if path is not None]
    return (
        f"Damaged checkpoints were found, and the one before them is used, `{used}`:"
        f"{_reasons(damaged)}" + (f"\nThey were set aside as {', '.join(kept)}." if kept else "")
    )


def _reasons(damaged: Mapping[Path, str]) -> str:
    return "".join(f"\n  {reason}" for reason in damaged.values())


def _recover(root: Path) -> None:
    """Finishes what a killed process began: gives a checkpoint its name that was complete and had
    none yet, and removes the rest. Needs the lock."""
    for written in root.glob(f"{TEMPORARY}*"):
        name = written.name.removeprefix(TEMPORARY).rpartition("-")[0]
        with contextlib.suppress(CheckpointError):
            if _gives_way(root / name, read_manifest(written, name)):
                publish(written, root / name)
    sweep(root)


def _gives_way(path: Path, to: Manifest) -> bool:
    """Whether nothing bears this name, or an older checkpoint than `to`."""
    if not os.path.lexists(path):
        return True
    try:
        return looks_like_checkpoint(path) and read_manifest(path).serial < to.serial
    except CheckpointDamaged:
        return not path.is_symlink()


# Saving


class CheckpointStore:
    """The one writer of a folder of checkpoints: a process, or all those of a job together, which
    then do the same with it in the same order.

    Makes the folder, takes its lock, and finishes or removes what a killed run left half done.
    Raises an `OSError` where the folder cannot be written, and `RunLocked`, with the pid of the
    process that has it, where it is taken. To be used from one thread.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root).absolute()
        self._open = True
        self._lock: RunLock | None = None
        self._save: Save | None = None
        self._serial: int | None = None
        error: Exception | None = None
        if processes.is_main():
            try:
                check_writable(self.root)
                self._lock = RunLock(self.root)
                _recover(self.root)
            except (OSError, CheckpointError) as failure:
                error = failure
        told = processes.all_or_none(processes.next_topic("store"), error)
        if error is not None:
            raise error
        if told is not None:
            raise CheckpointError(told)

    def save(
        self,
        step: int,
        tree: PyTree,
        metadata: Mapping[str, Any],
        name: str | None = None,
        wait: bool = False,
        before_commit: Sequence[Callable[[], Any]] = (),
    ) -> Path:
        """Saves the arrays of `tree` and the JSON values of `metadata`; returns where they will be.

        On return all arrays have been copied to the host (so that the next step may donate
        them), and threads write the copy. At most one save is under way: a second one waits for
        the first. With `wait` the checkpoint is on the disk on return.

        A failure of the threads is a `SaveFailed`, raised once, by the next `save`, `wait` or
        `close`, and at the latest at the end of the process, whose exit code is then 1. The call
        of `save` that raises it saves nothing itself; the one after it works as usual.

        Arrays may have any shape and dtype that JAX has, PRNG keys included. Python numbers among
        the leaves are recorded, to be compared on restore; functions and the like are not.
        `name` is `step_0000000042` unless given; a checkpoint of that name is replaced. If one of
        `before_commit`, which the threads call, raises, the checkpoint is not saved: they make
        durable what it refers to.
        """
        self.wait()
        step = operator.index(step)
        path = self._path(step, name)
        written = (plain(metadata), snapshot(tree))
        save = Save(path, step, *written, self._next_serial, before_commit)
        self._save = save
        save.start()
        if wait:
            self.wait()
        return path

    def _next_serial(self) -> int:
        """Of the save under way, on whose thread it runs: the first one reads all manifests."""
        if self._serial is None:
            self._serial = 0
            for path in self.root.iterdir():
                with contextlib.suppress(CheckpointError, OSError):
                    if looks_like_checkpoint(path):
                        self._serial = max(self._serial, read_manifest(path).serial)
        self._serial += 1
        return self._serial

    def _path(self, step: int, name: str | None) -> Path:
        if not self._open:
            raise CheckpointError(
                f"The checkpoint store of `{self.root}` is closed, and has given up its lock. "
                "Make a new one: `CheckpointStore(root)`."
            )
        if step < 0:
            raise CheckpointError(f"`step={step}`, but steps are counted from 0.")
        if name is None:
            name = f"step_{step:010d}"
        if not NAME.fullmatch(name) or name == "LOCK":
            raise CheckpointError(
                f"`{name}` cannot be the name of a checkpoint: a name has up to 200 letters, "
                "digits and `._=-`, starts with a letter or digit, and is not `LOCK`. Write "
                f"`{re.sub('[^A-Za-z0-9._=-]', '_', name).lstrip('._=-')[:200] or 'last'}`."
            )
        path = self.root / name
        taken = path.is_symlink() or (path.exists() and not looks_like_checkpoint(path))
        if taken and processes.is_main():
            raise CheckpointError(
                f"`{path}` exists and is not a checkpoint, so it is not replaced by one. Save "
                "under another name, or move it away."
            )
        return path

    def wait(self) -> None:
        """Returns when the save under way, if there is one, is on the disk; raises if it failed."""
        if self._save is not None:
            failure = self._save.join()
            self._save = None
            if failure is not None:
                raise failure

    def abandon(self) -> None:
        """Gives up the save under way: nobody waits for it, not even the end of the process, and
        those before it stay as they are."""
        if self._save is not None:
            self._save.abandon()
            self._save = None

    def close(self) -> None:
        """Waits, and gives up the lock. Raises if the last save failed."""
        try:
            self.wait()
        finally:
            self._open = False
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def delete(self, path: str | os.PathLike[str]) -> None:
        """Deletes a checkpoint of this folder: whole, at once, also under a kill.

        While a save is under way, only after it has been committed, and not at all if it fails:
        the last good checkpoint is never given up for one that might not come to be.
        """
        path = Path(path).absolute()
        if not processes.is_main():
            return
        under_way = self._save
        mine = path.parent == self.root and looks_like_checkpoint(path)
        if not mine and (under_way is None or under_way.path != path):
            raise CheckpointError(
                f"`{path}` is not a checkpoint in `{self.root}`, so it is not deleted. There are "
                f"{[entry.path.name for entry in self.entries()]}."
            )
        if under_way is None or not (under_way.then_delete(path) or under_way.failed):
            discard(path)

    def entries(self) -> list[Entry]:
        """See `find_checkpoints`. A save under way is not among them yet."""
        return find_checkpoints(self.root)

    def latest(self) -> Entry | None:
        """The checkpoint of the highest step; of two of the same step the one saved later."""
        entries = self.entries()
        return entries[-1] if entries else None
