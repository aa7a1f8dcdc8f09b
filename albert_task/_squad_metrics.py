"""SQuAD's exact match and F1, by the rules of its official evaluation scripts.

Rajpurkar et al. 2016 and 2018. Answers are compared without case, punctuation, articles and
superfluous blanks; a prediction gets the best of its scores over the answers that people gave.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = set(string.punctuation)


class Answered(NamedTuple):
    """A question of a SQuAD file, with all answers that people gave; none: it has no answer."""

    id: str
    answers: tuple[str, ...]


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles, and blanks that are too many."""
    text = "".join(c for c in answer.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same after `normalised`, else 0."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words. Where either has none, 1 if both have
    none, else 0."""
    found, true = normalised(prediction).split(), normalised(answer).split()
    if not found or not true:
        return float(found == true)
    same = sum((collections.Counter(found) & collections.Counter(true)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(true)
    return 2 * precision * recall / (precision + recall)


def questions_of(dataset: Mapping[str, Any] | Sequence[Any]) -> Iterator[Answered]:
    """The questions of a SQuAD file, of version 1.1 or 2.0, in its order."""
    articles = dataset["data"] if isinstance(dataset, Mapping) else dataset
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible") else question.get("answers", [])
                yield Answered(question["id"], tuple(answer["text"] for answer in answers))


def squad_scores(
    questions: Sequence[Answered],
    predictions: Mapping[str, str],
    no_answer: Mapping[str, float] | None = None,
    version: str | None = None,
) -> dict[str, float]:
    """Exact match and F1 in per cent.

    Where some question has no answer, also for those that have one and those that have none; with
    `no_answer` also the thresholds that would have been best: the script of version 2.0.

    **Arguments:**

    - `questions`: from `questions_of`.
    - `predictions`: the answer by question; `""` for none.
    - `no_answer`: by question, how sure it is that there is none.
    - `version`: whose rules count, `"1.1"` or `"2.0"`; by default 2.0 where some question has no
      answer. They differ in answers of punctuation only, of which nothing is left: 2.0 passes over
      them. (The published 78.76 and 81.79 of BERT on the development set of 2.0 count two that
      are `.` by the rules of 1.1; by those of 2.0 they are 78.74 and 81.78.)

    **Raises:** `ValueError` where a question has no prediction, with some of them.
    """
    missing = [question.id for question in questions if question.id not in predictions]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(questions)} questions have no prediction, such as "
            f"{', '.join(f'`{name}`' for name in missing[:3])}. Write an empty one where there is "
            "no answer."
        )
    if not questions:
        raise ValueError("There is no question to score.")
    unanswerable = any(not question.answers for question in questions)
    version = version or ("2.0" if unanswerable else "1.1")
    if version not in ("1.1", "2.0"):
        raise ValueError(f"`version={version!r}` is unknown; SQuAD has `'1.1'` and `'2.0'`.")
    exact, overlap = {}, {}
    for question in questions:
        prediction = predictions[question.id]
        answers = question.answers
        if version == "2.0":
            answers = tuple(answer for answer in answers if normalised(answer))
        answers = answers or ("",)
        exact[question.id] = max(exact_match(prediction, answer) for answer in answers)
        overlap[question.id] = max(f1(prediction, answer) for answer in answers)
    found = {"exact_match": _percent(exact), "f1": _percent(overlap)}
    if unanswerable:
        for name, has in (("has_answer", True), ("no_answer", False)):
            ids = [question.id for question in questions if bool(question.answers) is has]
            if ids:
                found[f"{name}_exact_match"] = _percent({i: exact[i] for i in ids})
                found[f"{name}_f1"] = _percent({i: overlap[i] for i in ids})
    if no_answer is not None:
        for name, scores in (("exact_match", exact), ("f1", overlap)):
            best, threshold = best_threshold(questions, predictions, scores, no_answer)
            found |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return found


def best_threshold(
    questions: Sequence[Answered],
    predictions: Mapping[str, str],
    scores: Mapping[str, float],
    no_answer: Mapping[str, float],
) -> tuple[float, float]:
    """The best score in per cent, and the threshold of `no_answer` above which an answer is taken
    back to reach it: the script's `find_best_thresh`. Where all are best taken back, that is 0 as
    there for probabilities, and below all of them for scores."""
    current = best = float(sum(not question.answers for question in questions))
    threshold = min([0.0, *(value - 1.0 for value in no_answer.values() if value <= 0)])
    has = {question.id: bool(question.answers) for question in questions}
    for name in sorted(no_answer, key=lambda name: no_answer[name]):
        if name not in scores:
            continue
        if has[name]:
            change = scores[name]
        else:
            change = -1.0 if predictions[name] else 0.0
        current += change
        if current > best:
            best, threshold = current, no_answer[name]
    return 100.0 * best / len(scores), threshold


def _percent(scores: Mapping[str, float]) -> float:
    return 100.0 * sum(scores.values()) / len(scores)
