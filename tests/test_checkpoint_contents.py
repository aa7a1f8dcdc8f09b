"""What a checkpoint holds, and what it is restored into."""

import json
import os
import subprocess

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from checkpoints import assert_same, bits, on, saved, values
from jax.sharding import NamedSharding, PartitionSpec

from jaxlightning import _checkpoint_arrays, _checkpoint_manifest, _checkpoint_read
from jaxlightning._checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    load_arrays,
    read_checkpoint,
    read_metadata,
    verify_checkpoint,
)
from jaxlightning._checkpoint_manifest import DTYPES
from jaxlightning._checkpoint_read import read_manifest

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


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
    assert "`warm_start(path, task, include=...)`" in message
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
