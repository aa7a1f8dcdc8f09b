"""Rows of an embedding table, and the gradient that a GPU computes by a product of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albert_task import _lookup
from albert_task._lookup import by_product, looked_up

GENERATOR = np.random.default_rng(0)
TABLE = jnp.asarray(GENERATOR.normal(size=(50, 8)), jnp.float32)
IDS = jnp.asarray(GENERATOR.integers(0, 50, (4, 13)) * (GENERATOR.random((4, 13)) < 0.5))
WEIGHTS = jnp.asarray(GENERATOR.normal(size=(4, 13, 8)), jnp.float32)


def gradient(lookup, table=TABLE, weights=WEIGHTS, ids=IDS):
    return jax.jit(jax.grad(lambda table: jnp.sum(lookup(table, ids) * weights)))(table)


@pytest.mark.parametrize("entries", [2**27, 50 * 4 * 5, 1])
def test_the_gradient_adds_up_all_places_of_a_row(monkeypatch, entries):
    """At once, and so many places at a time that they do not come out even."""
    monkeypatch.setattr(_lookup, "_AT_ONCE", entries)
    expected = np.zeros((50, 8), np.float64)
    np.add.at(expected, np.asarray(IDS), np.asarray(WEIGHTS, np.float64))
    np.testing.assert_array_equal(by_product(TABLE, IDS), np.asarray(TABLE)[np.asarray(IDS)])
    np.testing.assert_allclose(gradient(by_product), expected, atol=1e-5)
    np.testing.assert_allclose(gradient(looked_up), expected, atol=1e-5)


@pytest.mark.parametrize("lookup", [looked_up, by_product])
def test_it_is_summed_in_float32_whatever_the_dtype(lookup):
    """10,000 times 0.01 in bfloat16 stays at 4, where 0.01 is too small to count."""
    table, ids = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((4, 2500), jnp.int32)
    weights = jnp.full((4, 2500, 2), 0.01, jnp.bfloat16)
    found = gradient(lookup, table, weights, ids)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32)[1], 100, rtol=0.01)
    assert not found[0].any()


@pytest.mark.parametrize("lookup", [looked_up, by_product])
@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_outside_the_table_gives_nan(lookup, wrong):
    found = lookup(TABLE, jnp.array([[0, wrong]]))
    assert jnp.isnan(found[0, 1]).all()
    np.testing.assert_array_equal(found[0, 0], TABLE[0])


def test_it_can_be_batched_and_differentiated_twice():
    tables = jnp.stack([TABLE, 2 * TABLE])
    each = jax.vmap(lambda table: gradient(lambda t, ids: by_product(t, ids) ** 2, table))(tables)
    np.testing.assert_allclose(each[1], 2 * each[0], rtol=1e-5, atol=1e-5)

    def twice(lookup):
        inner = jax.grad(lambda table: jnp.sum(jnp.sin(lookup(table, IDS))))
        return jax.grad(lambda table: jnp.sum(inner(table) * TABLE))(TABLE)

    np.testing.assert_allclose(twice(by_product), twice(looked_up), atol=1e-5)


def test_a_gpu_scatters_nothing(monkeypatch):
    """Where many threads would add to one row, the row of [MASK]."""
    assert "scatter" in gradient_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "scatter" not in gradient_text()


def gradient_text():
    run = jax.jit(jax.grad(lambda table: jnp.sum(looked_up(table, IDS) * WEIGHTS)))
    return run.lower(TABLE).as_text()
