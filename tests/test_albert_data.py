"""Encoded tokens on disk, rows of them, the split and the unigram baseline."""

import json
from itertools import chain

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.metrics import log_loss

from albert_task._corpus import Document
from albert_task._data import PretrainingData, TokenRows, split_documents, unigram_baseline
from albert_task._store import encode_documents, open_tokens
from albert_task._tokenizer import SpecialIds, train_tokenizer

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
SENTENCE = "the fox dog jumps over a lazy brown quick and then sleeps"
WORDS = SENTENCE.split()


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(count):
        lines = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(3)]
        yield Document(f"document {number}", "\n".join(lines))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in documents(50)], 60)


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    return encode_documents(documents(40), tokenizer, folder, text="abc")


def test_documents_come_back_token_by_token(store, tokenizer):
    assert len(store) == 40
    for number, document in enumerate(documents(40)):
        lines = [
            tokenizer.encode(line, add_special_tokens=False).ids
            for line in document.text.split("\n")
        ]
        own = store.tokens[store.offsets[number] : store.offsets[number + 1]]
        assert own.tolist() == [*chain(*lines), 3]
    assert store.tokens.dtype == np.uint16
    assert store.vocab_size == tokenizer.get_vocab_size()
    assert store.special == SPECIAL


def test_progress_counts_characters_and_blocks_change_nothing(
    tokenizer, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("albert_task._store._CHUNK", 300)
    done = []
    again = encode_documents(
        documents(40), tokenizer, tmp_path / "t", text="", progress=done.append
    )
    assert len(done) > 5
    assert done[-1] == sum(len(document.text) for document in documents(40))
    assert done == sorted(done)
    np.testing.assert_array_equal(again.tokens, store.tokens)
    np.testing.assert_array_equal(again.offsets, store.offsets)


def test_sentences_begin_where_they_do(store, tokenizer):
    begins = set(store.sentences.tolist())
    assert set(store.offsets[:-1].tolist()) <= begins
    place = 0
    for document in documents(40):
        for line in document.text.split("\n"):
            assert place in begins
            place += len(tokenizer.encode(line, add_special_tokens=False).ids)
        place += 1
    assert len(begins) == 3 * 40


class Counted:
    """A tokenizer that counts what it encodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_batch_fast(self, texts, **how):
        self.encoded += len(texts)
        return self.tokenizer.encode_batch_fast(texts, **how)


def test_an_encoding_that_was_interrupted_goes_on(tokenizer, store, tmp_path, monkeypatch):
    monkeypatch.setattr("albert_task._store._CHUNK", 300)

    def broken():
        yield from documents(25)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encode_documents(broken(), tokenizer, tmp_path / "t", text="abc")
    assert not (tmp_path / "t").exists()
    # What was written after the last note of progress does not count.
    with (tmp_path / ".t-part" / "tokens.bin").open("ab") as file:
        file.write(b"half a block")
    counted = Counted(tokenizer)
    monkeypatch.setattr("albert_task._store.of_plain_text", lambda _: counted)
    again = encode_documents(documents(40), tokenizer, tmp_path / "t", text="abc")
    assert 15 * 3 <= counted.encoded < 30 * 3
    np.testing.assert_array_equal(again.tokens, store.tokens)
    np.testing.assert_array_equal(again.offsets, store.offsets)
    np.testing.assert_array_equal(again.sentences, store.sentences)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_two_at_once_are_not_let_into_one_store(tokenizer, store, tmp_path, monkeypatch):
    monkeypatch.setattr("albert_task._store._CHUNK", 300)
    refused = []

    def second(done):
        with pytest.raises(ValueError, match=r"Another process encodes into `.*\.t-part`. Wait"):
            encode_documents(documents(40), tokenizer, tmp_path / "t", text="abc")
        refused.append(done)

    made = encode_documents(documents(40), tokenizer, tmp_path / "t", text="abc", progress=second)
    assert len(refused) > 5
    np.testing.assert_array_equal(made.tokens, store.tokens)
    again = encode_documents(documents(40), tokenizer, tmp_path / "t", text="abc")
    np.testing.assert_array_equal(again.tokens, store.tokens)


def test_what_was_begun_with_other_text_begins_anew(tokenizer, store, tmp_path):
    def broken():
        yield from documents(25, seed=9)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        encode_documents(broken(), tokenizer, tmp_path / "t", text="other")
    again = encode_documents(documents(40), tokenizer, tmp_path / "t", text="abc")
    np.testing.assert_array_equal(again.tokens, store.tokens)


def test_nothing_to_encode_leaves_nothing_behind(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="There is no text to encode"):
        encode_documents([Document("blank", "")], tokenizer, tmp_path / "t", text="")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_opened_only_where_it_is_what_is_expected(store, tokenizer):
    again = open_tokens(store.folder, tokenizer=tokenizer, text="abc")
    np.testing.assert_array_equal(again.tokens, store.tokens)
    with pytest.raises(ValueError, match=r"made with another text \(`abc`, expected `xyz`\)"):
        open_tokens(store.folder, text="xyz")
    other = train_tokenizer(["another text of some other words, and so on"], 40)
    with pytest.raises(ValueError, match=r"made with another tokenizer .*Delete `.*tokens`"):
        open_tokens(store.folder, tokenizer=other)
    with pytest.raises(FileNotFoundError, match="no encoded tokens in"):
        open_tokens(store.folder.parent)


@pytest.mark.parametrize("damage", ["cut", "header", "offsets", "bit", "format"])
def test_a_damaged_store_is_noticed(tokenizer, tmp_path, damage):
    folder = encode_documents(documents(5), tokenizer, tmp_path / "t", text="").folder
    if damage == "cut":
        data = (folder / "tokens.bin").read_bytes()
        (folder / "tokens.bin").write_bytes(data[:-2])
    elif damage == "bit":
        data = bytearray((folder / "tokens.bin").read_bytes())
        data[7] ^= 4
        (folder / "tokens.bin").write_bytes(data)
    elif damage == "format":
        header = json.loads((folder / "header.json").read_text())
        (folder / "header.json").write_text(json.dumps(header | {"format": 1}))
    elif damage == "header":
        header = json.loads((folder / "header.json").read_text())
        del header["dtype"]
        (folder / "header.json").write_text(json.dumps(header))
    else:
        (folder / "offsets.npy").unlink()
    with pytest.raises(ValueError, match=r"`.*t` are damaged: .*Delete `.*t`, and it is made anew"):
        open_tokens(folder)


def stream_of(store, chosen):
    parts = [store.tokens[store.offsets[i] : store.offsets[i + 1]] for i in chosen]
    return np.concatenate(parts)


@pytest.mark.parametrize("chosen", [list(range(40)), [3], [39, 0, 7, 8]])
@pytest.mark.parametrize("seq_len", [3, 8, 17])
def test_rows_are_the_stream_cut_in_equal_parts(store, chosen, seq_len):
    rows = TokenRows(store, np.asarray(chosen), seq_len)
    body = seq_len - 2
    stream = stream_of(store, chosen)
    expected = stream[: len(stream) // body * body].reshape(-1, body)
    ids = rows[np.arange(len(rows))]["input_ids"]
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[:, 1:-1], expected)
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all()
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(rows[order]["input_ids"], ids[order])


def test_counts_are_those_of_the_pieces_that_can_be_masked(store):
    rows = TokenRows(store, np.arange(40), 8)
    ids = rows[np.arange(len(rows))]["input_ids"]
    expected = np.bincount(ids[ids > 4], minlength=store.vocab_size)
    np.testing.assert_array_equal(rows.counts(), expected)


def test_rows_that_text_does_not_fill_are_refused(store):
    with pytest.raises(ValueError, match=r"1 documents with \d+ tokens do not fill a row"):
        TokenRows(store, np.asarray([0]), 512)
    with pytest.raises(ValueError, match=r"`seq_len=2` is too short"):
        TokenRows(store, np.arange(40), 2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_a_split_parts_whole_documents_by_tokens(store, seed, fraction):
    train, validation = split_documents(store, fraction, seed)
    assert sorted([*train, *validation]) == list(range(40))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    lengths = np.diff(store.offsets)
    share = lengths[validation].sum() / lengths.sum()
    assert fraction <= share <= 2 * fraction
    again = split_documents(store, fraction, seed)
    np.testing.assert_array_equal(again[1], validation)
    other = split_documents(store, fraction, seed + 10)[1]
    assert other.tolist() != validation.tolist()


def test_a_split_of_a_single_document_says_what_to_do(tokenizer, tmp_path):
    one = encode_documents(documents(1), tokenizer, tmp_path / "t", text="")
    with pytest.raises(ValueError, match=r"single document.*blank\s+lines between documents"):
        split_documents(one)
    with pytest.raises(ValueError, match=r"`val_fraction=1.5` has to lie between 0 and 1"):
        split_documents(one, 1.5)


def test_where_every_document_is_large_the_smallest_one_validates(tokenizer, tmp_path):
    two = encode_documents(documents(2), tokenizer, tmp_path / "t", text="")
    train, validation = split_documents(two, 0.01)
    lengths = np.diff(two.offsets)
    assert validation.tolist() == [lengths.argmin()]
    assert train.tolist() == [lengths.argmax()]


def test_the_baseline_is_what_sklearn_and_scipy_say():
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 50, (2, 30))
    train[7] = 0  # a piece that validation has and training has not
    train[:5] = validation[:5] = 0
    found = unigram_baseline(train, validation, SPECIAL)
    labels = np.repeat(np.arange(30), validation)
    shares = np.where(np.arange(30) > 4, train + 0.5, 0.0)
    shares /= shares.sum()
    expected = log_loss(labels, np.tile(shares[5:], (len(labels), 1)), labels=np.arange(5, 30))
    assert found.cross_entropy == pytest.approx(expected, rel=1e-12)
    assert found.entropy == pytest.approx(entropy(train + validation), rel=1e-12)
    assert found.piece == train.argmax()
    assert found.accuracy == pytest.approx(np.mean(labels == found.piece), rel=1e-12)


def test_the_data_module_gives_shuffled_rows_and_a_fixed_validation(store):
    data = PretrainingData(store, seq_len=8, batch_size=4, val_fraction=0.2, seed=3)
    train = np.concatenate([batch["input_ids"] for batch in data.train_dataloader()])
    assert len(train) == len(data.train_rows[0]) // 4 * 4
    in_order = data.train_rows[0][np.arange(len(data.train_rows[0]))]["input_ids"]
    assert train.tolist() != in_order[: len(train)].tolist()
    assert {*map(tuple, train.tolist())} <= {*map(tuple, in_order.tolist())}
    validation = np.concatenate([batch["input_ids"] for batch in data.val_dataloader()])
    every = data.val_rows[0][np.arange(len(data.val_rows[0]))]["input_ids"]
    np.testing.assert_array_equal(validation, every)


def test_validation_rows_are_limited_and_the_baseline_is_that_of_the_rows_used(store):
    data = PretrainingData(store, seq_len=8, batch_size=4, val_fraction=0.4, max_val_rows=6)
    batches = [batch["input_ids"] for batch in data.val_dataloader()]
    assert [len(batch) for batch in batches] == [4, 2]
    ids = np.concatenate(batches)
    counts = np.bincount(ids[ids > 4], minlength=store.vocab_size)
    expected = unigram_baseline(data.train_rows[0].counts(), counts, SPECIAL)
    assert data.baseline() == expected
    loader = data.val_dataloader()
    assert (
        loader.fingerprint()
        != PretrainingData(store, seq_len=8, val_fraction=0.4).val_dataloader().fingerprint()
    )
