"""Pairs of segments and packed rows, held against the documents they are of."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from albert_task import RowLoader, SegmentRows, SpecialIds
from albert_task._store import TokenStore

SPECIAL = SpecialIds(0, 1, 2, 3, 4)


def store(documents, folder="made"):
    """A store of documents that are lists of sentences' lengths; each token is its own number."""
    tokens, offsets, begins = [], [0], []
    for sentences in documents:
        for size in sentences:
            begins.append(len(tokens))
            tokens += range(len(tokens) + 10, len(tokens) + 10 + size)
        tokens.append(3)
        offsets.append(len(tokens))
    header = {"special": SPECIAL._asdict(), "vocab_size": len(tokens) + 20, "text": folder}
    header["tokenizer"] = "t"
    as_array = lambda x: np.asarray(x, np.int64)
    numbers = np.asarray(tokens, np.int32)
    return TokenStore(Path(folder), numbers, as_array(offsets), as_array(begins), header)


def drawn(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 15, generator.integers(1, 12)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def made():
    return store(drawn(300))


def everything(rows, epoch=0):
    return rows.take(np.arange(len(rows)) + epoch * len(rows))


def texts_of(batch, packed):
    """Each text: row, positions, ids, types."""
    segments = batch["segment_ids"] if packed else batch["attention_mask"]
    for row, line in enumerate(segments):
        for number in range(1, line.max() + 1):
            at = np.flatnonzero(line == number)
            yield row, number, at, batch["input_ids"][row, at], batch["token_type_ids"][row, at]


def document_of(made, token):
    return int(np.searchsorted(made.offsets, token - 10, side="right")) - 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seq_len", [16, 64])
def test_texts_are_parts_of_documents(made, pairs, packed, seq_len):
    rows = SegmentRows(made, np.arange(300), seq_len, pairs=pairs, packed=packed)
    batch = everything(rows)
    seen = set()
    for row, number, at, ids, types in texts_of(batch, packed):
        assert np.array_equal(at, np.arange(at[0], at[0] + len(at)))
        assert ids[0] == 2
        assert ids[-1] == 3
        if packed:
            np.testing.assert_array_equal(batch["position_ids"][row, at], np.arange(len(at)))
        closing = np.flatnonzero(ids == 3)
        np.testing.assert_array_equal(types, (np.arange(len(ids)) > closing[0]).astype(int))
        parts = [ids[1 : closing[0]]] + [ids[closing[0] + 1 : -1]] * (len(closing) - 1)
        for part in parts:
            np.testing.assert_array_equal(part, np.arange(part[0], part[0] + len(part)))
            seen |= set(part.tolist())
        assert len({document_of(made, int(part[0])) for part in parts}) == 1
        if not pairs:
            assert len(parts) == 1
            continue
        label = batch["sentence_order_label"][row]
        label = label[number - 1] if packed else label
        if len(parts) == 1:
            assert label == -100
        else:
            # In order, the first comes first; where they meet, a sentence ends.
            earlier, later = parts if label == 0 else parts[::-1]
            assert earlier[-1] < later[0]
            border = made.sentences[np.searchsorted(made.sentences + 10, earlier[-1], "right")]
            if len(ids) < seq_len - 3 and not packed:  # nothing was cut off
                assert later[0] - 10 == border == earlier[-1] - 9
    total = len(made.tokens) - 300
    assert len(seen) > (0.8 if seq_len == 16 else 0.93) * total


def test_packed_rows_have_no_padding():
    made = store(drawn(2000, seed=3))
    for pairs in (False, True):
        rows = SegmentRows(made, np.arange(2000), 128, pairs=pairs, packed=True)
        own = everything(rows)["attention_mask"]
        assert own[:-1].mean() > 0.96
    long = store([[12] * 400 for _ in range(20)])
    rows = SegmentRows(long, np.arange(20), 128, packed=True, short=0)
    batch = everything(rows)
    assert batch["attention_mask"][:-1].mean() > 0.995


def test_half_of_the_pairs_are_swapped_and_each_epoch_is_new(made):
    rows = SegmentRows(made, np.arange(300), 32, pairs=True)
    labels = everything(rows)["sentence_order_label"]
    known = labels[labels >= 0]
    assert binomtest(int(known.sum()), len(known)).pvalue > 1e-3
    one, again, other = everything(rows), everything(rows), everything(rows, 1)
    np.testing.assert_array_equal(one["input_ids"], again["input_ids"])
    assert (one["input_ids"] != other["input_ids"]).any()
    assert len(other["input_ids"]) == len(rows)


def test_short_texts():
    long = store([[4] * 3000])
    lengths = []
    for short in (0.0, 0.1, 0.5):
        rows = SegmentRows(long, np.arange(1), 128, short=short)
        own = everything(rows)["attention_mask"].sum(1)
        lengths.append((own < 120).mean())
    assert lengths[0] <= 1 / 90  # the document's end
    assert 0.02 < lengths[1] < 0.25 < lengths[2]


def test_a_row_is_a_function_of_its_number(made):
    rows = SegmentRows(made, np.arange(300), 32, pairs=True, packed=True, seed=4)
    whole = everything(rows, 2)
    numbers = np.asarray([5, 0, len(rows) - 1]) + 2 * len(rows)
    some = SegmentRows(made, np.arange(300), 32, pairs=True, packed=True, seed=4).take(numbers)
    for name, array in some.items():
        np.testing.assert_array_equal(array, whole[name][numbers % len(rows)])
    across = rows.take(np.asarray([0, len(rows), 1]))
    for name, array in across.items():
        np.testing.assert_array_equal(array[[0, 2]], everything(rows)[name][[0, 1]])
        np.testing.assert_array_equal(array[1], everything(rows, 1)[name][0])


def test_validation_rows_are_in_order_and_limited(made):
    rows = SegmentRows(made, np.arange(300), 32, short=0, shuffle=False, limit=7)
    batch = everything(rows)
    assert len(batch["input_ids"]) == len(rows) == 7
    firsts = batch["input_ids"][:, 1]
    assert (np.diff(firsts) > 0).all()
    np.testing.assert_array_equal(batch["input_ids"], everything(rows, 1)["input_ids"])


def test_counts(made):
    rows = SegmentRows(made, np.arange(5), 32)
    counts = rows.counts()
    assert counts.sum() == made.offsets[5] - 5
    assert counts.max() == 1


def test_counts_of_limited_rows(made):
    rows = SegmentRows(made, np.arange(300), 32, shuffle=False, limit=2)
    tokens = everything(rows)["input_ids"]
    assert rows.counts().sum() == (tokens > 4).sum() > 0


def test_short_documents_fill_rows():
    rows = SegmentRows(store([[2]] * 400), np.arange(400), 128, packed=True, shuffle=False, short=0)
    padding = 1 - everything(rows)["attention_mask"][:-1]
    assert padding.sum(1).max() < 16


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_sentence_longer_than_a_row_goes_on_in_the_next(pairs, packed):
    long = store([[5, 1000, 7], [3000], [300, 2]])
    rows = SegmentRows(long, np.arange(3), 64, pairs=pairs, packed=packed, short=0)
    batch = everything(rows)
    words = batch["input_ids"][batch["input_ids"] >= 10]
    assert len(np.unique(words)) == len(words) > 0.9 * len(long.tokens)
    if pairs:
        known = batch["sentence_order_label"] != -100
        assert known.sum() > 0.9 * len(rows)
    for _, _, _, ids, _ in texts_of(batch, packed):
        assert len({document_of(long, int(token)) for token in ids[ids >= 10]}) == 1


def test_a_loader_of_one_source(made):
    rows = SegmentRows(made, np.arange(300), 32)
    loader = RowLoader(rows, 16)
    batches = list(loader.batches(1))
    assert len(batches) == len(loader) == len(rows) // 16
    want = rows.take(len(rows) + np.arange(len(batches) * 16))["input_ids"]
    np.testing.assert_array_equal(np.concatenate([b["input_ids"] for b in batches]), want)
    np.testing.assert_array_equal(next(loader.batches(1, 7))["input_ids"], batches[7]["input_ids"])
    last = RowLoader(rows, 16, drop_last=False)
    sizes = [len(batch["input_ids"]) for batch in last]
    assert sum(sizes) == len(rows)
    assert {shape["input_ids"].shape for shape in last.batch_shapes} == {(s, 32) for s in sizes}


def test_sources_are_mixed_by_weight(made):
    other = store(drawn(100, seed=7), "other")
    shift = 100_000
    other.tokens[other.tokens > 9] += shift
    sources = {
        "a": SegmentRows(made, np.arange(300), 32),
        "b": SegmentRows(other, np.arange(100), 32),
    }
    loader = RowLoader(sources, 20, weights={"a": 1, "b": 3})
    assert len(loader) == (len(sources["a"]) + len(sources["b"])) // 20
    whole = [batch["input_ids"] for epoch in (0, 1) for batch in loader.batches(epoch)]
    of_b = np.asarray([(ids[:, 1] > shift).sum() for ids in whole])
    assert set(of_b) <= {14, 15, 16}
    # Each source goes on by itself: its rows come one after the other, none twice, none left out.
    mine = np.concatenate([ids[ids[:, 1] > shift] for ids in whole])
    np.testing.assert_array_equal(mine, sources["b"].take(np.arange(len(mine)))["input_ids"])
    again = next(loader.batches(1, 3))["input_ids"]
    np.testing.assert_array_equal(again, whole[len(loader) + 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda made: SegmentRows(made, np.arange(3), 5), "`seq_len=5` has to be at least 8"),
        (lambda made: SegmentRows(made, np.arange(3), 16, short=1.0), "`short=1.0` is a probab"),
        (lambda made: SegmentRows(made, np.arange(0), 16), "no documents to make rows of"),
        (lambda made: RowLoader(SegmentRows(made, np.arange(1), 16), 999), "no batch of 999"),
        (
            lambda made: RowLoader({"a": SegmentRows(made, np.arange(9), 16)}, 2, weights={"b": 1}),
            r"`weights` are of \['b'\], but the sources are \['a'\]",
        ),
        (
            lambda made: RowLoader(
                {str(n): SegmentRows(made, np.arange(9), n) for n in (16, 32)}, 2
            ),
            "Sources that are mixed need the same `seq_len`",
        ),
    ],
)
def test_what_cannot_be(made, make, message):
    with pytest.raises(ValueError, match=message):
        make(made)
