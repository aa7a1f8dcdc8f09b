"""A shard's draws are its rows of the whole batch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlightning.parallel._randomness import (
    Draw,
    NotByRows,
    _places,
    check_key,
    draws_by_rows,
    shard_key,
)

ROWS, SHARDS = 24, 8


def draws(function):
    """As the step finds them: by tracing for two batch sizes."""

    def trace(rows):
        x = jax.ShapeDtypeStruct((rows, 5), jnp.float32)
        return jax.make_jaxpr(function)(x, jax.random.key(0))

    return draws_by_rows(trace, ROWS, SHARDS)


def everything(x, key):
    """By rows: numbers, bits of all widths, keys; and for all rows: a vector."""
    a, b, c, d = jax.random.split(key, 4)
    bits = [
        jax.random.bits(jax.random.fold_in(a, width), (2 * x.shape[0], 3), f"uint{width}")
        for width in (8, 16, 32)
    ]
    keys = jax.random.split(b, x.shape[0])
    each = jax.vmap(lambda row, key: jax.random.bits(key, row.shape))(x, keys)
    kept = jax.random.bernoulli(c, 0.5, x.shape)
    layers = jax.lax.map(lambda key: jax.random.bits(key, x.shape), jax.random.split(d, 2))
    return [*bits, each, kept, layers[0], layers[1]], jax.random.bits(d, (7,))


def test_shards_draw_their_rows():
    own = draws(everything)
    assert Draw("random_split", (ROWS // SHARDS,)) in own
    assert Draw("random_bits", (7,)) not in own
    key = jax.random.key(7)
    x = jnp.ones((ROWS, 5))
    by_rows, for_all = everything(x, key)
    on_shard = jax.jit(lambda x, data, shard: everything(x, shard_key(data, shard, own)))
    parts = []
    for shard in range(SHARDS):
        rows, same = on_shard(
            x[: ROWS // SHARDS], jax.random.key_data(key), jnp.asarray(shard, jnp.uint32)
        )
        np.testing.assert_array_equal(same, for_all)
        parts.append(rows)
    for whole, *pieces in zip(by_rows, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("shard", [0, 1, 60_000])
def test_places_beyond_32_bits(shard):
    high, low = _places(jnp.asarray(shard, jnp.uint32), (3, 70_001))
    places = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low)
    expected = np.arange(3 * 70_001, dtype=np.uint64) + np.uint64(shard * 3 * 70_001)
    np.testing.assert_array_equal(places.ravel(), expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda x, key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x))),
            "folds the places of its rows into keys",
        ),
        (lambda x, key: jax.random.bits(key, (5, len(x))), "whose first axis is not its rows'"),
        (lambda x, key: jax.random.gamma(key, 2.0, (len(x),)), "uses its key in `random_gamma`"),
        (
            lambda x, key: (jax.random.split(key, 3), jax.random.split(key, len(x))),
            "draws twice with shape (3,), once by rows and once not",
        ),
        (
            lambda x, key: [jax.random.bits(key, (2,)) for _ in range(len(x))],
            "draws more often from its key for a larger batch",
        ),
        (
            lambda x, key: jax.random.key_data(key),
            "uses its key in `random_unwrap`",
        ),
    ],
)
def test_what_cannot_be_cut_into_rows(function, reason):
    with pytest.raises(NotByRows) as caught:
        draws(function)
    assert reason in str(caught.value)


def test_other_generators_are_refused():
    check_key(jax.random.key(0))
    with pytest.raises(NotByRows, match="not Threefry"):
        check_key(jax.random.key(0, impl="rbg"))
    with jax.threefry_partitionable(False), pytest.raises(NotByRows, match="partitionable"):
        check_key(jax.random.key(0))
