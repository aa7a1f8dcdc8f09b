"""The workload's network as a task of ours: what `loop_overhead` and `resume_time` train."""

from __future__ import annotations

import equinox as eqx
import jax
import optax
from jaxtyping import PRNGKeyArray, PyTree

from jaxlightning import Mean, TaskModule

from ._workload import LEARNING_RATE


class Classifier(TaskModule):
    net: eqx.nn.MLP

    def training_step(self, batch: PyTree, *, key: PRNGKeyArray) -> Mean:
        logits = jax.vmap(self.net)(batch["x"])
        return Mean.over(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adamw(LEARNING_RATE)
