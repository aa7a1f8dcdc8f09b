"""The parts an ALBERT is built of, written for whole batches.

Equinox's own `Linear` and `LayerNorm` take one example and are meant for `jax.vmap`; these take
any number of leading axes, so that a product over (batch, seq, hidden) is one large matmul, and
keep the statistics of normalisation in float32 whatever the compute dtype.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxlightning.parallel import axis_size

from ._config import AlbertConfig


def named_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The key of one named part: adding a part never changes another's randomness."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def dropped(
    dropout: eqx.nn.Dropout, x: Float[Array, "*shape"], key: PRNGKeyArray | None, name: str
) -> Float[Array, "*shape"]:
    """`x` after `dropout`, whose key is the part `name` of `key`.

    **Raises:** `ValueError` where dropout is on and there is no key.
    """
    if dropout.inference or dropout.p == 0:
        return x
    if key is None:
        raise ValueError(
            f"This ALBERT drops out a share of {dropout.p} and so needs `key=`. To run it without "
            "dropout, take `eqx.nn.inference_mode(model)`."
        )
    return dropout(x, key=named_key(key, name))


def initial(key: PRNGKeyArray, shape: tuple[int, ...], config: AlbertConfig) -> Array:
    """Weights from a normal of deviation `initializer_range`, cut off at two deviations.

    As google-research/albert (`tf.truncated_normal_initializer`): the deviation is that before
    the cut. Hugging Face draws from the whole normal.
    """
    return config.initializer_range * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def along_last(
    vector: Float[Array, " d"], like: Float[Array, "*batch d"]
) -> Float[Array, "*ones d"]:
    """`vector` with the rank of `like`: broadcasting is spelt out here, never implied."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Dense(eqx.Module):
    """`x @ weight + bias` over the last axis. Weights are drawn by `initial`, biases are 0."""

    weight: Float[Array, "into out"]
    bias: Float[Array, " out"]

    def __init__(self, into: int, out: int, config: AlbertConfig, *, key: PRNGKeyArray):
        self.weight = initial(key, (into, out), config)
        self.bias = jnp.zeros(out)

    def __call__(self, x: Float[Array, "*batch into"]) -> Float[Array, "*batch out"]:
        if axis_size("context") > 1:
            # Merged with the batch, a sequence that is sharded would have to be gathered.
            return self._biased(x @ self.weight)
        # As one matrix: on CPU, XLA would transpose the gradients of more axes, at half the speed.
        y = self._biased(x.reshape(-1, x.shape[-1]) @ self.weight)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def in_float32(self, x: Float[Array, "*batch into"]) -> Float[Array, "*batch out"]:
        """The same in float32, whatever the dtypes: for a few logits, whose probabilities less the
        labels would lose in 16 bits what the gradient is made of."""
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self)
        return wide(x.astype(jnp.float32))

    def _biased(self, y: Float[Array, "*batch out"]) -> Float[Array, "*batch out"]:
        # Spread in float32, in which its gradient is then summed over the batch.
        bias = along_last(self.bias.astype(jnp.float32), y)
        return y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)


class LayerNorm(eqx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    weight: Float[Array, " d"]
    bias: Float[Array, " d"]
    eps: float = eqx.field(static=True)

    def __init__(self, size: int, config: AlbertConfig):
        self.weight = jnp.ones(size)
        self.bias = jnp.zeros(size)
        self.eps = config.layer_norm_eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        weight, bias = self.weight.astype(jnp.float32), self.bias.astype(jnp.float32)
        return (y * along_last(weight, y) + along_last(bias, y)).astype(x.dtype)


def activation(name: str) -> Callable[[Array], Array]:
    """The function that `hidden_act` names. `"gelu_new"` is the tanh approximation, which
    google-research/albert calls `"gelu"`."""
    return {
        "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }[name]


def in_turns(x: Shaped[Array, "batch seq ..."], several: int) -> Shaped[Array, ...]:
    """Parts the sequence into turns of `several` places, with zeros after the last one:
    (turns, batch, several, …), for `jax.lax.map` and `scan`. The batch stays as it lies on the
    devices."""
    spare = -x.shape[1] % several
    x = jnp.pad(x, [(0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)])
    return rearrange(x, "batch (turns several) ... -> turns batch several ...", several=several)


def rematerialised(function: Callable[..., Array], policy: str) -> Callable[..., Array]:
    """`function`, whose backward pass keeps what `AlbertConfig.remat` says."""
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=getattr(jax.checkpoint_policies, policy))
