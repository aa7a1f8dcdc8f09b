import errno
import json
import os
import re
import subprocess
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlightning import _checkpoint_arrays, _checkpoint_manifest, _checkpoint_read
from jaxlightning._checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointStore,
    RunLocked,
    SaveFailed,
    check_writable,
    export_weights,
    find_checkpoints,
    load_arrays,
    read_checkpoint,
    read_metadata,
    restore_latest,
    verify_checkpoint,
)
from jaxlightning._checkpoint_manifest import DTYPES
from jaxlightning._checkpoint_read import read_manifest

real_fsync = os.fsync


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        yield store


def saved(store, tree, metadata=None, step=1, name=None):
    return store.save(step, tree, metadata or {}, name=name, wait=True)


def bits(array):
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(first, jax.Array | np.ndarray | np.generic):
            assert type(first) is type(second)
            assert first.dtype == second.dtype
            assert bits(first) == bits(second)
        else:
            assert first == second


def values(dtype, shape=(64,)):
    """Every bit pattern of a narrow dtype, random ones of a wide one, and the odd numbers."""
    dtype = np.dtype(dtype)
    if dtype.name in ("bool", "int2", "int4", "uint2", "uint4", "float4_e2m1fn"):
        return np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    rng = np.random.default_rng(0)
    array = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    if dtype.itemsize == 1 and np.prod(shape) >= 256:
        array = np.arange(np.prod(shape)).astype(np.uint8).view(dtype).reshape(shape)
    return array


# What can be saved


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(store, dtype):
    tree = {
        "vector": values(dtype, (512,)),
        "matrix": values(dtype, (3, 5)),
        "scalar": values(dtype, ()),
        "generic": values(dtype, (1,))[0],
        "empty": values(dtype, (0, 4)),
    }
    if dtype not in ("int64", "uint64", "float64", "complex128"):  # JAX has those in x64 only
        # Through the device, so that what is compared is what JAX made of the values.
        tree["device"] = jnp.asarray(tree["vector"])
        tree["no elements"] = jnp.asarray(tree["empty"])
        tree["single"] = jnp.asarray(tree["scalar"])
    path = saved(store, tree)
    assert_same(tree, read_checkpoint(path, tree)[0])


@pytest.mark.parametrize(
    ("dtype", "patterns"),
    [
        ("float32", [0x7FC00001, 0x7F800001, 0xFFC12345, 0x80000000, 0x7F800000, 0x00000001]),
        ("bfloat16", [0x7FC1, 0x7F81, 0xFFC1, 0x8000, 0x7F80, 0x0001]),
        ("float16", [0x7E01, 0x7C01, 0xFE01, 0x8000, 0x7C00, 0x0001]),
    ],
)
def test_nan_payloads_and_negative_zeros_stay(store, dtype, patterns):
    raw = np.array(patterns, "uint32" if dtype == "float32" else "uint16")
    tree = {"host": raw.view(dtype), "device": jnp.asarray(raw.view(dtype))}
    assert np.asarray(tree["device"]).tobytes() == raw.tobytes()
    found, _ = read_checkpoint(saved(store, tree), tree)
    assert found["host"].tobytes() == raw.tobytes()
    assert np.asarray(found["device"]).tobytes() == raw.tobytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_implementation(store, impl):
    key = jax.random.key(7, impl=impl)
    tree = {"key": key, "keys": jax.random.split(key, (3, 2))}
    found, _ = read_checkpoint(saved(store, tree), jax.eval_shape(lambda: tree))
    assert_same(tree, found)
    assert found["key"].dtype == key.dtype
    assert jnp.array_equal(jax.random.bits(found["key"]), jax.random.bits(key))


def test_paths_that_read_alike_are_told_apart(store):
    tree = {
        "a.b": np.array(1),
        "a": {"b": np.array(2), "b/c": np.array(3)},
        "a/b": {"c": np.array(4)},
        "a/b/c": np.array(5),
        "": np.array(6),
        "..": {"/": np.array(7)},
        "ä ␤\n": np.array(8),
    }
    path = saved(store, tree)
    assert_same(tree, read_checkpoint(path, tree)[0])
    assert {int(array) for array in load_arrays(path).values()} == set(range(1, 9))


class Alike:
    """A container that gives both of its leaves the same key."""

    def __init__(self, *items):
        self.items = items


jax.tree_util.register_pytree_with_keys(
    Alike,
    lambda alike: ([(jax.tree_util.DictKey("x"), item) for item in alike.items], None),
    lambda _, items: Alike(*items),
)


def test_leaves_of_one_path_are_refused(store):
    with pytest.raises(CheckpointError, match=r"Two leaves have the same path, `\['x'\]`"):
        store.save(0, Alike(np.ones(2), np.zeros(2)), {})
    assert store.entries() == []


def test_a_model_keeps_its_structure_and_all_that_is_static(store):
    class Model(eqx.Module):
        net: eqx.nn.MLP
        dropout: eqx.nn.Dropout
        name: str = eqx.field(static=True)
        notes: list

    def make(key):
        net = eqx.nn.MLP(4, 2, 8, 2, activation=jax.nn.gelu, key=key)
        model = Model(net, eqx.nn.Dropout(0.1), "m", ["text", None, 3])
        return model, optax.adamw(1e-3).init(eqx.filter(model, eqx.is_inexact_array))

    one, other = make(jax.random.key(0)), make(jax.random.key(1))
    assert not eqx.tree_equal(one, other)
    path = saved(store, one)
    assert eqx.tree_equal(read_checkpoint(path, other)[0], one)
    # Abstract arrays do as well.
    like = eqx.filter_eval_shape(make, jax.random.key(2))
    assert eqx.tree_equal(read_checkpoint(path, like)[0], one)


def test_text_and_objects_are_refused(store):
    for array in (np.array(["a"]), np.array([None]), np.datetime64("2020-01-01")):
        with pytest.raises(CheckpointError, match=r"`x` has dtype .* put text into the metadata"):
            store.save(0, {"x": array}, {})
    assert store.entries() == []


def test_numpy_arrays_of_any_layout(store):
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = {
        "fortran": np.asfortranarray(rows),
        "strided": rows[::2, 1::2],
        "reversed": rows[::-1],
        "big-endian": rows.astype(">f4"),
        "broadcast": np.broadcast_to(rows[0], (3, 6)),
    }
    found, _ = read_checkpoint(saved(store, tree), tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array, strict=name != "big-endian")
        assert found[name].dtype.name == "float32"
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable


def test_large_arrays_are_summed_in_blocks(store, monkeypatch):
    for module in (_checkpoint_manifest, _checkpoint_arrays):
        monkeypatch.setattr(module, "BLOCK", 1000)
    monkeypatch.setattr(_checkpoint_read, "GROUP", 3000)
    sizes = (0, 1, 999, 1000, 1001, 2000, 5000)
    tree = {str(size): np.random.default_rng(size).bytes(size) for size in sizes}
    tree = {name: np.frombuffer(data, np.uint8) for name, data in tree.items()}
    path = saved(store, tree)
    stored = read_manifest(path).arrays
    assert [len(stored[str(size)].shards[0].sha256) for size in sizes] == [0, 1, 1, 1, 2, 2, 5]
    assert_same(tree, read_checkpoint(path, tree)[0])


# The format


def test_other_programs_read_the_array_file(store):
    tree = {name.replace("_", "/"): values(name, (6, 2)) for name in DTYPES}
    path = saved(store, tree)
    (file,) = path.glob("*.safetensors")
    assert file.name == "arrays-00000-of-00001.safetensors"
    data = file.read_bytes()
    tensors = dict(safetensors.deserialize(data))
    manifest = json.loads((path / "manifest.json").read_text())
    shards = {name: array["shards"][0] for name, array in manifest["arrays"].items()}
    in_file = sorted(shards, key=lambda name: shards[name]["offset"])
    assert len(tensors) == len(tree)
    for number, name in enumerate(in_file):
        tensor, dtype = tensors[str(number)], tree[name].dtype.name
        assert bytes(tensor["data"]) == tree[name].tobytes()
        assert tensor["dtype"] == (DTYPES[dtype] or "U8")
        assert tensor["shape"] == ([6, 2] if DTYPES[dtype] else [tree[name].nbytes])
        assert shards[name]["offset"] % tree[name].itemsize == 0


def test_commit_is_the_checksum_of_the_manifest(store):
    path = saved(store, {"x": np.ones(3)})
    command = ["sha256sum", path / "manifest.json"]
    digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    assert (path / "COMMIT").read_text().strip() == digest
    assert sorted(os.listdir(path)) == [
        "COMMIT",
        "arrays-00000-of-00001.safetensors",
        "manifest.json",
    ]


# Metadata


def test_metadata_comes_back(store):
    metadata = {
        "text": "ä\n\0",
        "numbers": [1, -2.5, 1e300, 2**70, 0.1 + 0.2],
        "odd": [float("inf"), -float("inf")],
        "none": None,
        "nested": {"a": {"b": [True, {}, []]}},
    }
    path = saved(store, {}, metadata | {"tuple": (1, (2,)), "nan": float("nan")})
    found = read_metadata(path)
    assert np.isnan(found.pop("nan"))
    assert found == metadata | {"tuple": [1, [2]]}
    assert read_checkpoint(path, {})[0] == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {"b": [1, np.float32(2)]}}, r"`metadata\.a\.b\[1\]` is a `numpy\.float32`.*float"),
        ({"a": jnp.ones(2)}, r"`metadata\.a` is a `jax.*put arrays into the tree"),
        ({"a": {3: 1}}, r"`metadata\.a` has the key `3`.*Write `'3'`"),
        ({"a": {1, 2}}, r"`metadata\.a` is a `builtins\.set`"),
    ],
)
def test_metadata_that_json_would_change_is_refused(store, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        store.save(0, {}, metadata)
    assert store.entries() == []


# Devices


def mesh(size):
    return jax.make_mesh(
        (size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )


def on(size, *axes):
    return NamedSharding(mesh(size), PartitionSpec(*axes))


def test_each_part_is_written_once(store):
    tree = {
        "split": jax.device_put(np.arange(8.0, dtype=np.float32), on(4, "data")),
        "whole": jax.device_put(np.arange(8.0, dtype=np.float32), on(4)),
        "columns": jax.device_put(np.arange(24, dtype=np.int32).reshape(3, 8), on(2, None, "data")),
    }
    arrays = read_manifest(saved(store, tree)).arrays
    regions = {name: [shard.region for shard in array.shards] for name, array in arrays.items()}
    assert sorted(regions["split"]) == [((0, 2),), ((2, 4),), ((4, 6),), ((6, 8),)]
    assert regions["whole"] == [((0, 8),)]
    assert sorted(regions["columns"]) == [((0, 3), (0, 4)), ((0, 3), (4, 8))]


@pytest.mark.parametrize("before", [on(4, "data"), on(2, None, "data"), on(4), on(1)])
@pytest.mark.parametrize("after", [on(4, None, "data"), on(2, "data"), on(2), None])
def test_restores_onto_other_devices(store, before, after):
    plain = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    split = before.spec[0] if len(before.spec) else None
    key_sharding = NamedSharding(before.mesh, PartitionSpec(split))
    tree = {"x": jax.device_put(plain, before), "keys": jax.device_put(keys, key_sharding)}
    like = {
        "x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=after),
        "keys": jax.ShapeDtypeStruct(
            (8,), keys.dtype, sharding=after and NamedSharding(after.mesh, PartitionSpec())
        ),
    }
    found, _ = read_checkpoint(saved(store, tree), like)
    assert np.asarray(found["x"]).tobytes() == plain.tobytes()
    assert bits(found["keys"]) == bits(keys)
    for name in like:
        if after is None:
            assert found[name].sharding.device_set == {jax.devices()[0]}
            assert not found[name].committed
        else:
            assert found[name].sharding.is_equivalent_to(like[name].sharding, found[name].ndim)


def test_restores_to_where_the_arrays_of_like_are(store):
    like = {
        "free": jnp.zeros(4),
        "there": jax.device_put(np.zeros(4, np.float32), jax.devices()[2]),
        "split": jax.device_put(np.zeros(4, np.float32), on(4, "data")),
        "split keys": jax.device_put(jax.random.split(jax.random.key(0), 4), on(4, "data")),
        "host": np.zeros(4, np.float32),
    }
    found, _ = read_checkpoint(saved(store, like), like)
    assert_same(like, found)
    for name in ("free", "there", "split", "split keys"):
        assert found[name].sharding.is_equivalent_to(like[name].sharding, 1)
        assert found[name].committed == like[name].committed


@pytest.mark.parametrize("sharding", [None, on(1), on(4, "data"), on(4)])
def test_restored_arrays_can_be_donated(store, sharding):
    like = jax.ShapeDtypeStruct((2**8, 2**8), np.float32, sharding=sharding)
    path = saved(store, np.arange(2**16, dtype=np.float32).reshape(2**8, 2**8))
    found, _ = read_checkpoint(path, like)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards]
    after = step(found)
    assert found.is_deleted()
    assert [s.data.unsafe_buffer_pointer() for s in after.addressable_shards] == pointers


def test_the_copy_is_complete_when_save_returns(store):
    step = jax.jit(lambda x: x * 2, donate_argnums=0)
    x, host = step(jnp.ones(2**20)), np.ones(2**20)
    pointer = x.unsafe_buffer_pointer()
    store.save(1, {"x": x, "host": host}, {})
    after = step(x)
    host[:] = 5
    after.block_until_ready()
    store.wait()
    assert after.unsafe_buffer_pointer() == pointer  # donated in place, while the copy was written
    arrays = load_arrays(store.latest().path)
    assert set(arrays["x"]) == {2.0}
    assert set(arrays["host"]) == {1.0}


# What does not fit


def test_a_mismatch_lists_every_leaf(store):
    tree = {
        "net": {"weight": jnp.ones((3, 4)), "bias": jnp.ones(3), "scale": jnp.ones(2)},
        "key": jax.random.key(0),
        "dropout": eqx.nn.Dropout(0.1),
        "old": jnp.ones(1),
        "same": jnp.ones(2),
    }
    like = {
        "net": {
            "weight": jnp.ones((4, 3)),
            "bias": jnp.ones(3, jnp.bfloat16),
            "scales": jnp.ones(2),
        },
        "key": jax.random.key(0, impl="rbg"),
        "dropout": eqx.nn.Dropout(0.2),
        "same": jnp.ones(2),
        "raw": jnp.zeros(2, jnp.uint32),
    }
    path = saved(store, tree)
    with pytest.raises(CheckpointMismatch) as caught:
        read_checkpoint(path, like)
    assert sorted(caught.value.differences) == [
        "`dropout/p`: 0.1 in the checkpoint, 0.2 here",
        "`key`: keys[] of `threefry2x32` in the checkpoint, keys[] of `rbg` here",
        "`net/bias`: float32[3] in the checkpoint, bfloat16[3] here",
        "`net/scale`: float32[2] is only in the checkpoint",
        "`net/scales`: float32[2] is not in the checkpoint; was it `net/scale`?",
        "`net/weight`: float32[3,4] in the checkpoint, float32[4,3] here",
        "`old`: float32[1] is only in the checkpoint",
        "`raw`: uint32[2] is not in the checkpoint",
    ]
    message = str(caught.value)
    assert f"`{path}` is intact, but of another state" in message
    assert all(f"\n  {line}" in message for line in caught.value.differences)
    assert "load_arrays(path, include=...)" in message
    assert verify_checkpoint(path).step == 1


@pytest.mark.parametrize(
    ("saved_leaf", "like_leaf"),
    [
        (jnp.ones(2, jnp.float32), jnp.ones(2, jnp.int32)),
        (np.ones(2, np.float64), np.ones(2, np.float32)),
        (jax.random.key_data(jax.random.key(0)), jax.random.key(0)),
        (jax.random.key(0), jax.random.key_data(jax.random.key(0))),
        (jax.random.split(jax.random.key(0)), jax.random.key(0)),
        (1, 1.0),
        (True, 1),
        (1.5, float("nan")),
    ],
)
def test_nothing_is_cast(store, saved_leaf, like_leaf):
    path = saved(store, [saved_leaf])
    with pytest.raises(CheckpointMismatch, match="`0`:"):
        read_checkpoint(path, [like_leaf])


def test_numbers_are_compared_only_where_both_have_them(store):
    path = saved(store, {"x": 1, "nan": float("nan"), "gone": 2.0})
    like = {"x": 1, "nan": float("nan"), "new": 5}
    assert read_checkpoint(path, like)[0]["new"] == 5


def test_a_long_list_of_differences_is_cut(store):
    path = saved(store, {})
    with pytest.raises(CheckpointMismatch, match="and 80 more") as caught:
        read_checkpoint(path, [jnp.ones(1)] * 100)
    assert len(caught.value.differences) == 100


def test_load_arrays_takes_what_is_asked_for(store):
    tree = {"task": {"w": jnp.ones(2), "b": jnp.zeros(1)}, "key": jax.random.key(3), "p": 0.5}
    path = saved(store, tree)
    assert list(load_arrays(path)) == ["key", "task/b", "task/w"]
    assert list(load_arrays(path, include="^task/w$")) == ["task/w"]
    assert load_arrays(path)["key"].tolist() == [0, 3]
    with pytest.raises(CheckpointError, match=r"`include='tusk'` finds no leaf.*`task/b`.*inspect"):
        load_arrays(path, include="tusk")


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
        with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
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
    assert "Those saved before it are as they were." in str(caught.value)
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


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=r"2 processes.*enable_checkpointing=False"):
        CheckpointStore(tmp_path)


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
            OSError, match=r"The folder `.*file/run` cannot be written .*default_root_dir"
        ):
            make(tmp_path / "file" / "run")


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
