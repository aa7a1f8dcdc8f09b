"""Whatever happens to the files of a checkpoint: it is never loaded, the one before it is, and one
clear report says so. If none is left that is an error."""

import errno
import functools
import json
import os
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from checkpoints import assert_same, saved, values

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks._faults import (
    Region,
    files,
    flip,
    flips,
    imposters,
    removal,
    renamed,
    tails,
    truncations,
)
from jaxlightning import (
    _checkpoint_files,
    _checkpoint_manifest,
    _checkpoint_read,
    _checkpoint_save,
)
from jaxlightning._checkpoint import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointStore,
    SaveFailed,
    find_checkpoints,
    latest_checkpoint,
    read_checkpoint,
    restore_latest,
)
from jaxlightning._checkpoint_manifest import commit_of
from jaxlightning._checkpoint_read import read_manifest

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int4", "bool", "uint32", "int64", "complex128")
ARRAYS = "arrays-00000-of-00001.safetensors"
FILES = ("COMMIT", "manifest.json", ARRAYS)
FIRST, SECOND = "step_0000000001", "step_0000000002"
HIGHER = "step_0000000099"


def tree(step):
    found = {dtype: np.roll(values(dtype, (40,)), step) for dtype in DTYPES}
    return found | {"scalar": np.float32(step), "empty": np.zeros((0, 3), np.float16), "rate": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of two checkpoints, which every test leaves as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        folder = tmp_path_factory.mktemp("faults") / "run"
        with CheckpointStore(folder) as store:
            for step in (1, 2):
                saved(store, tree(step), {"step": step}, step=step)
    return folder


def regions(folder):
    """Every byte of a checkpoint of ours, parted by what it means."""
    commit, manifest, arrays = (
        next(region for region in files(folder) if region.file == name) for name in FILES
    )
    header = read_manifest(folder).files[ARRAYS].header_size
    found = {"COMMIT": commit, "manifest": manifest, "header": arrays._replace(stop=header)}
    for name, array in read_manifest(folder).arrays.items():
        for shard in filter(lambda shard: shard.size, array.shards):
            found[name] = Region(ARRAYS, shard.offset, shard.offset + shard.size)
    return found


def check_set_aside(root, fault, used=1):
    """The fault befalls the newest of two checkpoints: the one of step `used` is loaded."""
    with fault.befall(root / SECOND) as where:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = restore_latest(root, tree(0))
        (hidden,) = root.glob(".damaged-*")
        os.rename(hidden, where)
    assert found.path == root / f"step_{used:010d}", fault.name
    assert found.metadata == {"step": used}
    assert_same(found.tree, tree(used))
    (report,) = [str(warning.message) for warning in caught]
    assert report.startswith("Damaged checkpoints were found, and the one before them is used")
    assert f"`{where}`" in report, fault.name
    assert f"set aside as `{hidden.name}`" in report


def check_newest_is_used(root):
    found = restore_latest(root, tree(0))
    assert found.path == root / SECOND
    assert_same(found.tree, tree(2))


# Bits


FLIPS = {"COMMIT": 80, "manifest": 130, "header": 70}
FLIPS_OF_ARRAY = 26


def flips_of(root):
    return {
        name: flips(region, FLIPS.get(name, FLIPS_OF_ARRAY))
        for name, region in regions(root / SECOND).items()
    }


def test_the_regions_are_all_bytes_of_all_files(root):
    covered = {name: set() for name in FILES}
    for file, start, stop in regions(root / SECOND).values():
        covered[file] |= set(range(start, stop))
    sizes = {name: (root / SECOND / name).stat().st_size for name in FILES}
    assert sorted(os.listdir(root / SECOND)) == sorted(FILES)
    assert covered == {name: set(range(size)) for name, size in sizes.items()}
    assert sum(map(len, flips_of(root).values())) >= 500


@pytest.mark.parametrize("region", ["COMMIT", "manifest", "header", "scalar", *DTYPES])
def test_every_flipped_bit_is_found(root, region):
    for fault in flips_of(root)[region]:
        check_set_aside(root, fault)
    check_newest_is_used(root)


# Files and folders


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_is_found(root, file):
    region = next(region for region in files(root / SECOND) if region.file == file)
    faults = truncations(region, 20)
    assert len(faults) == 20
    for fault in [*faults, *tails(region)]:
        check_set_aside(root, fault)
    check_newest_is_used(root)


@pytest.mark.parametrize("fault", [*map(removal, FILES), renamed(HIGHER)], ids=lambda f: f.name)
def test_what_is_no_whole_checkpoint_is_never_loaded(root, fault):
    check_set_aside(root, fault)
    check_newest_is_used(root)


@pytest.mark.parametrize("fault", imposters(HIGHER), ids=lambda fault: fault.name)
def test_what_only_has_the_name_of_a_higher_step(root, fault):
    check_set_aside(root, fault, used=2)
    check_newest_is_used(root)


# Nothing left


@pytest.fixture
def run(root, tmp_path):
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(root, tmp_path / "run"))


def spoil(folder, name=ARRAYS):
    flip(name, (folder / name).stat().st_size - 1, 0).befall(folder).__enter__()


@pytest.mark.parametrize("file", FILES)
def test_all_damaged_is_an_error_and_stays_one(run, file):
    for name in (FIRST, SECOND):
        spoil(run / name, file)
    for _ in range(2):
        with pytest.raises(CheckpointDamaged, match=r"(?s)All checkpoints in `.*` are") as caught:
            restore_latest(run, tree(0))
        for name in (FIRST, SECOND):
            assert str(caught.value).count(f"`{run / name}` is damaged") == 1
        assert "Move them away or delete them to start afresh." in str(caught.value)
    assert sorted(os.listdir(run)) == ["LOCK", FIRST, SECOND]


def test_what_was_set_aside_is_not_forgotten(run):
    """Else the run after the next would begin anew without a word."""
    spoil(run / SECOND)
    with pytest.warns(UserWarning, match="Damaged checkpoints"):
        restore_latest(run, tree(0))
    shutil.rmtree(run / FIRST)
    with pytest.raises(CheckpointDamaged, match=r"`.*\.damaged-step_.*` was set aside before\."):
        restore_latest(run, tree(0))
    with pytest.raises(CheckpointDamaged, match="was set aside before"):
        latest_checkpoint(run)


def test_the_latest_by_its_manifest_is_reported_alike(run):
    assert latest_checkpoint(run).step == 2
    spoil(run / SECOND, "manifest.json")
    with pytest.warns(UserWarning, match=f"(?s)Damaged checkpoints.*{SECOND}.*set aside") as caught:
        assert latest_checkpoint(run).step == 1
    assert len(caught) == 1
    assert latest_checkpoint(run).step == 1


# What is not the checkpoint's fault


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "pread", "preadv"])
def test_an_error_of_the_disk_says_nothing_about_the_checkpoint(run, monkeypatch, call, error):
    real = getattr(os, call)

    def failing(*arguments, **options):
        if call != "open" or arguments[0] in FILES:
            raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(error))):
        restore_latest(run, tree(0))
    monkeypatch.undo()
    assert sorted(os.listdir(run)) == ["LOCK", FIRST, SECOND]
    check_newest_is_used(run)


def rewritten(folder, change):
    """A manifest changed by somebody who then makes the checksum right."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    encoded = json.dumps(content).encode()
    (folder / "manifest.json").write_bytes(encoded)
    (folder / "COMMIT").write_bytes(commit_of(encoded))


def test_a_newer_format_is_neither_damaged_nor_passed_over(run):
    rewritten(run / SECOND, lambda content: content.update(format=2))
    for read in (restore_latest, read_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"written by a newer jaxlightning \(format 2"
        ) as e:
            read(run if read is restore_latest else run / SECOND, tree(0))
        assert not isinstance(e.value, CheckpointDamaged)
        assert "Upgrade: `pip install -U jaxlightning`." in str(e.value)
    with pytest.raises(CheckpointError, match="written by a newer"):
        find_checkpoints(run)
    assert sorted(os.listdir(run)) == ["LOCK", FIRST, SECOND]


# Clocks


@pytest.mark.parametrize("years", [("1970", "2099"), ("2099", "1970")])
def test_no_clock_decides_which_is_the_latest(tmp_path, monkeypatch, years):
    """Neither that of the machine nor that of the file system, whichever way they are wrong."""
    with CheckpointStore(tmp_path) as store:
        for step in (3, 7):
            for name, year in zip(("one", "two"), years, strict=True):
                monkeypatch.setattr(_checkpoint_save, "now", lambda year=year: f"{year}-01-01")
                path = saved(store, {}, {"name": name}, step=step, name=f"{name}-{step}")
                os.utime(path, (0, 0) if year == "1970" else (2**32, 2**32))
    assert [entry.path.name for entry in find_checkpoints(tmp_path)] == [
        "one-3",
        "two-3",
        "one-7",
        "two-7",
    ]
    assert restore_latest(tmp_path, {}).metadata == {"name": "two"}


def test_the_counter_goes_on_in_another_process_behind_the_clock(tmp_path, monkeypatch):
    for name, year in (("z", "2030"), ("m", "2020"), ("a", "2010")):
        monkeypatch.setattr(_checkpoint_save, "now", lambda year=year: f"{year}-01-01T00:00:00")
        with CheckpointStore(tmp_path) as store:
            saved(store, {}, step=5, name=name)
    found = find_checkpoints(tmp_path)
    assert [(entry.path.name, entry.serial) for entry in found] == [("z", 1), ("m", 2), ("a", 3)]
    spoil(tmp_path / "m", "COMMIT")
    with CheckpointStore(tmp_path) as store:  # what cannot be read does not count
        saved(store, {}, step=5, name="b")
    assert [entry.path.name for entry in find_checkpoints(tmp_path)] == ["z", "a", "b"]


def test_checkpoints_of_before_the_counter_are_ordered_by_what_they_say(run):
    for name in (FIRST, SECOND):
        rewritten(run / name, lambda content: content.pop("serial"))
    assert [entry.serial for entry in find_checkpoints(run)] == [0, 0]
    assert latest_checkpoint(run).step == 2


# While somebody else writes


def test_restoring_waits_for_the_saves_of_its_own_process(tmp_path, monkeypatch):
    """Else it would sweep away what they are writing."""
    begun, go = threading.Event(), threading.Event()

    def fsync(file):
        begun.set()
        go.wait(60)

    with CheckpointStore(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", fsync)
        store.save(1, {"x": np.array(3)}, {})
        begun.wait(60)
        threading.Timer(0.05, go.set).start()
        assert restore_latest(tmp_path, {"x": np.array(0)}).tree["x"] == 3
        store.wait()


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """By another process, in the middle of a replacement, its old files are gone: no damage."""
    with CheckpointStore(tmp_path) as store:
        saved(store, {"x": np.array(1)}, step=1, name="last")
        opened = _checkpoint_files.open_folder

        def replaced_meanwhile(path):
            folder = opened(path)
            if path.name == "last" and store.latest is not None and not replaced:
                replaced.append(True)
                saved(store, {"x": np.array(2)}, step=2, name="last")
            return folder

        replaced = []
        monkeypatch.setattr(_checkpoint_read, "open_folder", replaced_meanwhile)
        assert restore_latest(tmp_path, {"x": np.array(0)}).tree["x"] == 2
        assert replaced


@pytest.mark.parametrize("what", ["newer", "folder", "file", "LOCK"])
def test_what_a_killed_save_left_replaces_nothing_newer(tmp_path, what):
    """A complete checkpoint that never got its name, and something else that bears it now."""
    with CheckpointStore(tmp_path) as store:
        left = saved(store, {}, {"is": "left"}, step=1, name="a")
        left.rename(tmp_path.parent / "left")
        if what == "newer":
            saved(store, {}, {"is": "newer"}, step=2, name="a")
    name = "LOCK" if what == "LOCK" else "a"
    left = (tmp_path.parent / "left").rename(tmp_path / f".tmp-{name}-0123")
    rewritten(left, lambda content: content.update(name=name))
    if what == "folder":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes.txt").write_text("mine")
    elif what == "file":
        (tmp_path / "a").write_text("mine")
    with CheckpointStore(tmp_path) as store:
        found = [entry.metadata for entry in store.entries()]
    assert found == ([{"is": "newer"}] if what == "newer" else [])
    assert sorted(os.listdir(tmp_path)) == ["LOCK"] + ([] if what == "LOCK" else ["a"])
    if what == "folder":
        assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


# What could not be read again is not written


@pytest.mark.parametrize(
    ("tree", "metadata", "message"),
    [
        ({"x": 10**5000}, {}, "Exceeds the limit"),
        ({"x": np.ones((1,) * 64 + (2,)[:0])}, {"n": 10**5000}, "Exceeds the limit"),
    ],
)
def test_what_json_would_not_read_is_a_failed_save(tmp_path, tree, metadata, message):
    with CheckpointStore(tmp_path) as store:
        store.save(1, tree, metadata)
        with pytest.raises(SaveFailed, match=message):
            store.wait()
        assert store.entries() == []
        saved(store, {}, step=2)


def test_metadata_without_an_end(store):
    nested = []
    nested.append(nested)
    deep = functools.reduce(lambda inner, _: [inner], range(100), 0)
    with pytest.raises(CheckpointError, match=r"is nested more than 100 levels deep, if it ends"):
        store.save(1, {}, {"nested": nested})
    with pytest.raises(CheckpointError, match="is nested more than 100 levels deep"):
        store.save(1, {}, {"nested": deep})
    path = saved(store, {}, {"nested": deep[0]})
    assert read_manifest(path).metadata == {"nested": deep[0]}


def test_a_manifest_that_would_be_too_large(store, monkeypatch):
    monkeypatch.setattr(_checkpoint_manifest, "LIMIT", 1000)
    store.save(1, {}, {"text": "x" * 1000})
    with pytest.raises(
        SaveFailed, match=r"manifest would have 1,\d+ bytes.*less into the metadata"
    ):
        store.wait()
    assert store.entries() == []
