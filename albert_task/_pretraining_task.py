"""ALBERT's own objective: masked language modelling and sentence-order prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlightning import Accuracy, Mean, Metric

from ._base import example_weights
from ._config import AlbertConfig
from ._layers import Dense, named_key
from ._losses import cross_entropy
from ._model import Albert, MaskedLMHead
from ._rows import IGNORED
from ._tasks import AlbertForMaskedLM


class AlbertForPreTraining(AlbertForMaskedLM):
    """Masked language modelling, and whether two segments stand in their order (section 3.1).

        task = AlbertForPreTraining.init(AlbertConfig.preset("base"), key)

    The losses `mlm` and `sop` count equally. A batch is as for `AlbertForMaskedLM`, and has

    - `token_type_ids`: 0 for the first segment, with its [CLS] and [SEP], 1 for the second;
    - `sentence_order_label`: int (batch,): 0 in order, 1 swapped, -100 where there are no two
      segments. For packed rows (batch, texts): of the texts whose `segment_ids` are 1, 2, …,
      where -100 also fills up.

    Parameters are those of google-research/albert and of Hugging Face's `AlbertForPreTraining`;
    nothing is dropped out before the classification, as in the former.
    """

    sop: Dense

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        return {
            "albert": Albert(config, key=named_key(key, "albert")),
            "head": MaskedLMHead(config, key=named_key(key, "head")),
            "sop": Dense(config.hidden_size, 2, config, key=named_key(key, "sop")),
        }

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[dict[str, Mean], dict[str, Metric]]:
        order = _order_of(batch)
        mlm, metrics, hidden = self.masked_lm(batch, key)
        logits = self.order_logits(hidden, batch.get("segment_ids"), order.shape[1])
        known = (order != IGNORED).astype(jnp.float32)
        known = known * example_weights(batch, known[:, 0])[:, None]
        labels = jnp.where(order == IGNORED, 0, order)
        sop = Mean.over(cross_entropy(logits, labels), known)
        metrics["sop_accuracy"] = Accuracy.of(logits, labels, where=known)
        return {"mlm": mlm, "sop": sop}, metrics

    def limits(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return super().limits(batch) | {"sentence_order_label": 2}

    def order_logits(
        self,
        hidden: Float[Array, "batch seq hidden"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        texts: int = 1,
    ) -> Float[Array, "batch texts 2"]:
        """Of each text of a row, in float32: 0 in order, 1 swapped; from its first token."""
        if segment_ids is None:
            pooled = rearrange(self.albert.pooled(hidden), "batch hidden -> batch 1 hidden")
        else:
            numbers = jnp.arange(1, texts + 1, dtype=segment_ids.dtype)
            is_in = segment_ids[:, None] == numbers[None, :, None]
            pooled = self.albert.pooled(hidden, jnp.argmax(is_in, axis=2))
        return self.sop.in_float32(pooled)


def _order_of(batch: dict[str, Any]) -> Int[Array, "batch texts"]:
    """**Raises:** `ValueError` where it is not there, or does not fit the rows."""
    if "sentence_order_label" not in batch:
        raise ValueError(
            "`AlbertForPreTraining` needs `sentence_order_label` in each batch: 0 where the "
            "segments stand in their order, 1 where they are swapped. Take "
            "`SegmentRows(…, pairs=True)` for a source, or `AlbertForMaskedLM` to train on masked "
            "language modelling alone."
        )
    order = jnp.asarray(batch["sentence_order_label"])
    rows = len(batch["tokens"] if "tokens" in batch else batch["input_ids"])
    packed = "segment_ids" in batch
    if len(order) != rows or order.ndim != (2 if packed else 1):
        shape = "(batch, texts), as there are `segment_ids`" if packed else "(batch,)"
        raise ValueError(
            f"The batch's `sentence_order_label` has shape {order.shape}, but for {rows} rows it "
            f"has to be {shape}."
        )
    return order if packed else rearrange(order, "batch -> batch 1")
