"""Checkpoints of arrays that are spread over devices: read in parts, on any other mesh."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlightning._checkpoint import (
    CheckpointDamaged,
    export_weights,
    read_checkpoint,
    verify_checkpoint,
)
from jaxlightning._checkpoint_manifest import (
    Shard,
    StoredArray,
    StoredFile,
    decode_part,
    encode_part,
)
from jaxlightning._checkpoint_read import CheckpointReader
from jaxlightning.parallel import make_mesh

P = PartitionSpec


def tree():
    random = np.random.default_rng(0)
    return {
        "wide": random.normal(size=(64, 24)).astype(np.float32),
        "tall": jnp.asarray(random.normal(size=(8, 640)), jnp.bfloat16),
        "cube": random.integers(-128, 127, (8, 4, 12)).astype(np.int8),
        "vector": np.arange(32.0, dtype=np.float32),
        "scalar": np.float32(3.0),
        "nothing": np.zeros((0, 4), np.float32),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 8),
    }


SPECS = [
    {"mesh": {"fsdp": 4}, "wide": P("fsdp"), "tall": P(None, "fsdp"), "keys": P("fsdp")},
    {"mesh": {"data": 2, "fsdp": 2}, "wide": P(None, "fsdp"), "cube": P("data", "fsdp")},
    {"mesh": {"data": 2, "tensor": 2}, "wide": P(("data", "tensor")), "vector": P("tensor")},
    {"mesh": {"data": 4}},
    {"mesh": {"data": 2}, "cube": P(None, None, "data"), "tall": P("data")},
    {"mesh": {"data": 1}},
]


def placed(specs):
    """The tree on devices, and the shardings."""
    count = int(np.prod(list(specs["mesh"].values())))
    mesh = make_mesh(jax.devices()[:count], specs["mesh"])
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs.get(name, P())))
        for name, leaf in tree().items()
    }


def same(a, b):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("saved", range(len(SPECS)))
def test_what_one_mesh_saved_every_other_restores(tmp_path, store, saved):
    path = store.save(1, placed(SPECS[saved]), {}, wait=True)
    verify_checkpoint(path)
    for specs in SPECS:
        like = placed(specs)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        restored, _ = read_checkpoint(path, abstract)
        for name, leaf in restored.items():
            assert same(leaf, like[name]), (specs, name)
            assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)


def test_each_shard_is_stored_once(store):
    """Replicas are not, and nothing is put together on the host for it."""
    path = store.save(1, placed(SPECS[1]), {}, wait=True)
    stored = verify_checkpoint(path).arrays
    assert [shard.region for shard in stored["wide"].shards] == [
        ((0, 64), (0, 12)),
        ((0, 64), (12, 24)),
    ]
    assert len(stored["cube"].shards) == 4
    assert len(stored["vector"].shards) == 1


@pytest.mark.parametrize(
    ("spec", "device_rows"), [(P("fsdp"), 1024), (P(None, "fsdp"), 4096)], ids=["rows", "columns"]
)
def test_only_the_blocks_are_read_that_are_needed(store, monkeypatch, spec, device_rows):
    """Of 64 MiB in blocks of 16 MiB: a device that wants a quarter of the rows reads a quarter;
    one that wants some columns reads all rows of the shards that have any of them."""
    mesh = make_mesh(jax.devices(), {"fsdp": 4})
    x = jax.device_put(np.ones((4096, 4096), np.float32), NamedSharding(mesh, P()))
    path = store.save(1, {"x": x}, {}, wait=True)
    read = []
    preadv = os.preadv

    def counted(file, buffers, offset):
        read.append(sum(map(len, buffers)))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    rows = x.shape[0] if spec[0] is None else device_rows
    with CheckpointReader(path) as reader:
        region = ((0, rows), (0, 1024 if spec[0] is None else 4096))
        part = reader.region("x", region)
    assert part.shape == tuple(stop - start for start, stop in region)
    assert sum(read) == 4 * 4096 * device_rows


def test_a_flipped_bit_of_any_shard_is_found(store):
    like = placed(SPECS[0])
    path = store.save(1, like, {}, wait=True)
    (file,) = path.glob("arrays-*")
    manifest = verify_checkpoint(path)
    for name in ("wide", "tall"):
        for shard in manifest.arrays[name].shards:
            data = bytearray(file.read_bytes())
            data[shard.offset + shard.size // 2] ^= 4
            whole = file.read_bytes()
            file.write_bytes(data)
            with pytest.raises(CheckpointDamaged, match=f"which belong to `{name}`"):
                read_checkpoint(path, like)
            file.write_bytes(whole)
    read_checkpoint(path, like)


def test_restored_parts_can_be_donated(store):
    """They are JAX's own, and not numpy's memory, which it could never take over."""
    like = placed(SPECS[0])
    path = store.save(1, like, {}, wait=True)
    restored, _ = read_checkpoint(path, like)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    step(restored["wide"])
    assert restored["wide"].is_deleted()


def test_weights_of_several_devices_are_exported_whole(tmp_path):
    from safetensors.numpy import load_file

    leaves = {k: v for k, v in placed(SPECS[0]).items() if k in ("wide", "cube")}
    export_weights(tmp_path / "weights.safetensors", leaves)
    for name, array in load_file(tmp_path / "weights.safetensors").items():
        np.testing.assert_array_equal(array, tree()[name])


def test_parts_come_back():
    file = StoredFile(100, 20, "ab")
    shard = Shard("arrays-00001-of-00002.safetensors", 20, 80, ((0, 20),), ("cd",))
    arrays = {"x": StoredArray("float32", (20,), None, (shard,))}
    name, back, shards = decode_part(encode_part(shard.file, file, arrays))
    assert (name, back, shards) == (shard.file, file, {"x": (shard,)})
