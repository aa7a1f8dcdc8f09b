"""The kinds of fine-tuning, by the names that the command line has for them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlightning import Trainer

from ._base import AlbertTask
from ._classification import (
    AlbertForMultipleChoice,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)
from ._encoded import BucketLoader, Encoded, few_buckets
from ._entities import entity_scores, say_entities
from ._features import (
    Columns,
    classification,
    label_names,
    multiple_choice,
    token_classification,
    words_of,
)
from ._glue import METRICS
from ._question_answering import AlbertForQuestionAnswering
from ._squad import Answer, Windows, answered, answers, read_questions, windows
from ._squad_metrics import squad_scores
from ._tables import read_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Predictions = Mapping[str, Sequence[np.ndarray]]


class Kind:
    """One kind of fine-tuning: its data, its task, its scores, and how predictions are written.

    **Arguments:**

    - `name`: on the command line.
    - `columns`, `max_length`: of its data.
    """

    task: type[AlbertTask] = AlbertForSequenceClassification
    problem_type: str | None = "single_label_classification"
    metric = "accuracy"
    fewest_labels = 2
    labels_anywhere = False
    """Whether labels may be new in the validation examples, as rare tags are."""

    def __init__(self, name: str, columns: Columns, max_length: int):
        self.name = name
        self.columns = columns
        self.max_length = max_length

    def judged_by(self, labels: Sequence[str]) -> str:
        """The metric by which the best epoch is found; more is better."""
        return self.metric

    def read(self, path: str, *, labelled: bool = True) -> Any:
        """The examples of a file, unencoded."""
        return read_table(path)

    def labels(self, sources: Sequence[Any]) -> tuple[str, ...]:
        """The labels to tell apart.

        **Raises:** `ValueError` where they are too few for that.
        """
        found = label_names(sources, self.columns, self.name)
        if len(found) < self.fewest_labels:
            few = f"only the label `{found[0]}`" if found else "no label"
            raise ValueError(
                f"`{sources[0].source}` has {few}, but `--task {self.name}` needs "
                f"{self.fewest_labels} at least. Is it the right column? Name it: "
                "`--label-column NAME`. (Numbers to predict are `--task regression`.)"
            )
        return found

    def encode(
        self, source: Any, tokenizer: Tokenizer, labels: Sequence[str], *, labelled: bool = True
    ) -> Encoded:
        return classification(
            source,
            tokenizer,
            labels,
            columns=self.columns,
            max_length=self.max_length,
            kind=self.name,
            labelled=labelled,
        )

    def fingerprint(self, source: Any, examples: Encoded) -> str:
        """A hash of all that is learnt from, and judged by."""
        return examples.fingerprint()

    def scores(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> dict[str, float]:
        """What the predictions are worth, by name, between 0 and 1."""
        classes = np.asarray([logits.argmax() for logits in found["logits"]])
        truth = examples.fixed["labels"]
        names = ["accuracy", "f1", "matthews"] if len(labels) == 2 else ["accuracy", "matthews"]
        return {name: METRICS[name](classes, truth) for name in names}

    def rows(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The predictions, to be written a line each."""
        return [
            {
                "label": labels[int(logits.argmax())],
                "probabilities": _named(_softmax(logits), labels),
            }
            for logits in found["logits"]
        ]


class Regression(Kind):
    problem_type = "regression"
    metric = "pearson"

    def labels(self, sources: Sequence[Any]) -> tuple[str, ...]:
        return ("score",)

    def scores(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> dict[str, float]:
        values = np.asarray([logits[0] for logits in found["logits"]])
        truth = examples.fixed["labels"]
        scores = {name: METRICS[name](values, truth) for name in ("pearson", "spearman")}
        return scores | {"mean_squared_error": float(np.square(values - truth).mean())}

    def rows(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return [{"score": float(logits[0])} for logits in found["logits"]]


class MultiLabel(Kind):
    problem_type = "multi_label_classification"
    metric = "f1"
    fewest_labels = 1
    labels_anywhere = True

    def scores(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> dict[str, float]:
        chosen = (np.stack(found["logits"]) > 0).astype(np.int32).ravel()
        truth = examples.fixed["labels"].astype(np.int32).ravel()
        return {name: METRICS[name](chosen, truth) for name in ("accuracy", "f1")}

    def rows(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return [
            {
                "labels": [label for label, x in zip(labels, logits, strict=True) if x > 0],
                "probabilities": _named(1 / (1 + np.exp(-logits)), labels),
            }
            for logits in found["logits"]
        ]


class Tokens(Kind):
    task = AlbertForTokenClassification
    problem_type = None
    fewest_labels = 1
    labels_anywhere = True

    def judged_by(self, labels: Sequence[str]) -> str:
        return "f1" if say_entities(labels) else self.metric

    def encode(
        self, source: Any, tokenizer: Tokenizer, labels: Sequence[str], *, labelled: bool = True
    ) -> Encoded:
        return token_classification(
            source,
            tokenizer,
            labels,
            columns=self.columns,
            max_length=self.max_length,
            labelled=labelled,
        )

    def scores(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> dict[str, float]:
        """Of words, and where labels say them of entities."""
        tags = examples.ragged["labels"]
        said, true = [], []
        for row, logits in enumerate(found["logits"]):
            truth = tags.sequence(row)
            known = truth >= 0
            said.append(logits.argmax(-1)[known])
            true.append(truth[known])
        accuracy = float((np.concatenate(said) == np.concatenate(true)).mean())
        if not say_entities(labels):
            return {"accuracy": accuracy}
        named = [[[labels[int(i)] for i in row] for row in rows] for rows in (said, true)]
        return {"accuracy": accuracy} | entity_scores(*named)

    def rows(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """A tag for each word; `None` for one that is beyond `max_length`, or of which the
        tokenizer keeps nothing."""
        ids = examples.ragged["word_ids"]
        _, told = words_of(source, self.columns)
        written = []
        for row, words in enumerate(told):
            of = ids.sequence(row)
            firsts = (of >= 0) & (of != np.concatenate([[-1], of[:-1]]))
            tags: list[str | None] = [None] * len(words)
            classes = found["logits"][row].argmax(-1)
            for word, number in zip(of[firsts], classes[firsts], strict=True):
                tags[word] = labels[int(number)]
            written.append({"tags": tags})
        return written


class Choice(Kind):
    task = AlbertForMultipleChoice
    problem_type = None

    def labels(self, sources: Sequence[Any]) -> tuple[str, ...]:
        return ()

    def encode(
        self, source: Any, tokenizer: Tokenizer, labels: Sequence[str], *, labelled: bool = True
    ) -> Encoded:
        return multiple_choice(
            source, tokenizer, columns=self.columns, max_length=self.max_length, labelled=labelled
        )

    def scores(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> dict[str, float]:
        chosen = np.asarray([logits.argmax() for logits in found["logits"]])
        return {"accuracy": METRICS["accuracy"](chosen, examples.fixed["labels"])}

    def rows(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return [
            {"label": int(logits.argmax()), "probabilities": _softmax(logits).tolist()}
            for logits in found["logits"]
        ]


class QuestionAnswering(Kind):
    """**Arguments:**

    - `doc_stride`, `max_query_length`: of `windows`.
    - `n_best`, `max_answer_length`, `threshold`: of `answers`.
    - `may_be_none`: of `answers`; also true once some question that was read has no answer.
    """

    task = AlbertForQuestionAnswering
    problem_type = None

    def __init__(
        self,
        name: str,
        columns: Columns,
        max_length: int,
        *,
        doc_stride: int = 128,
        max_query_length: int = 64,
        n_best: int = 20,
        max_answer_length: int = 30,
        threshold: float = 0.0,
        may_be_none: bool = False,
    ):
        super().__init__(name, columns, max_length)
        self.doc_stride = doc_stride
        self.max_query_length = max_query_length
        self.n_best = n_best
        self.max_answer_length = max_answer_length
        self.threshold = threshold
        self.may_be_none = may_be_none
        self._windows: dict[int, Windows] = {}

    def read(self, path: str, *, labelled: bool = True) -> Any:
        found = read_questions(path, self.columns, labelled=labelled)
        if labelled:
            self.may_be_none |= any(not one.answers for one in found)
        return found

    def labels(self, sources: Sequence[Any]) -> tuple[str, ...]:
        return ()

    def encode(
        self, source: Any, tokenizer: Tokenizer, labels: Sequence[str], *, labelled: bool = True
    ) -> Encoded:
        found = windows(
            source,
            tokenizer,
            max_length=self.max_length,
            doc_stride=self.doc_stride,
            max_query_length=self.max_query_length,
            labelled=labelled,
        )
        if labelled and not any(found.examples.fixed["start_positions"]):
            raise ValueError(
                "No window holds an answer: every context is longer than all windows, or no "
                "question has an answer. Raise `--max-length`."
            )
        self._windows[id(found.examples)] = found
        return found.examples

    def fingerprint(self, source: Any, examples: Encoded) -> str:
        """Of all answers too: windows hold only the first one, but any counts."""
        found = hashlib.sha256(repr(source).encode())
        return f"{examples.fingerprint()}-{found.hexdigest()[:16]}"

    def answers(self, found: Predictions, examples: Encoded) -> dict[str, Answer]:
        """The answer to each question, by its id, of examples that `encode` gave."""
        return answers(
            self._windows[id(examples)],
            found["start_logits"],
            found["end_logits"],
            n_best=self.n_best,
            max_answer_length=self.max_answer_length,
            may_be_none=self.may_be_none,
            threshold=self.threshold,
        )

    def scores(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> dict[str, float]:
        said = self.answers(found, examples)
        scores = squad_scores(answered(source), {name: one.text for name, one in said.items()})
        if any(not one.answers for one in source):
            # The best threshold may lie above ours: it is found among answers not taken back.
            some = {k: next((c.text for c in a.candidates if c.text), "") for k, a in said.items()}
            none = {name: answer.no_answer for name, answer in said.items()}
            whole = squad_scores(answered(source), some, none)
            scores |= {name: value for name, value in whole.items() if name.startswith("best_")}
        return {k: v if k.endswith("threshold") else v / 100 for k, v in scores.items()}

    def rows(
        self, found: Predictions, source: Any, examples: Encoded, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        said = self.answers(found, examples)
        return [
            {
                "id": name,
                "answer": answer.text,
                # None of all spans could be an answer: JSON has no infinity.
                "no_answer": answer.no_answer if math.isfinite(answer.no_answer) else None,
                "candidates": [one._asdict() for one in answer.candidates],
            }
            for name, answer in said.items()
        ]


KINDS: Mapping[str, type[Kind]] = {
    "classification": Kind,
    "regression": Regression,
    "multilabel": MultiLabel,
    "tokens": Tokens,
    "choice": Choice,
    "qa": QuestionAnswering,
}


def kind_of(task: AlbertTask) -> str:
    """The kind that a task is of."""
    for name, kind in KINDS.items():
        if type(task) is kind.task and getattr(task, "problem_type", None) == kind.problem_type:
            return name
    names = dict.fromkeys(f"`{kind.task.__name__}`" for kind in KINDS.values())
    raise ValueError(
        f"The model is a `{type(task).__name__}`, and not fine-tuned: it is none of "
        f"{', '.join(names)}. Fine-tune it first: `albert finetune --help`. (How a pretrained "
        "model did on held-out text is in its run's `result.json`; `albert fill-mask --score` "
        "judges texts.)"
    )


def predicted(
    trainer: Trainer, task: AlbertTask, examples: Encoded, batch_size: int
) -> dict[str, list[np.ndarray]]:
    """What `predict_step` gives for each example, without padding, in their order."""
    lengths = examples.lengths
    buckets = np.asarray(few_buckets(examples, batch_size))
    place = np.searchsorted(buckets, lengths)
    rows = {int(buckets[i]): np.flatnonzero(place == i) for i in np.unique(place)}
    loaders = {
        str(length): BucketLoader(examples.select(some), batch_size, buckets=(length,))
        for length, some in rows.items()
    }
    outputs = trainer.predict(task, loaders)
    found: dict[str, list[np.ndarray]] = {}
    for length, some in rows.items():
        for name, array in outputs[str(length)].items():
            kept = found.setdefault(name, [np.empty(0)] * len(examples))
            by_token = isinstance(task, AlbertForTokenClassification | AlbertForQuestionAnswering)
            for row, value in zip(some.tolist(), array[: len(some)], strict=True):
                kept[row] = value[: lengths[row]] if by_token else value
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _named(values: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    return {label: round(float(x), 6) for label, x in zip(labels, values, strict=True)}


def check_writable(path: Path) -> None:
    """**Raises:** `OSError` where no file can be written at `path`."""
    if path.is_dir():
        raise OSError(f"`{path}` is a folder. Name a file: `--out FILE`.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"`{path.parent}` is no folder that can be written into: `--out FILE`.")
