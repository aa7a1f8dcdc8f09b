"""Which loaders a stage uses: from a `DataModule`, or as passed to an entry point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import jax

from .data import DataModule
from .data._epochs import epochs_of, has_batches, known_length

Loaders = dict[str, Any]
"""Loaders by name; one that stands alone has the name `""`."""

_METHODS = {
    "train": "train_dataloader",
    "val": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class _NoModule(DataModule):
    """In place of a `DataModule` where loaders were passed."""


class Sources:
    """Loaders by kind: `"train"`, `"val"`, `"test"`, `"predict"`."""

    def __init__(self, entry: str, passed: Mapping[str, Any], datamodule: DataModule | None):
        first = next(iter(passed))
        if isinstance(passed[first], DataModule):
            if datamodule is not None:
                raise ValueError(f"`{entry}` got two `DataModule`s. Pass one.")
            datamodule, passed = passed[first], {**passed, first: None}
        given = [kind for kind, loader in passed.items() if loader is not None]
        if datamodule is not None and given:
            raise ValueError(
                f"`{entry}` got a `DataModule` and {given[0]} loaders. Pass one of the two."
            )
        if datamodule is None and not given:
            raise ValueError(
                f"`{entry}` got no data. Pass a `DataLoader`, any iterable of batches, or a "
                f"`DataModule`: `trainer.{entry}(task, DataLoader(arrays, batch_size=32))`."
            )
        if datamodule is not None and not isinstance(datamodule, DataModule):
            raise TypeError(
                f"`datamodule` is a `{type(datamodule).__name__}`; it has to be a `DataModule`."
            )
        self.from_module = datamodule is not None
        self.module = datamodule or _NoModule()
        self._passed = passed

    def loaders(self, kind: str) -> Loaders:
        """**Raises:** `TypeError` for what is no loader, `ValueError` for none."""
        found = getattr(self.module, _METHODS[kind])() if self.from_module else self._passed[kind]
        return _named(found, kind)

    def train(self) -> Any:
        loaders = self.loaders("train")
        if list(loaders) != [""]:
            raise ValueError(
                "There has to be one training loader. Mix several sources inside one loader."
                if loaders
                else "There is no training data. Pass a `DataLoader`, any iterable of batches, or "
                "a `DataModule` whose `train_dataloader` returns one."
            )
        return loaders[""]


def _named(found: Any, kind: str) -> Loaders:
    if found is None:
        return {}
    if isinstance(found, Mapping):
        for name, loader in found.items():
            if not isinstance(name, str) or not _is_loader(loader):
                raise TypeError(
                    f"The {kind} data is a dict, which means several loaders by name, but its "
                    f"entry {name!r} is a `{type(loader).__name__}`. To pass arrays, write "
                    "`DataLoader(arrays, batch_size=32)`."
                )
        return dict(found)
    if isinstance(found, list | tuple) and found:
        if all(map(has_batches, found)):
            return {str(index): loader for index, loader in enumerate(found)}
        for item in filter(_gives_batches, found):
            raise TypeError(
                f"The {kind} data is a list that holds a loader, a `{type(item).__name__}`, where "
                'batches are expected. Pass several loaders by name: `{"first": a, "second": b}`.'
            )
    if not _is_loader(found):
        raise TypeError(
            f"The {kind} data is a `{type(found).__name__}`, which is no loader. Pass a "
            "`DataLoader`, a `DataModule`, or any iterable of batches."
        )
    return {"": found}


def _is_loader(found: Any) -> bool:
    array = hasattr(found, "dtype") and hasattr(found, "shape")
    if array or isinstance(found, str | bytes | type):
        return False
    return has_batches(found) or isinstance(found, Iterable)


def _gives_batches(item: Any) -> bool:
    """Whether an item of a list can be no batch, but gives some."""
    if isinstance(item, str | bytes | Mapping) or hasattr(item, "__array__"):
        return False
    return jax.tree_util.all_leaves([item]) and _is_loader(item)


class _Batches(list[Any]):
    allow_nan = False


def first_batches(loader: Any, count: int | float) -> list[Any]:
    """The same few batches in the same order: what `overfit_batches` trains on."""
    if hasattr(loader, "unshuffled"):
        loader = loader.unshuffled()
    if isinstance(count, float):
        length = known_length(loader)
        if length is None:
            raise ValueError(
                f"`overfit_batches={count}` is a fraction, but the training data has no length. "
                "Write a number of batches."
            )
        count = max(1, int(length * count))
    batches = _Batches()
    with closing(epochs_of(loader, "training")) as epochs:
        reads = epochs.open(0, 0)
        batches.extend(read.batch for read in islice(reads, count))
        reads.close()
    batches.allow_nan = getattr(loader, "allow_nan", False)
    return batches
