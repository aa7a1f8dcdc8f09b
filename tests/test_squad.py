"""Questions: windows over long texts, answers by offsets, and from logits back to text."""

import json

import numpy as np
import pytest

from albert_task import Question, answers, read_questions, squad_scores, train_tokenizer, windows
from albert_task._features import USUAL, Columns
from albert_task._kinds import QuestionAnswering
from albert_task._squad import answered

CONTEXT = (
    "Zürich lies on a Lake. The Rhine (2,857 m³/s) flows past Basel and  Köln.\nIn 1848 the "
    "Swiss wrote a new Constitution, which the cantons took on."
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CONTEXT] * 10, 120)


def question(text, ask="which river?", context=CONTEXT, name="q"):
    return Question(name, ask, context, ((text, context.index(text)),))


def oracle(found):
    """Logits that are highest at the marked tokens."""
    logits = ([], [])
    for row, length in enumerate(found.examples.lengths):
        for name, of in zip(("start_positions", "end_positions"), logits, strict=True):
            line = np.zeros(length)
            line[found.examples.fixed[name][row]] = 5.0 if found.examples.fixed[name][row] else 1.0
            of.append(line)
    return logits


TEXTS = [
    "Zürich",
    "Lake",
    "Rhine",
    "2,857 m³/s",
    "Köln",
    "1848",
    "Swiss",
    "new Constitution",
    "took on",
]


@pytest.mark.parametrize("max_length", [200, 64, 48])
@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(tokenizer, text, max_length):
    """From characters to tokens of each window, and from logits at them to the same characters."""
    asked = [question(text)]
    found = windows(asked, tokenizer, max_length=max_length, doc_stride=6, labelled=True)
    assert (len(found.windows) == 1) == (max_length == 200)
    assert found.examples.lengths.max() <= max_length
    said = answers(found, *oracle(found))["q"]
    assert said.text == text
    assert said.candidates[0].start == CONTEXT.index(text)
    assert squad_scores(answered(asked), {"q": said.text}) == {"exact_match": 100, "f1": 100}


def test_windows_cover_and_overlap(tokenizer):
    found = windows([question("Rhine")], tokenizer, max_length=48, doc_stride=7)
    ids = tokenizer.encode(CONTEXT, add_special_tokens=False)
    query = tokenizer.encode("which river?", add_special_tokens=False).ids
    room = 48 - len(query) - 3
    begin = 0
    best = np.zeros(len(ids.ids), int)
    for row, window in enumerate(found.windows):
        batch = found.examples.batch(np.asarray([row]), 48)
        length = len(window.spans)
        line = batch["input_ids"][0]
        assert line[: window.first].tolist() == [2, *query, 3]
        assert (
            line[window.first : window.first + length].tolist() == ids.ids[begin : begin + length]
        )
        assert line[window.first + length] == 3
        kinds = batch["token_type_ids"][0, : window.first + length + 1]
        assert kinds.tolist() == [0] * window.first + [1] * (length + 1)
        assert length == min(room, len(ids.ids) - begin)
        best[begin : begin + length] += window.best
        begin += 7
    assert (best == 1).all()  # each token counts in exactly one window
    middle = found.windows[1]
    assert not middle.best[0]
    assert middle.best[len(middle.best) // 2]


def test_long_questions_are_cut_and_too_long_ones_refused(tokenizer):
    asked = [question("Rhine", ask="which river flows past Basel " * 20)]
    found = windows(asked, tokenizer, max_length=64, max_query_length=10)
    assert found.windows[0].first == 12
    with pytest.raises(
        ValueError, match="leaves no room for the context beside question `q` of 21"
    ):
        windows(asked, tokenizer, max_length=22, max_query_length=19)


def made(tokenizer, start, end, ask="which river?", **how):
    """The answer where `start` and `end` have high logits: pairs of place in the context, value."""
    found = windows([question("Rhine", ask)], tokenizer)
    first, length = found.windows[0].first, int(found.examples.lengths[0])
    logits = []
    for marks in (start, end):
        line = np.zeros(length)
        for place, value in marks:
            line[first + place if place >= 0 else 0] = value
        logits.append([line])
    return answers(found, *logits, **how)["q"]


def test_spans_that_cannot_be_are_passed_over(tokenizer):
    assert len(made(tokenizer, [(3, 9)], [(1, 9), (4, 5)]).candidates[0].text) > 0
    short = made(tokenizer, [(3, 9)], [(40, 9), (5, 3)], max_answer_length=5)
    longer = made(tokenizer, [(3, 9)], [(40, 9), (5, 3)], max_answer_length=50)
    assert CONTEXT.startswith(short.text, CONTEXT.index(short.text))
    assert len(short.text) < len(longer.text)
    assert short.candidates[0].score == 12
    texts = [one.text for one in longer.candidates]
    assert len(set(texts)) == len(texts)
    assert sum(one.probability for one in longer.candidates) == pytest.approx(1)


def test_no_answer_where_there_may_be_none(tokenizer):
    marks = ([(3, 4), (-1, 5)], [(4, 4), (-1, 5)])
    assert made(tokenizer, *marks).text
    none = made(tokenizer, *marks, may_be_none=True)
    assert none.text == ""
    assert none.no_answer == pytest.approx(2)
    assert made(tokenizer, *marks, may_be_none=True, threshold=2.5).text
    assert none.candidates[0].text == ""


# Files


def squad(qas):
    return {"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}


ANSWER = {"text": "Rhine", "answer_start": CONTEXT.index("Rhine")}


def test_files_of_both_versions_and_tables(tmp_path):
    both = [
        {"id": "a", "question": "which?", "answers": [ANSWER, ANSWER]},
        {"id": "b", "question": "why?", "is_impossible": True, "answers": []},
    ]
    (tmp_path / "squad.json").write_text(json.dumps(squad(both)))
    found = read_questions(tmp_path / "squad.json")
    pair = ("Rhine", ANSWER["answer_start"])
    assert found == [
        Question("a", "which?", CONTEXT, (pair, pair)),
        Question("b", "why?", CONTEXT),
    ]
    rows = [
        {
            "id": one.id,
            "question": one.question,
            "context": one.context,
            "answers": {
                "text": [t for t, _ in one.answers],
                "answer_start": [s for _, s in one.answers],
            },
        }
        for one in found
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_questions(tmp_path / "rows.jsonl") == found
    (tmp_path / "plain.jsonl").write_text(json.dumps({"question": "why?", "context": CONTEXT}))
    assert read_questions(tmp_path / "plain.jsonl", labelled=False)[0].answers == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', "is broken, or cut off"),
        ('{"data": [{"paragraphs": [{}]}]}', "not laid out as SQuAD's files are"),
        ('{"data": []}', "holds no question"),
        (
            json.dumps(
                squad([{"id": "a", "question": "x", "answers": [ANSWER | {"answer_start": 3}]}])
            ),
            r"Question `a` .* answer 'Rhine' begins at character 3 of the context, where there is "
            r"'ich l', which begins at character 27\. Correct",
        ),
        (
            json.dumps(
                squad([{"id": "a", "question": "x", "answers": [ANSWER | {"text": "Elbe"}]}])
            ),
            "which is not in its context at all",
        ),
        (
            json.dumps(squad([{"id": "a", "question": " ", "answers": []}])),
            "question of question `a`",
        ),
        (
            json.dumps(squad([{"id": "a", "question": "x", "answers": []}] * 2)),
            "several questions with the id `a`",
        ),
    ],
)
def test_files_that_cannot_be(tmp_path, content, message):
    (tmp_path / "squad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "squad.json")


def test_columns_of_tables_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"asked": "which river?", "where": CONTEXT}))
    columns = Columns("asked", "where")
    assert read_questions(path, columns, labelled=False)[0].question == "which river?"
    with pytest.raises(ValueError, match=r"questions: .* Name one: `--text-column NAME`"):
        read_questions(path, labelled=False)
    (tmp_path / "squad.json").write_text(json.dumps(squad([])))
    with pytest.raises(ValueError, match=r"has no columns to choose\. Leave out `--text-column`"):
        read_questions(tmp_path / "squad.json", columns)


# The kind of fine-tuning


def kind_and_logits(tokenizer, sure):
    """Ten questions, of which every second has no answer; the logits of the right answers, and of
    none as much higher as `sure` says of each."""
    asked = [
        question("Rhine", name=str(number))
        if number % 2
        else Question(str(number), "which river?", CONTEXT)
        for number in range(10)
    ]
    kind = QuestionAnswering("qa", USUAL, 384)
    examples = kind.encode(asked, tokenizer, (), labelled=True)
    place = int(max(examples.fixed["start_positions"]))
    starts = []
    for number, length in enumerate(examples.lengths):
        line = np.full(length, -9.0)
        line[place], line[0] = 0.0, sure[number] / 2
        starts.append(line)
    ends = [line.copy() for line in starts]
    last = int(max(examples.fixed["end_positions"]))
    for line in ends:
        line[place], line[last] = line[last], line[place]
    return kind, asked, examples, {"start_logits": starts, "end_logits": ends}


def test_the_best_threshold_may_lie_above_the_one_in_use(tokenizer):
    kind, asked, examples, found = kind_and_logits(tokenizer, [5.0, 2.0] * 5)
    kind.may_be_none = True
    scores = kind.scores(found, asked, examples, ())
    assert scores["exact_match"] == 0.5  # all are taken back
    assert (scores["best_exact_match"], scores["best_exact_match_threshold"]) == (1.0, 2.0)
    kind.threshold = 2.0
    assert kind.scores(found, asked, examples, ())["exact_match"] == 1.0


def test_what_has_no_labels_says_nothing_of_answers(tokenizer, tmp_path):
    """Whether there may be none follows from what was learnt from, not from what is predicted."""
    kind, _, examples, found = kind_and_logits(tokenizer, [5.0] * 10)
    (tmp_path / "new.jsonl").write_text(json.dumps({"question": "which?", "context": CONTEXT}))
    kind.read(str(tmp_path / "new.jsonl"), labelled=False)
    assert all(row["answer"] for row in kind.rows(found, [], examples, ()))
    qas = [{"id": "a", "question": "which?", "answers": []}]
    (tmp_path / "squad.json").write_text(json.dumps(squad(qas)))
    kind.read(str(tmp_path / "squad.json"))
    assert not any(row["answer"] for row in kind.rows(found, [], examples, ()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "After 0 questions: .*None has to be a text"),
        ({"answers": [{"text": "a", "answer_start": "1"}]}, "answer_start '1' has to be a whole"),
        ({"answers": [{"text": "a", "answer_start": 0.5}]}, "answer_start 0.5 has to be a whole"),
        ({"answers": [{"text": "c", "answer_start": -1}]}, "begins at character -1"),
        ({"answers": [{"text": "", "answer_start": 0}]}, "`1` in .* has an answer that is empty"),
        ({"answers": [{"text": 1, "answer_start": 0}]}, "1 has to be a text"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_questions_of_another_type(tmp_path, change, message, suffix):
    one = {"id": "1", "question": "what", "answers": [{"text": "a", "answer_start": 0}]} | change
    paragraph = {"context": "a b c", "qas": [one]}
    row = one | {"context": "a b c"}
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        json.dumps({"data": [{"paragraphs": [paragraph]}]} if suffix == "json" else row)
    )
    if suffix == "jsonl" and "begins" not in message and "empty" not in message:
        message = "`question` in line 1 .* is empty|`answers` in line 1 of .* but has to be"
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_no_span_at_all_is_no_number_in_json(tokenizer):
    kind = QuestionAnswering("qa", USUAL, 64, may_be_none=True)
    asked = [question("Rhine")]
    examples = kind.encode(asked, tokenizer, ())
    logits = [np.zeros(length) for length in examples.lengths]
    for line in logits:
        line[0] = 9.0
    found = {"start_logits": logits, "end_logits": logits}
    kind.n_best = 1
    (row,) = kind.rows(found, asked, examples, ())
    assert (row["answer"], row["no_answer"]) == ("", None)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
