"""Entities in tags, beside seqeval where it is installed."""

import jax
import numpy as np
import pytest

from albert_task._encoded import Encoded, Ragged
from albert_task._entities import entities, entity_f1, entity_scores, say_entities
from albert_task._features import Columns
from albert_task._kinds import KINDS


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-a I-a O B-b", {("a", 0, 2), ("b", 3, 4)}),
        ("B-a B-a I-a", {("a", 0, 1), ("a", 1, 3)}),
        ("I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),
        ("B-a I-b I-b", {("a", 0, 1), ("b", 1, 3)}),
        ("S-a B-b I-b E-b I-b", {("a", 0, 1), ("b", 1, 4), ("b", 4, 5)}),
        ("E-a E-a", {("a", 0, 1), ("a", 1, 2)}),
        ("B-first-name I-first-name", {("first-name", 0, 2)}),
    ],
)
def test_entities(tags, found):
    assert entities(tags.split()) == found


def test_an_entity_counts_where_kind_and_both_ends_are_right():
    truth = [["B-a", "I-a", "O", "B-b"], ["B-a", "O"], ["O", "O"]]
    said = [["B-a", "I-a", "O", "B-a"], ["B-a", "I-a"], ["B-b", "O"]]
    assert entity_scores(said, truth) == {"f1": 2 / 7, "precision": 1 / 4, "recall": 1 / 3}
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_scores_of_a_model_are_those_of_its_words():
    kind, labels = KINDS["tokens"]("tokens", Columns(), 8), ["O", "B-a", "I-a"]
    true = [[-100, 1, -100, 2, 0, -100], [-100, 0, 1, -100]]
    said = [[2, 1, 0, 2, 1, 1], [1, 0, 1, 0]]
    examples = Encoded({"input_ids": Ragged.of(true), "labels": Ragged.of(true, -100)})
    found = {"logits": [np.eye(3)[row] for row in said]}
    scores = kind.scores(found, None, examples, labels)
    assert scores == {"accuracy": 4 / 5, "f1": 4 / 5, "precision": 2 / 3, "recall": 1.0}
    assert kind.scores(found, None, examples, ["O", "A", "B"]) == {"accuracy": 4 / 5}


@pytest.mark.parametrize(
    ("labels", "do"),
    [
        ("O B-a I-a", True),
        ("O S-a E-a", True),
        ("NOUN VERB", False),
        ("O B I", False),
        ("O", False),
        ("B- O", False),
    ],
)
def test_labels_that_say_entities(labels, do):
    assert say_entities(labels.split()) == do


@pytest.mark.parametrize("tags", ["O B-a I-a B-b I-b", "O B-a I-a E-a S-a B-b I-b E-b S-b"])
def test_scores_are_those_of_seqeval(tags):
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    generator, drawn = np.random.default_rng(0), tags.split()
    truth = [generator.choice(drawn, n).tolist() for n in generator.integers(1, 12, 300)]
    said = [
        [str(generator.choice(drawn)) if generator.random() < 0.3 else tag for tag in one]
        for one in truth
    ]
    for name, ours in entity_scores(said, truth).items():
        theirs = getattr(metrics, f"{name}_score")(truth, said)
        assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("tags", ["O B-a I-a B-b I-b", "O B-a I-a E-a S-a B-b I-b E-b S-b", "B-a"])
def test_the_traced_score_is_that_of_the_sequences(tags):
    """Also of words in several pieces, of rows that count nothing, and of padding."""
    generator, drawn = np.random.default_rng(0), tags.split()
    truths = generator.integers(0, len(drawn), (64, 12))
    other = generator.random(truths.shape) < 0.3
    said = np.where(other, generator.integers(0, len(drawn), truths.shape), truths)
    first = (generator.random(truths.shape) < 0.7) & (np.arange(12) < 10)
    counts = generator.random(64) < 0.8
    weights = np.float32(first & counts[:, None])
    found = jax.jit(lambda *arrays: entity_f1(*arrays, drawn).compute())(said, truths, weights)
    words = [
        [[drawn[i] for i in row[own]] for row, own in zip(rows[counts], first[counts], strict=True)]
        for rows in (said, truths)
    ]
    assert float(found) == pytest.approx(entity_scores(*words)["f1"], abs=1e-6)
