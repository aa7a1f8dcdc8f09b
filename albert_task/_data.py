"""Rows of tokens to pretrain on, split into training and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlightning.data import DataLoader, DataModule

from ._segments import RowLoader, SegmentRows
from ._store import TokenStore
from ._tokenizer import SpecialIds


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
    """Rows to pretrain on, split into training and validation by document.

    By default rows are one long stream of all text (`TokenRows`); with `pairs` or `packed` they
    are documents' own texts (`SegmentRows`).

    **Arguments:**

    - `stores`: from `encode_documents` or `open_tokens`; several are mixed.
    - `weights`: of several stores, in any unit; by default their sizes.
    - `seq_len`: tokens in a row, [CLS] and [SEP] included.
    - `pairs`, `packed`, `short`: of `SegmentRows`; `pairs` are for `AlbertForPreTraining`.
    - `batch_size`, `val_batch_size`: rows in a batch. The masks of a validation, drawn by batch,
      and so its figures a little, depend on the latter.
    - `val_fraction`: of each store's tokens, kept for validation, in whole documents.
    - `max_val_rows`: validation uses this many rows at most, spread evenly over them.
    - `seed`: of the split and of the order of the training rows.

    **Raises:** `ValueError` where the text is too short for it.
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        *,
        weights: Sequence[float | int] | None = None,
        seq_len: int = 128,
        pairs: bool = False,
        packed: bool = False,
        short: float | int = 0.1,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        val_fraction: float = 0.05,
        max_val_rows: int | None = None,
        seed: int = 0,
    ):
        self.stores = [stores] if isinstance(stores, TokenStore) else list(stores)
        if weights is not None and len(weights) != len(self.stores):
            raise ValueError(
                f"There are {len(weights)} `weights`, but {len(self.stores)} sources of text."
            )
        self.weights = weights
        self.segmented = pairs or packed or len(self.stores) > 1
        self.train_rows: list[TokenRows | SegmentRows] = []
        self.val_rows: list[TokenRows | SegmentRows] = []
        how: dict[str, Any] = {"pairs": pairs, "packed": packed, "seed": seed}
        limit = None if max_val_rows is None else -(-max_val_rows // len(self.stores))
        for store in self.stores:
            train, validation = split_documents(store, val_fraction, seed)
            if self.segmented:
                fixed: dict[str, Any] = {"short": 0.0, "shuffle": False, "limit": limit}
                self.train_rows.append(SegmentRows(store, train, seq_len, short=short, **how))
                self.val_rows.append(SegmentRows(store, validation, seq_len, **fixed, **how))
            else:
                self.train_rows.append(TokenRows(store, train, seq_len))
                self.val_rows.append(TokenRows(store, validation, seq_len, limit))
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.seed = seed

    @property
    def store(self) -> TokenStore:
        """The first one, with what all have in common: vocabulary and special tokens."""
        return self.stores[0]

    def train_dataloader(self) -> DataLoader | RowLoader:
        if self.segmented:
            weights = None
            if self.weights is not None:
                weights = {str(i): weight for i, weight in enumerate(self.weights)}
            return RowLoader(_named(self.train_rows), self.batch_size, weights=weights)
        return DataLoader(
            self.train_rows[0], self.batch_size, shuffle=True, seed=self.seed, drop_last=True
        )

    def val_dataloader(self) -> DataLoader | InTurn:
        """All rows of all sources, one source after the other."""
        if not self.segmented:
            return DataLoader(self.val_rows[0], self.val_batch_size)
        return InTurn(
            [
                RowLoader(rows, self.val_batch_size, drop_last=False)
                for rows in _named(self.val_rows).values()
            ]
        )

    def counts(self) -> Int[np.ndarray, " vocab"]:
        """How often each piece can be masked in training. Reads all rows once."""
        return sum(rows.counts() for rows in self.train_rows)  # type: ignore[return-value]

    def baseline(self) -> UnigramBaseline:
        """What a model without context reaches on these rows. Reads all of them once."""
        validation: Any = sum(rows.counts() for rows in self.val_rows)
        return unigram_baseline(self.counts(), validation, self.store.special)


def _named(rows: Sequence[Any]) -> dict[str, SegmentRows]:
    return {str(number): of for number, of in enumerate(rows)}


class InTurn:
    """The batches of several loaders, one loader after the other."""

    def __init__(self, loaders: Sequence[RowLoader]):
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(len(loader) for loader in self.loaders)

    def __iter__(self) -> Iterator[Any]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from number `start` on."""
        for loader in self.loaders:
            yield from loader.batches(epoch, min(start, len(loader)))
            start = max(0, start - len(loader))

    @property
    def batch_shapes(self) -> list[Any]:
        """Abstract batches of all shapes there are."""
        shapes = [shape for loader in self.loaders for shape in loader.batch_shapes]
        return [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]]

    def fingerprint(self) -> dict[str, Any]:
        return {"in_turn": [loader.fingerprint() for loader in self.loaders]}
