"""From a loader to arrays on the devices: read ahead in a thread, checked, placed."""

from __future__ import annotations

import copy
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxlightning.parallel import Placement, leaf_path

from ._loader import abstract, check_leading_axes


class DeviceBatch(NamedTuple):
    """A batch on the devices, with its leaves, which is what a compiled step takes."""

    batch: PyTree
    leaves: list[jax.Array]
    shapes: tuple[tuple[int, ...], ...]
    state: Any = None
    """What `get_state` of the iterator said after this batch; `None` where it has none."""


class Feed:
    """A loader as the loop sees it: epochs of `DeviceBatch`es, and what they look like.

    Reads the first batch at construction, to learn and check its shapes. An epoch has as many
    batches as the loader's `__len__` says: more that it would give are not taken, fewer are an
    error.

    **Arguments:**

    - `loader`: a `DataLoader`, or any object with `batches(epoch, start)`; or any iterable, of
      which an iterator with `get_state` and `set_state` resumes at once, others by replaying.
      Leaves of batches may be whatever knows `__array__`, such as torch's tensors on the CPU.
      With an attribute `allow_nan` that is true its first batch may hold NaN.
    - `limit`: batches in an epoch at most: an integer, or a fraction of the loader's length.
    - `poll`: called while waiting for data; may raise.
    """

    def __init__(
        self,
        loader: Any,
        placement: Placement,
        *,
        name: str,
        limit: int | float = 1.0,
        prefetch: int = 2,
        poll: Callable[[], None] = lambda: None,
    ):
        if not isinstance(loader, Iterable) and not has_batches(loader):
            raise TypeError(
                f"The {name} data is a `{type(loader).__name__}`, which is no loader. Pass a "
                "`DataLoader`, a `DataModule`, or any iterable of batches."
            )
        self.loader = loader
        self.name = name
        self.wait_s = 0.0
        self._placement = placement
        self._poll = poll
        self._opened: Iterator[PyTree] | None = None
        self._taken, self._restored = 0, None
        length = known_length(loader)
        self.counted = length is not None
        """Whether the loader knows its length."""
        self.length = _limited(length, limit, name)
        self._checked_shapes: set[tuple[tuple[int, ...], ...]] = set()
        first = self._first()
        check_leading_axes(first, f"The first {name} batch")
        _check_rows(first, name)
        if not getattr(loader, "allow_nan", False):
            _refuse_nan(first, name)
        self.structure: Any = jax.tree.structure(first)
        self.spec = abstract(first)
        self._depth = _depth(self.spec, prefetch)
        self._resident = self._all_on_device()

    def _first(self) -> PyTree:
        one_pass = is_one_pass(self.loader)
        before = _state(self.loader) if one_pass else None
        for first in self._raw(0, 0):
            if before is not None:
                self.loader.set_state(before)
            elif one_pass:
                self._opened = chain([first], self.loader)
            return first
        raise ValueError(
            f"The {self.name} data is empty: its loader, a `{type(self.loader).__name__}`, gave "
            "no batch."
        )

    def _raw(self, epoch: int, start: int) -> Iterator[PyTree]:
        if has_batches(self.loader):
            return self.loader.batches(epoch, start)
        opened: Any = self._opened or iter(self.loader)
        skipped = self._taken if is_one_pass(self.loader) else start
        restored = self._restored if skipped else None
        self._opened, self._taken, self._restored = None, 0, None
        if restored is not None:
            opened.set_state(restored)
            return opened
        return self._replayed(opened, skipped) if skipped else opened

    def go_on(self, taken: int, state: Any) -> None:
        """Makes the next epoch go on after `taken` batches in all, with the iterator in `state`,
        where it had one."""
        self._taken, self._restored = taken, state

    def _replayed(self, opened: Iterator[PyTree], count: int) -> Iterator[PyTree]:
        if not isinstance(self.loader, list | tuple):
            warnings.warn(
                f"The {self.name} data is a `{type(self.loader).__name__}`, which can't be entered "
                f"in the middle: to go on, {count} batches are read and thrown away, and the run "
                "is the same only if they are the same ones again. A `DataLoader` goes on at once, "
                "and so does an iterator with `get_state` and `set_state`.",
                stacklevel=2,
            )
        return islice(opened, count, None)

    def _all_on_device(self) -> list[DeviceBatch] | None:
        """The batches themselves, where they are a list of arrays that already lie right."""
        if not isinstance(self.loader, list | tuple):
            return None
        for batch in self.loader:
            if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
                return None
        return [self._checked(batch) for batch in self.loader]

    def _checked(self, batch: PyTree) -> DeviceBatch:
        leaves, structure = jax.tree.flatten(batch)
        if self.structure != structure:
            raise ValueError(
                f"A {self.name} batch has the structure {structure}, but the first one had "
                f"{self.structure}. All batches have to be alike."
            )
        leaves = list(map(_own_array, leaves))
        shapes = tuple(map(np.shape, leaves))
        if shapes not in self._checked_shapes:
            check_leading_axes(batch, f"A {self.name} batch")
            self._checked_shapes.add(shapes)
        placed = self._placement.put(leaves)
        return DeviceBatch(jax.tree.unflatten(structure, placed), placed, shapes)

    def _with_state(self, raw: Any) -> Iterator[DeviceBatch]:
        for batch in raw:
            yield self._checked(batch)._replace(state=_state(raw))

    @cached_property
    def shapes(self) -> list[PyTree]:
        """Abstract batches of every announced shape, the usual one first."""
        announced = getattr(self.loader, "batch_shapes", None)
        if announced is not None:
            complete = not isinstance(self.length, int) or self.length >= len(self.loader)
            return list(announced) if complete else [self.spec]
        if isinstance(self.loader, list | tuple):
            sizes = map(abstract, self.loader[: self.length])
            return list({tuple(jax.tree.leaves(size)): size for size in sizes}.values())
        return [self.spec]

    def marked(self, epoch: int, start: int = 0) -> Iterator[tuple[DeviceBatch, bool]]:
        """As `epoch`, and with each batch whether it is the last one. Where the loader does not
        know its length that takes reading one batch ahead."""
        if self.counted:
            taken = start
            for taken, batch in enumerate(self.epoch(epoch, start), start + 1):
                yield batch, taken == self.length
            if self.length is not None and taken < self.length:
                raise ValueError(
                    f"The {self.name} loader says that it has {self.length} batches (`__len__`), "
                    f"but gave {taken}."
                )
            return
        batches = self.epoch(epoch, start)
        held = next(batches, None)
        while held is not None:
            following = next(batches, None)
            yield held, following is None
            held = following

    def epoch(self, epoch: int, start: int = 0) -> Iterator[DeviceBatch]:
        """The batches of one epoch, from number `start` on, limited."""
        stop = self.length
        if self._resident is not None:
            yield from self._resident[start:stop]
            return
        count = None if stop is None else max(stop - start, 0)
        raw = self._raw(epoch, start)
        checked = self._with_state if _has_state(raw) else partial(map, self._checked)
        reader = _ReadAhead(islice(checked(raw), count), self._depth, self._poll)
        try:
            for batch in reader:
                yield batch
                self.wait_s = self.wait_s + reader.wait_s
                reader.wait_s = 0.0
        finally:
            reader.close()

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint remembers of the loader, to notice that it was changed."""
        own = getattr(self.loader, "fingerprint", None)
        found = own() if callable(own) else {"source": type(self.loader).__name__}
        shapes = jax.tree_util.tree_flatten_with_path(self.spec)[0]
        spec = {leaf_path(p): f"{x.dtype}{list(x.shape)}" for p, x in shapes}
        return found | {"length": self.length, "batch": spec}


def has_batches(loader: Any) -> bool:
    """Whether `loader` can be entered anywhere: it has a method `batches(epoch, start)`."""
    return callable(getattr(loader, "batches", None))


def is_one_pass(loader: Any) -> bool:
    """Whether `loader` gives its batches once, as generators do."""
    return not has_batches(loader) and isinstance(loader, Iterator)


def known_length(loader: Any) -> int | None:
    """`None` also where `__len__` itself does not know: that of torch's `DataLoader` over a
    stream raises."""
    try:
        return len(loader)
    except TypeError:
        return None


def _own_array(leaf: Any) -> Any:
    """An array of another library as numpy's. A copy, since nobody could forbid to write to it."""
    if isinstance(leaf, np.ndarray | jax.Array) or not hasattr(leaf, "__array__"):
        return leaf
    return np.asarray(leaf).copy()


def _has_state(iterator: Any) -> bool:
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def _state(iterator: Any) -> Any:
    return copy.deepcopy(iterator.get_state()) if _has_state(iterator) else None


def _limited(length: int | None, limit: int | float, name: str) -> int | None:
    if isinstance(limit, int) and not isinstance(limit, bool):
        return limit if length is None else min(limit, length)
    if length is None:
        if limit == 1.0:
            return None
        raise ValueError(
            f"The {name} data has no length, so {limit} of it is unknown. Limit it with an integer."
        )
    return int(length * limit) if limit == 0 or int(length * limit) > 0 else 1


def _depth(batch: PyTree, least: int) -> int:
    """How many batches to read ahead: of small ones more, up to 1 MiB of them."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    return max(least, min(_MOST_AHEAD, 2**20 // max(size, 1)))


def _check_rows(batch: PyTree, name: str) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if np.shape(leaf)[:1] == (0,):
            raise ValueError(
                f"The first {name} batch is empty: `{leaf_path(path)}` has no rows "
                f"(its shape is {np.shape(leaf)})."
            )


def _refuse_nan(batch: PyTree, name: str) -> None:
    # Infinities may be meant: attention biases hold them.
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        array = np.asarray(leaf)
        if jax.dtypes.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            where = np.argwhere(np.isnan(array))[0].tolist()
            raise ValueError(
                f"The first {name} batch holds NaN: `{leaf_path(path)}` has it at {where}. Clean "
                "the data, or, if it stands for values that the task leaves out, write "
                "`DataLoader(..., allow_nan=True)`, or give your loader that attribute."
            )


_END = object()
_MOST_AHEAD = 16
_JOIN_S = 1.0


class _Failure(NamedTuple):
    error: BaseException


class _ReadAhead:
    """Runs an iterator in a thread, at most `depth` items ahead."""

    def __init__(self, items: Iterator[Any], depth: int, poll: Callable[[], None]):
        self.wait_s = 0.0
        self._poll = poll
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._room.put(depth)
        self._closed = False
        # Room is given back by halves: a change of threads costs more than reading a small batch.
        self._share = max(depth // 2, 1)
        self._thread = threading.Thread(
            target=self._run, args=(items,), name="jaxlightning-feed", daemon=True
        )
        self._thread.start()

    def _run(self, items: Iterator[Any]) -> None:
        try:
            while room := self._room.get():
                for _ in range(room):
                    if self._closed:
                        return
                    item = next(items, _END)
                    self._ready.put(item)
                    if item is _END:
                        return
        except BaseException as error:
            self._ready.put(_Failure(error))

    def __iter__(self) -> Iterator[Any]:
        taken = 0
        while True:
            try:
                item = self._ready.get_nowait()
            except queue.Empty:
                item = self._wait()
            if item is _END:
                return
            if isinstance(item, _Failure):
                raise item.error
            taken += 1
            if taken == self._share:
                self._room.put(taken)
                taken = 0
            yield item

    def _wait(self) -> Any:
        start = time.perf_counter()
        while True:
            self._poll()
            try:
                item = self._ready.get(timeout=0.1)
            except queue.Empty:
                continue
            self.wait_s += time.perf_counter() - start
            return item

    def close(self) -> None:
        """Ends the thread, so that nobody else reads the loader. Where it hangs in the loader, it
        ends after that."""
        self._closed = True
        self._room.put(0)
        if self._thread is not threading.current_thread():  # as garbage, it may be
            self._thread.join(_JOIN_S)
