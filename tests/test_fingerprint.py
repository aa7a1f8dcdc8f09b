"""Fingerprints: what tells data from other data, in milliseconds and in any process."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from feeds import Stops
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader
from jaxlightning.callbacks import ModelCheckpoint


def of(source, **options):
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(DataLoader(source, 4, **options).fingerprint()))


def same(a, b, **options):
    return of(a, **options) == of(b, **options)


# Arrays


def test_arrays_are_told_by_dtype_shape_and_contents():
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert of({"x": x, "y": {"z": x[:, 0]}})["source"].keys() == {"x", "y/z"}
    assert of({"x": x})["source"]["x"]["array"] == "float32[8, 3]"
    assert of(x)["source"].keys() == {"array"}
    assert same(x, x.copy())
    assert same(x, np.asfortranarray(x))
    assert same(x, jax.numpy.asarray(x))
    changed = x.copy()
    changed[3, 1] += 1e-6
    for other in (changed, x[::-1], x.astype(np.float64), x[:7], x.reshape(8, 3, 1), x * 2):
        assert not same(x, other)
    nan = np.where(x == 3, np.nan, x)
    assert same(nan, nan.copy())


def test_a_sample_is_bounded_and_even():
    """One row of 256 in a thousand is looked at, the first and the last among them."""
    large = np.zeros((256_000, 3), np.int32)
    before = of(large)
    for row, noticed in ((0, True), (255_999, True), (1, False)):
        large[row] = 1
        assert (of(large) != before) is noticed
        large[row] = 0
    hashed: list = []

    class Counts:
        def update(self, data):
            hashed.append(len(data))

        def hexdigest(self):
            return "0" * 64

    wide = np.zeros((1000, 100_000), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hashlib.sha256", Counts)
        of({"a": wide, "b": wide[:, :10], "c": wide.astype(np.float16)})
    assert sum(hashed) <= 2**20


def test_of_a_row_that_is_long_values_everywhere_count():
    image = np.zeros((1, 2000, 2000), np.uint8)
    before = of(image)
    image[0, 1000:] = 1
    assert of(image) != before


def test_memory_maps_are_told_as_arrays_are(tmp_path):
    x = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    np.save(tmp_path / "x.npy", x)
    assert same(np.load(tmp_path / "x.npy", mmap_mode="r"), x)


@pytest.mark.parametrize(
    "dtype", ["bool", "complex64", "datetime64[s]", "<U5", object, jax.numpy.bfloat16], ids=str
)
def test_arrays_of_any_dtype(dtype):
    x = np.array([0, 1, 2, 3, 4]).astype(dtype)
    y = np.array([0, 1, 2, 3, 0]).astype(dtype)
    assert same(x, x.copy())
    assert not same(x, y)


# Hugging Face


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def columns(count=200):
    return {
        "text": [f"row {i}" for i in range(count)],
        "ids": [[i] * (i % 4) for i in range(count)],
        "x": [i / 7 for i in range(count)],
        "maybe": [None if i % 3 else i for i in range(count)],
        "deep": [{"a": i, "b": [[i, 1.5]]} for i in range(count)],
        "flag": [i % 2 == 0 for i in range(count)],
        "raw": [bytes([i % 256]) for i in range(count)],
    }


def test_a_dataset_is_told_by_its_columns_rows_and_contents(datasets):
    dataset = datasets.Dataset.from_dict(columns())
    found = of(dataset)
    assert found["rows"] == 200
    assert found["source"]["columns"]["ids"] == "list<item: int64>"
    assert found["source"]["columns"]["text"] == "string"
    for name, value in (
        ("text", "other"),
        ("ids", [199] * 2),
        ("x", 0.5),
        ("maybe", 5),
        ("deep", {"a": 199, "b": [[199, 2.5]]}),
        ("flag", True),
        ("raw", b"x"),
    ):
        changed = columns()
        changed[name][-1] = value
        assert not same(dataset, datasets.Dataset.from_dict(changed)), name
    assert not same(dataset, dataset.rename_column("x", "z"))
    assert not same(dataset, dataset.remove_columns("x"))
    assert not same(dataset, dataset.cast_column("x", datasets.Value("float32")))
    assert not same(dataset, dataset.select(range(199, -1, -1)))


def test_a_dataset_is_the_same_wherever_it_lies(datasets, tmp_path):
    """Its own `_fingerprint` is not."""
    dataset = datasets.Dataset.from_dict(columns())
    again = datasets.Dataset.from_dict(columns())
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    os.utime(next((tmp_path / "saved").glob("*.arrow")), (1, 1))
    saved = datasets.load_from_disk(tmp_path / "saved")
    parquet = datasets.Dataset.from_parquet(
        str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")
    )
    parts = [dataset.select(range(0, 90)), dataset.select(range(90, 200))]
    whole = datasets.concatenate_datasets(parts)
    for other in (again, saved, parquet, whole, dataset.with_format("numpy", columns=["x"])):
        assert same(dataset, other)
    assert dataset._fingerprint != parquet._fingerprint


# Other sources, and transforms


def test_an_unknown_source_is_not_read():
    class Source:
        def __len__(self):
            return 8

        def __getitem__(self, rows):
            raise AssertionError("read")

    assert of(Source())["source"] == "Source"


def scaled(batch, factor, axes=(0,)):
    return {"x": batch["x"] * factor}


class Scaled:
    def __init__(self, factor, table=None):
        self.factor = factor
        self._table = table
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        return scaled(batch, self.factor)


@dataclasses.dataclass(frozen=True, slots=True)
class Cropped:
    size: int

    def __call__(self, batch):
        return {"x": batch["x"][:, : self.size]}


def test_transforms_are_told_by_name_arguments_and_attributes():
    of_transform = lambda transform: of({"x": np.ones((4, 2))}, transform=transform)["transform"]
    assert of_transform(np.exp) == "exp"
    assert of_transform(np.sort) == {"sort": {"axis": -1}}
    assert of_transform(scaled) == {"scaled": {"axes": [0]}}
    assert of_transform(functools.partial(scaled, factor=2, axes=(0, 1))) == {
        "scaled": {"factor": 2, "axes": [0, 1]}
    }
    assert of_transform(Cropped(3)) == {"Cropped": {"size": 3}}
    found = of_transform(Scaled(0.5, table=np.arange(3)))["Scaled"]
    assert found == {"calls": 0, "factor": 0.5, "_table": found["_table"]}
    assert found["_table"].startswith("int64[3] ")
    assert of_transform(Scaled(0.5, table=np.arange(3) + 1))["Scaled"] != found
    closed = lambda factor: lambda batch: scaled(batch, factor)
    assert of_transform(closed(2)) != of_transform(closed(3))


def test_an_object_is_told_as_it_was_before_it_was_called():
    loader = DataLoader({"x": np.ones((4, 2))}, 2, transform=Scaled(2))
    before = loader.fingerprint()
    list(loader)
    assert loader.transform.calls == 2
    assert loader.fingerprint() == before


def told_of(datasets):
    sources = [
        ({"b": np.arange(20.0), "a": np.array(["x"] * 20, object)}, Scaled(2)),
        (datasets.Dataset.from_dict(columns()), functools.partial(scaled, factor=3)),
    ]
    return json.dumps([DataLoader(s, 2, transform=t).fingerprint() for s, t in sources])


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import datasets
from test_fingerprint import told_of
print(told_of(datasets), end="")
"""


def test_a_process_with_another_hash_seed_agrees(datasets):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == told_of(datasets)


# In a run


def test_changed_data_are_listed(tmp_path, no_waiting_for_the_disk):
    def fit(data, batch_size, *more, **options):
        saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2)
        trainer = quiet(max_epochs=2, enable_checkpointing=None, callbacks=[saves, *more])
        return trainer.fit(Classifier(), DataLoader(data, batch_size), **options)

    with pytest.raises(InterruptedError):
        fit(rows(20), 4, Stops(3))
    other = rows(20)
    other["y"][7] += 1
    other["x"] = other["x"].astype(np.float64)
    with pytest.raises(ValueError, match="changed since the checkpoint") as caught:
        fit(other, 5, resume="auto")
    told = str(caught.value)
    assert "train data: batch_size: 4 in the checkpoint, 5 now" in told
    assert (
        "train data: source: x: array: float32[20, 6] in the checkpoint, float64[20, 6] n" in told
    )
    assert "train data: source: y: checksum: " in told
    assert "source: mask" not in told
