"""From tables of texts and labels to encoded examples, for each kind of fine-tuning but answers."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxlightning._nearest import nearest

from ._config import unnamed_labels
from ._encoded import Encoded, Ragged
from ._rows import IGNORED
from ._tables import Table
from ._tokenizer import of_plain_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIRST = ("sentence", "text", "sentence1", "premise", "question1", "question", "review")
SECOND = ("sentence2", "hypothesis", "question2", "pair")
ASKED = ("sentence", "passage", "context")
"""What a question is about: QNLI's, BoolQ's."""
LABEL = ("label", "labels", "class", "score", "target")
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "pos_tags")
CHOICES = ("choices", "endings", "options")
"""Columns by the names that datasets usually give them, the likeliest first."""


class Columns(NamedTuple):
    """Columns by name; `None` are found by the names that are usual."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


USUAL = Columns()


def label_names(tables: Iterable[Table], columns: Columns, kind: str) -> tuple[str, ...]:
    """The labels there are, sorted: numbers as such.

    **Raises:** `ValueError` where there is no column of labels, or a value that can be none.
    """
    found: set[str] = set()
    for table in tables:
        name = _label_column(table, columns, kind)
        for row in range(len(table)):
            found |= set(_names_in(table, name, row, kind))
    numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in found)
    return tuple(sorted(found, key=int if numbers else None))


def _label_column(table: Table, columns: Columns, kind: str) -> str:
    known, what = (TAGS, "tags") if kind == "tokens" else (LABEL, "labels")
    return table.column(columns.label, known, what, "--label-column")


def _names_in(table: Table, column: str, row: int, kind: str) -> list[str]:
    """The names of a row's label or labels."""
    value = table.rows[row][column]
    if kind in ("tokens", "multilabel"):
        parts = _sequence(value, table, column, row, "," if kind == "multilabel" else None)
        return [_name(one, table, column, row) for one in parts]
    return [_name(value, table, column, row)]


def _name(value: Any, table: Table, column: str, row: int) -> str:
    if not isinstance(value, str | int) or value == "":
        raise ValueError(
            f"The `{column}` in {table.where(row)} is {value!r}, but has to be a label: a name or "
            "a whole number. (Numbers to predict are `--task regression`.)"
        )
    return str(value)


def _sequence(
    value: Any, table: Table, column: str, row: int, separator: str | None = None
) -> list[Any]:
    """A list, or a string that is one: in brackets as JSON or Python write it, else parted by
    `separator`, by default at blanks."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return [part.strip() for part in text.split(separator) if part.strip()]
        value = _literal(text)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    parted = "commas" if separator else "blanks"
    raise ValueError(
        f"The `{column}` in {table.where(row)} is {table.rows[row][column]!r}, but has to be a "
        f'list, such as ["a", "b"], or without brackets a text with {parted} in between.'
    )


def _literal(text: str) -> Any:
    """What a list in a cell says, as JSON or as Python's `str` has it, which is how pandas writes
    one. `None` where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    # An array's ['a' 'b'] is Python's ['ab'] too: what is not said the same way is not meant.
    same = str(found).replace(" ", "") == text.replace(" ", "")
    return found if same else None


def _ids(labels: Sequence[str]) -> dict[str, int]:
    """The number of each label; where labels are but numbered, by the numbers too."""
    unnamed = tuple(labels) == unnamed_labels(len(labels))
    numbered = {str(number): number for number in range(len(labels))} if unnamed else {}
    return {label: number for number, label in enumerate(labels)} | numbered


def _class(name: str, ids: Mapping[str, int], table: Table, column: str, row: int) -> int:
    if name not in ids:
        raise ValueError(
            f"The `{column}` in {table.where(row)} is `{name}`, which is no label of the model: "
            f"{', '.join(f'`{label}`' for label in ids)}.{nearest(name, ids)}"
        )
    return ids[name]


class TextPairs(NamedTuple):
    """Texts, and what goes with each, if anything does."""

    first: list[str]
    second: list[str] | None


def text_pairs(table: Table, columns: Columns) -> TextPairs:
    """**Raises:** `ValueError` for columns that are not there, and texts that are empty."""
    known: tuple[str, ...]
    beside: tuple[str, ...]
    guessed = columns.text is None and columns.pair is None
    if guessed and "question" in table.columns and set(ASKED) & set(table.columns):
        known, beside = ("question",), ASKED
    else:
        known, beside = FIRST, () if columns.text else SECOND
    first = table.column(columns.text, known, "texts", "--text-column")
    second = table.optional(columns.pair, beside, "--pair-column")
    return TextPairs(table.strings(first), None if second is None else table.strings(second))


class EncodedPairs(NamedTuple):
    """What `encode_pairs` makes of texts."""

    ragged: dict[str, Ragged]
    cut: Bool[np.ndarray, " sequences"]
    """Which of them were longer."""


def encode_pairs(tokenizer: Tokenizer, texts: TextPairs, max_length: int) -> EncodedPairs:
    """`input_ids` and `token_type_ids` of `[CLS] first [SEP]` or `[CLS] first [SEP] second [SEP]`;
    the longer of two is cut until both fit into `max_length`."""
    cutting = _cutting(tokenizer, max_length)
    inputs: list[Any] = (
        texts.first if texts.second is None else list(zip(texts.first, texts.second, strict=True))
    )
    found = cutting.encode_batch(inputs)
    ragged = {
        "input_ids": Ragged.of([one.ids for one in found]),
        "token_type_ids": Ragged.of([one.type_ids for one in found]),
    }
    return EncodedPairs(ragged, _were_cut(found))


def _were_cut(found: Sequence[Any]) -> Bool[np.ndarray, " sequences"]:
    return np.asarray([bool(one.overflowing) for one in found], bool)


def _cutting(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """A copy that cuts."""
    copy = of_plain_text(tokenizer)
    copy.enable_truncation(max_length, strategy="longest_first")
    return copy


def classification(
    table: Table,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    *,
    columns: Columns = USUAL,
    max_length: int = 128,
    kind: str = "classification",
    labelled: bool = True,
) -> Encoded:
    """Examples of `AlbertForSequenceClassification`.

    **Arguments:**

    - `labels`: by id.
    - `kind`: `"classification"`, `"multilabel"` or `"regression"`.
    - `labelled`: whether the table has to have labels.

    **Raises:** `ValueError` with the place of what cannot be.
    """
    fixed = {}
    if labelled:
        name = _label_column(table, columns, kind)
        ids = _ids(labels)
        if kind == "regression":
            fixed["labels"] = _numbers(table, name)
        elif kind == "multilabel":
            many = np.zeros((len(table), len(labels)), np.float32)
            for row in range(len(table)):
                for label in _names_in(table, name, row, kind):
                    many[row, _class(label, ids, table, name, row)] = 1
            fixed["labels"] = many
        else:
            fixed["labels"] = np.asarray(
                [
                    _class(_names_in(table, name, row, kind)[0], ids, table, name, row)
                    for row in range(len(table))
                ],
                np.int32,
            )
    pairs = encode_pairs(tokenizer, text_pairs(table, columns), max_length)
    return Encoded(pairs.ragged, fixed, cut=pairs.cut)


def _numbers(table: Table, column: str) -> Any:
    found = []
    for row in range(len(table)):
        value = table.rows[row][column]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"The `{column}` in {table.where(row)} is {value!r}, but has to be a number."
            )
        found.append(number)
    return np.asarray(found, np.float32)


def token_classification(
    table: Table,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    *,
    columns: Columns = USUAL,
    max_length: int = 128,
    labelled: bool = True,
) -> Encoded:
    """Examples of `AlbertForTokenClassification`: the first piece of each word has its label, the
    others -100; words beyond `max_length` are left out. `word_ids` says which word a piece is of,
    -1 for special tokens.

    **Raises:** `ValueError` with the place of what cannot be.
    """
    words_in, words = words_of(table, columns)
    tags_in = _label_column(table, columns, "tokens") if labelled else None
    ids = _ids(labels)
    found = _cutting(tokenizer, max_length).encode_batch(words, is_pretokenized=True)
    places = [[-1 if word is None else word for word in one.word_ids] for one in found]
    ragged = {
        "input_ids": Ragged.of([one.ids for one in found]),
        "token_type_ids": Ragged.of([one.type_ids for one in found]),
        "word_ids": Ragged.of(places, -1),
    }
    if tags_in is not None:
        tagged: list[list[int]] = []
        for row, pieces in enumerate(places):
            names = _names_in(table, tags_in, row, "tokens")
            if len(names) != len(words[row]):
                raise ValueError(
                    f"There are {len(names)} `{tags_in}` but {len(words[row])} `{words_in}` in "
                    f"{table.where(row)}."
                )
            classes = [_class(name, ids, table, tags_in, row) for name in names]
            before = [-1, *pieces[:-1]]
            tagged.append(
                [
                    classes[word] if word >= 0 and word != last else IGNORED
                    for word, last in zip(pieces, before, strict=True)
                ]
            )
        ragged["labels"] = Ragged.of(tagged, IGNORED)
    return Encoded(ragged, cut=_were_cut(found))


def words_of(table: Table, columns: Columns = USUAL) -> tuple[str, list[list[str]]]:
    """The column of words of `AlbertForTokenClassification`, and the words of each example."""
    name = table.column(columns.text, TOKENS, "lists of words", "--text-column")
    words = [
        [str(word) for word in _sequence(table.rows[row][name], table, name, row)]
        for row in range(len(table))
    ]
    for row, one in enumerate(words):
        if not one or not all(word.strip() for word in one):
            what = "is empty" if not one else "has an empty word"
            raise ValueError(f"The `{name}` in {table.where(row)} {what}.")
    return name, words


def multiple_choice(
    table: Table,
    tokenizer: Tokenizer,
    *,
    columns: Columns = USUAL,
    max_length: int = 128,
    labelled: bool = True,
) -> Encoded:
    """Examples of `AlbertForMultipleChoice`: a text with each of its choices, which are a column
    of lists (`--pair-column`), or columns `choice0`, `choice1`, … or `ending0`, `ending1`, …; the
    label is the number of the right one, or its letter, `A`, `B`, ….

    **Raises:** `ValueError` with the place of what cannot be.
    """
    known = ("context", "article", "sent1", "startphrase", *FIRST)
    first = table.column(columns.text, known, "texts", "--text-column")
    texts = table.strings(first)
    choices = _choices(table, columns)
    counts = {len(one) for one in choices}
    if len(counts) > 1 or min(counts) < 2:
        raise ValueError(
            f"Every example in `{table.source}` needs the same number of choices, two at least; "
            f"found {', '.join(map(str, sorted(counts)))}."
        )
    (count,) = counts
    # SWAG's endings go on from the second sentence's beginning.
    asked = table.optional(None, ("sent2",) if first == "sent1" else ("question",), "")
    questions = [""] * len(table) if asked in (None, first) else table.strings(asked)
    pairs = TextPairs(
        [text for text in texts for _ in range(count)],
        [
            f"{question} {choice}".strip()
            for question, one in zip(questions, choices, strict=True)
            for choice in one
        ],
    )
    fixed = {}
    if labelled:
        name = table.column(columns.label, ("label", "answer"), "labels", "--label-column")
        fixed["labels"] = np.asarray(
            [_choice(table, name, row, count) for row in range(len(table))], np.int32
        )
    encoded = encode_pairs(tokenizer, pairs, max_length)
    return Encoded(encoded.ragged, fixed, choices=count, cut=encoded.cut)


def _choices(table: Table, columns: Columns) -> list[list[str]]:
    for stem in ("choice", "ending"):
        named = [name for name in table.columns if name.removeprefix(stem).isdigit()]
        if columns.pair is None and len(named) > 1:
            by_name = [table.strings(name) for name in sorted(named, key=lambda n: (len(n), n))]
            return [list(one) for one in zip(*by_name, strict=True)]
    name = table.column(columns.pair, CHOICES, "lists of choices", "--pair-column")
    found = []
    for row in range(len(table)):
        value = table.rows[row][name]
        if isinstance(value, Mapping):  # as `datasets` stores a sequence of structures
            value = value.get("text", value)
        if not isinstance(value, list) or not all(isinstance(c, str) and c for c in value):
            raise ValueError(
                f"The `{name}` in {table.where(row)} is {value!r}, but has to be a list of texts."
            )
        found.append(value)
    return found


def _choice(table: Table, column: str, row: int, count: int) -> int:
    value = table.rows[row][column]
    text = str(value).strip()
    letters = [chr(ord("A") + i) for i in range(count)]
    number = letters.index(text.upper()) if text.upper() in letters else None
    if number is None and text.isdigit():
        number = int(text)
    if number is None or not 0 <= number < count:
        raise ValueError(
            f"The `{column}` in {table.where(row)} is {value!r}, but has to be a number from 0 to "
            f"{count - 1}, or a letter from A to {letters[-1]}."
        )
    return number
