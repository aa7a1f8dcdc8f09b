"""Rows of documents' own texts: pairs of segments for sentence order, and packing.

Lan et al. 2020, section 3.1, and google-research/albert's `create_pretraining_data.py`; unlike
there, rows are made anew in each epoch, and a text of a single sentence is never paired with
another document's.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from ._rows import IGNORED
from ._store import TokenStore

Numbers = Int[np.ndarray, " rows"]
Batch = dict[str, Shaped[np.ndarray, "..."]]

_LEAST_TEXT = 4  # the special tokens of a text, and one of its own
_LEAST_ROOM = 16  # what is left of a packed row is filled by another text if it is this long


class Texts(NamedTuple):
    """All texts of an epoch: which of the store's tokens, and in which row. Arrays (texts,)."""

    row: Int[np.ndarray, " texts"]
    """Rows count from 0, each of one text or, packed, of several next to each other."""
    at: Int[np.ndarray, " texts"]
    """Where in its row a text begins, with its [CLS]."""
    first: Int[np.ndarray, " texts"]
    first_length: Int[np.ndarray, " texts"]
    """The first segment, in the store's tokens."""
    second: Int[np.ndarray, " texts"]
    second_length: Int[np.ndarray, " texts"]
    """The second segment; length 0: there is none."""
    order: Int[np.ndarray, " texts"]
    """0: in the document the first comes first, 1: swapped, -100: there is no second."""


class SegmentRows:
    """Rows of `seq_len` tokens out of some documents of a store, made anew in each epoch.

    A text is [CLS] segment [SEP], or with `pairs` [CLS] segment [SEP] segment [SEP], where the
    two follow each other in a document, cut at a sentence's end, and are swapped half of the time.
    Unpacked, a row is one text and padding. Packed, it is filled by one text after another of the
    documents in random order, the last of which is cut to what is left: there is no padding but
    for less than 16 tokens in some rows. A sentence that is longer than a row goes on in the next
    texts. `rows.take(numbers)` gives a dict of arrays (rows, seq):

    - `input_ids`, `attention_mask`, `token_type_ids`;
    - packed: `segment_ids`, the number of each token's text in its row, and `position_ids`, which
      begin again in each;
    - with `pairs`, `sentence_order_label`: (rows,), packed (rows, `max_texts`).

    All of it is a function of `(seed, number)`: row n is row `n % len(rows)` of epoch
    `n // len(rows)`.

    **Arguments:**

    - `documents`: their numbers in the store.
    - `pairs`: whether to make two segments of a text.
    - `packed`: whether a row holds several texts.
    - `short`: the probability of a text that is shorter than there is room for: of a length drawn
      uniformly from 2 on.
    - `seed`: of the order of documents, of lengths, cuts and swaps.
    - `shuffle`: whether documents and rows come in random order; if not, all epochs are the same.
    - `limit`: so many rows of an epoch at most, spread evenly over all.

    **Raises:** `ValueError` for numbers that cannot be, and documents without a full row.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: Int[np.ndarray, " documents"],
        seq_len: int,
        *,
        pairs: bool = False,
        packed: bool = False,
        short: float | int = 0.1,
        seed: int = 0,
        shuffle: bool = True,
        limit: int | None = None,
    ):
        least = 8
        if seq_len < least:
            raise ValueError(f"`seq_len={seq_len}` has to be at least {least}.")
        if not 0 <= short < 1:
            raise ValueError(f"`short={short}` is a probability: at least 0 and below 1.")
        if len(documents) == 0:
            raise ValueError("There are no documents to make rows of.")
        self.store = store
        self.documents = np.asarray(documents)
        self.seq_len = seq_len
        self.pairs = pairs
        self.packed = packed
        self.short = short
        self.seed = seed
        self.shuffle = shuffle
        self.limit = limit
        self.max_texts = max(1, seq_len // _LEAST_TEXT)
        # Closing [SEP]s are no part of a sentence.
        last = np.searchsorted(store.sentences, store.offsets[1:]) - 1
        ends = np.append(store.sentences[1:], store.offsets[-1])
        ends[last] -= 1
        self._begins, self._ends, pieces = _in_pieces(store.sentences, ends, seq_len, pairs)
        until = np.cumsum(pieces)
        first = np.searchsorted(store.sentences, store.offsets[:-1])
        self._first_sentence = until[first] - pieces[first]
        self._last_sentence = until[last] - 1
        self.plan = functools.lru_cache(maxsize=2)(self._plan)
        self._count = len(self.plan(0)[2])

    def __len__(self) -> int:
        """Rows of an epoch: as many as the first one has."""
        return self._count

    def take(self, numbers: Numbers) -> Batch:
        """The rows of these numbers, which go on from epoch to epoch."""
        epochs, places = np.divmod(numbers, len(self))
        found: Batch = {}
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            part = self._rows(epoch, places[chosen])
            if chosen.all():
                return part
            for name, array in part.items():
                whole = found.setdefault(name, np.empty((len(numbers), *array.shape[1:]), np.int32))
                whole[chosen] = array
        return found

    def fingerprint(self) -> dict[str, Any]:
        header = self.store.header
        return {
            "text": header["text"],
            "tokenizer": header["tokenizer"],
            "documents": f"{len(self.documents)}, first {self.documents[:1].tolist()}",
            "rows": len(self),
            "seq_len": self.seq_len,
            "pairs": self.pairs,
            "packed": self.packed,
            "short": self.short,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "limit": self.limit,
        }

    def counts(self) -> Int[np.ndarray, " vocab"]:
        """How often each piece stands in the documents, or in the rows that `limit` leaves of them,
        where it can be masked: special tokens count 0."""
        counts = np.zeros(self.store.vocab_size, np.int64)
        for part in self._all_tokens():
            counts += np.bincount(part, minlength=len(counts))
        counts[list(self.store.special)] = 0
        return counts

    def _all_tokens(self) -> Iterator[Int[np.ndarray, " some"]]:
        if self.limit is not None:
            for first in range(0, len(self), 4096):
                rows = self.take(np.arange(first, min(first + 4096, len(self))))
                yield rows["input_ids"].ravel()
            return
        for first in range(0, len(self.documents), 4096):
            some = self.documents[first : first + 4096]
            begins = self.store.offsets[some]
            lengths = self.store.offsets[some + 1] - begins
            yield self.store.tokens[np.repeat(begins, lengths) + _counting(lengths)]

    # Planning an epoch: which tokens go where

    def _plan(
        self, epoch: int
    ) -> tuple[Texts, Int[np.ndarray, " rows_and_one"], Int[np.ndarray, " order"]]:
        """The texts of an epoch, where each row's texts begin among them, and the order in which
        rows are given."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch * self.shuffle]))
        documents = generator.permutation(self.documents) if self.shuffle else self.documents
        spans = self._spans(documents, generator)
        texts = self._segmented(spans, generator)
        count = int(texts.row[-1]) + 1
        begins = np.searchsorted(texts.row, np.arange(count + 1))
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        if self.limit is not None and self.limit < count:
            order = order[np.linspace(0, count - 1, self.limit).astype(np.int64)]
        return texts, begins, order

    def _spans(
        self, documents: Int[np.ndarray, " documents"], generator: np.random.Generator
    ) -> Int[np.ndarray, "texts 4"]:
        """Whole sentences next to each other for each text: its row, where it begins in it, its
        first sentence, and the one after its last; cut to the room there is later."""
        special = 3 if self.pairs else 2
        room, row, at, texts_in_row = self.seq_len, 0, 0, 0
        draws: Iterator[float] = iter(())
        found: list[int] = []
        for document in documents.tolist():
            first, last = self._first_sentence[document], self._last_sentence[document] + 1
            begins, ends = self._begins[first:last].tolist(), self._ends[first:last].tolist()
            sentence, count, first = 0, len(begins), int(first)
            while sentence < count:
                target = room - special
                if self.short:
                    draw = next(draws, None)
                    if draw is None:
                        draws = iter(generator.random(4096).tolist())
                        draw = next(draws)
                    if draw < self.short:
                        target = 2 + int((target - 2) * draw / self.short)
                # Sentences until there are enough tokens for the room.
                begin = begins[sentence]
                after = bisect.bisect_left(ends, begin + target, sentence, count - 1) + 1
                found += (row, at, first + sentence, first + after)
                # A sentence alone makes no pair, and has a [SEP] less.
                less = 1 if self.pairs and after - sentence == 1 else 0
                at += min(ends[after - 1] - begin, target + less) + special - less
                room = self.seq_len - at
                texts_in_row += 1
                full = room < max(_LEAST_ROOM, special + 1) or texts_in_row == self.max_texts
                if not self.packed or full:
                    row, at, room, texts_in_row = row + 1, 0, self.seq_len, 0
                sentence = after
        return np.asarray(found, np.int64).reshape(-1, 4)

    def _segmented(
        self, spans: Int[np.ndarray, "texts 4"], generator: np.random.Generator
    ) -> Texts:
        row, at, sentence, after = spans.T
        begin, end = self._begins[sentence], self._ends[after - 1]
        next_at = np.append(at[1:], 0)
        same_row = np.append(row[1:] == row[:-1], False)
        alone = (after - sentence == 1) | (not self.pairs)
        # What the plan left room for; the last text of a row goes up to its end.
        target = np.where(same_row, next_at, self.seq_len) - at - np.where(alone, 2, 3)
        # Cut at the end of a random sentence but the last.
        cut = sentence + _random_up_to(generator, np.maximum(after - sentence - 2, 0))
        middle = np.where(alone, end, self._ends[cut])
        resume = np.where(alone, end, self._begins[np.minimum(cut + 1, after - 1)])
        first, second = middle - begin, end - resume
        # The longer one is cut to fit: down to the other, then both alike.
        half = np.where(alone, target, (target + 1) // 2)
        kept_first = np.minimum(first, np.maximum(half, target - second))
        kept_second = np.minimum(second, target - kept_first)
        begin_first = begin + _random_up_to(generator, first - kept_first)
        begin_second = resume + _random_up_to(generator, second - kept_second)
        swapped = (generator.random(len(row)) < 0.5) & ~alone
        order = np.where(alone, IGNORED, swapped.astype(np.int64))
        return Texts(
            row,
            at,
            np.where(swapped, begin_second, begin_first),
            np.where(swapped, kept_second, kept_first),
            np.where(swapped, begin_first, begin_second),
            np.where(swapped, kept_first, kept_second),
            order,
        )

    # Writing rows

    def _rows(self, epoch: int, places: Numbers) -> Batch:
        texts, begins, order = self.plan(epoch)
        # A later epoch may have a few rows less than the first: some of them come twice.
        rows = order[places % len(order)]
        counts = begins[rows + 1] - begins[rows]
        number = _counting(counts)
        which = np.repeat(begins[rows], counts) + number
        line = np.repeat(np.arange(len(rows)), counts)
        second = texts.second_length[which]
        has = second > 0
        head, tail = texts.first_length[which] + 2, np.where(has, second + 1, 0)
        # The batch in pieces, one after the other: of each text [CLS] first [SEP], second [SEP],
        # and the padding up to the next text, or to the end of the row.
        at = texts.at[which]
        following = np.append(at[1:], 0)
        following[np.cumsum(counts) - 1] = self.seq_len
        lengths = np.stack([head, tail, following - at - head - tail], axis=1)
        starts = np.cumsum(lengths).reshape(lengths.shape) - lengths
        begin, middle, padding = starts.T
        place = np.arange(len(rows) * self.seq_len)

        def spread(*of_pieces: Any, dtype: Any = np.int32) -> Shaped[np.ndarray, " tokens"]:
            """For each token a value, by whether it is in a head, a tail or padding."""
            values = np.empty(lengths.shape, dtype)
            values[:, 0], values[:, 1], values[:, 2] = of_pieces
            return np.repeat(values.ravel(), lengths.ravel())

        tokens, special = np.asarray(self.store.tokens), self.store.special
        source = spread(
            texts.first[which] - 1 - begin, texts.second[which] - middle, -padding, dtype=np.int64
        )
        ids = tokens.take(source + place, mode="clip").astype(np.int32)
        ids[begin] = special.cls
        ids[middle - 1] = special.sep
        ids[padding[has] - 1] = special.sep
        segment = spread(number + 1, number + 1, 0)
        own = segment > 0
        ids[~own] = special.pad
        batch: Batch = {"input_ids": ids, "token_type_ids": spread(0, 1, 0)}
        batch["attention_mask"] = own.astype(np.int32)
        if self.packed:
            batch |= {"segment_ids": segment}
            batch["position_ids"] = np.where(own, place - spread(begin, begin, 0), 0)
        batch = {k: x.astype(np.int32, copy=False).reshape(len(rows), -1) for k, x in batch.items()}
        if self.pairs:
            labels = np.full((len(rows), self.max_texts), IGNORED, np.int32)
            labels[line, number] = texts.order[which]
            batch["sentence_order_label"] = labels if self.packed else labels[:, 0]
        return batch


def _in_pieces(
    begins: Int[np.ndarray, " sentences"],
    ends: Int[np.ndarray, " sentences"],
    seq_len: int,
    pairs: bool,
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"], Int[np.ndarray, " sentences"]]:
    """Sentences longer than a row in pieces that fill one, with `pairs` two of them; where pieces
    begin and end, and how many each sentence has."""
    size = (seq_len - 2) // 2 if pairs else seq_len - 2
    lengths = ends - begins
    counts = np.where(lengths > seq_len - 2, -(-lengths // size), 1)
    if (counts == 1).all():
        return begins, ends, counts
    nth = _counting(counts)
    begin, end = np.repeat(begins, counts) + nth * size, np.repeat(ends, counts)
    whole = np.repeat(counts == 1, counts)
    return begin, np.where(whole, end, np.minimum(begin + size, end)), counts


def _random_up_to(
    generator: np.random.Generator, most: Int[np.ndarray, " some"]
) -> Int[np.ndarray, " some"]:
    """Uniform over 0, 1, …, `most`."""
    return (generator.random(len(most)) * (most + 1)).astype(np.int64)


def _counting(counts: Int[np.ndarray, " some"]) -> Int[np.ndarray, " all"]:
    """0, 1, … up to each count, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


class RowLoader:
    """Batches of rows from one source, or from several mixed by weight.

    Of every 1,000 rows each source gives its share, rounded, whatever its own length, and goes on
    from epoch to epoch by itself. A batch is a function of its number.

    **Arguments:**

    - `sources`: a `SegmentRows`, or several by name.
    - `batch_size`: rows in a batch.
    - `weights`: by name, in any unit; by default each source's rows.
    - `drop_last`: whether to leave out an epoch's last, smaller batch; several sources always do.
    """

    def __init__(
        self,
        sources: SegmentRows | Mapping[str, SegmentRows],
        batch_size: int,
        *,
        weights: Mapping[str, float | int] | None = None,
        drop_last: bool = True,
    ):
        self.sources = sources if isinstance(sources, Mapping) else {"": sources}
        given = dict(weights or {name: len(rows) for name, rows in self.sources.items()})
        if set(given) != set(self.sources):
            raise ValueError(
                f"`weights` are of {sorted(given)}, but the sources are {sorted(self.sources)}. "
                "Give one of each."
            )
        if not all(weight > 0 for weight in given.values()):
            raise ValueError(f"All of `weights={given}` have to be above 0.")
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` has to be at least 1.")
        kinds = {(r.seq_len, r.pairs, r.packed, r.store.special) for r in self.sources.values()}
        if len(kinds) > 1:
            raise ValueError(
                "Sources that are mixed need the same `seq_len`, `pairs`, `packed` and special "
                "tokens."
            )
        self.batch_size = batch_size
        self._names = list(self.sources)
        shares = np.asarray([given[name] for name in self._names], np.float64)
        self._turns = _turns(shares / shares.sum())
        self._each = np.bincount(self._turns, minlength=len(self._names))
        self.drop_last = drop_last or len(self.sources) > 1
        self._rows = sum(len(rows) for rows in self.sources.values())
        if len(self) == 0:
            raise ValueError(
                f"There are {self._rows} rows, and no batch of {batch_size}. Make `batch_size` "
                "smaller, or give more text."
            )

    def __len__(self) -> int:
        """Batches in an epoch: all rows there are, once on average."""
        whole, rest = divmod(self._rows, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        for index in range(start, len(self)):
            yield self.batch(epoch, index)

    def batch(self, epoch: int, index: int) -> Batch:
        if len(self._names) == 1:
            rows = self.sources[self._names[0]]
            begin = index * self.batch_size
            end = min(begin + self.batch_size, len(rows))
            return rows.take(np.arange(epoch * len(rows) + begin, epoch * len(rows) + end))
        begin = (epoch * len(self) + index) * self.batch_size
        before, after = self._given(begin), self._given(begin + self.batch_size)
        parts = [
            self.sources[name].take(np.arange(a, b))
            for name, a, b in zip(self._names, before, after, strict=True)
            if b > a
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _given(self, rows: int) -> list[int]:
        """How many of the first so many rows are of each source."""
        blocks, rest = divmod(rows, len(self._turns))
        within = np.bincount(self._turns[:rest], minlength=len(self._names))
        return (blocks * self._each + within).tolist()

    @property
    def batch_shapes(self) -> list[Any]:
        """Abstract batches of all shapes there are."""
        whole, rest = divmod(self._rows, self.batch_size)
        sizes = [self.batch_size] if whole else []
        if rest and not self.drop_last:
            sizes.append(rest)
        one = next(iter(self.sources.values())).take(np.arange(1))
        return [{name: _of(size, array) for name, array in one.items()} for size in sizes]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sources": {name: rows.fingerprint() for name, rows in self.sources.items()},
            "of_1000": self._each.tolist(),
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
        }


def _of(rows: int, array: Shaped[np.ndarray, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)


def _turns(shares: Float[np.ndarray, " sources"]) -> Int[np.ndarray, " thousand"]:
    """Whose turn it is in each of 1,000 rows: evenly spread, as often as the shares say."""
    exact = shares * 1000
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() < 1000:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > 1000:
        counts[np.argmax(counts)] -= 1
    when = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(when, kind="stable")]
