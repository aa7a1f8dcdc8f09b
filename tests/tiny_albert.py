"""A small ALBERT for tests, and ALBERT's arithmetic written out in numpy from the paper."""

import dataclasses
import math
from statistics import NormalDist

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from albert_task import Albert, AlbertConfig, AlbertForMaskedLM, MaskedLMHead

TINY = AlbertConfig.preset("tiny", vocab_size=40, max_position_embeddings=20)
GROUPS = dataclasses.replace(
    TINY, num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2, num_attention_heads=4
)
"""Several groups, which 5 layers use unevenly, each of two different layers."""
DROPPING = dataclasses.replace(TINY, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)


def scrambled(model, seed=0):
    """`model` with all arrays random, so that no bias is 0 and no norm scales by 1."""
    generator = np.random.default_rng(seed)

    def drawn(path, leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        around = 1.0 if "norm.weight" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(generator.normal(around, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(drawn, model)


def albert(config=TINY, seed=0, pooler=True):
    return scrambled(Albert(config, key=jax.random.key(seed), pooler=pooler), seed)


def head(config=TINY, seed=1):
    return scrambled(MaskedLMHead(config, key=jax.random.key(seed)), seed)


def task(config=TINY, seed=0, **options):
    return scrambled(AlbertForMaskedLM.init(config, jax.random.key(seed), **options), seed)


def rows(count=4, seq=12, vocab=40, seed=0, padded=True):
    """Rows of [CLS] ordinary tokens [SEP] and, but for the first, some padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, vocab, (count, seq)).astype(np.int32)
    tokens[:, 0] = 2
    for row in range(count):
        end = seq - (row % 4 if padded else 0)
        tokens[row, end - 1] = 3
        tokens[row, end:] = 0
    return tokens


def numpy_head(head, words, hidden, act="gelu_new"):
    """Section 3.1: through the embeddings' width, and the tied word embeddings."""
    x = _norm(head.norm, _activation(act)(_dense(head.dense, hidden)))
    return x @ _wide(words).T + _wide(head.bias)


def numpy_albert(albert, tokens, mask=None, token_types=None):
    """Hidden vectors, a row at a time and a head at a time, in float64.

    Section 3.1: a token's vector is E wide, then projected to H; layers share weights. The layer
    is BERT's: attention, then a feed-forward network, each with a residual connection and then
    normalised. Layer i of L uses group i // (L / groups).
    """
    config = albert.config
    tables = albert.embeddings
    out = []
    for row, ids in enumerate(tokens):
        types = np.zeros(len(ids), int) if token_types is None else token_types[row]
        x = _wide(tables.words)[ids] + _wide(tables.token_types)[types]
        x = _norm(tables.norm, x + _wide(tables.positions)[: len(ids)])
        x = _dense(albert.mapping, x)
        for number in range(config.num_hidden_layers):
            group = number * config.num_hidden_groups // config.num_hidden_layers
            for layer in albert.groups[group]:
                x = _layer(layer, x, config, None if mask is None else mask[row])
        out.append(x)
    return np.stack(out)


def _layer(layer, x, config, seen):
    attention = layer.attention
    size = config.hidden_size // config.num_attention_heads
    q, k, v = (_dense(getattr(attention, name), x) for name in ("query", "key", "value"))
    heads = []
    for head in range(config.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if seen is not None:
            allowed = np.broadcast_to(seen, scores.shape)
            scores = np.where(allowed, scores, -1e30)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    x = _norm(attention.norm, x + _dense(attention.output, np.concatenate(heads, axis=1)))
    inner = _activation(config.hidden_act)(_dense(layer.ffn, x))
    return _norm(layer.norm, x + _dense(layer.ffn_output, inner))


def _dense(dense, x):
    return x @ _wide(dense.weight) + _wide(dense.bias)


def _norm(norm, x):
    standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return standard * _wide(norm.weight) + _wide(norm.bias)


def _activation(name):
    return {
        "gelu_new": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu": lambda x: x * np.vectorize(NormalDist().cdf)(x),
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "swish": lambda x: x / (1 + np.exp(-x)),
        "tanh": np.tanh,
    }[name]


def _wide(array):
    return np.asarray(array, np.float64)


def tensors(shapes, seed=0):
    """Random weights by Hugging Face's names: the same from any version of numpy."""
    generator = np.random.RandomState(seed)
    drawn = {name: 0.2 * generator.standard_normal(shapes[name]) for name in sorted(shapes)}
    norms = ("LayerNorm.weight", "layer_norm.weight")
    return {
        name: (value + name.endswith(norms)).astype(np.float32) for name, value in drawn.items()
    }


def labels(tokens):
    """The token at every third place and -100 elsewhere, as PyTorch's loss wants it."""
    chosen = (np.arange(tokens.size).reshape(tokens.shape) % 3 == 1) & (tokens > 4)
    return np.where(chosen, tokens, -100).astype(np.int32)
