"""Pipelines of Grain, accepted as they are. Nothing here imports Grain: whoever passes a pipeline
has done so."""

from __future__ import annotations

import atexit
import signal
import sys
import weakref
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import numpy as np

from jaxlightning._configuration import described

from ._culprit import first_failing
from ._fingerprint import of_arrays, of_list

_KINDS = ("MapDataset", "IterDataset", "DataLoader", "DatasetIterator", "DataLoaderIterator")
# The length of what was repeated without an end is about `sys.maxsize`, by the batch size.
_ENDLESS = 2**40
# What changes speed and not data, and what is derived from the rest.
_LEFT_OUT = {
    "parents", "datasets", "read_options", "options", "buffer_size", "prefetch_buffer_size",
    "num_make_iter_threads", "make_iter_buffer_size", "iter_buffer_size", "has_child", "stats",
    "default_seed", "record_metrics", "original_source_map_dataset", "source_name", "map_fn",
    "filter_fn", "transform_name", "transform_cls_name", "rng_pool", "parent_length", "length",
}  # fmt: skip
_SOURCES = {"source", "data_source"}
# An iterator has attributes that change as well; these do not.
_OF_ITERATORS = {
    "batch_size", "drop_remainder", "seed", "window_size", "length_struct", "num_packing_bins",
    "num_epochs", "count", "proportions", "cycle_length",
}  # fmt: skip

_WORKER = "ProcessPrefetchIterDataset"

_opened: weakref.WeakSet[Any] = weakref.WeakSet()


def _is(thing: Any, *kinds: str) -> bool:
    module = sys.modules.get("grain")
    known = tuple(getattr(module, kind) for kind in kinds if hasattr(module, kind))
    return isinstance(thing, known)


def recognises(loader: Any) -> bool:
    """Whether it is a pipeline of Grain, or an iterator of one."""
    return _is(loader, *_KINDS)


def iterator(loader: Any, epoch: int = 0) -> Any:
    """A new iterator of a pipeline; of a `MapDataset` one of the given epoch, which reads 16
    batches ahead: Grain's own 500 are meant for what is not yet batched."""
    allow_processes()
    if _is(loader, "MapDataset"):
        if epoch:
            length = len(loader)
            loader = loader.repeat(epoch + 1).slice(slice(epoch * length, None))
        options = sys.modules["grain"].ReadOptions(num_threads=16, prefetch_buffer_size=16)
        loader = loader.to_iter_dataset(options)
    opened = iter(loader)
    close_at_exit(opened)
    return opened


def allow_processes() -> None:
    """Grain 0.2.18 starts worker processes only where absl's flags were parsed, which they never
    are in a script without `absl.app`."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def close_at_exit(opened: Any) -> None:
    """Sees to it that an iterator is closed while the interpreter is whole."""
    _opened.add(opened)
    _register()


@cache
def _register() -> None:
    # Not sooner: what is registered last runs first, and multiprocessing's own exit has to be
    # after this one.
    atexit.register(_close_all)


def _close_all() -> None:
    alive = list(_opened)
    for opened in alive:
        close(opened)
    if alive:  # they would close again when modules are gone, and print errors
        sys.modules["grain"].DatasetIterator.__del__ = lambda self: None


def close(opened: Any) -> None:
    """Ends an iterator's threads and processes."""
    inner = getattr(opened, "_iterator", opened)  # of a `DataLoader`
    if hasattr(inner, "close"):
        inner.close()


def _nodes(node: Any) -> list[Any]:
    """What a step of a pipeline reads from."""
    if _is(node, "DataLoader"):
        return [node._dataset]
    if _is(node, "DataLoaderIterator"):
        return [node._data_loader]
    found = [*getattr(node, "_parents", ()), *getattr(node, "_datasets", ())]
    upstream = (getattr(node, name, None) for name in ("_map_parent", "_iter_parent"))
    return found + [step for step in upstream if step is not None]


def is_endless(loader: Any) -> bool:
    """Whether a pipeline was repeated without an end."""
    if _is(loader, "MapDataset"):
        return len(loader) >= _ENDLESS
    if type(loader).__name__ == "LimitIterDataset":
        return False
    if type(loader).__name__ == "RepeatIterDataset" and loader._num_epochs is None:
        return True
    nodes = _nodes(loader)
    return bool(nodes) and all(map(is_endless, nodes))


def is_reshuffled(loader: Any) -> bool:
    """Whether each epoch may have an order of its own: a `MapDataset` with an end knows more
    epochs than its length shows."""
    return _is(loader, "MapDataset") and not is_endless(loader)


def is_shuffled_once(loader: Any) -> bool:
    """Whether a pipeline is shuffled, but gives that order each time it is iterated."""
    if _is(loader, "MapDataset") or is_endless(loader):
        return False
    return _shuffles(loader) and not _any(loader, "RepeatMapDataset")


def _shuffles(node: Any) -> bool:
    shuffles = "Shuffle" in type(node).__name__
    shuffles |= bool(getattr(getattr(node, "_sampler", None), "_shuffle", False))
    return shuffles or any(map(_shuffles, _nodes(node)))


def known_length(loader: Any) -> int | None:
    """Batches of an epoch, where the pipeline says how many there are."""
    if not is_reshuffled(loader) or _any(loader, "FilterMapDataset", "FlatMapMapDataset"):
        return None
    return len(loader)


def _any(node: Any, *names: str) -> bool:
    return type(node).__name__ in names or any(_any(step, *names) for step in _nodes(node))


# What tells a pipeline from another one


def describe(loader: Any) -> dict[str, Any]:
    """The steps of a pipeline, the source first, with all of their settings that change what it
    gives. Grain itself checks nothing of that where a state is restored."""
    steps: list[tuple[str, Any]] = []
    node = loader
    while node is not None:
        name = type(node).__name__.lstrip("_")
        settings = _settings(node)
        nodes = _nodes(node)
        workers = [step for step in nodes if type(step).__name__ == _WORKER]
        if workers:
            name, settings = "mp_prefetch", {"workers": len(workers)}
            nodes = _nodes(workers[0])
        elif len(nodes) > 1:
            settings |= {f"input {i}": describe(step) for i, step in enumerate(nodes)}
        steps.append((name, settings or None))
        node = nodes[0] if len(nodes) == 1 or workers else None
    found: dict[str, Any] = {"pipeline": " > ".join(name for name, _ in reversed(steps))}
    for name, settings in reversed(steps):
        number = 2
        unique = name
        while unique in found:
            unique, number = f"{name} {number}", number + 1
        if settings is not None:
            found[unique] = settings
    return found


def _settings(node: Any) -> dict[str, Any]:
    if _is(node, "DataLoaderIterator", "DataLoader"):
        return {}
    iterates = _is(node, "DatasetIterator")
    found = {}
    for name, value in sorted(vars(node).items()):
        name = name.lstrip("_")
        if value is None or name in _LEFT_OUT or (iterates and name not in _OF_ITERATORS):
            continue
        if isinstance(getattr(type(node), f"_{name}", None), cached_property):
            continue  # derived, and there only once somebody asked
        found[name] = _source(value) if name in _SOURCES else described(value)
    return found


def _source(source: Any) -> Any:
    own = getattr(source, "fingerprint", None)
    if callable(own):
        return own()
    if isinstance(source, list | tuple):
        return of_list(source)
    if isinstance(source, np.ndarray) and source.ndim:
        return of_arrays(source)
    rows = len(source) if hasattr(source, "__len__") else None
    return {"type": type(source).__name__, "rows": rows}


# What went wrong in it


class Workers:
    """The processes of a pipeline that has some, to say which of them died."""

    def __init__(self, loader: Any):
        self.any = recognises(loader) and _any(loader, _WORKER)
        self._seen: dict[int | None, Any] = {}

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, and after each a look at the processes there are."""
        if not self.any:
            return batches
        return (batch for batch in batches if self._look())

    def _look(self) -> bool:
        import multiprocessing

        self._seen |= {process.pid: process for process in multiprocessing.active_children()}
        return True

    def note_dead(self, error: Exception) -> None:
        """Notes those that ended otherwise than by themselves."""
        for pid, process in self._seen.items():
            code = process.exitcode
            if not process.name.startswith("grain-") or code in (None, 0):
                continue
            how = f"with exit code {code}"
            if code < 0:
                how = f"by signal {-code} ({signal.strsignal(-code)})"
            hint = " The system kills processes where memory runs short." if code == -9 else ""
            error.add_note(
                f"The worker process {pid} of Grain, `{process.name}`, died {how}.{hint}"
            )


def note_culprit(error: Exception, loader: Any, opened: Any, epoch: int) -> None:
    """Notes the row that raised, where a `MapDataset` lets one look for it."""
    if not _is(loader, "MapDataset"):
        return
    try:
        index = opened.get_state()["next_index"]
        index += epoch * len(loader) if is_reshuffled(loader) else 0
        found = _culprit(loader, index, error)
    except (AttributeError, KeyError, TypeError, ValueError):  # another version of Grain
        return
    if found is not None:
        row, source = found
        error.add_note(f"The row that fails is row {row} of the source, a `{source}`.")


def _culprit(node: Any, index: int, error: Exception) -> tuple[int, str] | None:
    while type(node).__name__ != "BatchMapDataset":
        index, node = _upstream(node, index)
    parent, size = node._parent, node._batch_size
    epoch, inside = divmod(index, len(node))
    rows = range(inside * size, min((inside + 1) * size, len(parent)))
    before = epoch * len(parent)
    row = first_failing((before + row for row in rows), parent.__getitem__, error)
    if row is None:
        return None
    node = parent
    while type(node).__name__ not in ("SourceMapDataset", "RangeMapDataset"):
        row, node = _upstream(node, row)
    source = type(getattr(node, "_source", range(0))).__name__
    return row % len(node), source


def _upstream(node: Any, index: int) -> tuple[int, Any]:
    """Where a step of one element each takes its element `index` from."""
    name = type(node).__name__
    if name == "ShuffleMapDataset":
        return node._shuffled_index(index), node._parent
    if name in {
        "MapMapDataset", "RandomMapMapDataset", "MapWithIndexMapDataset", "FilterMapDataset",
        "RepeatMapDataset", "_WithSeedMapDataset",
    }:  # fmt: skip
        return index, node._parent
    raise ValueError(f"Nobody knows where a `{name}` takes its elements from.")
