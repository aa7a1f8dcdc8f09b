"""ALBERT's kind of tokenizer: a lower-cased unigram model with `▁` for spaces."""

from __future__ import annotations

import hashlib
import json
import re
import string
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")


_PUNCTUATION = set(string.punctuation) | {"€", "£"}
_WITHIN = set(string.ascii_lowercase) | _PUNCTUATION


class SpecialIds(NamedTuple):
    """The ids of `SPECIAL_TOKENS`."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


class WordStarts(NamedTuple):
    """Which pieces of a vocabulary begin a word, small enough for a hyper-parameter."""

    size: int
    """Pieces in the vocabulary."""
    bits: str
    """One bit a piece, as hexadecimal digits."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordStarts:
        """As google-research/albert (`_is_start_piece_sp`): pieces with SentencePiece's `▁` in
        front, punctuation, and what has other characters than English letters and punctuation."""
        size = tokenizer.get_vocab_size()
        pieces = [tokenizer.id_to_token(number) or "" for number in range(size)]
        return cls.from_table([_begins_a_word(piece) for piece in pieces])

    @classmethod
    def from_table(cls, table: Sequence[bool]) -> WordStarts:
        return cls(len(table), np.packbits(np.asarray(table, bool)).tobytes().hex())

    def table(self) -> Bool[np.ndarray, " vocab"]:
        packed = np.frombuffer(bytes.fromhex(self.bits), np.uint8)
        return np.unpackbits(packed, count=self.size).astype(bool)


def _begins_a_word(piece: str) -> bool:
    if piece.startswith("▁") or piece in _PUNCTUATION:
        return True
    return not set(piece.lower()) <= _WITHIN


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8000) -> Tokenizer:
    """Trains a unigram tokenizer (Kudo 2018) on `texts`; the special tokens get the ids 0 to 4.

    Takes about 2 s a megabyte. The library goes through pieces and characters in a random
    order; scores are rounded and ties ordered by piece, so that the same text gives the same ids.

    **Arguments:**

    - `texts`: paragraphs; a new line inside one counts as a space.
    - `vocab_size`: pieces, special tokens included. Fewer come out where the text has no more.

    **Raises:** `ValueError` where there is no text, or more different characters than pieces.
    """
    from tokenizers import models, trainers

    tokenizer = _dressed(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=_added_tokens(),
        unk_token="<unk>",
        shrinking_factor=0.5,  # twice as fast as the default 0.75, for 1.4 % more tokens
        show_progress=False,
    )
    failure = "it has no word"
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # where no piece is left the library panics: no `Exception`
        failure = str(error)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    # Characters without a score of their own get the lowest one, and 0.0001 more each: undone.
    floor = min(score for _, score in vocabulary) if vocabulary else 0.0
    filler = floor + 0.0001 * sum(len(piece) == 1 for piece, _ in vocabulary)
    scores = {
        piece: round(floor if len(piece) == 1 and score <= filler else score, 6)
        for piece, score in vocabulary
    }
    if set(scores) <= {*SPECIAL_TOKENS, "▁"}:
        raise ValueError(
            f"No tokenizer of `vocab_size={vocab_size}` pieces can be trained on this text: "
            f"{failure}. Give it more text, or more pieces than it has different characters."
        )
    special = [(token, 0.0) for token in SPECIAL_TOKENS]
    pieces = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    pieces = special + [item for item in pieces if item[0] not in SPECIAL_TOKENS]
    return _dressed(models.Unigram(pieces, unk_id=1))


def _dressed(model: Any) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    )
    # "first": no `▁` before what follows a [MASK] at once, so "[MASK]." ends as "fox." does.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(_added_tokens())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def _added_tokens() -> list[Any]:
    from tokenizers import AddedToken

    # lstrip: the [MASK] stands for `▁fox`, space and all, so it takes the space before it.
    return [
        AddedToken(token, lstrip=token == "[MASK]", special=True, normalized=False)
        for token in SPECIAL_TOKENS
    ]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, a SentencePiece `.model`, or a folder that has one.

    A SentencePiece model gets ALBERT's own normalisation around it, as in the released
    `albert-*-v2`: quotes, NFKD, no accents, lower case, then the model's character map.

    **Raises:** `FileNotFoundError`; `ValueError` for a file that is no tokenizer or that lacks
    one of `SPECIAL_TOKENS`.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.json", "spiece.model")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"The folder `{path}` has neither a `tokenizer.json` nor a `spiece.model`."
            )
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no tokenizer at `{path}`. Pass a `tokenizer.json`, a `spiece.model`, or a "
            "folder that has one."
        )
    try:
        if path.suffix == ".model":
            tokenizer = _from_sentencepiece(path.read_bytes())
        else:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise ValueError(f"`{path}` is no tokenizer that can be read: {error}") from None
    special_ids(tokenizer)
    # A file keeps what transformers last used it with, which would silently cut documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_config(positions: int) -> dict[str, Any]:
    """Hugging Face's `tokenizer_config.json` beside a `tokenizer.json`: that it is taken as it is.
    By the model's type alone, transformers 5 would put its own normalisation in its place."""
    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "unk_token": unk,
        "cls_token": cls,
        "sep_token": sep,
        "mask_token": mask,
        "bos_token": cls,
        "eos_token": sep,
        "model_max_length": positions,
    }


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """**Raises:** `ValueError` where the tokenizer lacks one of `SPECIAL_TOKENS`."""
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ids = {token: number for token, number in found.items() if number is not None}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise ValueError(
            f"This tokenizer of {tokenizer.get_vocab_size()} pieces has no "
            + ", ".join(f"`{token}`" for token in missing)
            + ". ALBERT needs "
            + ", ".join(f"`{token}`" for token in SPECIAL_TOKENS)
            + "."
        )
    return SpecialIds(*ids.values())


def of_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for text as people wrote it, in which `[MASK]` and `<pad>` are words like others: with
    the same ids, but names for special tokens that no text has."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    special = [token for token in content["added_tokens"] if token["special"]]
    names = {token["content"]: _NO_CHARACTER + token["content"] for token in special}
    for token in special:
        token["content"] = names[token["content"]]
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): n for piece, n in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    else:
        model["vocab"] = [(names.get(piece, piece), score) for piece, score in model["vocab"]]
    return Tokenizer.from_str(json.dumps(content))


_NO_CHARACTER = "\ufdd0"
"""Unicode sets it aside: it stands in no text (its FAQ on private use and noncharacters)."""


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of all that decides how a tokenizer encodes."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def _from_sentencepiece(data: bytes) -> Tokenizer:
    """SentencePiece's ModelProto, read by hand: 20 lines instead of a dependency on protobuf."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    charsmap = b""
    for field, value in _fields(data):
        if field == 1:
            entry = dict(_fields(value))
            text, score = entry[1].decode(), struct.unpack("<f", entry.get(2, bytes(4)))[0]
            # ALBERT parts "1," into "1" and "," (`encode_pieces` in its tokenization.py).
            pieces.append((text, score - 100 if re.search(r"\d,$", text) else score))
            kinds.append(entry.get(3, 1))
        elif field == 2 and dict(_fields(value)).get(3, 1) != 1:
            raise ValueError("it is a SentencePiece model, but not a unigram one")
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    unknown, control, user_defined = 2, 3, 4
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=kinds.index(unknown)))
    steps: list[Any] = [
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
    ]
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Strip(left=False, right=True))
    tokenizer.normalizer = normalizers.Sequence(steps)
    own = [
        piece
        for (piece, _), kind in zip(pieces, kinds, strict=True)
        if kind == user_defined and piece not in SPECIAL_TOKENS
    ]
    splits: list[Any] = [pre_tokenizers.Metaspace(prepend_scheme="always")]
    if own:
        # Pieces that are always taken whole. As `AddedToken`s they would part the text before the
        # `▁` are put in, and what follows them would begin a word.
        longest = sorted(own, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(piece) for piece in longest))
        splits.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    for (piece, _), kind in zip(pieces, kinds, strict=True):
        if kind in (unknown, control) or piece in SPECIAL_TOKENS:
            lstrip = piece == "[MASK]"
            token = AddedToken(piece, lstrip=lstrip, special=True, normalized=False)
            tokenizer.add_special_tokens([token])
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids.cls), ("[SEP]", ids.sep)],
    )
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The `(number, value)` pairs of a protobuf message; length-delimited values as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = divmod(key, 8)
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where the next thing begins."""
    value = shift = 0
    while True:
        if shift > 63 or at == len(data):
            raise ValueError("it holds a number that has no end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
