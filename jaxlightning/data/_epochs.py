"""How the epochs of a loader are opened: anew, in the middle, or where the last one ended."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from jaxtyping import PyTree

from .._say import warn
from . import _grain as grain
from ._fingerprint import checksum
from ._loader import DataLoader, abstract


class Read(NamedTuple):
    """A batch, and what `get_state` of its iterator said after it: `None` where it has none."""

    batch: PyTree
    state: Any = None


class Epochs(abc.ABC):
    """The epochs of a loader. `name` says in errors whose data it is."""

    def __init__(self, loader: Any, name: str):
        self.loader = loader
        self.name = name
        self.held: Callable[[int], tuple[tuple[int, int], ...]] | None = None
        """In a job of several processes: which rows of a batch of so many this one holds."""
        self._goes_on: tuple[int, Any] = (0, None)

    @abc.abstractmethod
    def first(self) -> PyTree:
        """The first batch of all, which the first epoch gives again.

        **Raises:** `StopIteration` where there is none.
        """

    @abc.abstractmethod
    def open(self, epoch: int, start: int) -> Generator[Read, None, None]:
        """The batches of an epoch from number `start` on. Whoever stops early closes it."""

    def go_on(self, taken: int, state: Any) -> None:
        """Makes the epoch that is opened next go on after `taken` batches in all, with the
        iterator in `state`, where it had one."""
        self._goes_on = (taken, state)

    def _going_on(self) -> tuple[int, Any]:
        """What `go_on` said, once."""
        found, self._goes_on = self._goes_on, (0, None)
        return found

    def close(self) -> None:  # noqa: B027
        """Lets go of the threads and processes that were started to read."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells the loader from another one."""
        own = getattr(self.loader, "fingerprint", None)
        return own() if callable(own) else {"source": type(self.loader).__name__}

    def announced(self) -> list[PyTree] | None:
        """Abstract batches of all shapes there are, where that is known."""
        return getattr(self.loader, "batch_shapes", None)

    def replayed(self, opened: Iterator[PyTree], count: int) -> Iterator[PyTree]:
        """What `opened` gives after `count` batches, which are read and thrown away."""
        if count and not isinstance(self.loader, list | tuple):
            warn(
                f"The {self.name} data is a `{type(self.loader).__name__}`, which can't be entered "
                f"in the middle: to go on, {count} batches are read and thrown away, and the run "
                "is the same only if they are the same ones again. A `DataLoader` goes on at once, "
                "and so does an iterator with `get_state` and `set_state`.",
            )
        return islice(opened, count, None)


class IndexedEpochs(Epochs):
    """Of a loader that can be entered anywhere: `batches(epoch, start)`."""

    def first(self) -> PyTree:
        return next(self._batches(0, 0))

    def open(self, epoch: int, start: int) -> Generator[Read, None, None]:
        for batch in self._batches(epoch, start):
            yield Read(batch)

    def _batches(self, epoch: int, start: int) -> Iterator[PyTree]:
        if self.held is not None and isinstance(self.loader, DataLoader):
            return self.loader.held_batches(epoch, start, self.held)
        return iter(self.loader.batches(epoch, start))

    def announced(self) -> list[PyTree] | None:
        if self.held is not None and isinstance(self.loader, DataLoader):
            return self.loader.held_shapes(self.held)
        return super().announced()


class RepeatedEpochs(Epochs):
    """Of an iterable, which every epoch iterates anew."""

    def first(self) -> PyTree:
        return next(iter(self.loader))

    def open(self, epoch: int, start: int) -> Generator[Read, None, None]:
        taken, restored = self._going_on()
        opened = batches = iter(self.loader)
        if start and restored is not None:
            opened.set_state(restored)
        else:
            if taken and not start and restored is None:
                self._warn_of_epochs(epoch)
            batches = self.replayed(opened, start)
        yield from _noted(batches, opened, self.name, epoch, start)

    def _warn_of_epochs(self, epoch: int) -> None:
        if not isinstance(self.loader, list | tuple):
            warn(
                f"The {self.name} data is a `{type(self.loader).__name__}`, which does not know of "
                f"epochs: the run goes on with epoch {epoch}, and is the same only if every "
                "iteration gives the same batches. A `DataLoader` shuffles by the epoch's number.",
            )


class OnePassEpochs(Epochs):
    """Of an iterator: each epoch goes on where the last one ended."""

    def __init__(self, loader: Any, name: str):
        super().__init__(loader, name)
        self._batches: Iterator[PyTree] = loader
        self._workers = grain.Workers(loader)
        if grain.recognises(loader):
            grain.close_at_exit(loader)

    def first(self) -> PyTree:
        before = _state(self.loader)
        first = next(self.loader)
        if before is not None:
            self.loader.set_state(before)
        else:
            self._batches = chain([first], self.loader)
        return first

    def open(self, epoch: int, start: int) -> Generator[Read, None, None]:
        skipped, restored = self._going_on()
        batches, self._batches = self._batches, self.loader
        if skipped and restored is not None:
            self.loader.set_state(restored)
        else:
            batches = self.replayed(batches, skipped)
        try:
            batches = self._workers.watched(batches)
            yield from _noted(batches, self.loader, self.name, epoch, start)
        except Exception as error:
            self._workers.note_dead(error)
            raise

    def fingerprint(self) -> dict[str, Any]:
        steps = grain.describe(self.loader) if grain.recognises(self.loader) else {}
        return super().fingerprint() | steps


class GrainEpochs(Epochs):
    """Of a Grain pipeline: `MapDataset`, `IterDataset` or `DataLoader`.

    - A `MapDataset` gives in epoch `e` what its `repeat()` would: shuffled anew each time.
    - One without an end, after `repeat()`, goes on over the epochs of training, which
      `limit_train_batches` parts; where epoch 0 is opened again, as for validation, it starts anew.
    - Any other one is iterated anew by each epoch.

    Iterators are closed when they are done with, and at exit. The first one is kept for the first
    epoch, since it may have started processes.
    """

    def __init__(self, loader: Any, name: str):
        super().__init__(loader, name)
        self._endless = grain.is_endless(loader)
        self._reshuffled = grain.is_reshuffled(loader)
        self._workers = grain.Workers(loader)
        self._kept: tuple[Any, Read] | None = None
        self._running: Any = None
        self._steps = grain.describe(loader)
        self._first_batch = ""

    def first(self) -> PyTree:
        iterator = grain.iterator(self.loader)
        try:
            first = next(iterator)
        except StopIteration:
            grain.close(iterator)
            raise
        except Exception as error:
            self._explain(error, iterator, 0, 0)
            raise
        self._kept = (iterator, Read(first, _state(iterator)))
        self._first_batch = checksum(first)
        return first

    def open(self, epoch: int, start: int) -> Generator[Read, None, None]:
        iterator, held = self._opened(epoch, start)
        self._running = iterator
        number = start
        try:
            for read in held:
                yield read
                number += 1
            for batch in self._workers.watched(iterator):
                yield Read(batch, _state(iterator))
                number += 1
        except Exception as error:
            self._explain(error, iterator, epoch, number)
            raise
        finally:
            if not self._endless:
                self.close()

    def announced(self) -> list[PyTree] | None:
        length = grain.known_length(self.loader)
        if length is None or self._kept is None:
            return None
        try:
            batches = [self._kept[1].batch, self.loader[length - 1]]
        except Exception:  # which it will raise again where the batch is due
            return None
        shapes = list(map(abstract, batches))
        return shapes[:1] if shapes[0] == shapes[1] else shapes

    def _explain(self, error: Exception, iterator: Any, epoch: int, number: int) -> None:
        """Adds what is known of the place, and closes the iterator: Grain would pass it over."""
        error.add_note(f"Raised by the {self.name} data in batch {number} of epoch {epoch}.")
        self._workers.note_dead(error)
        grain.note_culprit(error, self.loader, iterator, epoch)
        grain.close(iterator)
        self._running = None

    def _opened(self, epoch: int, start: int) -> tuple[Any, list[Read]]:
        if epoch and grain.is_shuffled_once(self.loader):
            warn(
                f"The {self.name} data is shuffled, but a `{type(self.loader).__name__}` of Grain "
                "that is iterated anew by each epoch has the same order in all of them. Write "
                "`.repeat()` before `.to_iter_dataset()`, and `limit_train_batches=` to part the "
                "epochs; or pass a `MapDataset`, which is shuffled anew.",
            )
        kept, self._kept = self._kept, None
        taken, restored = self._going_on()
        enters = taken if self._endless else start
        if self._endless and epoch and not enters and self._running is not None:
            return self._running, []
        self.close()
        if kept is not None and not enters and (epoch == 0 or not self._reshuffled):
            return kept[0], [kept[1]]
        if kept is not None and self._workers.any:
            iterator = kept[0]  # starting others takes seconds
        else:
            if kept is not None:
                grain.close(kept[0])
            iterator = grain.iterator(self.loader, epoch if self._reshuffled else 0)
        if enters:
            iterator.set_state(restored)
        return iterator, []

    def close(self) -> None:
        for iterator in (self._running, self._kept and self._kept[0]):
            if iterator is not None:
                grain.close(iterator)
        self._running = self._kept = None

    def fingerprint(self) -> dict[str, Any]:
        return self._steps | {"first batch": self._first_batch}


def epochs_of(loader: Any, name: str) -> Epochs:
    """**Raises:** `TypeError` for what is no loader."""
    if not isinstance(loader, Iterable) and not has_batches(loader):
        raise TypeError(
            f"The {name} data is a `{type(loader).__name__}`, which is no loader. Pass a "
            "`DataLoader`, a `DataModule`, or any iterable of batches."
        )
    if has_batches(loader):
        return IndexedEpochs(loader, name)
    if is_one_pass(loader):
        return OnePassEpochs(loader, name)
    return GrainEpochs(loader, name) if grain.recognises(loader) else RepeatedEpochs(loader, name)


def has_batches(loader: Any) -> bool:
    """Whether `loader` can be entered anywhere: it has a method `batches(epoch, start)`."""
    return callable(getattr(loader, "batches", None))


def is_one_pass(loader: Any) -> bool:
    """Whether `loader` gives its batches once, as generators do."""
    return not has_batches(loader) and isinstance(loader, Iterator)


def known_length(loader: Any) -> int | None:
    """`None` also where `__len__` itself does not know: that of torch's `DataLoader` over a
    stream raises, and Grain's counts elements that are filtered out, and what has no end."""
    if grain.recognises(loader):
        return grain.known_length(loader)
    try:
        return len(loader)
    except TypeError:
        return None


def _noted(
    batches: Iterator[PyTree], opened: Any, name: str, epoch: int, start: int
) -> Iterator[Read]:
    number = start
    try:
        for batch in batches:
            yield Read(batch, _state(opened))
            number += 1
    except Exception as error:
        error.add_note(f"Raised by the {name} data in batch {number} of epoch {epoch}.")
        raise


def _state(iterator: Any) -> Any:
    has = hasattr(iterator, "get_state") and hasattr(iterator, "set_state")
    return copy.deepcopy(iterator.get_state()) if has else None
