"""Training and loading of ALBERT's kind of tokenizer."""

import json
import os
import struct
from pathlib import Path

import pytest

from albert_task._tokenizer import (
    SPECIAL_TOKENS,
    SpecialIds,
    load_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
)

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "A dog is not as quick as a fox, and a fox is not as lazy as a dog.",
    "Over and over the brown dog jumps, quick as the fox is lazy.",
    "What jumps over a dog, and is it quick? It is the brown fox, of course.",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, 45)


def test_special_tokens_have_the_first_ids(tokenizer):
    assert special_ids(tokenizer) == SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)


def test_a_vocabulary_has_the_size_asked_for_or_what_the_text_has(tokenizer):
    assert tokenizer.get_vocab_size() == 45
    assert 45 < train_tokenizer(LINES, 4000).get_vocab_size() < 100


def test_blanks_at_the_end_are_nothing(tokenizer):
    for text in ("the fox ", "the fox\n", "the fox \t "):
        assert tokenizer.encode(text).ids == tokenizer.encode("the fox").ids
    assert tokenizer.encode("the [MASK] ").ids == tokenizer.encode("the [MASK]").ids


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert tokenizer_hash(train_tokenizer(iter(LINES), 45)) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(LINES, 40)) != tokenizer_hash(tokenizer)


def test_a_file_that_cuts_and_pads_does_neither_here(tokenizer, tmp_path):
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    whole = tokenizer.encode(LINES[0]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(LINES[0]).ids == whole
    assert loaded.encode("").ids == [2, 3]


def test_text_comes_back_lower_cased_with_single_spaces(tokenizer):
    ids = tokenizer.encode("The  QUICK\nbrown   fox.").ids
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode(ids) == "the quick brown fox."


def test_a_mask_stands_for_a_word_space_and_all(tokenizer):
    plain = tokenizer.encode("the quick fox jumps").ids
    masked = tokenizer.encode("the quick [MASK] jumps").ids
    assert masked.count(4) == 1
    at = masked.index(4)
    assert masked[:at] == plain[:at]
    after = len(masked) - at - 1
    assert masked[-after:] == plain[-after:]
    assert tokenizer.encode("the [MASK].").ids[-2] == tokenizer.encode("a dog.").ids[-2]


def test_what_has_no_piece_is_unknown(tokenizer):
    assert 1 in tokenizer.encode("☃").ids


def test_two_sentences_are_told_apart_by_their_type(tokenizer):
    pair = tokenizer.encode("a fox", "a dog")
    first = pair.ids.index(3) + 1
    assert pair.type_ids == [0] * first + [1] * (len(pair.ids) - first)


@pytest.mark.parametrize(("lines", "size"), [([], 60), (["", " "], 60), (LINES, 10)])
def test_text_that_cannot_be_trained_on_says_so(lines, size):
    with pytest.raises(ValueError, match=f"No tokenizer of `vocab_size={size}` pieces"):
        train_tokenizer(lines, size)


def test_a_saved_tokenizer_is_read_from_file_and_folder(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(tokenizer)


def test_what_is_no_tokenizer_is_refused(tokenizer, tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(FileNotFoundError, match=r"neither a `tokenizer\.json` nor a `spiece"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no tokenizer at `.*absent\.json`"):
        load_tokenizer(tmp_path / "absent.json")
    for name in ("broken.json", "broken.model"):
        (tmp_path / name).write_text("this is none")
        with pytest.raises(ValueError, match=rf"{name}` is no tokenizer that can be read"):
            load_tokenizer(tmp_path / name)
    other = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "[CLS]": 2}, unk_token="<unk>"))
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match=r"of 3 pieces has no `\[SEP\]`, `\[MASK\]`. ALBERT needs"):
        load_tokenizer(tmp_path / "other.json")


# SentencePiece


def varint(value):
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(pieces, model_type=1):
    """A ModelProto written by hand: repeated SentencePiece = 1, TrainerSpec = 2."""
    data = b""
    for text, score, kind in pieces:
        entry = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        data += field(1, entry + field(3, kind))
    return data + field(2, field(3, model_type))


PIECES = [
    ("<pad>", 0.0, 3),
    ("<unk>", 0.0, 2),
    ("[CLS]", 0.0, 4),
    ("[SEP]", 0.0, 4),
    ("[MASK]", 0.0, 4),
    ("▁the", -2.0, 1),
    ("▁fox", -3.0, 1),
    ("▁", -4.0, 1),
    ("1", -5.0, 1),
    (",", -5.0, 1),
    ("1,", -1.0, 1),
]


def test_a_sentencepiece_model_is_read_with_alberts_normalisation(tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentencepiece(PIECES))
    tokenizer = load_tokenizer(tmp_path)
    assert special_ids(tokenizer) == SpecialIds(0, 1, 2, 3, 4)
    assert tokenizer.encode("The  FÓX").tokens == ["[CLS]", "▁the", "▁fox", "[SEP]"]
    # "1," is parted although its piece scores best.
    assert tokenizer.encode("1,").tokens == ["[CLS]", "▁", "1", ",", "[SEP]"]
    assert tokenizer.encode("the [MASK]").ids == [2, 5, 4, 3]


def test_a_sentencepiece_model_of_another_kind_or_cut_short_is_refused(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(sentencepiece(PIECES, model_type=2))
    with pytest.raises(ValueError, match="but not a unigram one"):
        load_tokenizer(path)
    path.write_bytes(sentencepiece(PIECES)[:-3])
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_tokenizer(path)


@pytest.fixture
def released():
    folder = os.environ.get("JAXLIGHTNING_DATA")
    if not folder or not Path(folder, "tokenizer", "spiece.model").is_file():
        pytest.skip("ALBERT's own tokenizer is in the data folder, named by JAXLIGHTNING_DATA")
    return Path(folder, "tokenizer")


def test_the_released_model_encodes_as_published(released):
    ids = [31, 23, 386, 19, 561, 3050, 15, 17, 48, 25, 4997, 9]
    for name in ("spiece.model", "tokenizer.json"):
        tokenizer = load_tokenizer(released / name)
        text = "I was born in 92000, and this is falsé."
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.get_vocab_size() == 30000
        assert special_ids(tokenizer) == SpecialIds(0, 1, 2, 3, 4)


def test_hard_texts_are_encoded_as_by_sentencepiece(released):
    """Recorded from transformers' `AlbertTokenizer`, which runs SentencePiece itself: accents,
    control characters, digits with commas, other scripts, blanks, [MASK]."""
    tokenizer = load_tokenizer(released / "spiece.model")
    recorded = json.loads((Path(__file__).parent / "albert_tokens.json").read_text())
    assert len(recorded) == 13
    for case in recorded:
        assert tokenizer.encode(case["text"]).ids == case["ids"], case["text"]


def test_blanks_around_are_nothing_as_for_sentencepiece(released):
    """SST-2's sentences end in one."""
    tokenizer = load_tokenizer(released / "spiece.model")
    for text in ("hello ", " hello", "hello\t", "\nhello \n"):
        assert tokenizer.encode(text).tokens == ["[CLS]", "▁hello", "[SEP]"]
    assert tokenizer.encode(" ").tokens == ["[CLS]", "[SEP]"]


def test_punctuation_that_parts_words_begins_none(released):
    """`(`, `.` and `-` are pieces that are always taken whole; what follows goes on."""
    tokenizer = load_tokenizer(released / "spiece.model")
    pieces = tokenizer.encode("the U.S. (high-pH)", add_special_tokens=False).tokens
    assert pieces == ["▁the", "▁u", ".", "s", ".", "▁", "(", "high", "-", "ph", ")"]
    offsets = tokenizer.encode("the U.S. (high-pH)", add_special_tokens=False).offsets
    assert [offsets[i] for i in (3, 7, 9)] == [(6, 7), (10, 14), (15, 17)]
