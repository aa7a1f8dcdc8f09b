"""ALBERT's forward pass against the paper's arithmetic in numpy; masks, dropout, precision."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_albert import (
    DROPPING,
    GROUPS,
    TINY,
    albert,
    head,
    numpy_albert,
    numpy_head,
    rows,
)

from albert_task import Albert
from albert_task._layers import Dense, LayerNorm, initial
from albert_task._model import gather


def close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("config", [TINY, GROUPS], ids=["shared", "groups"])
def test_hidden_and_logits_are_the_papers(config):
    model, lm = albert(config), head(config)
    tokens = rows()
    mask = tokens != 0
    types = (np.arange(12)[None] > 5).astype(np.int32).repeat(4, axis=0)
    hidden = model(jnp.asarray(tokens), mask=jnp.asarray(mask), token_types=jnp.asarray(types))
    expected = numpy_albert(model, tokens, mask, types)
    close(hidden, expected)
    words = model.embeddings.words
    close(lm(hidden, words), numpy_head(lm, words, expected), 1e-4)
    pooler = expected[:, 0] @ np.asarray(model.pooler.weight) + np.asarray(model.pooler.bias)
    close(model.pooled(hidden), np.tanh(pooler))


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "swish", "tanh"])
def test_other_activations(name):
    config = dataclasses.replace(TINY, hidden_act=name, num_hidden_layers=1)
    model, lm = albert(config), head(config)
    tokens = rows(2, 6)
    hidden = model(jnp.asarray(tokens))
    expected = numpy_albert(model, tokens)
    close(hidden, expected)
    words = model.embeddings.words
    close(lm(hidden, words), numpy_head(lm, words, expected, name), 1e-4)


def test_defaults_are_written_out():
    model, tokens = albert(), jnp.asarray(rows())
    zeros = jnp.zeros_like(tokens)
    places = jnp.broadcast_to(jnp.arange(12), (4, 12))
    spelt = model(tokens, mask=zeros == 0, token_types=zeros, positions=places)
    close(spelt, np.asarray(model(tokens)), 1e-6)


def test_padding_is_not_seen():
    model = albert()
    tokens = rows()
    mask = jnp.asarray(tokens != 0)
    hidden = np.asarray(model(jnp.asarray(tokens), mask=mask))
    changed = np.where(tokens == 0, 7, tokens).astype(np.int32)
    again = np.asarray(model(jnp.asarray(changed), mask=mask))
    np.testing.assert_array_equal(hidden[tokens != 0], again[tokens != 0])
    short = model(jnp.asarray(tokens[3:, :9]))
    close(hidden[3, :9], np.asarray(short)[0], 1e-5)


def test_a_row_of_nothing_but_padding_is_finite():
    model = albert()
    tokens = jnp.zeros((2, 6), jnp.int32)
    assert np.isfinite(model(tokens, mask=tokens != 0)).all()


def test_rows_longer_than_the_positions():
    message = (
        r"The rows have 21 tokens, but this ALBERT has positions for 20 "
        r"\(`max_position_embeddings`\)\. Cut the rows, or .*max_position_embeddings=21"
    )
    with pytest.raises(ValueError, match=message):
        albert()(jnp.zeros((1, 21), jnp.int32))
    tokens = jnp.arange(21, dtype=jnp.int32)[None]
    packed = eqx.filter_eval_shape(albert(), tokens, positions=tokens % 20)
    assert packed.shape == (1, 21, 32)


@pytest.mark.parametrize("wrong", [-1, -100, 40, 1000])
def test_ids_outside_the_vocabulary_make_their_row_nan(wrong):
    tokens = rows(padded=False)
    tokens[1, 3] = wrong
    hidden = np.asarray(albert()(jnp.asarray(tokens)))
    assert np.isnan(hidden[1]).all()
    assert np.isfinite(np.delete(hidden, 1, axis=0)).all()


def test_a_model_without_a_pooler():
    model = albert(pooler=False)
    with pytest.raises(ValueError, match=r"no pooler. Make it with `Albert\(..., pooler=True\)`"):
        model.pooled(jnp.zeros((1, 2, 32)))


def test_the_head_on_gathered_positions_is_the_head_on_all():
    model, lm = albert(), head()
    hidden = model(jnp.asarray(rows()))
    positions = jnp.asarray([[3, 1], [0, 11], [5, 5], [2, 9]])
    some = lm(gather(hidden, positions), model.embeddings.words)
    all_ = np.asarray(lm(hidden, model.embeddings.words))
    expected = np.stack([all_[row, where] for row, where in enumerate(np.asarray(positions))])
    close(some, expected, 1e-5)


# Dropout


def run(model, key=None):
    return np.asarray(model(jnp.asarray(rows()), key=key))


@pytest.mark.long
def test_dropout_needs_a_key_and_is_off_in_inference():
    model = albert(DROPPING)
    with pytest.raises(ValueError, match=r"drops out a share of 0.3 and so needs `key=`"):
        run(model)
    plain = run(albert(TINY))
    np.testing.assert_array_equal(run(eqx.nn.inference_mode(model)), plain)
    np.testing.assert_array_equal(run(albert(TINY), jax.random.key(0)), plain)
    one, same, other = (run(model, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - plain).max() > 0.1


@pytest.mark.parametrize(
    "where",
    [
        lambda m: m.embeddings.dropout.p,
        lambda m: m.groups[0][0].attention.probs_dropout.p,
        lambda m: m.groups[0][0].attention.dropout.p,
        lambda m: m.groups[0][0].dropout.p,
    ],
    ids=["embeddings", "attention_probs", "attention_output", "ffn_output"],
)
def test_each_place_of_dropout_does_something(where):
    model = eqx.tree_at(where, albert(TINY), 0.5)
    one, other = (run(model, jax.random.key(seed)) for seed in (1, 2))
    assert np.abs(one - other).max() > 0.01


def test_which_probability_is_whose():
    config = dataclasses.replace(TINY, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.4)
    model = Albert(config, key=jax.random.key(0))
    layer = model.groups[0][0]
    assert layer.attention.probs_dropout.p == 0.4
    others = (model.embeddings.dropout, layer.attention.dropout, layer.dropout)
    assert [dropout.p for dropout in others] == [0.2] * 3


def test_layers_of_shared_weights_do_not_share_their_dropout():
    """The two keys that a shared layer is called with, and what it drops with each."""
    model = eqx.tree_at(lambda m: m.groups[0][0].dropout.p, albert(TINY), 0.5)
    key = jax.random.key(3)
    layer = model.groups[0][0]
    seen = []
    spied = eqx.tree_at(lambda m: m.groups[0][0], model, lambda x, mask, k: seen.append(k) or x)
    run(spied, key)
    x = jnp.ones((1, 2, 32))
    first, second = (np.asarray(layer(x, None, own)) for own in seen)
    assert np.abs(first - second).max() > 0.01


# Precision


def test_logits_are_float32_and_norms_are_computed_so():
    model, lm = albert(), head()
    low_model, low_lm = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, tree)
        for tree in (model, lm)
    )
    hidden = low_model(jnp.asarray(rows()))
    logits = low_lm(hidden, low_model.embeddings.words)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits * 128) % 1).max() > 0  # not float32 made from bfloat16
    exact = lm(model(jnp.asarray(rows())), model.embeddings.words)
    assert np.abs(np.asarray(logits - exact)).max() < 0.2


def test_a_norm_of_bfloat16_keeps_its_statistics_in_float32():
    norm = LayerNorm(256, TINY)
    x = (1000 + jax.random.normal(jax.random.key(0), (2, 256))).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    assert norm(x).dtype == jnp.bfloat16
    close(norm(x).astype(jnp.float32), expected, 0.02)


# Initial values


def test_initial_values():
    """A normal cut off at two deviations has the deviation 0.8796 of the whole one's."""
    weight = np.asarray(initial(jax.random.key(0), (400, 400), TINY))
    assert np.abs(weight).max() <= 0.04
    assert abs(weight.std() / 0.02 - 0.8796) < 0.01
    assert abs(weight.mean()) < 2e-4
    dense = Dense(3, 4, TINY, key=jax.random.key(0))
    assert dense.weight.shape == (3, 4)
    assert not np.asarray(dense.bias).any()


def test_parts_are_drawn_apart():
    leaves = jax.tree.leaves(eqx.filter(Albert(GROUPS, key=jax.random.key(0)), eqx.is_array))
    matrices = [np.asarray(leaf) for leaf in leaves if leaf.ndim == 2]
    assert len(matrices) == 3 + 1 + 4 * 6 + 1
    assert len({matrix.ravel()[0].item() for matrix in matrices}) == len(matrices)
