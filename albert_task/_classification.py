"""Fine-tuning for classes: of texts, of tokens, and among choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlightning import F1, Accuracy, MatthewsCorrelation, Mean, Metric, Pearson

from ._base import AlbertTask, example_weights
from ._config import AlbertConfig
from ._entities import entity_f1, say_entities
from ._layers import Dense, dropped, named_key
from ._losses import cross_entropy
from ._model import Albert
from ._rows import IGNORED, Rows


class Classifier(eqx.Module):
    """Dropout and a linear layer, to logits in float32."""

    dense: Dense
    dropout: eqx.nn.Dropout

    def __init__(self, config: AlbertConfig, out: int, *, key: PRNGKeyArray):
        self.dense = Dense(config.hidden_size, out, config, key=key)
        self.dropout = eqx.nn.Dropout(config.classifier_dropout_prob)

    def __call__(
        self, x: Float[Array, "*batch hidden"], key: PRNGKeyArray | None
    ) -> Float[Array, "*batch out"]:
        return self.dense.in_float32(dropped(self.dropout, x, key, "classifier"))


class AlbertForSequenceClassification(AlbertTask):
    """Classes of a text or a pair of texts, several at once, or a number, from the [CLS].

        config = AlbertConfig.preset("base", labels=("negative", "positive"))
        task = AlbertForSequenceClassification.init(config, key, learning_rate=2e-5)

    The configuration's `labels` say what is told apart (two without a name by default), and its
    `problem_type` whether one is true of a text, any number are, or (one label) it is a number. A
    batch has the ids as for `AlbertForMaskedLM`, and

    - `labels`: int (batch,), -100 where there is none; float (batch, labels) of zeros and ones for
      `multi_label_classification`; float (batch,) for `regression`, (batch, labels) with several;
    - `example_weight`: float (batch,), 0 for rows that count nothing; by default 1.
    """

    classifier: Classifier

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        out = _classes(config)
        return {
            "albert": Albert(config, key=named_key(key, "albert")),
            "classifier": Classifier(config, out, key=named_key(key, "classifier")),
        }

    @property
    def problem_type(self) -> str:
        return self.config.problem

    def logits(
        self, batch: dict[str, Any], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch labels"]:
        hidden = self.hidden(Rows.read(batch, self.config, one_label=True), key)
        return self.classifier(self.albert.pooled(hidden), key)

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[Mean, dict[str, Metric]]:
        logits = self.logits(batch, key)
        rows, whole = logits.shape[:1], logits.shape
        single = self.problem_type == "single_label_classification"
        shapes = [rows] if single else [rows, whole] if whole[1] == 1 else [whole]
        labels = _labels_of(batch, self, *shapes)
        weights = example_weights(batch, logits[:, 0])
        metrics: dict[str, Metric]
        if single:
            labels, weights = _known(labels, weights)
            metrics = {"accuracy": Accuracy.of(logits, labels, where=weights)}
            if logits.shape[1] == 2:
                metrics["f1"] = F1.of(logits, labels, where=weights)
                metrics["matthews"] = MatthewsCorrelation.of(logits, labels, where=weights)
            return Mean.over(_nll(logits, labels), weights), metrics
        labels = labels.reshape(logits.shape).astype(jnp.float32)
        each = jnp.broadcast_to(weights[:, None], logits.shape)
        if self.problem_type == "regression":
            metrics = {"pearson": Pearson.of(logits, labels, where=each)}
            return Mean.over(jnp.square(logits - labels), each), metrics
        found, true = (logits > 0).astype(jnp.int32), labels.astype(jnp.int32)
        metrics = {
            "accuracy": Accuracy.of(found, true, where=each),
            "f1": F1.of(found, true, where=each),
        }
        return Mean.over(optax.sigmoid_binary_cross_entropy(logits, labels), each), metrics

    def limits(self, batch: Mapping[str, Any]) -> dict[str, int]:
        single = self.problem_type == "single_label_classification"
        return super().limits(batch) | ({"labels": _classes(self.config)} if single else {})

    def predict_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch labels"]]:
        return {"logits": self.logits(batch)}


class AlbertForTokenClassification(AlbertTask):
    """A class for each token, such as of what kind of name it is part.

    The configuration's `labels` say what is told apart; of tags like `B-place`, `I-place` the
    metric `f1` is that of whole entities. A batch has the ids as for `AlbertForMaskedLM`, and
    `labels`: int (batch, seq), -100 where a token has none, as all but the first of a word;
    `example_weight` as for `AlbertForSequenceClassification`.
    """

    classifier: Classifier

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        out = _classes(config)
        return {
            "albert": Albert(config, key=named_key(key, "albert"), pooler=False),
            "classifier": Classifier(config, out, key=named_key(key, "classifier")),
        }

    def logits(
        self, batch: dict[str, Any], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq labels"]:
        return self.classifier(self.hidden(Rows.read(batch, self.config), key), key)

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[Mean, dict[str, Metric]]:
        logits = self.logits(batch, key)
        labels = _labels_of(batch, self, logits.shape[:2])
        labels, weights = _known(labels, example_weights(batch, logits[:, 0, 0])[:, None])
        loss = Mean.over(cross_entropy(logits, labels), weights)
        metrics: dict[str, Metric] = {"accuracy": Accuracy.of(logits, labels, where=weights)}
        if say_entities(self.config.labels):
            metrics["f1"] = entity_f1(logits.argmax(-1), labels, weights, self.config.labels)
        return loss, metrics

    def limits(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return super().limits(batch) | {"labels": _classes(self.config)}

    def predict_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch seq labels"]]:
        return {"logits": self.logits(batch)}


class AlbertForMultipleChoice(AlbertTask):
    """Which of several texts, such as a question with each of its answers, is the right one.

    A batch has the ids as for `AlbertForMaskedLM`, but each (batch, choices, seq), and `labels`:
    int (batch,), the right choice, -100 where there is none; `example_weight` as for
    `AlbertForSequenceClassification`.
    """

    classifier: Classifier

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        return {
            "albert": Albert(config, key=named_key(key, "albert")),
            "classifier": Classifier(config, 1, key=named_key(key, "classifier")),
        }

    def logits(
        self, batch: dict[str, Any], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch choices"]:
        ids = batch["tokens"] if "tokens" in batch else batch["input_ids"]
        if ids.ndim != 3:
            raise ValueError(
                f"The batch's ids have shape {ids.shape}, but for multiple choice they have to be "
                "(batch, choices, seq)."
            )
        merged = {
            name: rearrange(array, "batch choices seq -> (batch choices) seq")
            for name, array in batch.items()
            if name not in ("labels", "example_weight") and array.ndim == 3
        }
        hidden = self.hidden(Rows.read(merged, self.config), key)
        scores = self.classifier(self.albert.pooled(hidden), key)
        return rearrange(scores, "(batch choices) 1 -> batch choices", choices=ids.shape[1])

    def training_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> tuple[Mean, dict[str, Metric]]:
        logits = self.logits(batch, key)
        labels = _labels_of(batch, self, logits.shape[:1])
        labels, weights = _known(labels, example_weights(batch, logits[:, 0]))
        loss = Mean.over(_nll(logits, labels), weights)
        return loss, {"accuracy": Accuracy.of(logits, labels, where=weights)}

    def limits(self, batch: Mapping[str, Any]) -> dict[str, int]:
        shape = np.shape(batch.get("tokens", batch.get("input_ids")))
        return super().limits(batch) | ({"labels": shape[1]} if len(shape) == 3 else {})

    def predict_step(
        self, batch: dict[str, Any], *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch choices"]]:
        return {"logits": self.logits(batch)}


def _classes(config: AlbertConfig) -> int:
    return len(config.labels) or 2


def _nll(logits: Float[Array, "batch classes"], labels: Array) -> Float[Array, " batch"]:
    logits = rearrange(logits, "batch classes -> batch 1 classes")
    return cross_entropy(logits, rearrange(labels, "batch -> batch 1"))[:, 0]


def _known(labels: Array, weights: Array) -> tuple[Array, Array]:
    """Labels that a class can have, and no weight for those that were -100."""
    ignored = labels == IGNORED
    return jnp.where(ignored, 0, labels), jnp.where(ignored, 0.0, weights)


def _labels_of(batch: dict[str, Any], task: AlbertTask, *shapes: tuple[int, ...]) -> Array:
    """**Raises:** `ValueError` where there are none, or they have none of these shapes."""
    if "labels" not in batch:
        raise ValueError(
            f"`{type(task).__name__}` needs `labels` in each batch it learns from or is judged by; "
            f"this one has {', '.join(f'`{name}`' for name in batch)}."
        )
    labels = batch["labels"]
    if labels.shape not in shapes:
        raise ValueError(
            f"The shape of the batch's `labels` is {labels.shape}, but here it has to be "
            f"{' or '.join(map(str, shapes))}."
        )
    return labels
