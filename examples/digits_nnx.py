"""Handwritten digits with a Flax NNX model, to which nothing but the adapter is added.

python -m examples.digits_nnx
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from examples._digits import Digits
from jaxlightning import Accuracy, Mean, TaskModule, Trainer
from jaxlightning.flax import NNX


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.head = nnx.Linear(32 * 2 * 2, 10, rngs=rngs)

    def __call__(self, x: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch 10"]:
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), (2, 2))
        return self.head(self.dropout(x.reshape(len(x), -1)))


class Classifier(TaskModule):
    net: NNX

    def training_step(self, batch, *, key):
        logits, net = self.net(batch["x"], key=key)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        task = eqx.tree_at(lambda t: t.net, self, net)
        return Mean.over(nll), {"accuracy": Accuracy.of(logits, batch["y"])}, task

    def configure_optimizers(self):
        return optax.adamw(3e-3)


def initialise(key: PRNGKeyArray) -> Classifier:
    """Called by `fit`, inside the program that makes the first state."""
    return Classifier(NNX(CNN(rngs=nnx.Rngs(key))))


def main(max_epochs: int = 15, **options: Any) -> float:
    """The accuracy on the images held out."""
    trainer = Trainer(max_epochs=max_epochs, **options)
    trained = trainer.fit(initialise, Digits())
    return trainer.test(trained, Digits())["test/accuracy"]


if __name__ == "__main__":
    print(f"test accuracy: {main(default_root_dir='runs/digits_nnx'):.1%}")
