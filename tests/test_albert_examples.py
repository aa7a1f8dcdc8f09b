"""Examples for fine-tuning: files, encoding, batches of few shapes, and clear errors."""

import itertools
import json

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from albert_task import BucketLoader, Encoded, train_tokenizer
from albert_task._encoded import Ragged, bucket_lengths
from albert_task._features import (
    Columns,
    classification,
    label_names,
    multiple_choice,
    text_pairs,
    token_classification,
    words_of,
)
from albert_task._kinds import KINDS
from albert_task._tables import Table, read_table

TEXT = "the quick brown fox jumps over a lazy dog while it rains in the old town"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 20, 60)


def table(*rows, **columns):
    if columns:
        rows = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
    return Table(list(rows), "made.csv", list(range(2, 2 + len(rows))))


# Files

ROWS = [
    {"sentence": 'it "rains", now', "label": "bad"},
    {"sentence": "good\u2028day", "label": "good"},
]


def write(path):
    if path.suffix == ".tsv":
        lines = ["sentence\tlabel", *(f"{r['sentence']}\t{r['label']}" for r in ROWS)]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif path.suffix == ".csv":
        quoted = [r["sentence"].replace('"', '""') for r in ROWS]
        lines = [
            "sentence,label",
            *(f'"{t}",{r["label"]}' for t, r in zip(quoted, ROWS, strict=True)),
        ]
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        features = datasets.Features(
            sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
        )
        datasets.Dataset.from_list(ROWS, features=features).save_to_disk(path)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet", "saved"])
def test_all_files_give_the_same_rows(tmp_path, name):
    write(tmp_path / name)
    found = read_table(tmp_path / name)
    assert found.columns == ("sentence", "label")
    assert list(found.rows) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "is empty"),
        ("a.tsv", "sentence\tlabel\n", "holds no example"),
        (
            "a.tsv",
            "a\tb\n1\t2\n3\n",
            "Line 3 of .* has 1 columns, but its header names 2: `a`, `b`",
        ),
        ("a.tsv", "a\tb\ta\n1\t2\t3\n", "has several columns `a`"),
        ("a.csv", 'a,b\n1,"2\n', "is broken on line 2: unexpected end of data"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "is broken on line 2"),
        ("a.jsonl", '{"a": 1}\n{"b": 2}\n', "Line 2 of .* other keys than the first: .* `a`, `b`"),
        ("a.jsonl", "[1]\n", "has a JSON list on line 1"),
        ("a.parquet", "PAR1 but not", "cannot be read as parquet"),
        ("a.xlsx", "x", r"ends in none of `\.tsv`, `\.csv`"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_no_file_and_no_dataset(tmp_path, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"no file or folder of a dataset.*no network here"):
        read_table(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.tsv"):
        read_table(tmp_path / "absent.tsv")  # the hub is not asked


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xe9 at offset 18"):
        read_table(tmp_path / "a.tsv")


def test_classes_of_a_dataset_become_their_names(tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B"]))
    features = datasets.Features({"tags": tags, "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"tags": [[0, 1], [1]], "label": [1, -1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    found = read_table(tmp_path / "set").rows
    assert found == [{"tags": ["O", "B"], "label": "yes"}, {"tags": ["B"], "label": None}]


# Columns


@pytest.mark.parametrize(
    ("columns", "first", "second"),
    [
        (("idx", "sentence", "label"), "sentence", None),
        (("sentence1", "sentence2"), "sentence1", "sentence2"),
        (("premise", "hypothesis"), "premise", "hypothesis"),
        (("question", "sentence"), "question", "sentence"),
        (("question1", "question2"), "question1", "question2"),
        (("text", "label"), "text", None),
    ],
)
def test_columns_are_found(columns, first, second):
    found = text_pairs(table({name: f"in {name}" for name in columns}), Columns())
    assert found.first == [f"in {first}"]
    assert found.second == (None if second is None else [f"in {second}"])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"a": "x"}],
            Columns(),
            "no column that is known to hold texts.*Found: `a`. Name one: `--te",
        ),
        (
            [{"body": "x"}],
            Columns(text="bodi"),
            "no column `bodi`, .*Found: `body`.*Did you mean `body`",
        ),
        ([{"text": "x"}, {"text": "  "}], Columns(), "`text` in line 3 of `made.csv` is empty"),
        ([{"text": None}], Columns(), "`text` in line 2 of `made.csv` is empty"),
        ([{"text": 3}], Columns(), "holds 3, but has to be a text"),
    ],
)
def test_columns_that_cannot_be(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        text_pairs(table(*rows), columns)


# Labels


def test_labels_are_found_and_sorted():
    one = table(text=["x", "y"], label=["good", "bad"])
    assert label_names([one, table(text=["z"], label=["so so"])], Columns(), "classification") == (
        "bad",
        "good",
        "so so",
    )
    numbers = table(text=["x"] * 3, label=["10", "2", "-1"])
    assert label_names([numbers], Columns(), "classification") == ("-1", "2", "10")
    many = table(text=["x", "y"], labels=["b,a", ""])
    assert label_names([many], Columns(), "multilabel") == ("a", "b")
    blanks = table(text=["x"], labels=["science fiction, drama"])
    assert label_names([blanks], Columns(), "multilabel") == ("drama", "science fiction")
    tags = table(tokens=[["a", "b"]], ner_tags=[[0, 3]])
    assert label_names([tags], Columns(), "tokens") == ("0", "3")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (['a "b', "c"], ['a "b', "c"]),
        ('["a", "b c"]', ["a", "b c"]),
        ("['a', \"it's\", 'b c']", ["a", "it's", "b c"]),  # as pandas' to_csv writes a list
        ("[0, 3]", ["0", "3"]),
        ("In 3,000 years , no", ["In", "3,000", "years", ",", "no"]),
    ],
)
def test_lists_in_cells(cell, words):
    assert words_of(table(words=[cell]))[1] == [words]


@pytest.mark.parametrize("cell", ["['a' 'b']", "[0 3]", "['a', 'b", "['a' 'b'\n 'c']", 7, "[{}]"])
@pytest.mark.parametrize("kind", ["tokens", "multilabel"])
def test_lists_in_cells_that_cannot_be(cell, kind):
    """Such as pandas writes arrays, which look like lists."""
    one = table(text=["x"], labels=[cell])
    with pytest.raises(ValueError, match=r"`labels` in line 2 of `made.csv` .* has to be a l"):
        label_names([one], Columns(label="labels"), kind)


def test_labels_that_look_like_numbers():
    found = table(text=["x"] * 3, label=["--1", "-", "²"])
    assert label_names([found], Columns(), "classification") == ("-", "--1", "²")
    true = table(text=["x"] * 2, answer=[True, False])
    assert label_names([true], Columns(label="answer"), "classification") == ("False", "True")


@pytest.mark.parametrize(
    ("kind", "labels", "few"),
    [
        ("classification", ["good", "good"], "only the label `good`, but .* 2 at least"),
        ("multilabel", ["", ""], "no label, but .* 1 at least"),
    ],
)
def test_too_few_labels(kind, labels, few):
    one = table(text=["x", "y"], label=labels)
    with pytest.raises(ValueError, match=rf"`made.csv` has {few}\. Is it the right column\?"):
        KINDS[kind](kind, Columns(), 64).labels([one])


def test_labels_that_only_have_numbers(tokenizer):
    """As models of transformers whose classes nobody has named."""
    one = table(text=["x", "y", "z"], label=["1", 0, "LABEL_1"])
    examples = classification(one, tokenizer, ("LABEL_0", "LABEL_1"))
    assert examples.fixed["labels"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="`2`, which is no label of the model"):
        classification(table(text=["x"], label=[2]), tokenizer, ("LABEL_0", "LABEL_1"))


def test_which_columns_are_read():
    one = table(question=["a"], passage=["b"], title=["c"], label=["d"])
    assert text_pairs(one, Columns()) == (["a"], ["b"])
    label_names([one], Columns(), "classification")
    expected = "Of `made.csv`: `question`, `passage`, `label`; not used: `title`."
    assert one.usage() == expected


def test_classes_of_texts_and_pairs(tokenizer):
    one = table(sentence1=["the fox", TEXT], sentence2=["a dog", "it rains"], label=["y", "n"])
    examples = classification(one, tokenizer, ("n", "y"), max_length=24)
    batch = examples.batch(np.arange(2), 24)
    ids = tokenizer.encode("the fox", "a dog")
    assert batch["input_ids"][0, : len(ids.ids)].tolist() == ids.ids
    assert batch["token_type_ids"][0, : len(ids.ids)].tolist() == ids.type_ids
    assert batch["attention_mask"].sum(1).tolist() == [len(ids.ids), 24]
    assert (examples.cut, examples.select(np.arange(1)).cut) == (1, 0)
    assert batch["labels"].tolist() == [1, 0]
    second = batch["input_ids"][1]
    assert (second == tokenizer.token_to_id("[SEP]")).sum() == 2  # the longer one was cut


def test_texts_hold_no_special_tokens(tokenizer):
    """`[MASK]` in a text that people wrote is a word like others."""
    found = classification(table(text=["a [MASK] <pad> fox"]), tokenizer, (), labelled=False)
    assert 4 not in found.ragged["input_ids"].flat
    assert 0 not in found.ragged["input_ids"].flat
    assert tokenizer.encode("a [MASK]").ids.count(4) == 1


def test_numbers_and_several_labels(tokenizer):
    one = table(text=["x", "y"], score=["1.5", 2])
    found = classification(one, tokenizer, ("score",), kind="regression")
    assert found.fixed["labels"].tolist() == [1.5, 2]
    many = table(text=["x", "y", "z"], labels=["b, a", "", ["a"]])
    found = classification(many, tokenizer, ("a", "b"), kind="multilabel")
    assert found.fixed["labels"].tolist() == [[1, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("label", "kind", "message"),
    [
        ("great", "classification", "`label` in line 2 .* `great`, which is no label of the model"),
        ("goo", "classification", "Did you mean `good`"),
        (1.5, "classification", "has to be a label: a name or a whole number"),
        ("", "classification", "is '', but has to be a label"),
        ("many", "regression", "is 'many', but has to be a number"),
        ("nan", "regression", "is 'nan', but has to be a number"),
        (None, "regression", "is None, but has to be a number"),
    ],
)
def test_labels_that_cannot_be(tokenizer, label, kind, message):
    with pytest.raises(ValueError, match=message):
        classification(table(text=["x"], label=[label]), tokenizer, ("bad", "good"), kind=kind)


def test_tags_of_words(tokenizer):
    words = [["the", "quickfox", "rains"], ["dog"] * 30]
    tags = [["O", "ANIMAL", "O"], ["ANIMAL"] * 30]
    one = table(tokens=words, tags=tags)
    examples = token_classification(one, tokenizer, ("ANIMAL", "O"), max_length=40)
    batch = examples.batch(np.arange(2), 40)
    of = batch["word_ids"][0]
    assert of[0] == -1
    assert set(of) == {-1, 0, 1, 2}
    labels = batch["labels"][0]
    for word, label in ((0, 1), (1, 0), (2, 1)):
        places = np.flatnonzero(of == word)
        assert labels[places[0]] == label
        assert (labels[places[1:]] == -100).all()
    assert (labels[of == -1] == -100).all()
    assert len(np.flatnonzero(of == 1)) > 1
    with pytest.raises(ValueError, match="There are 2 `tags` but 3 `tokens` in line 2"):
        token_classification(table(tokens=words[:1], tags=[["O", "O"]]), tokenizer, ("O",))
    with pytest.raises(ValueError, match=r"`tokens` in line 2 .* has an empty word"):
        token_classification(table(tokens=[["a", " "]], tags=[["O", "O"]]), tokenizer, ("O",))


def test_each_word_is_given_the_tag_of_its_own_first_piece(tokenizer):
    """Also behind a word of which the tokenizer keeps nothing; one that was cut off has none."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.normalizer = normalizers.StripAccents()
    told = table(tokens=[["fox", "\u0301", "a", "old"], ["a", *["fox"] * 9]])
    kind, labels = KINDS["tokens"]("tokens", Columns(), 12), ["A", "B"]
    examples = kind.encode(told, own, labels, labelled=False)
    ids = examples.ragged["word_ids"]
    # Words of an even number are A's, others B's; each further piece says the contrary.
    found = [
        np.asarray([np.eye(2)[(word + (word == before)) % 2] for before, word in pairs])
        for pairs in [itertools.pairwise([-1, *ids.sequence(row)]) for row in range(2)]
    ]
    first, second = (row["tags"] for row in kind.rows({"logits": found}, told, examples, labels))
    assert first == ["A", None, "A", "B"]
    assert second[:2] == ["A", "B"]
    assert len(second) == 10
    assert second[-1] is None


@pytest.mark.parametrize(
    "columns",
    [
        {"context": ["it rains"], "choices": [["the dog", "a fox", "over"]], "label": [2]},
        {"sent1": ["it rains"], "ending0": ["the dog"], "ending1": ["a fox"], "ending2": ["over"],
         "label": ["2"]},
        {"sent1": ["it rains"], "sent2": ["the"], "ending0": ["dog"], "ending1": ["a fox"],
         "ending2": ["over"], "label": [2]},
        {"article": ["it rains"], "question": ["the"], "options": [["dog", "a fox", "over"]],
         "answer": ["C"]},
    ],
)  # fmt: skip
def test_choices(tokenizer, columns):
    examples = multiple_choice(table(**columns), tokenizer)
    batch = examples.batch(np.arange(1), 32)
    assert batch["input_ids"].shape == (1, 3, 32)
    assert batch["labels"].tolist() == [2]
    last = "the over" if {"question", "sent2"} & set(columns) else "over"
    ids = tokenizer.encode("it rains", last).ids
    assert batch["input_ids"][0, 2, : len(ids)].tolist() == ids


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"context": ["x", "y"], "choices": [["a", "b"], ["a"]], "label": [0, 0]}, "found 1, 2"),
        ({"context": ["x"], "choices": ["a"], "label": [0]}, "has to be a list of texts"),
        (
            {"context": ["x"], "choices": [["a", "b"]], "label": [2]},
            "a number from 0 to 1, or a lett",
        ),
        ({"context": ["x"], "label": [0]}, "no column that is known to hold lists of choices"),
    ],
)
def test_choices_that_cannot_be(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        multiple_choice(table(**columns), tokenizer)


# Batches


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 60, 203)
    ids = Ragged.of([list(range(1, size + 1)) for size in sizes])
    return Encoded({"input_ids": ids}, {"number": np.arange(203, dtype=np.int32)})


def test_the_best_buckets_by_trying_all():
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.integers(1, 50, 40)
        rounded = -(-lengths // 4) * 4
        options = np.unique(rounded)

        def cost(buckets, rounded=rounded):
            return sum(min(b for b in buckets if b >= n) for n in rounded)

        every = itertools.chain(*(itertools.combinations(options, k) for k in (1, 2, 3)))
        least = min(cost(some) for some in every if some[-1] == options[-1])
        found = bucket_lengths(lengths, most=3, multiple=4)
        assert len(found) <= 3
        assert cost(found) == least


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_example_comes_once_in_few_shapes(examples, shuffle):
    loader = BucketLoader(examples, 16, buckets=(24, 40, 48, 64), shuffle=shuffle, seed=3)
    batches = list(loader.batches(1))
    assert len(batches) == len(loader) == 13
    shapes = {batch["input_ids"].shape for batch in batches}
    assert shapes == {shape["input_ids"].shape for shape in loader.batch_shapes}
    assert len(shapes) == 4
    assert BucketLoader(examples, 16).buckets == (64,)  # too few for several shapes
    assert len(BucketLoader(examples, 1).buckets) == 4
    seen = np.concatenate([b["number"][b["example_weight"] > 0] for b in batches])
    assert sorted(seen.tolist()) == list(range(203))
    for batch in batches:
        sizes = examples.lengths[batch["number"]]
        np.testing.assert_array_equal(batch["attention_mask"].sum(1), sizes)
        np.testing.assert_array_equal(batch["input_ids"].max(1), sizes)
    again = next(loader.batches(1, 5))
    np.testing.assert_array_equal(again["number"], batches[5]["number"])
    other = next(loader.batches(2, 5))
    assert (other["number"] != again["number"]).any() == shuffle


def test_some_of_the_examples(examples):
    some = examples.select(np.asarray([7, 3]))
    assert len(some) == 2
    assert some.batch(np.arange(2), 64)["number"].tolist() == [7, 3]
    assert some.lengths.tolist() == examples.lengths[[7, 3]].tolist()


def test_loaders_that_cannot_be(examples):
    with pytest.raises(
        ValueError, match=r"has 59 tokens, more than the longest of `buckets=\(8, 16\)`"
    ):
        BucketLoader(examples, 4, buckets=(16, 8))
    with pytest.raises(ValueError, match="`batch_size=0` has to be at least 1"):
        BucketLoader(examples, 0)
