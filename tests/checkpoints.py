"""Helpers that the tests of checkpoints share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


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


def mesh(size):
    return jax.make_mesh(
        (size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )


def on(size, *axes):
    return NamedSharding(mesh(size), PartitionSpec(*axes))
