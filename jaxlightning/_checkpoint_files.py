"""What checkpoints ask of a file system: one writer a folder, and changes that happen wholly or
not at all, also across a kill or a power cut.

A folder of checkpoints holds, beside them:

    LOCK          taken by the one process that may write (`flock`: the kernel lets go of it)
    .tmp-*        a checkpoint that is being written
    .trash-*      one that is being deleted
    .damaged-*    one that failed verification and was set aside
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from ._say import warn

TEMPORARY, TRASH, DAMAGED = ".tmp-", ".trash-", ".damaged-"

_held: dict[Path, int] = {}
"""The folders that this process has locked, and the open files that hold the locks."""


class CheckpointError(Exception):
    """Something about a checkpoint: the base class of what follows."""


class CheckpointDamaged(CheckpointError):
    """What is on disk is not what was written."""


class RunLocked(CheckpointError):
    """Another process, or another store of this one, writes into this folder."""


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes `folder` and writes into it once, so that a run fails before its first step and not
    at its first checkpoint. Raises an `OSError` of the kind that the system gave."""
    path = Path(folder).absolute()
    probe = path / f"{TEMPORARY}probe-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_durably(probe, b"written to see whether one can")
        probe.unlink(missing_ok=True)  # another process may have cleared it away as a leftover
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise OSError(
            error.errno,
            f"The folder `{path}` cannot be written ({error.strerror}), so nothing could be kept "
            "in it. Make it writable, or save to another one: a run's checkpoints and logs go, "
            "unless they are given a path, to `Trainer(default_root_dir=...)`",
        ) from error


class RunLock:
    """The right to write into a folder, until `release` or the end of the process, however that
    comes about: it is the kernel that holds it, so that no kill leaves a stale lock."""

    def __init__(self, root: Path):
        self._root = root.resolve()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(self._root / "LOCK", flags, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            raise RunLocked(_locked_message(self._root, holder)) from None
        except OSError as error:
            # Some network file systems have no locks. Refusing to run there would help nobody.
            warn(
                f"`{self._root}` is on a file system without locks ({error.strerror}): nothing "
                "keeps a second run from writing into it. See to it that there is none.",
            )
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _held[self._root] = file

    def release(self) -> None:
        file = _held.pop(self._root, None)
        if file is not None:
            os.close(file)


@contextlib.contextmanager
def lock_if_free(root: Path) -> Iterator[bool]:
    """Whether this process may change `root` in the body of the `with`: it holds the lock, or
    nobody does and it is taken for the moment."""
    if root.resolve() in _held:
        yield True
        return
    try:
        lock = RunLock(root)
    except (RunLocked, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _holder(file: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except ValueError:  # the moment between taking the lock and writing into it
        return {}
    return found if isinstance(found, dict) else {}


def _locked_message(root: Path, holder: dict[str, object]) -> str:
    pid = holder.get("pid", "unknown")
    if pid == os.getpid():
        return (
            f"`{root}` is in use by another `CheckpointStore` of this process ({pid}). Close that "
            "one first: `store.close()`."
        )
    return (
        f"`{root}` is in use by process {pid} on `{holder.get('host', 'an unknown host')}`: two "
        "runs that write into one folder would replace each other's checkpoints. Wait for the "
        "other or stop it, or pass another folder: `Trainer(default_root_dir=...)`."
    )


def _forget_locks_after_fork() -> None:
    """A forked child, such as a data worker, shares the open file, and would keep the lock alive
    after its parent was killed."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks_after_fork)


def write_durably(path: Path, data: bytes) -> None:
    """A new file whose content is on the disk, and not on its way there, on return."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes names in a folder as durable as the files they name."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def aside(path: Path, prefix: str) -> Path:
    """A fresh hidden name beside `path`."""
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex}")


def publish(written: Path, path: Path) -> None:
    """Gives a complete checkpoint its name, in the place of one that has it.

    Between the two renames neither bears the name; a kill just there is made good by `recover`.
    """
    old = None
    if path.exists():
        sync_folder(path.parent)  # or a power cut could keep this renaming, but not what follows
        old = aside(path, TRASH)
        os.rename(path, old)
    try:
        os.rename(written, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def discard(path: Path) -> None:
    """Deletes a checkpoint: at once by name, then file by file, so that no half is ever seen."""
    trash = aside(path, TRASH)
    os.rename(path, trash)
    sync_folder(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that takes its name; `None` where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def set_aside(path: Path) -> Path | None:
    """Hides a damaged checkpoint without losing it; `None` where the folder is read-only."""
    hidden = aside(path, DAMAGED)
    try:
        os.rename(path, hidden)
    except OSError:
        return None
    return hidden


def sweep(root: Path) -> None:
    """Removes what a killed process left half written or half deleted. Needs the lock."""
    for path in root.iterdir():
        if path.name.startswith((TEMPORARY, TRASH)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def has_signs_of_checkpoint(path: Path) -> bool:
    """Whether a folder is named as one that holds a step, or holds a file of a checkpoint."""
    if re.search(r"step[=_]\d+", path.name):
        return True
    return any((path / name).exists() for name in ("COMMIT", "manifest.json")) or any(
        path.glob("arrays-*.safetensors")
    )


def open_inside(folder: int, name: str, path: Path) -> int:
    """Opens a file of a checkpoint, never through a link that leads out of it.

    `folder` is an open folder: what is read belongs together, even if another process gives its
    name to a newer checkpoint meanwhile.
    """
    try:
        # Not blocking: opening a pipe that somebody put there would wait for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        if name == "COMMIT" and not has_signs_of_checkpoint(path):
            from ._no_checkpoint import no_checkpoint

            raise no_checkpoint(path) from None
        raise CheckpointDamaged(f"`{path}` is damaged: its file `{name}` is missing.") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise
    else:
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
    raise CheckpointDamaged(
        f"`{path}` is damaged: its `{name}` is a link or a folder, and has to be a file of its own."
    )


def open_folder(path: Path) -> int:
    """Opens a checkpoint's folder, which may not be a link."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint `{path}`.") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise CheckpointDamaged(
                f"`{path}` is not a checkpoint: a checkpoint is a folder of its own, neither a "
                "file nor a symbolic link."
            ) from None
        raise
