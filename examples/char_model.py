"""A causal character model of the Python language reference, which every Python brings along.

python -m examples.char_model
"""

from __future__ import annotations

import dataclasses
from pydoc_data.topics import topics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlightning import DataLoader, DataModule, Mean, TaskModule, Trainer

CONTEXT = 64
ASCII = 128


def encode(text: str) -> Int[np.ndarray, " length"]:
    """Characters as ASCII codes; what is not ASCII becomes a question mark."""
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


@dataclasses.dataclass
class Reference(DataModule):
    """Windows of one character more than the context. One topic in ten is held out."""

    limit: int | None = None
    """How many topics to read; by default all."""

    def setup(self, stage: str) -> None:
        names = sorted(topics)[: self.limit]
        self.train = encode("\n".join(topics[name] for i, name in enumerate(names) if i % 10))
        self.held_out = encode("\n".join(topics[name] for name in names[::10]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(windows(self.train), batch_size=32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(windows(self.held_out), batch_size=32)

    def unigram_entropy(self) -> float:
        """What guessing by frequency costs on the held-out text, in nats a character."""
        counts = np.bincount(self.train, minlength=ASCII) + 1
        return float(-np.log(counts / counts.sum())[self.held_out].mean())


def windows(tokens: Int[np.ndarray, " length"]) -> Int[np.ndarray, "rows window"]:
    rows = len(tokens) // (CONTEXT + 1)
    return tokens[: rows * (CONTEXT + 1)].reshape(rows, CONTEXT + 1)


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, size: int, key: PRNGKeyArray):
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, size, key=one)
        self.mlp = eqx.nn.MLP(size, size, 4 * size, depth=1, activation=jax.nn.gelu, key=two)
        self.norms = (eqx.nn.LayerNorm(size), eqx.nn.LayerNorm(size))

    def __call__(self, x: Float[Array, "length size"]) -> Float[Array, "length size"]:
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=causal)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class CharModel(TaskModule):
    embed: eqx.nn.Embedding
    places: Float[Array, "context size"]
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, size: int, depth: int, *, key: PRNGKeyArray):
        first, last, *keys = jax.random.split(key, depth + 2)
        self.embed = eqx.nn.Embedding(ASCII, size, key=first)
        self.places = jnp.zeros((CONTEXT, size))
        self.blocks = [Block(size, k) for k in keys]
        self.norm = eqx.nn.LayerNorm(size)
        self.head = eqx.nn.Linear(size, ASCII, key=last)

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, "length codes"]:
        x = jax.vmap(self.embed)(tokens) + self.places[: len(tokens)]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))

    def training_step(self, batch, *, key):
        logits = jax.vmap(self)(batch[:, :-1])
        return Mean.over(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))

    def configure_optimizers(self):
        return optax.adamw(3e-3)


def main(max_epochs: int = 2, limit: int | None = None, **options: Any) -> tuple[float, float]:
    """The loss on the topics held out, and the unigram entropy, both in nats a character."""
    data = Reference(limit)
    trainer = Trainer(max_epochs=max_epochs, **options)
    trainer.fit(lambda key: CharModel(64, depth=2, key=key), data)
    return trainer.callback_metrics["val/loss"], data.unigram_entropy()


if __name__ == "__main__":
    loss, entropy = main(default_root_dir="runs/char_model")
    print(f"held-out loss: {loss:.2f} nats a character; by frequency alone: {entropy:.2f}")
