"""Writing: a checkpoint behind the training's back, or the weights alone."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from ._checkpoint_arrays import (
    ArrayFile,
    Checksums,
    Snapshot,
    as_bytes,
    checksums,
    is_array,
    named_leaves,
    on_host,
    safetensors_header,
)
from ._checkpoint_files import (
    TEMPORARY,
    CheckpointError,
    aside,
    discard,
    publish,
    sync_folder,
    write_durably,
)
from ._checkpoint_manifest import (
    DTYPES,
    Manifest,
    StoredArray,
    StoredFile,
    commit_of,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
    now,
    versions,
)
from .parallel import _processes as processes

_T = TypeVar("_T")


class SaveFailed(CheckpointError):
    """A checkpoint could not be written. The cause is in `__cause__`."""


class Save:
    """One save under way, on threads that a script which ends just after it has saved waits for
    (`_report_lost_saves`), unless they were abandoned.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        metadata: dict[str, Any],
        taken: Snapshot,
        next_serial: Callable[[], int],
        before_commit: Sequence[Callable[[], Any]],
    ):
        self.path = path
        self._topic = processes.next_topic("save")
        self._process = os.getpid()
        self._before_commit = before_commit
        self._step = step
        self._next_serial = next_serial
        self._metadata = metadata
        self._snapshot: Snapshot | None = taken
        self._failure: SaveFailed | None = None
        self._deletions: list[Path] | None = []
        self._deciding = threading.Lock()
        self._returning = threading.Event()
        self._ended = threading.Event()
        self._abandoned = False

    def start(self) -> None:
        _unsettled.add(self)
        _report_lost_saves_of_a_worker()
        try:
            # `threading.Thread` would wait until the thread has had its turn: on a busy machine
            # that is longer than the copy of the state.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # the interpreter is shutting down, and starts no thread any more
            self._returning.set()
            self._run()
        self._returning.set()

    @property
    def _mine(self) -> bool:
        """Whether it is this process that saves. A forked child has not got the threads, and
        would wait for ever."""
        return self._process == os.getpid()

    def end(self) -> None:
        """Waits for the end."""
        if self._mine:
            self._ended.wait()

    def join(self) -> SaveFailed | None:
        """Waits for the end; the failure, if it failed, has thereby been told."""
        self.end()
        _unsettled.discard(self)
        return self._failure if self._mine else None

    def abandon(self) -> None:
        """Nobody waits any more. Unless it is being committed just now, it never will be."""
        self._abandoned = True
        _unsettled.discard(self)

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise CheckpointError("it was abandoned")

    def then_delete(self, path: Path) -> bool:
        """Whether `path` will be deleted after this save, which it is not if that is over."""
        with self._deciding:
            if self._deletions is not None:
                self._deletions.append(path)
            return self._deletions is not None

    @property
    def failed(self) -> bool:
        """Whether it is known by now to have failed."""
        return self._failure is not None

    def _run(self) -> None:
        try:
            self._do()
        finally:
            self._ended.set()

    def _do(self) -> None:
        self._returning.wait()  # or this thread would keep the interpreter from the one that saves
        try:
            with contextlib.ExitStack() as others:  # all of them, whatever fails
                for call in self._before_commit:
                    others.callback(call)
            self._write()
        except BaseException as error:
            self._fail(f"The checkpoint `{self.path}` was not saved", error)
        self._snapshot = None
        with self._deciding:
            deletions, self._deletions = self._deletions or [], None
        for path in deletions if self._failure is None and processes.is_main() else []:
            try:
                discard(path)
            except OSError as error:
                self._fail(f"`{path}` could not be deleted", error)
        if self._failure is None:
            _unsettled.discard(self)

    def _fail(self, what: str, error: BaseException) -> None:
        told = f"{what} ({error}). Those saved before it are as they were."
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            told += ' Make room, then go on with `fit(..., resume="auto")`.'
        self._failure = SaveFailed(told)
        self._failure.__cause__ = error

    def _write(self) -> None:
        """Each process of a job writes a file of what it holds; the first one makes a checkpoint of
        them, once all are written."""
        written = self.path.parent / processes.share(
            f"{self._topic}/folder", aside(self.path, TEMPORARY).name
        )
        try:
            self._together("made", lambda: written.mkdir() if processes.is_main() else None)
            stored, index = self._together("written", lambda: self._write_arrays(written))
            commits = lambda: self._commit(written, stored, index)
            self._together("committed", commits if processes.is_main() else lambda: None)
        except BaseException:
            if processes.is_main():
                shutil.rmtree(written, ignore_errors=True)
            raise

    def _together(self, what: str, do: Callable[[], _T]) -> _T:
        """Does something that has to succeed on all processes."""
        error: BaseException | None = None
        try:
            found = do()
        except BaseException as failure:
            error = failure
        told = processes.all_or_none(f"{self._topic}/{what}", error)
        if error is not None:
            raise error
        if told is not None:
            raise CheckpointError(told)
        return found

    def _write_arrays(self, written: Path) -> tuple[StoredFile, dict[str, StoredArray]]:
        assert self._snapshot is not None
        arrays = self._snapshot.arrays()
        sha256 = _beside(lambda: checksums(arrays))
        me, count = processes.index(), processes.count()
        file = ArrayFile(f"arrays-{me:05d}-of-{count:05d}.safetensors", arrays)
        with open(written / file.name, "xb", buffering=2**20) as stream:
            stream.write(file.header)
            for chunk in file.chunks:
                self._check_abandoned()
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        stored, index = file.described(sha256())
        if me:
            write_durably(written / _part(me), encode_part(file.name, stored, index))
        return stored, index

    def _commit(self, written: Path, stored: StoredFile, index: dict[str, StoredArray]) -> None:
        assert self._snapshot is not None
        files = {f"arrays-00000-of-{processes.count():05d}.safetensors": stored}
        for other in range(1, processes.count()):
            name, file, shards = decode_part((written / _part(other)).read_bytes())
            files[name] = file
            index = {
                path: array._replace(shards=(*array.shards, *shards[path]))
                for path, array in index.items()
            }
            (written / _part(other)).unlink()
        manifest = encode_manifest(
            Manifest(
                name=self.path.name,
                step=self._step,
                serial=self._next_serial(),
                saved_at=now(),
                versions=versions(),
                files=files,
                arrays=index,
                scalars=self._snapshot.scalars(),
                metadata=self._metadata,
            )
        )
        decode_manifest(manifest)  # raises, where nobody could read it
        write_durably(written / "manifest.json", manifest)
        write_durably(written / "COMMIT", commit_of(manifest))
        sync_folder(written)
        self._check_abandoned()
        publish(written, self.path)


def _part(process: int) -> str:
    return f"part-{process:05d}.json"


def _beside(work: Callable[[], Checksums]) -> Callable[[], Checksums]:
    """Begins `work` on a thread of its own; to be called for its result."""
    results: list[Checksums] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    try:
        thread.start()
    except RuntimeError:  # as in `Save.start`; then it is done when it is asked for
        return work

    def result() -> Checksums:
        thread.join()
        return results[0] if results else work()

    return result


_unsettled: set[Save] = set()
"""Saves under way, and failures that nobody has been told of."""


def let_saves_end(root: Path) -> None:
    """Returns when this process writes nothing into `root`. Failures are left to be told."""
    for save in list(_unsettled):  # which threads change
        if save.path.parent == root:
            save.end()


def _tell_lost_saves() -> bool:
    """Waits for all saves; whether some failed of which nobody had been told."""
    failures = [failure for save in list(_unsettled) if (failure := save.join()) is not None]
    for failure in failures:
        traceback.print_exception(failure)
    return bool(failures)


@atexit.register
def _report_lost_saves() -> None:
    """A script that ends with its last checkpoint lost must not look like a success."""
    if _tell_lost_saves():
        # An exception would not change the exit code here. What else would have run at exit and
        # matters, is the flushing of output.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_finalizer: Any = None


def _report_lost_saves_of_a_worker() -> None:
    """The same for a process of `multiprocessing`, which ends without `atexit`."""
    global _finalizer
    process, util = map(sys.modules.get, ("multiprocessing.process", "multiprocessing.util"))
    if process is None or util is None or process.parent_process() is None:
        return
    if _finalizer is None or not _finalizer.still_active():
        # After what others do there, such as flushing queues.
        _finalizer = util.Finalize(None, _end_worker, exitpriority=-100)


def _end_worker() -> None:
    failed = _tell_lost_saves()
    if failed and isinstance(sys.exc_info()[1], SystemExit | None):
        sys.exit(1)  # or else what it ends with is to be told, and no success either


# Weights alone


def _gathered(leaf: Any) -> Any:
    """A leaf that this process can see all of; all processes of a job ask for it together."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    whole = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())  # type: ignore[attr-defined]
    return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(leaf))


def export_weights(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes the arrays of a tree to one safetensors file, named by their leaf paths, for other
    programs to read; a file of that name is replaced.

    Safetensors have no PRNG keys and no dtypes of less than 8 bits: those are refused.
    """
    path = Path(path).absolute()
    arrays = {name: leaf for name, leaf in named_leaves(tree) if is_array(leaf)}
    for name, leaf in arrays.items():
        if DTYPES.get(leaf.dtype.name) is None:
            raise CheckpointError(
                f"`{name}` has dtype `{leaf.dtype}`, which a safetensors file cannot hold. Cast "
                "it, or leave it out: `eqx.filter(tree, eqx.is_inexact_array)`."
            )
    host = {name: on_host(_gathered(leaf)) for name, leaf in arrays.items()}
    if not processes.is_main():
        return
    tensors = {name: (array.dtype.name, array.shape, array.nbytes) for name, array in host.items()}
    # "pt" is what other libraries ask for before they read a file.
    header = safetensors_header(tensors, {"format": "pt"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The folder `{path.parent}` can't be made ({error.strerror}), so `{path.name}` can't "
            "be written into it. Pass a path into a folder, or one that can be made",
        ) from error
    written = aside(path, TEMPORARY)
    try:
        with open(written, "xb") as stream:
            stream.write(header)
            for array in host.values():
                stream.write(as_bytes(array))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
    sync_folder(path.parent)
