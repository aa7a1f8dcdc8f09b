"""GLUE (Wang et al. 2019): its tasks, their columns, and what each is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxlightning import F1, Accuracy, MatthewsCorrelation, Pearson
from jaxlightning._nearest import nearest


class GlueTask(NamedTuple):
    """A task of GLUE, by the columns of its files and the names of its metrics."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    """By the order of their ids in `datasets`' files; none for a regression."""
    metrics: tuple[str, ...]
    """The first is the one to stop early by."""


_ENTAILED = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIRED = ("accuracy", "f1")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), _PAIRED),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), _PAIRED),
    "stsb": GlueTask(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "mnli": GlueTask(("premise", "hypothesis"), _NLI, ("accuracy",)),
    "qnli": GlueTask(("question", "sentence"), _ENTAILED, ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILED, ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
    "ax": GlueTask(("premise", "hypothesis"), _NLI, ("matthews",)),
}

Predictions = Shaped[np.ndarray, " _"]


def glue_scores(task: str, predictions: Predictions, labels: Predictions) -> dict[str, float]:
    """The metrics of a task of GLUE, between 0 and 1 (correlations from -1).

    **Arguments:**

    - `task`: a name of `GLUE`.
    - `predictions`, `labels`: classes, or numbers for `"stsb"`.

    **Raises:** `ValueError` for an unknown name, or where lengths differ.
    """
    if task not in GLUE:
        raise ValueError(
            f"GLUE has no task {task!r}; it has {', '.join(map(repr, GLUE))}.{nearest(task, GLUE)}"
        )
    if len(predictions) != len(labels):
        raise ValueError(f"There are {len(predictions)} predictions, but {len(labels)} labels.")
    return {name: METRICS[name](predictions, labels) for name in GLUE[task].metrics}


def _classes(values: Predictions) -> Int[np.ndarray, " _"]:
    return np.asarray(values, np.int32)


def _count(predictions: Predictions, labels: Predictions) -> int:
    return int(max(predictions.max(), labels.max())) + 1


def accuracy(predictions: Predictions, labels: Predictions) -> float:
    """The share that is right."""
    return float(Accuracy.of(_classes(predictions), _classes(labels)).compute())


def f1(predictions: Predictions, labels: Predictions) -> float:
    """Of class 1."""
    return float(F1.of(_classes(predictions), _classes(labels)).compute())


def matthews(predictions: Predictions, labels: Predictions) -> float:
    """Matthews' correlation."""
    classes = max(2, _count(predictions, labels))
    found = MatthewsCorrelation.of(_classes(predictions), _classes(labels), num_classes=classes)
    return float(found.compute())


def pearson(predictions: Predictions, labels: Predictions) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    pair = (np.asarray(values, np.float32) for values in (predictions, labels))
    return float(Pearson.of(*pair).compute())


def spearman(predictions: Predictions, labels: Predictions) -> float:
    """Spearman's correlation: Pearson's of ranks, where equal values share the mean of theirs."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: Predictions) -> Float[np.ndarray, " _"]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middles = ends - (counts - 1) / 2
    ranks = middles[place]
    return ranks - ranks.mean()


METRICS: Mapping[str, Callable[[Predictions, Predictions], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
