"""A loader whose whole state is one integer: the number of global batches taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree

from jaxlightning._checks import refuses_unknown
from jaxlightning._configuration import described

from . import _fingerprint, _grain
from ._culprit import first_failing, listed

Rows = Int[np.ndarray, " rows"]

_ELSEWHERE = {
    "dataset": "it is the `source`",
    "num_workers": "a thread reads ahead; for processes, pass a pipeline of Grain in its place",
    "collate_fn": "write `transform=`, a function from batch to batch",
    "pin_memory": "batches are on the devices before their step",
}
"""What takes the place of arguments that PyTorch's `DataLoader` has and this one has not."""


class HeldRows(NamedTuple):
    """The rows of a batch that this process's devices hold, one after another."""

    batch: PyTree
    rows: tuple[tuple[int, int], ...]
    """From and to, in the whole batch."""
    size: int
    """Rows of the whole batch."""

    def abstract(self) -> PyTree:
        """The shapes and dtypes of the whole batch."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.size, *x.shape[1:]), x.dtype),
            abstract(self.batch),
        )


class DataLoader:
    """Batches of rows of a source, shuffled by (seed, epoch).

        DataLoader({"x": images, "y": labels}, batch_size=32, shuffle=True)

    It shuffles and slices row numbers, then makes one read a batch. The order of an epoch is a
    function of `(seed, epoch)` and a batch one of `(seed, epoch, index)`, so going on in the
    middle reads nothing that was skipped.

    **Arguments:**

    - `source`: a pytree of arrays with equal leading axes, which may be memory-mapped; or a
      map-style `datasets.Dataset`; or a `TokenFile`; or anything else with `__len__` whose
      `__getitem__` takes an array of row numbers and returns a batch.
    - `batch_size`: rows in a batch, over all devices; `"auto"`: for training, as many as fit, found
      by `tuning.batch_size` when the fit begins. To resume such a run, write the number it found.
    - `shuffle`, `seed`: whether and how to permute the rows; each epoch differently.
    - `drop_last`: whether to leave out the last, smaller batch of an epoch. By default it is
      announced to the Trainer, which compiles a program for it.
    - `transform`: a function from batch to batch, run in the Trainer's prefetch thread. In a job
      of several processes it gets the rows that this one holds, and so treats each row alone.
    - `allow_nan`: whether NaN in the first batch is meant and no error.
    """

    @refuses_unknown("DataLoader", _ELSEWHERE)
    def __init__(
        self,
        source: Any,
        batch_size: int | str,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        transform: Callable[[PyTree], PyTree] | None = None,
        allow_nan: bool = False,
    ):
        is_number = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if batch_size != "auto" and not (is_number and int(batch_size) > 0):
            raise ValueError(
                f'`batch_size={batch_size!r}` has to be a positive integer, or "auto".'
            )
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed={seed!r}` has to be an integer of at least 0.")
        self.source = source
        self._batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.transform = transform
        self.allow_nan = allow_nan
        self._rows, self._read, self._source_fingerprint = _reader(source)
        # Now, since an object that is called may change by it.
        self._transform_fingerprint = described(transform)
        if self._rows == 0:
            raise ValueError("The `source` of this `DataLoader` is empty: it has no rows.")
        if batch_size != "auto" and len(self) == 0:
            raise ValueError(
                f"A `source` of {self._rows} rows gives no batch of {batch_size} with "
                "`drop_last=True`. Make `batch_size` smaller, or write `drop_last=False`."
            )

    @property
    def batch_size(self) -> int:
        """Rows in a batch.

        **Raises:** `ValueError` for `"auto"`, which a fit has not settled yet.
        """
        if isinstance(self._batch_size, str):
            raise ValueError(
                '`DataLoader(batch_size="auto")` is settled by `Trainer.fit`, for training data '
                "only. Write a number, or ask for one: `jaxlightning.tuning.batch_size(...)`."
            )
        return self._batch_size

    @property
    def rows(self) -> int:
        """Those of the source."""
        return self._rows

    @property
    def is_auto(self) -> bool:
        """Whether the batch size is still to be found."""
        return self._batch_size == "auto"

    def settle(self, batch_size: int) -> None:
        """Gives a loader with `batch_size="auto"` the size that was found."""
        self._batch_size = batch_size

    def row(self) -> PyTree:
        """A batch of the source's first row."""
        return self._batch(np.arange(1), "a first look at a row")

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self._rows, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[PyTree]:
        return self.batches(0)

    def order(self, epoch: int) -> Rows:
        """The row numbers of an epoch, in the order in which they are read."""
        if not self.shuffle:
            return np.arange(self._rows)
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return generator.permutation(self._rows)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PyTree]:
        """The batches of an epoch from number `start` on."""
        order = self.order(epoch)
        for index in range(start, len(self)):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self._batch(rows, f"batch {index} of epoch {epoch}")

    def held_batches(
        self, epoch: int, start: int, held: Callable[[int], tuple[tuple[int, int], ...]]
    ) -> Iterator[HeldRows]:
        """As `batches`, of which only the rows are read that a process holds: of a batch of so
        many, those that `held` says."""
        order = self.order(epoch)
        for index in range(start, len(self)):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            mine = held(len(rows))
            read = np.concatenate([rows[begin:end] for begin, end in mine])
            batch = self._batch(read, f"batch {index} of epoch {epoch}")
            yield HeldRows(batch, mine, len(rows))

    def held_shapes(self, held: Callable[[int], tuple[tuple[int, int], ...]]) -> list[PyTree]:
        """As `batch_shapes`, reading as many rows as a process holds."""
        look = "a first look at the shapes of batches"
        found = []
        for size in self._sizes():
            mine = held(size)
            count = sum(end - begin for begin, end in mine)
            found.append(HeldRows(self._batch(np.arange(count), look), mine, size).abstract())
        return found

    def _batch(self, rows: Rows, place: str) -> PyTree:
        try:
            return self._attempt(rows)
        except Exception as error:
            attempt = lambda row: self._attempt(np.array([row]))
            found = first_failing(rows.tolist(), attempt, error)
            error.add_note(
                f"No row fails alone: those of {place} are {listed(rows.tolist())}."
                if found is None
                else f"The row that fails is row {found} of the source, in {place}."
            )
            raise

    def _attempt(self, rows: Rows) -> PyTree:
        files = [file["filename"] for file in getattr(self.source, "cache_files", ())]
        who = f"the source, a `{type(self.source).__name__}`, " + (
            f"from {', '.join(f'`{file}`' for file in files)}"
            if files
            else "which is asked for a batch at a time: `__getitem__` gets an array of row numbers"
        )
        try:
            batch = self._read(rows)
            if self.transform is None:
                return batch
            who = f"`{_name(self.transform)}`, the `transform`"
            return self.transform(batch)
        except Exception as error:
            error.add_note(f"Raised by {who}.")
            raise

    @property
    def batch_shapes(self) -> list[PyTree]:
        """Abstract batches, one of each shape that an epoch contains. Reads two batches."""
        look = "a first look at the shapes of batches"
        return [abstract(self._batch(np.arange(size), look)) for size in self._sizes()]

    def _sizes(self) -> list[int]:
        sizes = [min(self.batch_size, self._rows)]
        rest = self._rows % self.batch_size
        if rest and not self.drop_last and self._rows > self.batch_size:
            sizes.append(rest)
        return sizes

    def unshuffled(self) -> DataLoader:
        """The same loader in the source's order."""
        return DataLoader(
            self.source,
            self._batch_size,
            seed=self.seed,
            drop_last=self.drop_last,
            transform=self.transform,
            allow_nan=self.allow_nan,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for two loaders to give the same batches.

        Of arrays and datasets it holds dtypes, shapes or columns, and a checksum of a sample: of
        at most 256 rows (64 of a dataset) that are evenly spaced, and at most 1 MiB. So another
        file, order or preprocessing is noticed, but not a few changed values elsewhere. A source
        of another kind has a `fingerprint()` of its own, or only its type and length count. Of a
        `transform` the name counts, what it closes over, the arguments of a `functools.partial`
        and the attributes of an object that is called; its code does not.
        """
        return {
            "source": self._content,
            "rows": self._rows,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "transform": self._transform_fingerprint,
        }

    @cached_property
    def _content(self) -> Any:
        return self._source_fingerprint()


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def abstract(batch: PyTree) -> PyTree:
    """The shapes and dtypes of a batch, as a device will hold it."""

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        array = np.asarray(leaf) if not isinstance(leaf, jax.Array) else leaf
        if array.dtype.kind in "OSUMm":
            raise TypeError(
                f"A batch has the leaf `{jax.tree_util.keystr(path, simple=True, separator='/')}` "
                f"of dtype {array.dtype}, which no device can hold. Turn it into numbers, or leave "
                "it out of the batch."
            )
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        return jax.ShapeDtypeStruct(array.shape, dtype)

    return jax.tree_util.tree_map_with_path(one, batch)


def _reader(source: Any) -> tuple[int, Callable[[Rows], PyTree], Callable[[], Any]]:
    """The number of rows, how to read some, and how to tell the source from another one."""
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        if not hasattr(source, "__len__"):
            raise TypeError(
                f"The `source` of a `DataLoader` is a `{type(source).__name__}`, which is a stream "
                "without numbered rows. To train on it, pass it as the loader itself: "
                '`dataset.with_format("numpy").batch(32)`.'
            )
        dataset = source.with_format("numpy")
        read = lambda rows: dict(dataset[rows.tolist()])
        return len(dataset), read, partial(_fingerprint.of_dataset, dataset)
    if _grain.recognises(source):
        raise TypeError(
            f"The `source` of a `DataLoader` is a `{type(source).__name__}` of Grain, which makes "
            "batches itself. Pass it as the loader: `trainer.fit(task, pipeline.batch(32))`."
        )
    arrays = [] if isinstance(source, Iterator) else jax.tree.leaves(source)
    if arrays and all(isinstance(leaf, np.ndarray | jax.Array) for leaf in arrays):
        held = jax.tree.map(np.asarray, source)
        check_leading_axes(held, "The `source` of this `DataLoader`", scalars=False)
        read = lambda rows: jax.tree.map(lambda x: x[rows], held)
        return len(jax.tree.leaves(held)[0]), read, partial(_fingerprint.of_arrays, held)
    if isinstance(source, dict | list | tuple):
        if not arrays:
            raise ValueError("The `source` of this `DataLoader` is empty: it holds no arrays.")
        odd = next(leaf for leaf in arrays if not isinstance(leaf, np.ndarray | jax.Array))
        raise TypeError(
            f"The `source` of a `DataLoader` is a `{type(source).__name__}` that holds a "
            f"`{type(odd).__name__}` where arrays are expected. Write `numpy.asarray(...)` around "
            "each column."
        )
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        own = getattr(source, "fingerprint", None)
        named = own if callable(own) else lambda: type(source).__name__
        return len(source), lambda rows: source[rows], named
    raise TypeError(
        f"The `source` of a `DataLoader` is a `{type(source).__name__}`. It has to be a pytree of "
        "arrays, a map-style `datasets.Dataset`, or an object with `__len__` and "
        "`__getitem__(rows)`."
    )


def check_leading_axes(batch: PyTree, what: str, scalars: bool = True) -> None:
    """**Raises:** `ValueError` where the leaves of a batch disagree on its size, or, unless
    `scalars` are fine, have none."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    for path, leaf in leaves:
        if not (scalars or np.ndim(leaf)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{what} has a scalar, `{name}`, where rows are expected.")
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)[0]
        for path, leaf in leaves
        if np.ndim(leaf)
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"`{path}`: {size}" for path, size in sizes.items())
        raise ValueError(
            f"{what} has leaves whose leading axes differ ({listed}). The leading axis is the "
            "batch's and has to be equal in all leaves."
        )


@dataclasses.dataclass
class DataModule:
    """Data as one object: what to prepare, and a loader for each stage.

    class Digits(DataModule):
        def setup(self, stage):
            self.x, self.y = load()

        def train_dataloader(self):
            return DataLoader({"x": self.x, "y": self.y}, 32, shuffle=True)
    """

    def prepare_data(self) -> None:
        """Downloads and other work that is done once a machine."""

    def setup(self, stage: str) -> None:
        """Before loaders are asked for. `stage`: `"fit"`, `"validate"`, `"test"`, `"predict"`."""

    def teardown(self, stage: str) -> None:
        """After the stage, also after an exception."""

    def train_dataloader(self) -> Any:
        raise NotImplementedError(_missing(self, "train_dataloader"))

    def val_dataloader(self) -> Any:
        """A loader, or a dict from names to loaders. `None`: no validation."""
        return None

    def test_dataloader(self) -> Any:
        raise NotImplementedError(_missing(self, "test_dataloader"))

    def predict_dataloader(self) -> Any:
        raise NotImplementedError(_missing(self, "predict_dataloader"))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a run that is gone on with: after `setup`, first with the state in which its loaders
        were asked for, before they are asked for again; then, if it was another when the
        checkpoint was taken, with that."""

    def on_exception(self, exception: BaseException) -> None: ...


def _missing(module: DataModule, method: str) -> str:
    return f"`{type(module).__name__}` has no `{method}`. Write one that returns a `DataLoader`."
