"""Handwritten digits with a Flax Linen model, to which nothing but the adapter is added.

python -m examples.digits_linen
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from examples._digits import Digits
from jaxlightning import Accuracy, Mean, TaskModule, Trainer
from jaxlightning.flax import Linen


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "batch 8 8 1"], train: bool) -> Float[Array, "batch 10"]:
        for features in (16, 32):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Dropout(0.25, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


class Classifier(TaskModule):
    net: Linen

    def training_step(self, batch, *, key):
        logits, net = self.net(batch["x"], key=key)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        task = eqx.tree_at(lambda t: t.net, self, net)
        return Mean.over(nll), {"accuracy": Accuracy.of(logits, batch["y"])}, task

    def configure_optimizers(self):
        return optax.adamw(3e-3)


def initialise(key: PRNGKeyArray) -> Classifier:
    """Called by `fit`, inside the program that makes the first state."""
    return Classifier(Linen(CNN(), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32), key=key))


def main(max_epochs: int = 15, **options: Any) -> float:
    """The accuracy on the images held out."""
    trainer = Trainer(max_epochs=max_epochs, **options)
    trained = trainer.fit(initialise, Digits())
    return trainer.test(trained, Digits())["test/accuracy"]


if __name__ == "__main__":
    print(f"test accuracy: {main(default_root_dir='runs/digits_linen'):.1%}")
