"""Digests on the device against their definition, and what they tell apart."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from digests import MASKS, reference
from jax.sharding import NamedSharding, PartitionSpec

from jaxlightning import _digest
from jaxlightning._digest import (
    DigestRecord,
    digest_sums,
    digests_by_path,
    named_arrays,
    total_digest,
)
from jaxlightning.parallel import make_mesh

FLOATS = ["float16", "float32", "bfloat16", "complex64", "float4_e2m1fn", "float8_e3m4"]
FLOATS += ["float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]
FLOATS += ["float8_e5m2fnuz", "float8_e8m0fnu"]
INTEGERS = ["bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", *list(MASKS)[:4]]
compiled = jax.jit(digest_sums)


def digests(*leaves):
    names = [str(i) for i in range(len(leaves))]
    return list(digests_by_path(names, np.asarray(compiled(list(leaves)))).values())


def drawn(name, shape, seed=0):
    """An array of random bits, NaNs of all kinds among them."""
    dtype = jnp.dtype(name)
    size = int(np.prod(shape))
    raw = np.random.default_rng(seed).bytes(size * dtype.itemsize)
    if name == "bool":
        return (np.frombuffer(raw, np.uint8) % 2 == 1).reshape(shape)
    if name in MASKS:
        bits = np.frombuffer(raw, np.uint8) & MASKS[name]
        if name == "float4_e2m1fn":
            return bits.view(dtype).reshape(shape)
        kind = ml_dtypes.uint4 if name.endswith("4") else ml_dtypes.uint2
        return bits.astype(kind).view(dtype).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape)


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
def test_equals_the_definition_for_every_dtype(name):
    shapes = [(), (5,), (3, 4), (2, 3, 5), (0,), (2, 0, 3)]
    arrays = [drawn(name, shape, seed) for seed, shape in enumerate(shapes)]
    labels = [f"{name}[{','.join(map(str, shape))}]" for shape in shapes]
    found = digests(*map(jnp.asarray, arrays))
    assert found == [reference(*pair) for pair in zip(arrays, labels, strict=True)]
    assert len(set(found)) == len(shapes)


@pytest.mark.parametrize("name", ["float64", "int64", "uint64", "complex128"])
def test_wide_dtypes_where_they_are_enabled(name):
    with jax.enable_x64(True):
        array = drawn(name, (3, 4))
        assert digests(jnp.asarray(array)) == [reference(array, f"{name}[3,4]")]


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys(kind):
    keys = jax.random.split(jax.random.key(3, impl=kind), 4)
    one, some, data = digests(keys[0], keys, jax.random.key_data(keys[0]))
    bits = np.asarray(jax.random.key_data(keys))
    assert one == reference(bits[0], f"keys[] of `{kind}`")
    assert some == reference(bits, f"keys[4] of `{kind}`")
    assert data != one


def test_large_arrays_and_small_ones_that_are_put_together():
    large = drawn("float32", (200, 120))
    assert large.nbytes > _digest.SMALL
    small = [drawn("bfloat16", (7,), seed) for seed in range(3)]
    found = digests(*map(jnp.asarray, [small[0], large, small[1], small[2], small[0]]))
    assert found[1] == reference(large, "float32[200,120]")
    order = [small[0], small[1], small[2], small[0]]
    assert [found[0], *found[2:]] == [reference(one, "bfloat16[7]") for one in order]


def test_words_beyond_those_that_32_bits_can_number_are_told_apart(monkeypatch):
    """The limit is lowered: an array of 2**32 elements does not fit here."""
    monkeypatch.setattr(_digest, "COUNTED", 8)
    x = np.arange(26, dtype=np.float32).reshape(2, 13)  # a shape of no other test
    sums = np.asarray(digest_sums([jnp.asarray(y) for y in (x, x[::-1], x[:, ::-1])]))
    assert len(np.unique(sums, axis=0)) == 3
    assert len(np.unique(np.asarray(_digest._numbers((2, 13), 1)))) == 26
    monkeypatch.undo()
    number = np.asarray(_digest._numbers((2, 13), 2))
    assert number.ravel().tolist() == list(range(0, 52, 2))
    huge = jax.ShapeDtypeStruct((70_000, 70_000), jnp.int8)
    assert jax.eval_shape(digest_sums, [huge]).shape == (1, 2)


def changed(array, index, bits):
    view = array.copy()
    view.reshape(-1).view(np.uint32)[index] = bits
    return view


def test_all_bits_and_places_count():
    x = drawn("float32", (4, 6))
    zero, nan = np.zeros((4, 6), np.float32), 0x7FC00000
    variants = [
        x,
        x.T.copy().reshape(4, 6),
        x[::-1],
        x[:, ::-1],
        x[[1, 0, 2, 3]],
        changed(x, 23, int(x.view(np.uint32)[3, 5]) ^ 1),
        changed(x, 0, int(x.view(np.uint32)[0, 0]) ^ 0x80000000),
        zero,
        -zero,
        changed(zero, 5, 0x80000000),
        changed(zero, 6, 0x80000000),
        changed(zero, 5, nan),
        changed(zero, 5, nan + 1),
        changed(zero, 5, nan + 0x80000000),
    ]
    found = digests(*map(jnp.asarray, variants))
    assert len(set(found)) == len(variants)
    # The same bits as another dtype or in another shape.
    same = [zero, zero.astype(np.int32), zero.reshape(6, 4), zero.reshape(24)]
    assert len(set(digests(*map(jnp.asarray, same)))) == len(same)
    assert digests(jnp.asarray(x.T))[0] != digests(jnp.asarray(x.reshape(6, 4)))[0]


def test_every_bit_of_every_element():
    x = drawn("uint32", (5,))
    flipped = [changed(x, i, int(x[i]) ^ (1 << bit)) for i in range(5) for bit in range(32)]
    found = digests(*map(jnp.asarray, [x, *flipped]))
    assert len(set(found)) == 161
    # In each lane, because what is mixed is mixed one to one.
    for lane in (slice(0, 8), slice(8, 16)):
        assert all(other[lane] != found[0][lane] for other in found[1:])


@pytest.mark.parametrize("spec", [("fsdp",), (None, "fsdp"), ("data", "fsdp"), ()])
def test_devices_and_shardings_make_no_difference(spec):
    mesh = make_mesh(jax.devices(), {"data": 2, "fsdp": 2})
    arrays = [drawn("float32", (8, 12)), drawn("bfloat16", (400, 128)), drawn("int8", (4, 4))]
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), spec))
    placed = jax.device_put(list(map(jnp.asarray, arrays)), split)
    program = jax.jit(digest_sums, out_shardings=everywhere).lower(placed).compile()
    names = list("abc")
    found = digests_by_path(names, np.asarray(program(placed)))
    assert list(found.values()) == digests(*map(jnp.asarray, arrays))
    # What travels between devices is sums, not the large array, of which a part has 25,600 bytes.
    assert program.memory_analysis().temp_size_in_bytes < 10_000


def test_the_total_sees_leaves_that_changed_places():
    leaves = {"a": "0" * 16, "b": "1" * 16}
    swapped = {"a": "1" * 16, "b": "0" * 16}
    renamed = {"a": "0" * 16, "c": "1" * 16}
    some = {"a": "0" * 16}
    assert len({total_digest(x) for x in (leaves, swapped, renamed, some, {})}) == 5
    assert total_digest(leaves) == total_digest(dict(reversed(leaves.items())))


def test_names_are_those_of_checkpoints():
    tree = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}, "f": jnp.tanh, "p": 0.5}
    assert {name: leaf.shape for name, leaf in named_arrays(tree).items()} == {
        "['a/b']": (2,),
        "['a']['b']": (3,),
    }


GOOD = {"step": 3, "leaves": {"a": "0" * 16}, "digest": total_digest({"a": "0" * 16})}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "no object of `step`, `digest` and `leaves`"),
        ({"step": 3}, "no object of `step`, `digest` and `leaves`"),
        (GOOD | {"more": 1}, "no object of `step`, `digest` and `leaves`"),
        (GOOD | {"step": True}, "its `step` is no number of steps"),
        (GOOD | {"step": -1}, "its `step` is no number of steps"),
        (GOOD | {"step": 10**30}, "its `step` is no number of steps"),
        (GOOD | {"step": 3.0}, "its `step` is no number of steps"),
        (GOOD | {"leaves": ["0" * 16]}, "a digest is not 16 digits of lower-case hex"),
        (GOOD | {"leaves": {"a": "G" * 16}}, "a digest is not 16 digits of lower-case hex"),
        (GOOD | {"leaves": {"a": "0" * 17}}, "a digest is not 16 digits of lower-case hex"),
        (GOOD | {"leaves": {"a": 0}}, "a digest is not 16 digits of lower-case hex"),
        (GOOD | {"digest": None}, "a digest is not 16 digits of lower-case hex"),
        (GOOD | {"digest": "0" * 16}, "its `digest` is not that of its `leaves`"),
    ],
)
def test_what_is_no_record(content, why):
    assert DigestRecord.of_json(GOOD).as_json() == GOOD
    with pytest.raises(ValueError, match=why):
        DigestRecord.of_json(content)
