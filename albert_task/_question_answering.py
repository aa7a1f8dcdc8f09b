"""Fine-tuning for questions whose answer is a span of a text."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlightning import Accuracy, Mean, Metric

from ._base import AlbertTask, example_weights
from ._config import AlbertConfig
from ._layers import Dense, named_key
from ._losses import cross_entropy
from ._model import Albert
from ._rows import Rows


class AlbertForQuestionAnswering(AlbertTask):
    """Where in the row the answer begins, and where it ends (Devlin et al. 2019, section 4.2).

    A batch has the ids as for `AlbertForMaskedLM`, question first, and

    - `start_positions`, `end_positions`: int (batch,), the answer's first and last token; 0, the
      [CLS], where the text has none; `seq` or more where the row counts nothing;
    - `example_weight`: float (batch,), 0 for rows that count nothing; by default 1.

    The metric `accuracy` is the share of rows where both are right.
    """

    outputs: Dense

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        return {
            "albert": Albert(config, key=named_key(key, "albert"), pooler=False),
            "outputs": Dense(config.hidden_size, 2, config, key=named_key(key, "outputs")),
        }

    def logits(
        self, batch: dict[str, Any], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
        """Of the start and of the end, in float32."""
        hidden = self.hidden(Rows.read(batch, self.config), key)
        both = self.outputs.in_float32(hidden)
        return both[..., 0], both[..., 1]

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[Mean, dict[str, Metric]]:
        for name in ("start_positions", "end_positions"):
            if name not in batch:
                raise ValueError(
                    f"`AlbertForQuestionAnswering` needs `{name}` in each batch it learns from or "
                    f"is judged by; this one has {', '.join(f'`{name}`' for name in batch)}."
                )
        logits = jnp.stack(self.logits(batch, key), axis=1)
        goals = jnp.stack([batch["start_positions"], batch["end_positions"]], axis=1)
        inside = (goals >= 0) & (goals < logits.shape[-1])
        weights = jnp.where(inside, example_weights(batch, logits[:, 0, 0])[:, None], 0.0)
        goals = jnp.where(inside, goals, 0)
        right = (jnp.argmax(logits, axis=-1) == goals).all(axis=1)
        metrics: dict[str, Metric] = {
            "accuracy": Accuracy.of(
                right.astype(jnp.int32), jnp.ones_like(right, jnp.int32), where=weights.min(axis=1)
            )
        }
        return Mean.over(cross_entropy(logits, goals), weights), metrics

    def predict_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch seq"]]:
        start, end = self.logits(batch)
        return {"start_logits": start, "end_logits": end}
