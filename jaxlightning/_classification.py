"""Metrics of classifiers, language models and regressors.

Predictions are logits of shape `(*batch, classes)`, or classes, integers of shape `(*batch)`.
Labels are classes, and `where` masks or weighs them, both of shape `(*batch)`. A label outside the
classes (say, -100 for "ignore") is not hidden by itself: write `where=labels >= 0`.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._metrics import Entries, Metric, Scalar, Weights, divide, namespace, weighted, weights_of

__all__ = [
    "F1",
    "Accuracy",
    "ConfusionMatrix",
    "MatthewsCorrelation",
    "Pearson",
    "Perplexity",
    "TopKAccuracy",
]

Classes = Int[Array, "..."]
PerClass = Float[Array | np.ndarray, " classes"]


class Accuracy(Metric):
    """The share of labels that are predicted; 0 over no labels at all."""

    correct: Scalar
    weight: Scalar

    @classmethod
    def of(cls, predictions: Entries, labels: Entries, where: Entries | None = None) -> Accuracy:
        """Of equal logits the first counts as predicted."""
        predicted, labels, _ = _read(predictions, labels, "Accuracy.of")
        return cls(*weighted((predicted == labels).astype(jnp.float32), where, "Accuracy.of"))

    def compute(self) -> Scalar:
        return divide(self.correct, self.weight)


class TopKAccuracy(Metric):
    """The share of labels among the `k` largest logits; 0 over no labels at all."""

    correct: Scalar
    weight: Scalar
    k: int = eqx.field(static=True)

    @classmethod
    def of(
        cls, logits: Entries, labels: Entries, k: int = 5, where: Entries | None = None
    ) -> TopKAccuracy:
        """Of equal logits the first are taken.

        **Raises:** `ValueError` unless there are logits of at least `k` classes.
        """
        logits, labels = jnp.asarray(logits), jnp.asarray(labels)
        _, _, classes = _read(logits, labels, "TopKAccuracy.of")
        if classes is None:
            raise ValueError(
                "`TopKAccuracy.of` got predicted classes, but needs logits, of shape (*batch, "
                "classes)."
            )
        if not 1 <= k <= classes:
            raise ValueError(
                f"`TopKAccuracy.of` got `k={k}` for {classes} classes. Write a `k` between 1 and "
                f"{classes}."
            )
        best = jax.lax.top_k(logits, k)[1]
        found = (best == labels[..., None].astype(best.dtype)).any(-1).astype(jnp.float32)
        return cls(*weighted(found, where, "TopKAccuracy.of"), k)

    def compute(self) -> Scalar:
        return divide(self.correct, self.weight)


class ConfusionMatrix(Metric):
    """How often each class (a row) was predicted as each class (a column).

    Computes to that matrix, so unlike other metrics it is no number that a logger could write.
    """

    counts: Float[Array | np.ndarray, "classes classes"]

    @classmethod
    def of(
        cls,
        predictions: Entries,
        labels: Entries,
        num_classes: int | None = None,
        where: Entries | None = None,
    ) -> ConfusionMatrix:
        """Labels and predictions outside the classes are left out."""
        predicted, labels, classes = _read_counted(
            predictions, labels, num_classes, "ConfusionMatrix.of"
        )
        weights = weights_of(where, labels.shape, "ConfusionMatrix.of")
        actual = jax.nn.one_hot(labels.ravel(), classes) * weights.ravel()[:, None]
        # A product, not a scatter, whose sums on a GPU are not reproducible.
        counts = jnp.matmul(
            actual.T, jax.nn.one_hot(predicted.ravel(), classes), precision="highest"
        )
        return cls(counts)

    def compute(self) -> Float[Array | np.ndarray, "classes classes"]:
        return self.counts


class F1(Metric):
    """The harmonic mean of precision and recall (van Rijsbergen 1979).

    - `average="binary"`: of class 1, of two;
    - `"macro"`: the plain mean over the classes that occur as a label or a prediction;
    - `"micro"`: over all classes at once, which is accuracy where every label is a class.

    0 where nothing is predicted or labelled.
    """

    correct: PerClass
    predicted: PerClass
    actual: PerClass
    average: str = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        predictions: Entries,
        labels: Entries,
        average: str = "binary",
        num_classes: int | None = None,
        where: Entries | None = None,
    ) -> F1:
        """`num_classes` is needed where predictions are classes, and `average` not `"binary"`."""
        averages = ("binary", "macro", "micro")
        if average not in averages:
            near = difflib.get_close_matches(str(average), averages, n=1, cutoff=0.0)
            raise ValueError(
                f"`F1.of` got `average={average!r}`; it is one of {', '.join(map(repr, averages))}."
                f" Did you mean `average={near[0]!r}`?"
            )
        if average == "binary" and num_classes is None:
            shape = np.shape(predictions)
            num_classes = shape[-1] if len(shape) > np.ndim(labels) else 2
        counts = _count(predictions, labels, where, num_classes, "F1.of")
        if average == "binary" and len(counts.actual) != 2:
            raise ValueError(
                f'`F1.of` got {len(counts.actual)} classes, but `average="binary"` is for two. '
                'Write `average="macro"` or `average="micro"`.'
            )
        return cls(*counts, average)

    def compute(self) -> Scalar:
        either = self.predicted + self.actual
        if self.average == "binary":
            return divide(2 * self.correct[1], either[1])
        if self.average == "micro":
            return divide(2 * self.correct.sum(), either.sum())
        occurs = (either != 0).astype(either.dtype)
        return divide(divide(2 * self.correct, either).sum(), occurs.sum())


class MatthewsCorrelation(Metric):
    """The correlation between labels and predictions, for any number of classes.

    R_K of Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
    coefficient"; for two classes that of Matthews 1975. 0 where all labels, or all predictions,
    are the same.
    """

    correct: PerClass
    predicted: PerClass
    actual: PerClass

    @classmethod
    def of(
        cls,
        predictions: Entries,
        labels: Entries,
        num_classes: int | None = None,
        where: Entries | None = None,
    ) -> MatthewsCorrelation:
        """`num_classes` is needed where predictions are classes."""
        return cls(*_count(predictions, labels, where, num_classes, "MatthewsCorrelation.of"))

    def compute(self) -> Scalar:
        xp = namespace(self)
        # In shares, because products of counts exceed what float32 can hold exactly.
        count = self.actual.sum()
        correct = divide(self.correct.sum(), count)
        predicted, actual = divide(self.predicted, count), divide(self.actual, count)
        covariance = correct - (predicted * actual).sum()
        spread = xp.sqrt(_one_minus_squares(predicted)) * xp.sqrt(_one_minus_squares(actual))
        return xp.clip(divide(covariance, spread), -1.0, 1.0)


class Perplexity(Metric):
    """`exp` of the mean negative log-likelihood; 1 over no tokens at all."""

    total: Scalar
    weight: Scalar

    @classmethod
    def of(cls, nll: Entries, where: Entries | None = None) -> Perplexity:
        """`nll`: natural negative log-likelihoods, one a token, of any shape."""
        return cls(*weighted(jnp.asarray(nll, jnp.float32), where, "Perplexity.of"))

    def compute(self) -> Scalar:
        with np.errstate(over="ignore"):  # Infinity is the right answer.
            return namespace(self).exp(divide(self.total, self.weight))


class Pearson(Metric):
    """Pearson's correlation; 0 where either side is constant (scipy gives NaN).

    Means and centred moments, merged as in Chan, Golub & LeVeque 1983, "Algorithms for computing
    the sample variance", so that a large common offset costs no digits.
    """

    weight: Scalar
    mean_x: Scalar
    mean_y: Scalar
    xx: Scalar
    """Σ (x - mean)², centred like the two that follow."""
    yy: Scalar
    xy: Scalar

    @classmethod
    def of(cls, x: Entries, y: Entries, where: Entries | None = None) -> Pearson:
        """The correlation of `x` and `y`, of one shape, whatever it is."""
        x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
        if x.shape != y.shape:
            raise ValueError(
                f"`Pearson.of` got `x` of shape {x.shape} and `y` of shape {y.shape}. They have to "
                "be the same: one `y` for each `x`."
            )
        w = weights_of(where, x.shape, "Pearson.of")
        weight = w.sum()
        (mean_x, dx), (mean_y, dy) = _centre(x, w), _centre(y, w)
        return cls(
            weight, mean_x, mean_y, (w * dx**2).sum(), (w * dy**2).sum(), (w * dx * dy).sum()
        )

    def merge(self, other: Pearson) -> Pearson:
        self._check(other)
        weight = self.weight + other.weight
        share = divide(other.weight, weight)
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.weight * share
        return Pearson(
            weight,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            self.xx + other.xx + dx * dx * between,
            self.yy + other.yy + dy * dy * between,
            self.xy + other.xy + dx * dy * between,
        )

    def compute(self) -> Scalar:
        xp = namespace(self)
        return xp.clip(divide(self.xy, xp.sqrt(self.xx) * xp.sqrt(self.yy)), -1.0, 1.0)


class _Counts(NamedTuple):
    correct: PerClass
    predicted: PerClass
    actual: PerClass


def _count(
    predictions: Entries,
    labels: Entries,
    where: Entries | None,
    num_classes: int | None,
    method: str,
) -> _Counts:
    predicted, labels, classes = _read_counted(predictions, labels, num_classes, method)
    weights = weights_of(where, labels.shape, method).ravel()[:, None]
    # An example of which either class is unknown counts on neither side.
    predicted = jax.nn.one_hot(predicted.ravel(), classes)
    actual = jax.nn.one_hot(labels.ravel(), classes)
    weights = weights * predicted.sum(-1, keepdims=True) * actual.sum(-1, keepdims=True)
    return _Counts(
        (predicted * actual * weights).sum(0),
        (predicted * weights).sum(0),
        (actual * weights).sum(0),
    )


def _read(
    predictions: Entries, labels: Entries, method: str
) -> tuple[Classes, Classes, int | None]:
    """Predicted classes, labels, and the number of classes where there are logits."""
    predictions, labels = jnp.asarray(predictions), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`{method}` got labels of dtype {labels.dtype}. Labels are classes; write "
            "`labels.astype(jnp.int32)`."
        )
    labels = labels.astype(jnp.int32)
    if predictions.ndim == labels.ndim + 1 and predictions.shape[:-1] == labels.shape:
        return jnp.argmax(predictions, axis=-1).astype(jnp.int32), labels, predictions.shape[-1]
    if predictions.shape == labels.shape and jnp.issubdtype(predictions.dtype, jnp.integer):
        return predictions.astype(jnp.int32), labels, None
    raise ValueError(
        f"`{method}` got predictions of shape {predictions.shape} and dtype {predictions.dtype} "
        f"for labels of shape {labels.shape}. Predictions are logits of shape "
        f"{(*labels.shape, 'classes')}, or integer classes of shape {labels.shape}."
    )


def _read_counted(
    predictions: Entries, labels: Entries, num_classes: int | None, method: str
) -> tuple[Classes, Classes, int]:
    predicted, labels, classes = _read(predictions, labels, method)
    if classes is None:
        if num_classes is None:
            raise ValueError(
                f"`{method}` got predicted classes, which do not tell how many there are. Write "
                f"`{method}(..., num_classes=...)`."
            )
        return predicted, labels, num_classes
    if num_classes not in (None, classes):
        raise ValueError(
            f"`{method}` got `num_classes={num_classes}`, but logits of {classes} classes. Leave "
            "`num_classes` out."
        )
    return predicted, labels, classes


def _centre(x: Weights, weights: Weights) -> tuple[Scalar, Weights]:
    """The weighted mean, and what is left without it; 0 where the weight is."""
    x = jnp.where(weights == 0, 0.0, x)
    mean = divide((weights * x).sum(), weights.sum())
    # Twice, which takes the rounding out: what is constant has a variance of exactly 0.
    mean += divide((weights * (x - mean)).sum(), weights.sum())
    return mean, jnp.where(weights == 0, 0.0, x - mean)


def _one_minus_squares(shares: Any) -> Any:
    """1 - Σ p², as Σ p (1 - p): exactly 0 where all is one class."""
    return (shares * (1.0 - shares)).sum()
