"""How ALBERT is computed: loops, rematerialisation, attention. Never what comes out."""

import dataclasses
import functools
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_albert import GROUPS, TINY, albert, rows

from albert_task import AlbertConfig
from albert_task._attention import attend

KEY = jax.random.key(3)
DROPPING_GROUPS = dataclasses.replace(
    TINY,
    num_hidden_layers=3,
    num_hidden_groups=2,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.2,
)


@eqx.filter_jit
def value_and_gradients(model, tokens, key):
    def loss(model):
        hidden = model(tokens, mask=tokens != 0, key=key)
        return jnp.square(hidden).mean(), hidden

    (_, hidden), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return hidden, gradients


@functools.cache
def computed(config, **changes):
    model = albert(dataclasses.replace(config, **changes), pooler=False)
    key = KEY if config.hidden_dropout_prob else None
    hidden, gradients = value_and_gradients(model, jnp.asarray(rows()), key)
    return [hidden, *jax.tree.leaves(eqx.filter(gradients, eqx.is_array))]


@pytest.mark.long
@pytest.mark.parametrize("config", [TINY, DROPPING_GROUPS], ids=["plain", "groups_and_dropout"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(scan_layers=True),
        dict(remat="dots_with_no_batch_dims_saveable", scan_layers=True),
        dict(remat="nothing_saveable"),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_outputs_and_gradients_are_those_of_layers_written_out(config, changes):
    for mine, plain in zip(computed(config, **changes), computed(config), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("config", "loops"), [(TINY, 1), (GROUPS, 2)])
def test_one_loop_a_group(config, loops):
    model = albert(dataclasses.replace(config, scan_layers=True), pooler=False)
    text = str(jax.make_jaxpr(lambda tokens: model(tokens))(jnp.asarray(rows())))
    assert text.count(" scan[") == loops


def residuals(remat):
    config = dataclasses.replace(TINY, num_hidden_layers=4, scan_layers=True, remat=remat)
    model = albert(config, pooler=False)
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params, tokens):
        return eqx.combine(params, static)(tokens).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.asarray(rows(16, 20))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.long
def test_what_is_computed_again_takes_no_memory():
    kept, dots, nothing = (
        residuals(name) for name in ("none", "dots_with_no_batch_dims_saveable", "nothing_saveable")
    )
    assert nothing < dots < kept


def test_how_it_is_computed_is_no_part_of_a_saved_model():
    config = dataclasses.replace(TINY, attention="xla", remat="nothing_saveable", scan_layers=True)
    saved = config.to_dict()
    assert not {"attention", "remat", "scan_layers"} & set(saved)
    assert AlbertConfig.from_dict(saved) == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(remat="dots_savable"), "`remat='dots_savable'` is unknown.*Did you mean `dots_sav"),
        (dict(attention="flash"), "`attention='flash'` is unknown; it is one of 'auto', 'xla'"),
    ],
)
def test_names_that_do_not_exist(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="is for machines without one")
def test_cudnn_says_why_it_cannot():
    model = albert(dataclasses.replace(TINY, attention="cudnn"))
    with pytest.raises(ValueError, match="`attention='cudnn'` cannot be used: this is a CPU"):
        model(jnp.asarray(rows()))


class OnAGpu:
    """Stands in for `jax.default_backend` and cuDNN's attention: takes down what it is given."""

    def __init__(self, monkeypatch):
        self.given = []
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax.nn, "dot_product_attention", self.attention)

    def attention(self, q, k, v, *, mask, implementation):
        self.given.append((q.shape, None if mask is None else mask.shape, implementation))
        return v


@pytest.mark.parametrize(
    ("dtype", "seq", "dim", "drop", "by"),
    [
        (jnp.bfloat16, 128, 64, 0.0, "cudnn"),
        (jnp.float32, 128, 64, 0.0, "xla"),
        (jnp.bfloat16, 128, 12, 0.0, "xla"),
        (jnp.bfloat16, 129, 64, 0.0, "xla"),
        (jnp.bfloat16, 64, 64, 0.0, "xla"),
        (jnp.bfloat16, 128, 64, 0.1, "xla"),
    ],
)
def test_cudnn_is_taken_where_it_can_compute_it(monkeypatch, dtype, seq, dim, drop, by):
    """And is given the mask of each pair: it takes none that is to be broadcast over rows."""
    gpu = OnAGpu(monkeypatch)
    q = jnp.ones((2, seq, 3, dim), dtype)
    mask = jnp.ones((2, 1, seq), bool)
    dropout = eqx.nn.Dropout(drop)
    y = attend(q, q, q, mask, dropout, KEY, "auto")
    assert y.shape == q.shape
    assert gpu.given == ([(q.shape, (2, 1, seq, seq), "cudnn")] if by == "cudnn" else [])


def test_cudnn_has_no_dropout(monkeypatch):
    OnAGpu(monkeypatch)
    q = jnp.ones((2, 128, 3, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="it draws no dropout"):
        attend(q, q, q, None, eqx.nn.Dropout(0.1), KEY, "cudnn")
    off = eqx.nn.inference_mode(eqx.nn.Dropout(0.1))
    assert attend(q, q, q, None, off, KEY, "cudnn").shape == q.shape


def test_cudnn_is_not_for_old_gpus(monkeypatch):
    OnAGpu(monkeypatch)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="7.5")])
    q = jnp.ones((2, 128, 3, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"compute capability 7.5, and it needs 8.0"):
        attend(q, q, q, None, eqx.nn.Dropout(0.0), KEY, "cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("seq", [128, 130])
@pytest.mark.parametrize("shown", ["all", "unpadded", "pairs"])
def test_cudnn_computes_what_xla_does(seq, shown):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (3, seq, 4, 64), jnp.bfloat16) for key in keys)
    own = jnp.arange(seq)[None] < jnp.array([seq, seq // 2, 1])[:, None]
    texts = jnp.arange(seq) // 5
    pairs = (texts[:, None] == texts[None])[None] & own[:, None, :]
    mask = {"all": None, "unpadded": own[:, None, :], "pairs": pairs}[shown]
    counts = jnp.ones((3, seq), bool) if mask is None else own

    def loss(qkv, implementation):
        y = attend(*qkv, mask, eqx.nn.Dropout(0.0), None, implementation)
        y = jnp.where(counts[:, :, None, None], y, 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(y)), y

    (_, ours), grads = jax.value_and_grad(loss, has_aux=True)((q, k, v), "cudnn")
    (_, expected), right = jax.value_and_grad(loss, has_aux=True)((q, k, v), "xla")
    np.testing.assert_allclose(ours, expected, atol=0.02)
    for a, b in zip(grads, right, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.03)
