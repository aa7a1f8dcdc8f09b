"""The store: names, order, deletion, failures, and who may write."""

import errno
import os
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoints import on, saved, values

from jaxlightning import _checkpoint_files, _checkpoint_manifest, _checkpoint_read
from jaxlightning._checkpoint import (
    CheckpointError,
    CheckpointStore,
    RunLocked,
    SaveFailed,
    check_writable,
    export_weights,
    find_checkpoints,
    read_checkpoint,
    restore_latest,
)

real_fsync = os.fsync

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# Names, order, deletion


def test_default_names_and_order(store):
    steps = [3, 20, 100]
    for step in reversed(steps):
        assert saved(store, {"x": np.array(step)}, step=step).name == f"step_{step:010d}"
    assert [entry.step for entry in store.entries()] == steps
    assert store.latest().path == store.root / "step_0000000100"
    tree, _, path = restore_latest(store.root, {"x": np.array(0)})
    assert (tree["x"], path.name) == (100, "step_0000000100")


def test_of_two_of_a_step_the_later_is_the_latest(store):
    for name in ("b", "a", "c", "a"):
        saved(store, {}, {"name": name}, step=5, name=name)
    saved(store, {}, step=4, name="z")
    assert [entry.path.name for entry in store.entries()] == ["z", "b", "c", "a"]
    assert store.latest().path.name == "a"


@pytest.mark.parametrize(
    "name", ["epoch=3-step=100", "a", "9", "val_loss=-0.25", "a" * 200, "a..b"]
)
def test_names_that_are_fine(store, name):
    assert saved(store, {}, name=name) == store.root / name
    assert [entry.path.name for entry in store.entries()] == [name]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("val/loss=1", "val_loss=1"),
        ("../evil", "evil"),
        (".hidden", "hidden"),
        ("", "last"),
        ("..", "last"),
        ("a b", "a_b"),
        ("a\n", "a_"),
        ("LOCK", "LOCK"),
        ("a" * 201, "a" * 200),
    ],
)
def test_names_that_are_not(store, name, instead):
    with pytest.raises(CheckpointError, match=re.escape(f"Write `{instead}`.")) as caught:
        store.save(0, {}, {}, name=name)
    assert f"`{name}` cannot be the name of a checkpoint" in str(caught.value)
    assert os.listdir(store.root.parent) == ["run"]


def test_a_name_is_replaced(store):
    for step in (1, 2, 3):
        saved(store, {"x": np.array(step)}, step=step, name="last")
    assert [(entry.path.name, entry.step) for entry in store.entries()] == [("last", 3)]
    assert sorted(os.listdir(store.root)) == ["LOCK", "last"]


def test_what_is_no_checkpoint_is_neither_replaced_nor_deleted(store):
    (store.root / "version_0").mkdir()
    (store.root / "version_0" / "metrics.csv").write_text("a")
    (store.root / "file").write_text("a")
    saved(store, {}, name="good")
    for name in ("version_0", "file"):
        with pytest.raises(CheckpointError, match=r"not a checkpoint, .* Save under another name"):
            store.save(0, {}, {}, name=name)
        with pytest.raises(CheckpointError, match=r"not a checkpoint in .* There are \['good'\]"):
            store.delete(store.root / name)
    with pytest.raises(CheckpointError, match="not a checkpoint in"):
        store.delete(store.root.parent)
    assert (store.root / "version_0" / "metrics.csv").exists()
    assert [entry.path.name for entry in store.entries()] == ["good"]


def test_delete(store):
    paths = [saved(store, {}, step=step) for step in (1, 2)]
    store.delete(paths[0])
    assert [entry.path for entry in store.entries()] == paths[1:]
    assert sorted(os.listdir(store.root)) == ["LOCK", paths[1].name]


@pytest.mark.parametrize("step", [-1])
def test_steps_are_counted_from_zero(store, step):
    with pytest.raises(CheckpointError, match="`step=-1`, but steps are counted from 0"):
        store.save(step, {}, {})
    with pytest.raises(TypeError):
        store.save(1.5, {}, {})


# Saving behind the training's back


@pytest.fixture
def held(monkeypatch):
    """Keeps saves from getting to the disk until it is set."""
    event = threading.Event()

    def fsync(file):
        event.wait(60)

    monkeypatch.setattr(os, "fsync", fsync)
    yield event
    event.set()


def test_save_does_not_wait_for_the_disk(tmp_path, held):
    held.set()
    with CheckpointStore(tmp_path) as store:
        held.clear()
        path = store.save(1, {"x": jnp.ones(3)}, {})
        assert not path.exists()
        assert store.entries() == []
        held.set()
        store.wait()
        assert [entry.path for entry in store.entries()] == [path]


def test_a_deletion_waits_until_the_new_checkpoint_is_committed(tmp_path, held):
    held.set()
    with CheckpointStore(tmp_path) as store:
        old = saved(store, {}, step=1)
        held.clear()
        new = store.save(2, {}, {})
        store.delete(old)
        assert [entry.path for entry in store.entries()] == [old]
        held.set()
        store.wait()
        assert [entry.path for entry in store.entries()] == [new]
        held.clear()
        own = store.save(3, {}, {})
        store.delete(own)
        held.set()
        store.wait()
        assert [entry.path for entry in store.entries()] == [new]


@pytest.fixture
def full_disk(monkeypatch):
    """A switch; while it is on, nothing reaches the disk."""
    switch = {"on": False}

    def fsync(file):
        if switch["on"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    return switch


@pytest.mark.parametrize("meeting", ["save", "wait", "close", "__exit__"])
def test_a_failure_is_raised_once(tmp_path, full_disk, meeting):
    store = CheckpointStore(tmp_path)
    good = saved(store, {"x": np.ones(2)}, step=1)
    full_disk["on"] = True
    store.save(2, {"x": np.ones(2)}, {})
    arguments = {"save": (3, {}, {}), "__exit__": (None, None, None)}.get(meeting, ())
    with pytest.raises(SaveFailed, match=r"`.*step_0000000002` was not saved.*No space") as caught:
        getattr(store, meeting)(*arguments)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(caught.value).endswith(
        "Those saved before it are as they were. Make room, then go on with `fit(..., "
        'resume="auto")`.'
    )
    assert [entry.path for entry in store.entries()] == [good]
    assert sorted(os.listdir(tmp_path)) == ["LOCK", good.name]
    full_disk["on"] = False
    store.wait()
    if meeting in ("save", "wait"):
        saved(store, {"x": np.ones(2)}, step=4)
        assert [entry.step for entry in store.entries()] == [1, 4]
    store.close()


def test_with_wait_a_failure_is_raised_by_the_save_itself(store, full_disk):
    full_disk["on"] = True
    with pytest.raises(SaveFailed, match="was not saved"):
        saved(store, {})


def test_nothing_is_deleted_for_a_save_that_failed(store, full_disk):
    old = saved(store, {}, step=1)
    full_disk["on"] = True
    store.save(2, {}, {})
    store.delete(old)
    with pytest.raises(SaveFailed):
        store.wait()
    assert [entry.path for entry in store.entries()] == [old]


def test_nothing_is_deleted_once_the_save_has_failed(store, full_disk):
    old = saved(store, {}, step=1)
    full_disk["on"] = True
    store.save(2, {}, {})
    store._save.join()
    store.delete(old)
    assert [entry.path for entry in store.entries()] == [old]
    with pytest.raises(SaveFailed):
        store.wait()


def test_a_failed_replacement_leaves_what_was_there(store, monkeypatch):
    saved(store, {}, {"n": 1}, name="last")
    rename = os.rename

    def failing(source, target):
        if os.path.basename(target) == "last" and ".tmp-" in str(source):
            raise OSError(errno.EIO, "the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(SaveFailed, match="the disk is gone"):
        saved(store, {}, {"n": 2}, name="last")
    assert [entry.metadata for entry in store.entries()] == [{"n": 1}]
    assert sorted(os.listdir(store.root)) == ["LOCK", "last"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    with CheckpointStore(tmp_path) as store:
        last = saved(store, {}, {"n": 1}, name="last")
        other = saved(store, {}, {"n": 2}, step=2, name="other")
    last.rename(tmp_path / ".trash-last-0123")
    text = (other / "manifest.json").read_bytes().replace(b'"name":"other"', b'"name":"last"')
    (other / "manifest.json").write_bytes(text)
    (other / "COMMIT").write_bytes(_checkpoint_manifest.commit_of(text))
    other.rename(tmp_path / ".tmp-last-4567")
    (tmp_path / ".tmp-torn-89ab").mkdir()
    (tmp_path / ".tmp-torn-89ab" / "manifest.json").write_text("{")
    assert restore_latest(tmp_path, {}).metadata == {"n": 2}
    assert sorted(os.listdir(tmp_path)) == ["LOCK", "last"]


def test_a_closed_store_saves_no_more(tmp_path):
    store = CheckpointStore(tmp_path)
    store.close()
    store.close()
    with pytest.raises(CheckpointError, match=r"is closed.*`CheckpointStore\(root\)`"):
        store.save(0, {}, {})


def test_two_stores_of_one_process(store):
    with pytest.raises(RunLocked, match=rf"of this process \({os.getpid()}\).*store\.close"):
        CheckpointStore(store.root)
    store.close()
    CheckpointStore(store.root).close()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="a file system without locks"):
        CheckpointStore(tmp_path).close()


# Finding


def test_there_may_be_nothing(tmp_path):
    assert restore_latest(tmp_path / "absent", {}) is None
    assert find_checkpoints(tmp_path / "absent") == []
    assert not (tmp_path / "absent").exists()
    (tmp_path / "version_0").mkdir()
    assert restore_latest(tmp_path, {}) is None


def test_restoring_neither_needs_nor_takes_the_lock(store):
    saved(store, {"x": np.array(3)})
    assert restore_latest(store.root, {"x": np.array(0)}).tree["x"] == 3
    root = store.root
    store.close()
    assert restore_latest(root, {"x": np.array(0)}).tree["x"] == 3
    CheckpointStore(root).close()


def test_a_checkpoint_that_is_deleted_while_it_is_read(store, monkeypatch):
    old, new = (saved(store, {"x": np.array(step)}, step=step) for step in (1, 2))
    read = _checkpoint_read.CheckpointReader.array

    def array(reader, path):
        if reader.path == new and new.exists():
            store.delete(new)
        if reader.path == new:
            raise reader._damaged("its file is gone")
        return read(reader, path)

    monkeypatch.setattr(_checkpoint_read.CheckpointReader, "array", array)
    found = restore_latest(store.root, {"x": np.array(0)})
    assert found.path == old
    assert found.tree["x"] == 1


def test_no_checkpoint_at_a_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no checkpoint `.*absent`"):
        read_checkpoint(tmp_path / "absent", {})


# Weights alone


def test_exported_weights_are_read_by_safetensors(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    tree = {
        "w": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "layers": [jnp.ones((2, 2)), jax.device_put(np.arange(8), on(4, "data"))],
        "big-endian": np.arange(3, dtype=">i4"),
        "activation": jax.nn.relu,
        "rate": 0.1,
    }
    export_weights(path, tree)
    export_weights(path, tree)
    found = safetensors.numpy.load_file(path)
    assert sorted(found) == ["big-endian", "layers/0", "layers/1", "w"]
    np.testing.assert_array_equal(found["w"], tree["w"], strict=True)
    np.testing.assert_array_equal(found["layers/0"], np.ones((2, 2), np.float32), strict=True)
    np.testing.assert_array_equal(found["layers/1"], np.arange(8))
    np.testing.assert_array_equal(found["big-endian"], np.arange(3))
    assert os.listdir(path.parent) == ["weights.safetensors"]
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_exported_narrow_floats_keep_their_names(tmp_path):
    tree = {name: values(name, (8,)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
    export_weights(tmp_path / "w", tree)
    found = dict(safetensors.deserialize((tmp_path / "w").read_bytes()))
    assert {name: tensor["dtype"] for name, tensor in found.items()} == {
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
    }
    assert all(bytes(found[name]["data"]) == tree[name].tobytes() for name in tree)


@pytest.mark.parametrize("leaf", [jax.random.key(0), np.ones(2, "int4"), np.array(["a"])])
def test_what_safetensors_lack_is_not_exported(tmp_path, leaf):
    with pytest.raises(CheckpointError, match=r"`x` has dtype .* a safetensors file cannot hold"):
        export_weights(tmp_path / "w", {"x": leaf})
    assert list(tmp_path.iterdir()) == []


# Folders that cannot be written


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (check_writable, CheckpointStore):
        with pytest.raises(
            OSError, match=r"The folder `.*file/run` cannot be written .* save to another one"
        ):
            make(tmp_path / "file" / "run")


def test_check_writable_while_another_process_clears_leftovers_away(tmp_path, monkeypatch):
    def cleared(path, data):
        path.write_bytes(data)
        path.unlink()

    monkeypatch.setattr(_checkpoint_files, "write_durably", cleared)
    check_writable(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_check_writable_leaves_nothing_but_the_folder(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_found_before_the_first_step(tmp_path, full_disk):
    full_disk["on"] = True
    with pytest.raises(OSError, match="cannot be written") as caught:
        CheckpointStore(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_saving_reaches_the_disk_in_order(tmp_path, monkeypatch):
    """Files before COMMIT, COMMIT before the name, the name before the next checkpoint's turn."""
    events = []

    def fsync(file):
        events.append(f"sync {re.sub('-[0-9a-f]{32}', '', os.readlink(f'/proc/self/fd/{file}'))}")
        real_fsync(file)

    rename = os.rename
    with CheckpointStore(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
        saved(store, {"x": np.ones(3)}, step=1, name="a")
    assert events == [
        f"sync {tmp_path}/.tmp-a/arrays-00000-of-00001.safetensors",
        f"sync {tmp_path}/.tmp-a/manifest.json",
        f"sync {tmp_path}/.tmp-a/COMMIT",
        f"sync {tmp_path}/.tmp-a",
        "rename",
        f"sync {tmp_path}",
    ]
