"""Tokens on disk, and fixed-length rows of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxlightning.data import DataLoader, DataModule

from ._corpus import Document
from ._tokenizer import SpecialIds, special_ids, tokenizer_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 1
_DTYPES = ("<u2", "<i4")  # for vocabularies up to 65,536 pieces, and larger ones
_CHUNK = 1 << 20  # characters that are encoded at once


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Encoded documents, memory-mapped: `tokens[offsets[i]:offsets[i + 1]]` is document i.

    Each document ends in a [SEP] and has no [CLS]. `header` says what the tokens were made with.
    """

    folder: Path
    tokens: Shaped[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " documents_and_one"]
    header: dict[str, Any]

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(**self.header["special"])

    @property
    def vocab_size(self) -> int:
        return self.header["vocab_size"]

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1


def encode_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    text: str,
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """Encodes documents into a token store: `tokens.bin`, `offsets.npy`, `header.json`.

    A document's lines are encoded one by one and joined: a new line counts as a space. The folder
    appears whole or not at all.

    **Arguments:**

    - `text`: the fingerprint of the text, kept in the header.
    - `progress`: called with the number of characters done so far.

    **Raises:** `ValueError` where there is nothing to encode.
    """
    folder = Path(folder)
    special = special_ids(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype(_DTYPES[vocab_size > 1 << 16])
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        lengths: list[int] = []
        done = 0
        with (scratch / "tokens.bin").open("wb") as file:
            for block in _blocks(documents):
                lines = [document.text.split("\n") for document in block]
                encoded = iter(
                    tokenizer.encode_batch_fast(list(chain(*lines)), add_special_tokens=False)
                )
                for own in lines:
                    ids = [number for _ in own for number in next(encoded).ids]
                    if not ids:
                        continue
                    np.asarray([*ids, special.sep], dtype).tofile(file)
                    lengths.append(len(ids) + 1)
                done += sum(len(document.text) for document in block)
                if progress is not None:
                    progress(done)
        if not lengths:
            raise ValueError("There is no text to encode: no document has a token.")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        np.save(scratch / "offsets.npy", offsets)
        header = {
            "format": _FORMAT,
            "dtype": dtype.str,
            "tokens": int(offsets[-1]),
            "documents": len(lengths),
            "vocab_size": vocab_size,
            "special": special._asdict(),
            "tokenizer": tokenizer_hash(tokenizer),
            "text": text,
        }
        (scratch / "header.json").write_text(json.dumps(header, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return open_tokens(folder)


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= _CHUNK:
            yield block
            block, size = [], 0
    if block:
        yield block


def open_tokens(
    folder: str | Path, *, tokenizer: Tokenizer | None = None, text: str | None = None
) -> TokenStore:
    """Opens a token store, and checks that it is whole and made of what is expected.

    **Raises:** `FileNotFoundError` where there is none; `ValueError` where it is damaged, or was
    made with another tokenizer or from other text.
    """
    folder = Path(folder)
    if not (folder / "header.json").is_file():
        raise FileNotFoundError(f"There are no encoded tokens in `{folder}`.")
    remedy = f"Delete `{folder}`, and it is made anew."
    try:
        header = json.loads((folder / "header.json").read_text())
        if header["dtype"] not in _DTYPES:  # an object's bytes would be taken for its address
            raise ValueError(f"`{str(header['dtype'])[:100]}` is no dtype of tokens")
        dtype = np.dtype(header["dtype"])
        # Mapped, so that what it says of its size is held against the file before memory is asked.
        offsets = np.array(np.load(folder / "offsets.npy", mmap_mode="r"))
        size = (folder / "tokens.bin").stat().st_size
        whole = (
            header["format"] == _FORMAT
            and size == header["tokens"] * dtype.itemsize
            and (offsets.dtype, offsets.shape) == (np.int64, (header["documents"] + 1,))
            and (offsets[0], offsets[-1]) == (0, header["tokens"])
            and bool((np.diff(offsets) > 0).all())
        )
        SpecialIds(**header["special"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"The tokens in `{folder}` are damaged: {error}. {remedy}") from None
    if not whole:
        raise ValueError(
            f"The tokens in `{folder}` are damaged: sizes do not agree with the header. {remedy}"
        )
    expected = {"tokenizer": tokenizer and tokenizer_hash(tokenizer), "text": text}
    for name, value in expected.items():
        if value is not None and header[name] != value:
            raise ValueError(
                f"The tokens in `{folder}` were made with another {name} (`{header[name]}`, "
                f"expected `{value}`). {remedy}"
            )
    tokens = np.memmap(folder / "tokens.bin", dtype, mode="r", shape=(header["tokens"],))
    return TokenStore(folder, tokens, offsets, header)


class TokenRows:
    """Rows of `seq_len` tokens out of some documents of a store: a `DataLoader`'s source.

    The documents, each with its closing [SEP], stand one after the other in a long stream; row i
    is [CLS], the stream's tokens `i * (seq_len - 2)` up to `(i + 1) * (seq_len - 2)`, [SEP]. So a
    row may begin in the middle of a document and hold parts of several, and there is no padding;
    the stream's rest that fills no row is left out. With a `limit`, so many rows at most are used,
    spread evenly over all.

    `rows[numbers]` is `{"input_ids": int32 (len(numbers), seq_len)}`.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: Int[np.ndarray, " documents"],
        seq_len: int,
        limit: int | None = None,
    ):
        if seq_len < 3:
            raise ValueError(f"`seq_len={seq_len}` is too short: [CLS], a token and [SEP] are 3.")
        self.store = store
        self.documents = documents
        self.seq_len = seq_len
        lengths = store.offsets[documents + 1] - store.offsets[documents]
        self._ends = np.cumsum(lengths)
        # Where a document's first token would be in the file, were the stream the file.
        self._shift = store.offsets[documents] - (self._ends - lengths)
        total = int(self._ends[-1]) if len(documents) else 0
        length = total // (seq_len - 2)
        if length == 0:
            raise ValueError(
                f"{len(documents)} documents with {total} tokens do not fill a row of "
                f"`seq_len={seq_len}`. Give more text, or a smaller `seq_len`."
            )
        self._chosen = np.arange(length)
        if limit is not None and limit < length:
            self._chosen = np.linspace(0, length - 1, limit).astype(np.int64)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, rows: Int[np.ndarray, " rows"]) -> dict[str, Int[np.ndarray, "rows seq"]]:
        body = self.seq_len - 2
        stream = self._chosen[np.asarray(rows)][:, None] * body + np.arange(body)
        at = stream + self._shift[np.searchsorted(self._ends, stream, side="right")]
        ids = np.empty((len(stream), self.seq_len), np.int32)
        ids[:, 0] = self.store.special.cls
        ids[:, 1:-1] = self.store.tokens[at]
        ids[:, -1] = self.store.special.sep
        return {"input_ids": ids}

    def counts(self) -> Int[np.ndarray, " vocab"]:
        """How often each piece stands where it can be masked: special tokens count 0."""
        counts = np.zeros(self.store.vocab_size, np.int64)
        for start in range(0, len(self), 4096):
            ids = self[np.arange(start, min(start + 4096, len(self)))]["input_ids"]
            counts += np.bincount(ids.ravel(), minlength=len(counts))
        counts[list(self.store.special)] = 0
        return counts

    def fingerprint(self) -> str:
        header = self.store.header
        which = f"{len(self.documents)} documents, first {self.documents[:1].tolist()}"
        return f"{len(self)} rows {header['text']} {header['tokenizer']} {self.seq_len} {which}"


def split_documents(
    store: TokenStore, fraction: float = 0.05, seed: int = 0
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Parts the documents into those to train on and those to validate on.

    Documents are drawn in a random order until they hold `fraction` of the tokens; one that
    would take validation above twice that is passed over. Both parts keep the store's order.

    **Raises:** `ValueError` where there are fewer than two documents, or none is small enough.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`val_fraction={fraction}` has to lie between 0 and 1.")
    if len(store) < 2:
        raise ValueError(
            "The text is a single document, and validation takes whole documents. Put blank "
            "lines between documents, or pass several files."
        )
    lengths = np.diff(store.offsets)
    wanted = fraction * lengths.sum()
    chosen: list[int] = []
    taken = 0
    for number in np.random.Generator(np.random.Philox(key=seed)).permutation(len(store)):
        if taken < wanted and taken + lengths[number] <= 2 * wanted:
            chosen.append(int(number))
            taken += lengths[number]
    if not chosen:
        chosen = [int(lengths.argmin())]
    validation = np.sort(np.asarray(chosen))
    return np.setdiff1d(np.arange(len(store)), validation), validation


class UnigramBaseline(NamedTuple):
    """What a model reaches that looks at no context.

    - `piece`: id of the piece most frequent in training.
    - `accuracy`: of always answering it, on validation.
    - `cross_entropy`: of training's piece frequencies on validation, in nats. Half a count is
      added to each piece, so that one never seen in training costs a finite amount.
    - `entropy`: of the piece frequencies of all the text, in nats.

    Special tokens, which are never masked, count in none of them.
    """

    piece: int
    accuracy: float
    cross_entropy: float
    entropy: float


def unigram_baseline(
    train: Int[np.ndarray, " vocab"], validation: Int[np.ndarray, " vocab"], special: SpecialIds
) -> UnigramBaseline:
    """The baseline from the pieces' counts in training and validation."""
    ordinary = np.ones(len(train), bool)
    ordinary[list(special)] = False
    smoothed = _shares(np.where(ordinary, train + 0.5, 0.0))
    seen = _shares(validation.astype(np.float64))
    both = _shares((train + validation).astype(np.float64))
    piece = int(train.argmax())
    return UnigramBaseline(
        piece=piece,
        accuracy=float(seen[piece]),
        cross_entropy=-float(np.sum(seen[ordinary] * np.log(smoothed[ordinary]))),
        entropy=-float(np.sum(both * np.log(both, where=both > 0, out=np.zeros_like(both)))),
    )


def _shares(counts: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    return counts / counts.sum()


class PretrainingData(DataModule):
    """Rows for masked language modelling, split into training and validation by document.

    **Arguments:**

    - `store`: from `encode_documents` or `open_tokens`.
    - `seq_len`: tokens in a row, [CLS] and [SEP] included.
    - `batch_size`, `val_batch_size`: rows in a batch.
    - `val_fraction`: of the tokens, kept for validation, in whole documents.
    - `max_val_rows`: validation uses this many rows at most, spread evenly over them.
    - `seed`: of the split and of the order of the training rows.

    **Raises:** `ValueError` where the text is too short for it.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int = 128,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        val_fraction: float = 0.05,
        max_val_rows: int | None = None,
        seed: int = 0,
    ):
        train, validation = split_documents(store, val_fraction, seed)
        self.store = store
        self.train_rows = TokenRows(store, train, seq_len)
        self.val_rows = TokenRows(store, validation, seq_len, max_val_rows)
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_rows, self.batch_size, shuffle=True, seed=self.seed, drop_last=True
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_rows, self.val_batch_size)

    def baseline(self) -> UnigramBaseline:
        """What a model without context reaches on these rows. Reads all of them once."""
        return unigram_baseline(
            self.train_rows.counts(), self.val_rows.counts(), self.store.special
        )
