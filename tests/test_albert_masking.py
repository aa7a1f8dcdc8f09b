"""Which tokens are hidden: how often, which never, and the same for the same key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_albert import rows

from albert_task import SpecialIds, mask_tokens
from albert_task._masking import num_predictions

SPECIAL = SpecialIds(0, 1, 2, 3, 4)
VOCAB = 40


jitted = jax.jit(
    mask_tokens, static_argnames=("mask_id", "special", "vocab_size", "rate", "predictions")
)


def mask(tokens, seed=0, **options):
    """Masked rows, as numpy arrays."""
    options = {"mask_id": 4, "special": SPECIAL, "vocab_size": VOCAB} | options
    key = jax.random.key(seed)
    return jax.tree.map(np.asarray, jitted(jnp.asarray(tokens), key, **options))


@pytest.fixture(scope="module")
def many():
    """2,000 rows with special tokens all over and padding, and what became of them."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCAB, (2000, 32)).astype(np.int32)
    ends = generator.integers(4, 33, 2000)
    own = np.arange(32)[None] < ends[:, None]
    tokens[~own] = 7  # an ordinary id, so that only `where` tells it apart
    return tokens, own, mask(tokens, where=jnp.asarray(own))


def changed(tokens, found):
    return tokens != found.tokens


def test_special_tokens_and_padding_are_never_chosen(many):
    tokens, own, found = many
    rows, column = np.nonzero(found.weights)
    at = found.positions[rows, column]
    assert not np.isin(tokens[rows, at], SPECIAL).any()
    assert own[rows, at].all()
    np.testing.assert_array_equal(found.labels[rows, column], tokens[rows, at])


def test_what_is_not_chosen_stays(many):
    tokens, _, found = many
    chosen = np.zeros(tokens.shape, bool)
    rows, column = np.nonzero(found.weights)
    chosen[rows, found.positions[rows, column]] = True
    assert chosen.sum() == len(rows)  # no position twice
    assert not changed(tokens, found)[~chosen].any()


def test_each_row_has_its_exact_number(many):
    tokens, own, found = many
    eligible = (own & ~np.isin(tokens, SPECIAL)).sum(1)
    wanted = [max(1, round(0.15 * int(length))) for length in own.sum(1)]
    np.testing.assert_array_equal(found.weights.sum(1), np.minimum(wanted, eligible))
    assert set(np.unique(found.weights)) == {0.0, 1.0}


def test_of_ten_chosen_eight_are_hidden_one_is_random_one_stays(many):
    *_, found = many
    rows, column = np.nonzero(found.weights)
    label, shown = found.labels[rows, column], found.tokens[rows, found.positions[rows, column]]
    count = len(label)
    assert count > 4000
    hidden, kept = (shown == 4).mean(), (shown == label).mean()
    # A random token is the same one by chance 1 time in 35. Bounds are 4 standard deviations.
    for share, expected in ((hidden, 0.8), (kept, 0.1 + 0.1 / 35)):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_random_tokens_are_uniform_over_the_ordinary_ones():
    tokens = np.full((400, 100), 20, np.int32)
    found = mask(tokens, special=(0, 4, 17, 39), rate=0.99)
    noise = found.tokens[(found.tokens != 20) & (found.tokens != 4)]
    counts = np.bincount(noise, minlength=VOCAB)
    assert not counts[[0, 4, 17, 39]].any()
    ordinary = np.delete(counts, [0, 4, 17, 39, 20])
    expected = 400 * 99 * 0.1 / 36
    assert np.abs(ordinary - expected).max() < 5 * np.sqrt(expected)


def test_every_eligible_position_is_as_likely():
    tokens = np.full((4000, 12), 9, np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    found = mask(tokens, rate=0.3)
    counts = np.bincount(found.positions[found.weights > 0], minlength=12)
    assert counts[0] == counts[11] == 0
    expected = 4000 * 4 / 10
    assert np.abs(counts[1:-1] - expected).max() < 5 * np.sqrt(expected * 0.6)


def test_a_pure_function_of_tokens_and_key():
    tokens = rows(8, 20)
    before = tokens.copy()
    one, same, other = mask(tokens, 1), mask(tokens, 1), mask(tokens, 2)
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.positions != other.positions).any()
    assert (one.tokens != other.tokens).any()
    np.testing.assert_array_equal(tokens, before)
    shapes = [array.shape for array in one]
    assert shapes == [array.shape for array in other] == [(8, 20), (8, 3), (8, 3), (8, 3)]


@pytest.mark.parametrize(
    ("length", "rate", "expected"),
    [(512, 0.15, 77), (128, 0.15, 19), (20, 0.15, 3), (10, 0.15, 2), (3, 0.15, 1), (10, 0.99, 10)],
)
def test_how_many_a_row_predicts(length, rate, expected):
    assert num_predictions(length, rate) == expected


def test_rows_with_nothing_to_predict():
    tokens = np.zeros((3, 9), np.int32)
    tokens[1, :2] = 2, 3
    tokens[2, 0] = 1
    found = mask(tokens, where=jnp.asarray(tokens != 0))
    assert not found.weights.any()
    np.testing.assert_array_equal(found.tokens, tokens)


def test_tokens_keep_their_dtype():
    found = mask(rows(4, 20).astype(np.int16))
    assert found.tokens.dtype == found.labels.dtype == np.int16
    assert found.weights.sum() == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, r"`rate=0.0`, has to lie in \(0, 1\)"),
        ({"rate": 1.0}, r"`rate=1.0`, has to lie in \(0, 1\)"),
        ({"predictions": 8}, "`predictions=8` of rows of 8 tokens leave nothing to predict from"),
        ({"mask_id": 7}, r"`mask_id=7` has to be among the ids of `special="),
        ({"special": (4, 40)}, "special token 40 is no id of a vocabulary of `vocab_size=40`"),
        ({"special": (4, -1)}, "special token -1 is no id"),
        ({"vocab_size": 5}, "All 5 tokens of the vocabulary are special"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        mask(rows(2, 8), **options)
