"""Tasks for several devices: a transformer whose layers are stacked, and a tensor-sharded MLP."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from tasks import FEATURES, TwoLosses

from jaxlightning import Mean, TaskModule
from jaxlightning.parallel import gather_layer

LENGTH, WIDTH = 8, 32


def series(count=64, seed=0):
    """Series whose next values are to be told, of unequal lengths: long ones first."""
    generator = np.random.default_rng(seed)
    x = np.cumsum(generator.normal(size=(count, LENGTH, 4)), axis=1).astype(np.float32) / 4
    lengths = np.sort(generator.integers(1, LENGTH + 1, count))[::-1]
    return {"x": x, "own": np.arange(LENGTH)[None] < lengths[:, None]}


class Block(eqx.Module):
    """Attention and a feed-forward network, each with its residual connection, for one series."""

    qkv: jax.Array
    out: jax.Array
    ffn: jax.Array
    ffn_out: jax.Array
    bias: jax.Array
    dropout: eqx.nn.Dropout

    def __init__(self, key, width, dropout):
        keys = jax.random.split(key, 4)
        normal = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
        self.qkv, self.out = normal(keys[0], width, 3 * width), normal(keys[1], width, width)
        self.ffn = normal(keys[2], width, 4 * width)
        self.ffn_out = normal(keys[3], 4 * width, width)
        self.bias = jnp.zeros(4 * width)
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, x, key):
        q, k, v = jnp.split(_normed(x) @ self.qkv, 3, axis=-1)
        scores = jnp.einsum("bqd,bkd->bqk", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None], scores, -1e9)
        x = x + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v) @ self.out
        hidden = jax.nn.gelu(_normed(x) @ self.ffn + self.bias[None, None])
        return x + self.dropout(hidden @ self.ffn_out, key=key)


def _normed(x):
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)


class Transformer(TaskModule):
    """Of layers stacked along an axis: scanned, unrolled, or gathered one by one in the scan."""

    independent_examples = True

    into: jax.Array
    blocks: Block
    head: jax.Array
    how: str = eqx.field(static=True)

    def __init__(self, how="scanned", layers=3, width=WIDTH, dropout=0.1):
        keys = jax.random.split(jax.random.key(0), layers + 2)
        self.into = jax.random.normal(keys[0], (4, width)) * 0.5
        self.blocks = eqx.filter_vmap(lambda key: Block(key, width, dropout))(keys[2:])
        self.head = jax.random.normal(keys[1], (width, 4)) * 0.1
        self.how = how

    def training_step(self, batch, *, key):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        layers = self.blocks.bias.shape[0]
        keys = jax.random.split(key, layers)

        def body(x, layer):
            block, key = layer
            if self.how == "gathered":
                block = gather_layer(block, "blocks")
            return eqx.combine(block, static)(x, key), None

        x = batch["x"] @ self.into
        if self.how == "unrolled":
            for i in range(layers):
                x, _ = body(x, (jax.tree.map(lambda leaf, i=i: leaf[i], arrays), keys[i]))
        else:
            x, _ = jax.lax.scan(jax.checkpoint(body), x, (arrays, keys))
        errors = jnp.square((x @ self.head)[:, :-1] - batch["x"][:, 1:]).sum(-1)
        return Mean.over(errors, batch["own"][:, 1:])

    def configure_optimizers(self):
        return optax.adamw(1e-3)

    def partition_rules(self):
        into, out = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")
        return [("blocks/ffn$", into), ("blocks/ffn_out$", out), ("blocks/bias$", out)]


class Layered(Transformer):
    """As `Transformer("gathered")`, and so it says to whoever gathers the rest."""

    gathered_in_scan = ("blocks",)

    def __init__(self, **options):
        super().__init__("gathered", **options)


class Sharded(TwoLosses):
    """Dropout by rows, and two masked losses of different weights, of an MLP split over tensor."""

    independent_examples = True

    def __init__(self):
        super().__init__(dropout=0.3)
        self.net = eqx.nn.MLP(FEATURES, 3, 256, 2, key=jax.random.key(1))

    def configure_optimizers(self):
        # A larger epsilon: where gradients are rounding only, Adam makes steps of it.
        return optax.adam(1e-3, eps=1e-4)

    def partition_rules(self):
        into, out = PartitionSpec("tensor"), PartitionSpec(None, "tensor")
        return [
            ("net/layers/0/(weight|bias)$", into),
            ("net/layers/1/weight$", out),
        ]
