"""GLUE's metrics, held against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from albert_task import GLUE, glue_scores

PEERS = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "pearson": lambda labels, found: stats.pearsonr(labels, found).statistic,
    "spearman": lambda labels, found: stats.spearmanr(labels, found).statistic,
}


@pytest.mark.parametrize("task", GLUE)
def test_each_task(task):
    generator = np.random.default_rng(0)
    if GLUE[task].labels:
        classes = len(GLUE[task].labels)
        labels = generator.integers(0, classes, 500)
        found = np.where(generator.random(500) < 0.7, labels, generator.integers(0, classes, 500))
    else:
        labels = np.round(generator.uniform(0, 5, 500), 1)  # with many ties
        found = labels + generator.normal(0, 1, 500).round(1)
    scores = glue_scores(task, found, labels)
    assert tuple(scores) == GLUE[task].metrics
    for name, score in scores.items():
        assert score == pytest.approx(PEERS[name](labels, found), abs=1e-6)


def test_what_is_constant():
    ones = np.ones(4, int)
    assert glue_scores("cola", ones, np.array([0, 1, 0, 1])) == {"matthews": 0.0}
    assert glue_scores("stsb", ones, np.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}
    assert glue_scores("mrpc", 0 * ones, ones) == {"accuracy": 0.0, "f1": 0.0}


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match=r"GLUE has no task 'sst'.*Did you mean `sst2`"):
        glue_scores("sst", np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="There are 1 predictions, but 2 labels"):
        glue_scores("sst2", np.ones(1), np.ones(2))
