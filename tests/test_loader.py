"""`DataLoader`: the order of its rows, its one-integer position, its sources, its errors."""

import itertools

import jax
import numpy as np
import pytest
from naming import named

from jaxlightning import DataLoader
from jaxlightning.data import abstract


def numbered(rows):
    """Rows that can be told apart: row i holds i."""
    return {"x": np.arange(rows, dtype=np.float32), "y": np.arange(rows, dtype=np.int32)}


def taken(batches):
    """The row numbers in batches of `numbered` rows."""
    return [batch["x"].astype(int).tolist() for batch in batches]


class Recorded:
    """A source that writes down which rows it was asked for."""

    def __init__(self, rows):
        self.rows = rows
        self.reads = []

    def __len__(self):
        return self.rows

    def __getitem__(self, rows):
        self.reads.append(np.asarray(rows).tolist())
        return {"x": rows.astype(np.float32)}


# Order and position


def test_without_shuffling_the_rows_come_in_order():
    assert taken(DataLoader(numbered(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_every_epoch_is_another_permutation_of_all_rows():
    loader = DataLoader(numbered(50), 8, shuffle=True)
    epochs = [list(itertools.chain(*taken(loader.batches(epoch)))) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_all_leaves_are_read_at_the_same_rows():
    for batch in DataLoader(numbered(20), 6, shuffle=True):
        np.testing.assert_array_equal(batch["x"].astype(np.int32), batch["y"])


def test_the_order_is_a_function_of_seed_and_epoch():
    """And of nothing else: not of what was read before, nor of numpy's global generator."""
    order = lambda seed, epoch: DataLoader(numbered(30), 4, shuffle=True, seed=seed).order(epoch)
    used = DataLoader(numbered(30), 4, shuffle=True, seed=1)
    for epoch in (2, 0, 1):
        np.random.seed(epoch)
        list(used.batches(epoch))
    np.testing.assert_array_equal(used.order(2), order(1, 2))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = {tuple(order(seed, epoch).tolist()) for seed, epoch in pairs}
    assert len(orders) == len(pairs)


def test_the_order_is_close_to_uniform():
    """Of 4! = 24 orders each comes about as often as the others: chi squared, 23 degrees."""
    loader = DataLoader(numbered(4), 4, shuffle=True, seed=5)
    counts: dict = {}
    for epoch in range(2400):
        order = tuple(loader.order(epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_squared < 49.7  # passed by chance once in a thousand seeds; this one is fixed


@pytest.mark.parametrize("drop_last", [False, True])
def test_from_any_position_the_rest_of_the_epoch(drop_last):
    loader = DataLoader(numbered(22), 4, shuffle=True, drop_last=drop_last)
    whole = taken(loader.batches(3))
    for start in range(len(loader) + 1):
        assert taken(loader.batches(3, start)) == whole[start:]


def test_going_on_reads_nothing_that_was_skipped():
    source = Recorded(1000)
    loader = DataLoader(source, 10, shuffle=True)
    expected = loader.order(1)[970:].reshape(3, 10).tolist()
    list(loader.batches(1, 97))
    assert source.reads == expected


# The last, smaller batch


@pytest.mark.parametrize(
    ("rows", "drop_last", "sizes"),
    [
        (10, False, [4, 4, 2]),
        (10, True, [4, 4]),
        (8, False, [4, 4]),
        (8, True, [4, 4]),
        (3, False, [3]),
        (4, True, [4]),
    ],
)
def test_the_smaller_last_batch_is_given_and_announced_or_dropped(rows, drop_last, sizes):
    loader = DataLoader(numbered(rows), 4, drop_last=drop_last)
    assert [len(batch["x"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)
    announced = [shape["x"].shape[0] for shape in loader.batch_shapes]
    assert announced == list(dict.fromkeys(sizes))


def test_announced_are_shapes_and_dtypes_as_a_device_holds_them():
    source = {"x": np.zeros((5, 2)), "n": np.zeros(5, np.int64), "b": np.zeros(5, bool)}
    usual, last = DataLoader(source, 3).batch_shapes
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in usual.items()} == {
        "x": ((3, 2), "float32"),
        "n": ((3,), "int32"),
        "b": ((3,), "bool"),
    }
    assert last["x"].shape == (2, 2)
    on_device = jax.device_put(next(iter(DataLoader(source, 3))))
    assert {name: leaf.dtype for name, leaf in usual.items()} == {
        name: leaf.dtype for name, leaf in on_device.items()
    }


def test_announced_after_the_transform():
    def halved(batch):
        return {"x": batch["x"][::2, None]}

    loader = DataLoader(numbered(10), 6, transform=halved)
    assert [shape["x"].shape for shape in loader.batch_shapes] == [(3, 1), (2, 1)]


# Sources


def test_one_read_a_batch():
    source = Recorded(10)
    batches = list(DataLoader(source, 4))
    assert source.reads == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch["x"].tolist() for batch in batches] == source.reads


def test_any_pytree_of_arrays():
    source = (np.arange(6), {"a": [np.ones((6, 2)), jax.numpy.arange(6)]})
    first, rest = next(iter(DataLoader(source, 4)))
    assert first.tolist() == [0, 1, 2, 3]
    assert rest["a"][0].shape == (4, 2)
    assert isinstance(rest["a"][1], np.ndarray)


def test_memory_mapped_arrays_are_read_batch_by_batch(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(40, dtype=np.float32).reshape(20, 2))
    mapped = np.load(path, mmap_mode="r")
    loader = DataLoader({"x": mapped}, 6, shuffle=True)
    assert np.shares_memory(loader.source["x"], mapped)
    for batch, rows in zip(loader.batches(1), np.split(loader.order(1), [6, 12, 18]), strict=True):
        np.testing.assert_array_equal(batch["x"], np.load(path)[rows])
        assert not np.shares_memory(batch["x"], mapped)


def test_datasets_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    rows = {"ids": [[i, i + 1] for i in range(10)], "label": list(range(10))}
    dataset = datasets.Dataset.from_dict(rows)
    loader = DataLoader(dataset, 4, shuffle=True, seed=3)
    assert len(loader) == 3
    for batch, order in zip(loader.batches(2), np.split(loader.order(2), [4, 8]), strict=True):
        np.testing.assert_array_equal(batch["ids"], np.stack([order, order + 1], 1))
        np.testing.assert_array_equal(batch["label"], order)
    assert [shape["ids"].shape for shape in loader.batch_shapes] == [(4, 2), (2, 2)]
    # The user's own dataset keeps the format it had.
    assert dataset.format["type"] is None


def test_a_streaming_dataset_is_told_from_a_map_style_one():
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_dict({"x": [1.0, 2.0]}).to_iterable_dataset()
    with pytest.raises(TypeError, match=r'pass .*`dataset\.with_format\("numpy"\)\.batch\(32\)`'):
        DataLoader(stream, 2)


# Transforms and what goes wrong in them


def test_a_transform_makes_the_batch():
    loader = DataLoader(numbered(5), 2, transform=lambda batch: {"z": 2 * batch["x"]})
    assert [batch["z"].tolist() for batch in loader] == [[0, 2], [4, 6], [8]]


def test_an_exception_in_a_transform_names_the_row():
    def picky(batch):
        if 5 in batch["x"]:
            raise ZeroDivisionError("five")
        return batch

    loader = DataLoader(numbered(9), 3, transform=picky)
    batches = iter(loader)
    assert next(batches)["x"].tolist() == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="five") as caught:
        next(batches)
    who, which = caught.value.__notes__
    assert who.startswith("Raised by `")
    assert who.endswith("picky`, the `transform`.")
    assert which == "The row that fails is row 5 of the source, in batch 1 of epoch 0."
    assert caught.traceback[-1].name == "picky"


def test_of_shuffled_rows_the_first_that_fails_is_named():
    """Rows 3, 5 and 6 fail, and another row in another way."""

    def picky(batch):
        if 2 in batch["x"] and len(batch["x"]) == 1:
            raise KeyError("not what stopped the run")
        if np.isin([3, 5, 6], batch["x"]).any():
            raise ValueError("bad row")
        return batch

    loader = DataLoader(numbered(12), 12, shuffle=True, seed=3, transform=picky)
    with pytest.raises(ValueError, match="bad row") as caught:
        list(loader.batches(4))
    first = next(row for row in loader.order(4).tolist() if row in (3, 5, 6))
    assert f"is row {first} of the source, in batch 0 of epoch 4." in caught.value.__notes__[1]


def test_an_exception_that_no_single_row_raises_names_the_batch():
    def narrow(batch):
        if len(batch["x"]) > 1:
            raise ValueError("too many")
        return batch

    with pytest.raises(ValueError, match="too many") as caught:
        next(DataLoader(numbered(30), 25, transform=narrow).batches(0, 0))
    note = caught.value.__notes__[1]
    assert note.startswith("No row fails alone: those of batch 0 of epoch 0 are [0, 1, 2, ")
    assert note.endswith("18, 19, and 5 more].")


def test_the_search_for_a_row_ends_in_time(monkeypatch):
    tried = []

    def slow(batch):
        tried.append(len(batch["x"]))
        if 7 in batch["x"]:
            raise ValueError("slow")
        return batch

    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with pytest.raises(ValueError, match="slow") as caught:
        next(iter(DataLoader(numbered(8), 8, transform=slow)))
    assert tried == [8, 1, 1, 1]  # ten seconds, at four a row
    assert caught.value.__notes__[1].startswith("No row fails alone")


def test_an_exception_in_a_source_names_the_rows():
    class OneByOne:
        """Written for another framework: it knows rows one by one only."""

        def __len__(self):
            return 4

        def __getitem__(self, row):
            return {"x": [1.0, 2.0, 3.0, 4.0][row]}

    with pytest.raises(TypeError) as caught:
        next(iter(DataLoader(OneByOne(), 2)))
    assert caught.value.__notes__ == [
        "Raised by the source, a `OneByOne`, which is asked for a batch at a time: `__getitem__` "
        "gets an array of row numbers.",
        "The row that fails is row 0 of the source, in batch 0 of epoch 0.",
    ]


def test_an_exception_in_a_dataset_of_hugging_face_names_the_row():
    datasets = pytest.importorskip("datasets")
    rows = {"x": [[0.0]] * 7 + [[1.0]] + [[0.0]] * 2}

    def picky(batch):
        if batch["x"].any():
            raise ArithmeticError("not zero")
        return batch

    loader = DataLoader(datasets.Dataset.from_dict(rows), 4, transform=picky)
    with pytest.raises(ArithmeticError, match="not zero") as caught:
        list(loader)
    assert caught.value.__notes__[1].startswith("The row that fails is row 7 of the source, in ba")


# What is refused


@pytest.mark.parametrize(
    ("source", "arguments", "error", "message"),
    [
        ({"x": np.ones(4)}, {"batch_size": 0}, ValueError, r"`batch_size=0` has to be a positive"),
        ({"x": np.ones(4)}, {"batch_size": True}, ValueError, r"`batch_size=True` has to be"),
        ({"x": np.ones(4)}, {"seed": -1}, ValueError, r"`seed=-1` has to be an integer of at"),
        ({"x": np.ones(0)}, {}, ValueError, "is empty: it has no rows"),
        ({}, {}, ValueError, "is empty: it holds no arrays"),
        ({"x": [], "y": []}, {}, ValueError, "is empty: it holds no arrays"),
        (
            {"x": np.ones(3)},
            {"drop_last": True},
            ValueError,
            r"3 rows gives no batch of 4 with `drop_last=True`",
        ),
        (
            {"x": np.ones(3), "deep": {"y": np.ones(4)}},
            {},
            ValueError,
            r"leading axes differ \(`deep/y`: 4, `x`: 3\)",
        ),
        ({"x": np.ones(3), "n": np.array(3)}, {}, ValueError, "has a scalar, `n`, where rows are"),
        ({"x": [1.0, 2.0]}, {}, TypeError, r"holds a `float` where arrays .* `numpy.asarray"),
        ([1, 2, 3], {}, TypeError, "is a `list` that holds a `int` where arrays are expected"),
        (3, {}, TypeError, "is a `int`. It has to be a pytree of arrays"),
        (None, {}, TypeError, "is a `NoneType`. It has to be a pytree of arrays"),
        (iter([1]), {}, TypeError, "is a `list_iterator`. It has to be a pytree of arrays"),
    ],
    ids=named,
)
def test_refuses(source, arguments, error, message):
    with pytest.raises(error, match=message):
        DataLoader(source, **{"batch_size": 4} | arguments)


@pytest.mark.parametrize("column", [np.array(["a", "b"]), np.array([None, "b"], object)])
def test_what_no_device_can_hold_is_named(column):
    with pytest.raises(TypeError, match=r"the leaf `text/raw` of dtype .* no device can hold"):
        abstract({"text": {"raw": column}})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("batchsize", " Did you mean `batch_size`?"),
        ("num_workers", " (a thread reads ahead; for processes, pass a pipeline of Grain in its"),
        ("collate_fn", " (write `transform=`, a function from batch to batch.)"),
        ("pin_memory", " (batches are on the devices before their step.)"),
        ("dataset", " (it is the `source`.)"),
        ("zzz", ""),
    ],
)
def test_unknown_arguments_are_explained(name, says):
    with pytest.raises(TypeError) as caught:
        DataLoader(numbered(8), **{name: 4})
    assert str(caught.value).startswith(f"`DataLoader` has no argument `{name}`.{says}")


# The fingerprint


def test_the_fingerprint_tells_whatever_changes_the_batches():
    def other(batch):
        return batch

    plain = DataLoader(numbered(10), 4)
    changed = [
        DataLoader(numbered(11), 4),
        DataLoader(numbered(10), 5),
        DataLoader(numbered(10), 4, shuffle=True),
        DataLoader(numbered(10), 4, seed=1),
        DataLoader(numbered(10), 4, drop_last=True),
        DataLoader(numbered(10), 4, transform=other),
        DataLoader(Recorded(10), 4),
    ]
    prints = [str(loader.fingerprint()) for loader in (plain, *changed)]
    assert len(set(prints)) == len(prints)
    assert plain.fingerprint() == DataLoader(numbered(10), 4).fingerprint()


def test_a_source_may_have_a_fingerprint_of_its_own():
    class Versioned(Recorded):
        def fingerprint(self):
            return {"version": 7}

    assert DataLoader(Versioned(4), 2).fingerprint()["source"] == {"version": 7}


def test_unshuffled_is_the_same_loader_in_the_sources_order():
    double = lambda batch: {"x": 2 * batch["x"]}
    options = {"drop_last": True, "transform": double, "allow_nan": True}
    loader = DataLoader(numbered(7), 3, shuffle=True, seed=4, **options)
    assert loader.unshuffled().allow_nan
    assert taken(loader.unshuffled()) == [[0, 2, 4], [6, 8, 10]]
