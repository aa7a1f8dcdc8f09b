"""From a loader to arrays on the devices: read ahead in a thread, checked, placed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxlightning.parallel import Placement, leaf_path

from ._epochs import epochs_of, known_length
from ._loader import HeldRows, abstract, check_leading_axes
from ._read_ahead import ReadAhead


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

    - `loader`: a `DataLoader`, or any object with `batches(epoch, start)`; or a pipeline of Grain,
      of which a `MapDataset` is shuffled anew by each epoch and one that is repeated without an
      end goes on over the epochs; or any iterable, of which an iterator with `get_state` and
      `set_state` resumes at once, others by replaying.
      Leaves of batches may be whatever knows `__array__`, such as torch's tensors on the CPU.
      With an attribute `allow_nan` that is true its first batch may hold NaN.
    - `limit`: batches in an epoch at most: an integer, or a fraction of the loader's length.
    - `poll`: called while waiting for data; may raise.
    - `check`: called with each batch, as arrays of numpy; may raise. Only with the first one, where
      they lie on the devices already.
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
        check: Callable[[PyTree], None] = lambda batch: None,
    ):
        self.loader = loader
        self.name = name
        self.wait_s = 0.0
        self._placement = placement
        self._poll = poll
        self._check = check
        self._epochs = epochs_of(loader, name)
        if not placement.replicated.is_fully_addressable:
            self._epochs.held = placement.held_rows
        self._reader: ReadAhead | None = None
        length = known_length(loader)
        self.counted = length is not None
        """Whether the loader knows its length."""
        self.length = _limited(length, limit, name)
        self._checked_shapes: set[tuple[tuple[int, ...], ...]] = set()
        first = self._first()
        held = first if isinstance(first, HeldRows) else None
        first = first if held is None else held.batch
        check_leading_axes(first, f"The first {name} batch")
        _check_rows(first, name)
        if not getattr(loader, "allow_nan", False):
            _refuse_nan(first, name)
        with _noting(f"Raised by the {name} data in batch 0 of epoch 0."):
            check(jax.tree.map(_on_host, first))
        self.structure: Any = jax.tree.structure(first)
        self.spec = abstract(first) if held is None else held.abstract()
        self._depth = _depth(self.spec, prefetch)
        self._resident = self._all_on_device()

    def _first(self) -> PyTree:
        try:
            return self._epochs.first()
        except StopIteration:
            raise ValueError(
                f"The {self.name} data is empty: its loader, a `{type(self.loader).__name__}`, "
                "gave no batch."
            ) from None

    def go_on(self, taken: int, state: Any) -> None:
        """Makes the next epoch go on after `taken` batches in all, with the iterator in `state`,
        where it had one."""
        self._epochs.go_on(taken, state)

    def close(self) -> None:
        """Ends what reads ahead, and lets go of the threads and processes that were started for
        it. They start again where an epoch is read after all."""
        if self._reader is not None:
            self._reader.close()
        self._epochs.close()

    def _all_on_device(self) -> list[DeviceBatch] | None:
        """The batches themselves, where they are a list of arrays that already lie right."""
        if not isinstance(self.loader, list | tuple):
            return None
        for batch in self.loader:
            if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
                return None
        return [self._checked(batch) for batch in self.loader]

    def _checked(self, batch: PyTree) -> DeviceBatch:
        held = batch if isinstance(batch, HeldRows) else None
        batch = batch if held is None else held.batch
        leaves, structure = jax.tree.flatten(batch)
        if self.structure != structure:
            raise ValueError(
                f"A {self.name} batch has the structure {structure}, but the first one had "
                f"{self.structure}. All batches have to be alike."
            )
        leaves = list(map(_own_array, leaves))
        shapes = tuple(map(np.shape, leaves))
        if held is not None:
            shapes = tuple((held.size, *shape[1:]) for shape in shapes)
        if shapes not in self._checked_shapes:
            check_leading_axes(batch, f"A {self.name} batch")
            self._checked_shapes.add(shapes)
        if not any(isinstance(leaf, jax.Array) for leaf in leaves):
            self._check(jax.tree.unflatten(structure, leaves))
        if held is None:
            placed = self._placement.put(leaves)
        else:
            placed = self._placement.put_rows(leaves, held.rows, held.size)
        return DeviceBatch(jax.tree.unflatten(structure, placed), placed, shapes)

    def _read(
        self, epoch: int, start: int, count: int | None
    ) -> Generator[DeviceBatch, None, None]:
        with closing(self._epochs.open(epoch, start)) as reads:
            for number, (batch, state) in enumerate(islice(reads, count), start):
                with _noting(f"Raised by the {self.name} data in batch {number} of epoch {epoch}."):
                    checked = self._checked(batch)
                yield checked._replace(state=state)

    @cached_property
    def shapes(self) -> list[PyTree]:
        """Abstract batches of every announced shape, the usual one first."""
        announced = self._epochs.announced()
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
        reader = ReadAhead(self._read(epoch, start, count), self._depth, self._poll)
        self._reader = reader
        try:
            for batch in reader:
                yield batch
                self.wait_s = self.wait_s + reader.wait_s
                reader.wait_s = 0.0
        finally:
            reader.close()

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint remembers of the loader, to notice that it was changed."""
        shapes = jax.tree_util.tree_flatten_with_path(self.spec)[0]
        spec = {leaf_path(p): f"{x.dtype}{list(x.shape)}" for p, x in shapes}
        return self._epochs.fingerprint() | {"length": self.length, "batch": spec}


@contextmanager
def _noting(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise


def _on_host(leaf: Any) -> Any:
    addressable = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return np.asarray(leaf) if addressable else leaf


def _own_array(leaf: Any) -> Any:
    """A leaf as an array that can be frozen: on CPU the devices may go on reading this very
    memory. What somebody else could still write to is copied: another library's array, or a view
    of a buffer that is not the view's alone."""
    if isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, np.ndarray):
        return leaf if _is_alone(leaf) else leaf.copy()
    return np.asarray(leaf).copy() if hasattr(leaf, "__array__") else leaf


def _is_alone(array: np.ndarray) -> bool:
    base = array.base
    if base is None:
        return True
    if not isinstance(base, np.ndarray):
        return not array.flags.writeable
    # References: the view's, `base`'s, and the argument's.
    return not base.flags.writeable or sys.getrefcount(base) <= 3


def _limited(length: int | None, limit: int | float, name: str) -> int | None:
    if isinstance(limit, int) and not isinstance(limit, bool):
        return limit if length is None else min(limit, length)
    if limit == 1.0:
        return length
    if length is None:
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


_MOST_AHEAD = 16
