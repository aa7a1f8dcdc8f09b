"""SQuAD's metrics, held against published scores, and rules of the official scripts by example."""

import json
import os
from pathlib import Path

import pytest

from albert_task import Answered, questions_of, squad_scores
from albert_task._squad_metrics import best_threshold, exact_match, f1, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick, Brown fox!", "quick brown fox"),
        ("a an the", ""),
        ("Theatre of an atheist", "theatre of atheist"),
        ("the-end", "theend"),
        ("U.S.", "us"),
        ("\tA\nline ", "line"),
        ("“quoted”", "“quoted”"),
        ("an\u00a0hour", "hour"),
        (".", ""),
    ],
)
def test_what_is_compared(text, expected):
    assert normalised(text) == expected


def test_words_in_common():
    assert f1("the cat sat", "cat sat down") == pytest.approx(2 * (2 / 2) * (2 / 3) / (1 + 2 / 3))
    assert f1("cat cat", "cat") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert f1("dog", "cat") == 0
    assert (f1("", ""), f1("the", "."), f1("", "cat"), f1("cat", "")) == (1, 1, 0, 0)
    assert (exact_match("The Cat.", "cat"), exact_match("cats", "cat")) == (1, 0)


def test_the_best_answer_counts():
    questions = [Answered("a", ("in 1066", "1066")), Answered("b", ("Normans",))]
    scores = squad_scores(questions, {"a": "1066", "b": "the Norman people", "more": ""})
    assert scores == {"exact_match": 50.0, "f1": 50.0}


def test_without_an_answer():
    questions = [Answered("a", ("cat",)), Answered("b", ()), Answered("c", ())]
    scores = squad_scores(questions, {"a": "a cat", "b": "", "c": "dog"})
    assert scores["exact_match"] == pytest.approx(200 / 3)
    assert (scores["has_answer_f1"], scores["no_answer_f1"]) == (100, 50)
    assert scores["no_answer_exact_match"] == 50


def test_answers_of_punctuation_only_are_passed_over_by_version_2():
    questions = [Answered("a", (".", "cat")), Answered("b", ())]
    empty = {"a": "", "b": ""}
    assert squad_scores(questions, empty)["exact_match"] == 50
    assert squad_scores(questions, empty, version="1.1")["exact_match"] == 100
    with pytest.raises(ValueError, match="`version='3'` is unknown"):
        squad_scores(questions, empty, version="3")


def test_the_best_threshold():
    """By trying all: below the threshold answers stand, from it on they are taken back."""
    questions = [Answered(n, ("x",) if n in "ac" else ()) for n in "abcd"]
    predictions = dict.fromkeys("abcd", "x") | {"d": ""}
    exact = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}
    sure = {"a": 0.1, "b": 0.9, "c": 0.3, "d": 0.5}

    def score(limit):
        return sum(exact[q.id] if sure[q.id] <= limit else float(not q.answers) for q in questions)

    best = max(score(limit) for limit in [-1, *sure.values()])
    assert best_threshold(questions, predictions, exact, sure) == (100 * best / 4, 0.3)
    scores = squad_scores(questions, predictions, sure)
    assert (scores["best_exact_match"], scores["best_exact_match_threshold"]) == (100, 0.3)


def test_predictions_that_are_missing():
    with pytest.raises(ValueError, match="1 of 2 questions have no prediction, such as `b`"):
        squad_scores([Answered("a", ("x",)), Answered("b", ())], {"a": "x"})
    with pytest.raises(ValueError, match="no question to score"):
        squad_scores([], {})


def test_a_file():
    qas = [
        {"id": "a", "answers": [{"text": "x", "answer_start": 0}]},
        {"id": "b", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "y"}]},
    ]
    data = {"version": "v2.0", "data": [{"paragraphs": [{"context": "x y", "qas": qas}]}]}
    assert list(questions_of(data)) == [Answered("a", ("x",)), Answered("b", ())]


@pytest.mark.parametrize(
    ("data", "predictions", "version", "scores"),
    [
        ("dev-v1.1.json", "v1.1-bert-ensemble.json", None, (86.21, 92.20)),
        ("dev-v2.0.json", "v2.0-bert-single.json", "1.1", (78.76, 81.79)),
        ("dev-v2.0.json", "v2.0-bert-single.json", None, (78.74, 81.78)),
    ],
    ids=["1.1", "2.0_as_published", "2.0_as_the_script"],
)
def test_published_predictions(data, predictions, version, scores):
    if "JAXLIGHTNING_DATA" not in os.environ:
        pytest.skip("JAXLIGHTNING_DATA does not point to a folder with `squad`")
    folder = Path(os.environ["JAXLIGHTNING_DATA"]) / "squad"
    questions = list(questions_of(json.loads((folder / data).read_text())))
    answers = json.loads((folder / "predictions" / predictions).read_text())
    found = squad_scores(questions, answers, version=version)
    assert (round(found["exact_match"], 2), round(found["f1"], 2)) == scores


def test_the_threshold_at_which_none_is_best_lies_below_all_scores():
    """Scores of no answer, unlike probabilities, may be negative."""
    asked = [Answered("a", ()), Answered("b", ()), Answered("c", ("x",))]
    said = {"a": "y", "b": "y", "c": "y"}
    scores = dict.fromkeys("abc", 0.0)
    best, threshold = best_threshold(asked, said, scores, {"a": -7.0, "b": 1.0, "c": -9.5})
    assert (best, threshold) == (pytest.approx(200 / 3), -10.5)
    assert best_threshold(asked, said, scores, dict.fromkeys("abc", 0.5))[1] == 0.0
