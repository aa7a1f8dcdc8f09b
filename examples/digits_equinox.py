"""Handwritten digits with an Equinox CNN that has batch norms.

python -m examples.digits_equinox
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from examples._digits import Digits
from jaxlightning import Accuracy, Mean, TaskModule, Trainer


class CNN(eqx.Module):
    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    pool: eqx.nn.MaxPool2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        sizes = [(1, 16), (16, 32)]
        self.convolutions = [
            eqx.nn.Conv2d(i, o, kernel_size=3, padding=1, key=k)
            for (i, o), k in zip(sizes, keys[:2], strict=True)
        ]
        self.norms = [
            eqx.nn.BatchNorm(o, axis_name="batch", mode="batch", momentum=0.9) for _, o in sizes
        ]
        self.pool = eqx.nn.MaxPool2d(kernel_size=2, stride=2)
        self.dropout = eqx.nn.Dropout(0.25)
        self.head = eqx.nn.Linear(32 * 2 * 2, 10, key=keys[2])

    def __call__(
        self, x: Float[Array, "8 8 1"], state: eqx.nn.State, key: PRNGKeyArray
    ) -> tuple[Float[Array, 10], eqx.nn.State]:
        x = jnp.moveaxis(x, -1, 0)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x, state = norm(convolution(x), state)
            x = self.pool(jax.nn.relu(x))
        return self.head(self.dropout(x.reshape(-1), key=key)), state


class Classifier(TaskModule):
    net: CNN
    state: eqx.nn.State

    def training_step(self, batch, *, key):
        keys = jax.random.split(key, len(batch["y"]))
        net = jax.vmap(self.net, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        logits, state = net(batch["x"], self.state, keys)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        task = eqx.tree_at(lambda t: t.state, self, state)
        return Mean.over(nll), {"accuracy": Accuracy.of(logits, batch["y"])}, task

    def configure_optimizers(self):
        return optax.adamw(3e-3)


def initialise(key: PRNGKeyArray) -> Classifier:
    """Called by `fit`, inside the program that makes the first state."""
    return Classifier(*eqx.nn.make_with_state(CNN)(key))


def main(max_epochs: int = 15, **options: Any) -> float:
    """The accuracy on the images held out."""
    trainer = Trainer(max_epochs=max_epochs, **options)
    trained = trainer.fit(initialise, Digits())
    return trainer.test(trained, Digits())["test/accuracy"]


if __name__ == "__main__":
    print(f"test accuracy: {main(default_root_dir='runs/digits_equinox'):.1%}")
