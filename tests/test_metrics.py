"""Metrics, against scikit-learn, scipy and numpy over the whole data."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlightning._classification import (
    F1,
    Accuracy,
    ConfusionMatrix,
    MatthewsCorrelation,
    Pearson,
    Perplexity,
    TopKAccuracy,
)
from jaxlightning._metrics import Last, Max, Mean, Min, Sum, TotalLoss

N, CLASSES = 24, 4
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(N, CLASSES)).astype(np.float32)
PREDICTED = LOGITS.argmax(-1)
LABELS = np.where(rng.random(N) < 0.5, PREDICTED, rng.integers(0, CLASSES, N))
MASK = rng.random(N) < 0.7
WEIGHTS = rng.integers(0, 4, N).astype(np.float32)
X = rng.normal(size=N).astype(np.float32)
Y = (0.5 * X + rng.normal(size=N)).astype(np.float32)


MAKERS = {
    "mean": lambda w: Mean.over(X, w),
    "sum": lambda w: Sum.of(X, w),
    "max": lambda w: Max.of(X, w),
    "min": lambda w: Min.of(X, w),
    "accuracy": lambda w: Accuracy.of(LOGITS, LABELS, w),
    "top 2": lambda w: TopKAccuracy.of(LOGITS, LABELS, 2, w),
    "f1": lambda w: F1.of(PREDICTED % 2, LABELS % 2, where=w),
    "macro": lambda w: F1.of(LOGITS, LABELS, "macro", where=w),
    "micro": lambda w: F1.of(LOGITS, LABELS, "micro", where=w),
    "matthews": lambda w: MatthewsCorrelation.of(LOGITS, LABELS, where=w),
    "perplexity": lambda w: Perplexity.of(jnp.abs(X), w),
    "pearson": lambda w: Pearson.of(X, Y, w),
    "confusion": lambda w: ConfusionMatrix.of(LOGITS, LABELS, where=w),
    "total": lambda w: TotalLoss({"a": Mean.over(X, w), "b": Mean.over(Y, w)}),
}


def oracle(name, w):
    """What each metric is over the examples of weight w, computed by others."""
    kept = w > 0
    x, y, v, n = X[kept].astype(float), Y[kept].astype(float), w[kept], kept.sum()
    labels, predicted = LABELS[kept], PREDICTED[kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "mean": lambda: np.average(x, weights=v),
            "sum": lambda: (x * v).sum(),
            "max": lambda: x.max(),
            "min": lambda: x.min(),
            "accuracy": lambda: sklearn.metrics.accuracy_score(labels, predicted, sample_weight=v),
            "top 2": lambda: sklearn.metrics.top_k_accuracy_score(
                labels, LOGITS[kept], k=2, labels=range(CLASSES), sample_weight=v
            ),
            "f1": lambda: sklearn.metrics.f1_score(
                labels % 2, predicted % 2, sample_weight=v, zero_division=0
            ),
            "macro": lambda: sklearn.metrics.f1_score(
                labels, predicted, average="macro", sample_weight=v, zero_division=0
            ),
            "micro": lambda: sklearn.metrics.f1_score(
                labels, predicted, average="micro", sample_weight=v
            ),
            "matthews": lambda: sklearn.metrics.matthews_corrcoef(
                labels, predicted, sample_weight=v
            ),
            "perplexity": lambda: np.exp(np.average(np.abs(x), weights=v)),
            "pearson": lambda: (
                np.cov(x, y, aweights=v)[0, 1]
                / np.sqrt(np.cov(x, aweights=v) * np.cov(y, aweights=v))
                if n > 1
                else 0.0
            ),
            "confusion": lambda: sklearn.metrics.confusion_matrix(
                labels, predicted, labels=range(CLASSES), sample_weight=v
            ),
            "total": lambda: np.average(x, weights=v) + np.average(y, weights=v),
        }[name]()


def on_host(metric):
    """As the trainer merges intervals: numpy leaves in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), metric)


def assert_same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("weights", ["all", "mask", "weights", "one"])
def test_equals_the_oracle_whole_and_in_parts(name, weights):
    one = np.arange(N) == 5
    w = {"all": np.ones(N), "mask": MASK, "weights": WEIGHTS, "one": one}[weights]
    make, expected = MAKERS[name], oracle(name, w.astype(float))
    if weights == "all":
        np.testing.assert_allclose(make(None).compute(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(make(jnp.asarray(w)).compute(), expected, rtol=1e-5, atol=1e-6)
    parts = [make(w * (np.arange(N) % 3 == i)) for i in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_allclose(merged.compute(), expected, rtol=1e-5, atol=1e-6)
    hosts = [on_host(part) for part in parts]
    merged = hosts[0].merge(hosts[1]).merge(hosts[2])
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(merged))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    np.testing.assert_allclose(merged.compute(), expected, rtol=1e-5, atol=1e-6)


assignments = st.lists(st.integers(0, 2), min_size=N, max_size=N)


@pytest.mark.parametrize("name", MAKERS)
@settings(deadline=None, max_examples=10)
@given(assignments)
def test_merge_is_a_commutative_monoid(name, assignment):
    part = np.asarray(assignment)
    a, b, c = (on_host(MAKERS[name](part == i)) for i in range(3))
    close = {"rtol": 1e-6, "atol": 1e-6}
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), **close)
    assert_same(a.merge(b), b.merge(a), **close)
    assert_same(a.merge(a.empty()), a, rtol=0)
    assert_same(a.empty().merge(a), a, rtol=0)
    whole = on_host(MAKERS[name](None))
    assert_same(a.merge(b).merge(c), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*MAKERS, "last"])
def test_empty_needs_shapes_and_dtypes_only(name):
    metric = Last.of(3.0) if name == "last" else MAKERS[name](None)
    shapes = jax.eval_shape(lambda: metric)
    template = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
    assert_same(template.empty().merge(metric), metric, rtol=0)
    traced = jax.jit(lambda m: m.empty().merge(m).merge(m.empty()))(metric)
    assert_same(traced, metric, rtol=0)
    np.testing.assert_allclose(traced.compute(), jax.jit(lambda m: m.compute())(metric), rtol=1e-6)
    host = on_host(metric)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(host.empty()))


def test_weight_zero_hides_nan():
    x, y = np.where(MASK, X, np.nan), np.where(MASK, Y, np.nan)
    made = {
        "mean": Mean.over(x, MASK),
        "sum": Sum.of(x, MASK),
        "max": Max.of(x, MASK),
        "min": Min.of(x, MASK),
        "perplexity": Perplexity.of(np.abs(x), MASK),
        "pearson": Pearson.of(x, y, MASK),
        "total": TotalLoss({"a": Mean.over(x, MASK), "b": Mean.over(y, MASK)}),
    }
    for name, metric in made.items():
        np.testing.assert_allclose(
            metric.compute(), oracle(name, MASK.astype(float)), rtol=1e-5, err_msg=name
        )


def test_over_nothing():
    nothing = np.zeros(N)
    values = {name: make(nothing).compute() for name, make in MAKERS.items()}
    expected = dict.fromkeys(MAKERS, 0.0) | {"max": -np.inf, "min": np.inf, "perplexity": 1.0}
    for name, value in values.items():
        np.testing.assert_array_equal(value, np.full(np.shape(value), expected[name]))
    assert np.isnan(Last.of(1.0).empty().compute())


# Mean


def test_a_mean_of_masked_values_has_finite_gradients():
    def loss(x):
        return Mean.over(x**2, MASK).total

    x = jnp.where(jnp.asarray(MASK), X, jnp.inf)
    grads = jax.grad(loss)(jnp.where(jnp.isinf(x), 0.0, x))
    np.testing.assert_allclose(grads, np.where(MASK, 2 * X, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(X))[~MASK], 0.0)


@pytest.mark.parametrize("factor", [0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5)])
def test_a_factor_scales_the_total_only(factor):
    mean = Mean.over(X, WEIGHTS)
    for scaled in (factor * mean, mean * factor, mean / (1 / factor)):
        np.testing.assert_allclose(scaled.total, 0.5 * (X * WEIGHTS).sum(), rtol=1e-5)
        np.testing.assert_allclose(scaled.weight, WEIGHTS.sum())
    assert (0.5 * on_host(mean)).total.dtype == np.float64


def test_sums_in_float32_whatever_the_precision():
    values = jnp.full(4096, 1.0, jnp.bfloat16)
    mean = Mean.over(values)
    assert mean.total.dtype == jnp.float32
    assert mean.total == 4096
    assert Mean.of(values[0]).total.dtype == jnp.float32


def test_adding_means_points_to_what_is_meant():
    a, b = Mean.of(1.0), Mean.of(2.0)
    for add in (lambda: a + b, lambda: a + 1.0, lambda: 0.0 + a, lambda: sum([a, b])):
        with pytest.raises(TypeError, match=r"dict of them.*`a\.merge\(b\)`"):
            add()
    for multiply in (lambda: a * b, lambda: a / b):
        with pytest.raises(TypeError, match="unsupported operand"):
            multiply()


def test_mean_refuses_what_is_no_loss():
    with pytest.raises(ValueError, match=r"`where` of shape \(24, 1\).*\(24,\).*broadcast_to"):
        Mean.over(X, MASK[:, None])
    with pytest.raises(TypeError, match=r"dtype int32.*`values.astype\(jnp.float32\)`"):
        Mean.over(jnp.arange(3))
    with pytest.raises(TypeError, match="dtype bool"):
        Mean.of(jnp.asarray(True))
    with pytest.raises(ValueError, match=r"shape \(24,\).*`Mean.over\(values\)`"):
        Mean.of(X)


# Merging


def test_last_is_the_latest():
    a, b = Last.of(1.0), Last.of(2.0)
    assert a.merge(b).compute() == 2.0
    assert b.merge(a).compute() == 1.0
    assert a.merge(b.empty()).merge(b.empty()).compute() == 1.0
    assert on_host(a).merge(on_host(b)).compute() == 2.0
    assert np.isnan(a.merge(Last.of(jnp.nan)).compute())


def test_nan_is_not_lost_in_a_maximum():
    for kind in (Max, Min):
        bad = kind.of(jnp.asarray([1.0, jnp.nan]))
        for merged in (bad.merge(kind.of(2.0)), kind.of(2.0).merge(bad)):
            assert np.isnan(merged.compute())
            assert np.isnan(on_host(merged).compute())


def test_only_like_metrics_merge():
    with pytest.raises(TypeError, match=r"`Mean.merge` got a `Sum`.*pass a `Mean`"):
        Mean.of(1.0).merge(Sum.of(1.0))
    macro, micro = (F1.of(LOGITS, LABELS, average) for average in ("macro", "micro"))
    with pytest.raises(ValueError, match=r"micro.*\n.*\n.*macro.*\n.*same arguments of `F1.of`"):
        macro.merge(micro)
    with pytest.raises(ValueError, match=r"\[3\].*\n.*\n.*\[4\]"):
        macro.merge(F1.of(LOGITS[:, :3], LABELS, "macro"))
    with pytest.raises(ValueError, match="k=3"):
        TopKAccuracy.of(LOGITS, LABELS, 2).merge(TopKAccuracy.of(LOGITS, LABELS, 3))


def test_steps_of_a_scan_merge_into_the_whole():
    def step(total, part):
        return total.merge(Pearson.of(*part)), None

    like = jax.tree.map(jnp.zeros_like, Pearson.of(X, Y)).empty()
    parts = X.reshape(6, 4), Y.reshape(6, 4)
    merged, _ = jax.jit(lambda: jax.lax.scan(step, like, parts))()
    np.testing.assert_allclose(merged.compute(), scipy.stats.pearsonr(X, Y).statistic, rtol=1e-5)


# Classes


def test_classes_of_any_batch_shape():
    logits, labels = LOGITS.reshape(2, 3, 4, CLASSES), LABELS.reshape(2, 3, 4)
    predicted, mask = PREDICTED.reshape(2, 3, 4), MASK.reshape(2, 3, 4)
    w = MASK.astype(float)
    assert (
        Accuracy.of(predicted, labels, mask).compute()
        == Accuracy.of(logits, labels, mask).compute()
    )
    for average in ("macro", "micro"):
        for made in (
            F1.of(logits, labels, average, where=mask),
            F1.of(predicted, labels, average, num_classes=CLASSES, where=mask),
        ):
            np.testing.assert_allclose(made.compute(), oracle(average, w), rtol=1e-5)
    matrix = ConfusionMatrix.of(predicted, labels, CLASSES, mask)
    np.testing.assert_array_equal(matrix.compute(), oracle("confusion", w))
    matthews = MatthewsCorrelation.of(predicted, labels, CLASSES, mask)
    np.testing.assert_allclose(matthews.compute(), oracle("matthews", w), rtol=1e-5)
    top = TopKAccuracy.of(logits, labels, 2, mask)
    np.testing.assert_allclose(top.compute(), oracle("top 2", w), rtol=1e-6)


def test_a_class_that_never_occurs():
    labels, predicted = np.asarray([0, 1, 1, 3]), np.asarray([0, 1, 3, 3])
    macro = F1.of(predicted, labels, "macro", num_classes=6)
    expected = sklearn.metrics.f1_score(labels, predicted, average="macro")
    np.testing.assert_allclose(macro.compute(), expected, rtol=1e-6)
    np.testing.assert_allclose(on_host(macro).compute(), expected, rtol=1e-12)
    matthews = MatthewsCorrelation.of(predicted, labels, 6).compute()
    np.testing.assert_allclose(
        matthews, sklearn.metrics.matthews_corrcoef(labels, predicted), rtol=1e-6
    )


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 0]])
def test_matthews_of_constant_predictions_is_0_as_in_sklearn(labels):
    predicted = np.zeros(3, int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That there is one class only.
        assert sklearn.metrics.matthews_corrcoef(labels, predicted) == 0.0
    metric = MatthewsCorrelation.of(predicted, np.asarray(labels), 2)
    assert metric.compute() == 0.0
    assert on_host(metric).compute() == 0.0


def test_matthews_keeps_its_digits_over_many_examples():
    # Products of these counts do not fit float32; merged in float64, as the host does.
    labels = np.repeat([0, 1], [1000, 999_000])
    predicted = np.concatenate([labels[500:], labels[:500]])
    halves = np.split(np.arange(1_000_000), 2)
    a, b = (on_host(MatthewsCorrelation.of(predicted[i], labels[i], 2)) for i in halves)
    expected = sklearn.metrics.matthews_corrcoef(labels, predicted)
    np.testing.assert_allclose(a.merge(b).compute(), expected, rtol=1e-9)


def test_labels_outside_the_classes():
    labels = np.where(MASK, LABELS, -100)
    w = MASK.astype(float)
    matrix = ConfusionMatrix.of(LOGITS, labels)
    np.testing.assert_array_equal(matrix.compute(), oracle("confusion", w))
    np.testing.assert_allclose(
        F1.of(LOGITS, labels, "macro").compute(), oracle("macro", w), rtol=1e-5
    )
    np.testing.assert_allclose(
        Accuracy.of(LOGITS, labels, where=labels >= 0).compute(), oracle("accuracy", w), rtol=1e-6
    )


def test_equal_logits_give_no_credit():
    labels = np.arange(CLASSES)
    flat = np.zeros((CLASSES, CLASSES), np.float32)
    assert Accuracy.of(flat, labels).compute() == 0.25
    assert TopKAccuracy.of(flat, labels, 2).compute() == 0.5


def test_classification_errors_teach():
    with pytest.raises(ValueError, match=r"`Accuracy.of` got predictions of shape \(24, 4\).*"):
        Accuracy.of(LOGITS, LABELS[:3])
    with pytest.raises(ValueError, match=r"float32.*integer classes of shape \(24,\)"):
        Accuracy.of(X, LABELS)
    with pytest.raises(TypeError, match=r"labels of dtype bool.*`labels.astype\(jnp.int32\)`"):
        Accuracy.of(LOGITS, LABELS > 1)
    with pytest.raises(ValueError, match="got predicted classes, but needs logits"):
        TopKAccuracy.of(PREDICTED, LABELS)
    with pytest.raises(ValueError, match="`k=5` for 4 classes"):
        TopKAccuracy.of(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"`F1.of\(..., num_classes=...\)`"):
        F1.of(PREDICTED, LABELS, "macro")
    with pytest.raises(ValueError, match="`num_classes=3`, but logits of 4 classes"):
        ConfusionMatrix.of(LOGITS, LABELS, 3)
    with pytest.raises(ValueError, match="Did you mean `average='macro'`"):
        F1.of(LOGITS, LABELS, "makro")
    with pytest.raises(ValueError, match='got 4 classes, but `average="binary"` is for two'):
        F1.of(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"`where` of shape \(3,\)"):
        MatthewsCorrelation.of(LOGITS, LABELS, where=MASK[:3])


# Pearson and perplexity


def test_pearson_survives_a_large_offset():
    big_x, big_y = X + np.float32(1e4), Y - np.float32(3e3)
    expected = scipy.stats.pearsonr(big_x.astype(float), big_y.astype(float)).statistic
    cuts = np.split(np.arange(N), [3, 4, 15])
    parts = [Pearson.of(big_x[i], big_y[i]) for i in cuts]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    np.testing.assert_allclose(merged.compute(), expected, rtol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4 / 3, -7e-30])
def test_pearson_of_a_constant_is_0(constant):
    flat = np.full(1000, constant, np.float32)
    other = rng.normal(size=1000).astype(np.float32)
    with pytest.warns(scipy.stats.ConstantInputWarning):
        assert np.isnan(scipy.stats.pearsonr(flat, other).statistic)
    weights = rng.random(1000).astype(np.float32)
    for metric in (Pearson.of(flat, other), Pearson.of(other, flat, weights)):
        assert metric.compute() == 0.0
        assert on_host(metric).compute() == 0.0
        merged = on_host(metric).merge(on_host(metric))
        assert merged.compute() == 0.0
    one = Pearson.of(flat[:1], other[:1])
    assert one.compute() == 0.0


def test_pearson_never_leaves_its_range():
    for sign in (1.0, -1.0):
        metric = Pearson.of(X, sign * 3 * X)
        assert abs(float(metric.compute())) <= 1.0
        np.testing.assert_allclose(metric.compute(), sign, rtol=1e-6)


def test_pearson_wants_pairs():
    with pytest.raises(ValueError, match=r"`x` of shape \(24,\) and `y` of shape \(23,\)"):
        Pearson.of(X, Y[1:])


def test_perplexity_overflows_to_infinity_quietly():
    metric = on_host(Perplexity.of(jnp.full(3, 1e6)))
    assert metric.compute() == np.inf
