"""Questions about texts: windows over long texts, and from logits back to answers.

The procedure of Devlin et al. 2019 (section 4.2) and of google-research/albert: a text that is too
long is read in windows that overlap, and a token counts in the window where it has most context.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ._encoded import Encoded, Ragged
from ._features import USUAL, Columns
from ._squad_metrics import Answered
from ._tables import SUFFIXES, Table, read_table
from ._tokenizer import of_plain_text, special_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Question(NamedTuple):
    """A question about a text."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    """Texts, and the character each begins with. None: the context does not say."""


class Window(NamedTuple):
    """A part of a context, as the model reads it after the question."""

    question: int
    """The number of the question."""
    first: int
    """Where the context's tokens begin in the row."""
    spans: list[tuple[int, int]]
    """The characters of each of the context's tokens in this window."""
    best: list[bool]
    """Whether this is the window in which the token has the most context."""


class Windows(NamedTuple):
    """All windows of some questions, encoded."""

    questions: Sequence[Question]
    windows: list[Window]
    examples: Encoded


def read_questions(
    path: str | Path, columns: Columns = USUAL, *, labelled: bool = True
) -> list[Question]:
    """Of a SQuAD file (`.json`), or of a table with the columns `question`, `context` and, where
    `labelled`, `answers` as `datasets` has them: `{"text": [...], "answer_start": [...]}`.

    **Raises:** `FileNotFoundError`; `ValueError` for a file that cannot be read, and for an answer
    that is not where it is said to be, with the question's id.
    """
    found = _squad_file(Path(path))
    if found is not None and columns != USUAL:
        raise ValueError(
            f"`{path}` is laid out as SQuAD's files are, and has no columns to choose. Leave out "
            "`--text-column`, `--pair-column` and `--label-column`."
        )
    if found is None:
        found = _of_table(read_table(path), columns, labelled)
    if not found:
        raise ValueError(f"`{path}` holds no question.")
    seen: set[str] = set()
    for one in found:
        if one.id in seen:
            raise ValueError(f"`{path}` has several questions with the id `{one.id}`.")
        seen.add(one.id)
        _check(one, str(path), labelled)
    return found


def _squad_file(path: Path) -> list[Question] | None:
    """`None` where it is another kind of file."""
    if path.suffix != ".json":
        if path.is_file() and path.suffix not in SUFFIXES:
            raise ValueError(f"`{path}` is neither a SQuAD file (`.json`) nor a table.")
        return None
    if not path.is_file():
        raise FileNotFoundError(f"There is no file `{path}`.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return None  # an object a line
        raise ValueError(f"`{path}` is broken, or cut off: {error}.") from None
    if not isinstance(content, dict) or "data" not in content:
        return None
    found = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    given = [] if one.get("is_impossible") else one.get("answers", [])
                    answers = tuple(_answer(a["text"], a["answer_start"]) for a in given)
                    asked = _text(one["question"]), _text(paragraph["context"])
                    found.append(Question(str(one["id"]), *asked, answers))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`{path}` is not laid out as SQuAD's files are: data, paragraphs, qas. After "
            f"{len(found)} questions: {error!r}."
        ) from None
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} has to be a text")
    return value


def _answer(text: Any, start: Any) -> tuple[str, int]:
    """**Raises:** `TypeError` where one of both is of another type."""
    if not isinstance(start, int) or isinstance(start, bool):
        raise TypeError(f"answer_start {start!r} has to be a whole number")
    return _text(text), start


def _of_table(table: Table, columns: Columns, labelled: bool) -> list[Question]:
    question = table.column(columns.text, ("question",), "questions", "--text-column")
    known = ("context", "passage", "text")
    context = table.column(columns.pair, known, "contexts", "--pair-column")
    questions, contexts = table.strings(question), table.strings(context)
    answers: list[tuple[tuple[str, int], ...]] = [()] * len(table)
    if labelled:
        name = table.column(columns.label, ("answers", "answer"), "answers", "--label-column")
        answers = [_answers(table, name, row) for row in range(len(table))]
    named = table.optional(None, ("id",), "")
    ids = [str(row[named] if named else number) for number, row in enumerate(table.rows)]
    return [Question(*parts) for parts in zip(ids, questions, contexts, answers, strict=True)]


def _answers(table: Table, column: str, row: int) -> tuple[tuple[str, int], ...]:
    value = table.rows[row][column]
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, Mapping):
            texts, starts = value["text"], value["answer_start"]
            if isinstance(texts, str):
                texts, starts = [texts], [starts]
            return tuple(_answer(*one) for one in zip(texts, starts, strict=True))
        return tuple(_answer(one["text"], one["answer_start"]) for one in value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"The `{column}` in {table.where(row)} is {value!r}, but has to be "
            '{"text": [...], "answer_start": [...]}.'
        ) from None


def _check(one: Question, path: str, labelled: bool) -> None:
    for name in ("question", "context"):
        if not getattr(one, name).strip():
            raise ValueError(f"The {name} of question `{one.id}` in `{path}` is empty.")
    for text, start in one.answers if labelled else ():
        if not text.strip():
            raise ValueError(
                f"Question `{one.id}` in `{path}` has an answer that is empty. Where the context "
                "does not say, leave the list of answers empty."
            )
        if start < 0 or one.context[start : start + len(text)] != text:
            place = one.context.find(text)
            hint = (
                "which is not in its context at all"
                if place < 0
                else f"which begins at character {place}"
            )
            raise ValueError(
                f"Question `{one.id}` in `{path}` says that its answer {text!r} begins at "
                f"character {start} of the context, where there is "
                f"{one.context[start : start + len(text)]!r}, {hint}. Correct `answer_start`."
            )


def windows(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
    labelled: bool = False,
) -> Windows:
    """Encodes `[CLS] question [SEP] part of the context [SEP]`.

    **Arguments:**

    - `max_length`: tokens in a row at most.
    - `doc_stride`: from the beginning of one window to that of the next, in tokens, as in
      google-research/albert (in transformers it is how far they overlap).
    - `max_query_length`: longer questions are cut.
    - `labelled`: whether to give `start_positions` and `end_positions` of the first answer; both
      are 0, the [CLS], in windows that do not hold all of it.

    **Raises:** `ValueError` where `max_length` leaves no room for the context.
    """
    if doc_stride < 1:
        raise ValueError(f"`doc_stride={doc_stride}` has to be at least 1.")
    special, tokenizer = special_ids(tokenizer), of_plain_text(tokenizer)
    texts = list(dict.fromkeys(one.context for one in questions))
    contexts = dict(
        zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True)
    )
    asked = tokenizer.encode_batch([one.question for one in questions], add_special_tokens=False)
    cls, sep = special.cls, special.sep
    found: list[Window] = []
    ids: list[list[int]] = []
    types: list[list[int]] = []
    starts, ends = [], []
    for number, (one, query) in enumerate(zip(questions, asked, strict=True)):
        head = [cls, *query.ids[:max_query_length], sep]
        room = max_length - len(head) - 1
        if room < 1:
            raise ValueError(
                f"`max_length={max_length}` leaves no room for the context beside question "
                f"`{one.id}` of {len(head)} tokens. Raise it, or lower `max_query_length`."
            )
        context = contexts[one.context]
        parts = _parts(len(context.ids), room, doc_stride)
        best = _best(len(context.ids), parts)
        for part, (begin, length) in enumerate(parts):
            spans = context.offsets[begin : begin + length]
            own = [best[begin + i] == part for i in range(length)]
            found.append(Window(number, len(head), spans, own))
            row = [*head, *context.ids[begin : begin + length], sep]
            ids.append(row)
            types.append([0] * len(head) + [1] * (length + 1))
            if labelled:
                start, end = _answer_tokens(one, spans, len(head))
                starts.append(start)
                ends.append(end)
    fixed = {}
    if labelled:
        fixed = {
            "start_positions": np.asarray(starts, np.int32),
            "end_positions": np.asarray(ends, np.int32),
        }
    ragged = {"input_ids": Ragged.of(ids), "token_type_ids": Ragged.of(types)}
    return Windows(questions, found, Encoded(ragged, fixed))


def _parts(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Where windows begin, and how long they are."""
    found, begin = [], 0
    while True:
        length = min(tokens - begin, room)
        found.append((begin, length))
        if begin + length >= tokens:
            return found
        begin += min(length, stride)


def _best(tokens: int, parts: Sequence[tuple[int, int]]) -> list[int]:
    """The part in which each token has the most context on its poorer side; of equal ones the
    longest, then the first."""
    scores = np.full((len(parts), tokens), -1.0)
    for number, (begin, length) in enumerate(parts):
        left = np.arange(length)
        scores[number, begin : begin + length] = np.minimum(left, left[::-1]) + 0.01 * length
    return scores.argmax(0).tolist()


def _answer_tokens(one: Question, spans: Sequence[tuple[int, int]], first: int) -> tuple[int, int]:
    if not one.answers or not spans:
        return 0, 0
    text, start = one.answers[0]
    begin, end = start, start + len(text)
    # Tokens hold the blank before them; what counts is that they reach into the answer.
    inside = [i for i, (a, b) in enumerate(spans) if b > begin and a < end]
    whole = spans[0][0] <= begin and spans[-1][1] >= end
    if not inside or not whole:
        return 0, 0
    return first + inside[0], first + inside[-1]


class Candidate(NamedTuple):
    """A possible answer; `""`: there is none."""

    text: str
    score: float
    """The sum of both logits."""
    probability: float
    """Among the candidates."""
    start: int
    """The character of the context it begins with; -1 for none."""


class Answer(NamedTuple):
    """What the model answers, and what else it considered, best first."""

    text: str
    candidates: list[Candidate]
    no_answer: float
    """The score of no answer less that of the best answer."""


def answers(
    found: Windows,
    start_logits: Sequence[Float[np.ndarray, " _"]],
    end_logits: Sequence[Float[np.ndarray, " _"]],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    may_be_none: bool = False,
    threshold: float = 0.0,
) -> dict[str, Answer]:
    """The answer to each question, by its id.

    **Arguments:**

    - `start_logits`, `end_logits`: of each window, in its order.
    - `n_best`: candidates that are kept, and starts and ends considered in each window.
    - `max_answer_length`: in tokens.
    - `may_be_none`: whether there may be no answer (SQuAD 2.0): that is what is said where the
      score of none exceeds the best answer's by more than `threshold`.
    """
    by_question: dict[int, list[int]] = collections.defaultdict(list)
    for number, window in enumerate(found.windows):
        by_question[window.question].append(number)
    said = {}
    for number, question in enumerate(found.questions):
        options: list[tuple[float, str, int]] = []
        none = math.inf
        for row in by_question[number]:
            window = found.windows[row]
            start, end = np.asarray(start_logits[row]), np.asarray(end_logits[row])
            none = min(none, float(start[0] + end[0]))
            options += _spans(window, start, end, question.context, n_best, max_answer_length)
        said[question.id] = _choose(options, none, n_best, may_be_none, threshold)
    return said


def _spans(
    window: Window,
    start: Float[np.ndarray, " seq"],
    end: Float[np.ndarray, " seq"],
    context: str,
    n_best: int,
    max_answer_length: int,
) -> list[tuple[float, str, int]]:
    """The best spans of a window: scores, texts, characters."""
    last = window.first + len(window.spans)
    begins = [int(i) for i in np.argsort(-start, kind="stable")[:n_best]]
    finishes = [int(i) for i in np.argsort(-end, kind="stable")[:n_best]]
    found = []
    for i in begins:
        if not window.first <= i < last or not window.best[i - window.first]:
            continue
        for j in finishes:
            if i <= j < min(last, i + max_answer_length):
                a, b = window.spans[i - window.first][0], window.spans[j - window.first][1]
                text = context[a:b]
                lead = len(text) - len(text.lstrip())
                if text.strip():
                    found.append((float(start[i] + end[j]), text.strip(), a + lead))
    return found


def _choose(
    options: list[tuple[float, str, int]],
    none: float,
    n_best: int,
    may_be_none: bool,
    threshold: float,
) -> Answer:
    options.sort(key=lambda option: -option[0])
    kept: list[tuple[float, str, int]] = []
    seen: set[str] = set()
    for option in options:
        if option[1] not in seen and len(kept) < n_best:
            seen.add(option[1])
            kept.append(option)
    best = kept[0][0] if kept else -math.inf
    if may_be_none or not kept:
        kept.append((none, "", -1))
        kept.sort(key=lambda option: -option[0])
    weights = np.exp([score - kept[0][0] for score, _, _ in kept])
    weights /= weights.sum()
    candidates = [
        Candidate(text, score, float(weight), start)
        for (score, text, start), weight in zip(kept, weights, strict=True)
    ]
    takes_none = best == -math.inf or (may_be_none and none - best > threshold)
    text = "" if takes_none else next(c.text for c in candidates if c.text)
    return Answer(text, candidates, none - best)


def answered(questions: Sequence[Question]) -> list[Answered]:
    """As `squad_scores` takes them."""
    return [Answered(one.id, tuple(text for text, _ in one.answers)) for one in questions]
