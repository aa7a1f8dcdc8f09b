"""Encoded examples of different lengths, and batches of them in a few shapes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped

Rows = Int[np.ndarray, " rows"]


class Ragged(NamedTuple):
    """Sequences one after the other: number i is `flat[offsets[i]:offsets[i + 1]]`."""

    flat: Int[np.ndarray, " all"]
    offsets: Int[np.ndarray, " sequences_and_one"]
    fill: int = 0
    """What pads a sequence."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], fill: int = 0) -> Ragged:
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        flat = np.fromiter((x for one in sequences for x in one), np.int32, int(offsets[-1]))
        return cls(flat, offsets, fill)

    def lengths(self) -> Int[np.ndarray, " sequences"]:
        return np.diff(self.offsets)

    def sequence(self, number: int) -> Int[np.ndarray, " length"]:
        return self.flat[self.offsets[number] : self.offsets[number + 1]]

    def padded(self, rows: Rows, length: int) -> Int[np.ndarray, "rows length"]:
        """The sequences `rows`, of `length` each, cut or filled up."""
        column = np.arange(length)
        begins = self.offsets[rows][:, None]
        inside = column < (self.offsets[rows + 1][:, None] - begins)
        at = np.minimum(begins + column, len(self.flat) - 1)
        return np.where(inside, self.flat[at], np.int32(self.fill))


class Encoded:
    """Examples as the model takes them, of whatever length.

    **Arguments:**

    - `ragged`: by the batch's key, what has a number for each token; `input_ids` among them.
    - `fixed`: by key, what has one entry an example, such as labels.
    - `choices`: sequences an example; more than one for multiple choice.
    - `cut`: which sequences were longer; by default none.
    """

    def __init__(
        self,
        ragged: Mapping[str, Ragged],
        fixed: Mapping[str, Shaped[np.ndarray, ...]] | None = None,
        choices: int = 1,
        cut: Bool[np.ndarray, " sequences"] | None = None,
    ):
        self.ragged = dict(ragged)
        self.fixed = dict(fixed or {})
        self.choices = choices
        sizes = self.ragged["input_ids"].lengths().reshape(-1, choices)
        self._rows = np.arange(len(sizes))
        self._lengths = sizes.max(1) if len(sizes) else sizes[:, 0]
        whole = np.zeros(sizes.shape, bool)
        self._cut = np.any(whole if cut is None else cut.reshape(sizes.shape), axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example, of its longest choice."""
        return self._lengths[self._rows]

    @property
    def cut(self) -> int:
        """How many examples were longer, and are cut."""
        return int(np.count_nonzero(self._cut[self._rows]))

    def select(self, rows: Rows) -> Encoded:
        """Some of the examples, which share memory with these."""
        chosen = copy.copy(self)
        chosen._rows = self._rows[rows]
        return chosen

    def fingerprint(self) -> str:
        """A hash of all that is in them, and of their order."""
        found = hashlib.sha256(self._rows.tobytes())
        for name, one in sorted(self.ragged.items()):
            found.update(name.encode() + one.flat.tobytes() + one.offsets.tobytes())
        for name, array in sorted(self.fixed.items()):
            found.update(name.encode() + array.tobytes())
        return found.hexdigest()[:16]

    def batch(self, rows: Rows, length: int) -> dict[str, Shaped[np.ndarray, ...]]:
        """The examples `rows`, padded to `length` tokens."""
        rows = self._rows[rows]
        each = (rows[:, None] * self.choices + np.arange(self.choices)).ravel()
        shape = (len(rows), length) if self.choices == 1 else (len(rows), self.choices, length)
        found = {k: one.padded(each, length).reshape(shape) for k, one in self.ragged.items()}
        sizes = self.ragged["input_ids"].lengths()[each]
        own = np.arange(length) < sizes[:, None]
        found["attention_mask"] = own.astype(np.int32).reshape(shape)
        return found | {name: array[rows] for name, array in self.fixed.items()}


def bucket_lengths(
    lengths: Int[np.ndarray, " examples"], most: int = 4, multiple: int = 8
) -> tuple[int, ...]:
    """At most `most` lengths to pad to, multiples of `multiple`, with the least padding in all.

    By dynamic programming over the lengths there are.
    """
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    values, counts = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: of padding the shortest j values, with as many buckets as there were rounds.
    cost = values * total[1:]
    cost = np.concatenate([[0], cost]).astype(np.float64)
    cuts: list[Any] = []
    for _ in range(min(most, len(values)) - 1):
        options = np.full((len(values) + 1, len(values) + 1), np.inf)
        for j in range(1, len(values) + 1):
            i = np.arange(j)
            options[j, :j] = cost[i] + values[j - 1] * (total[j] - total[i])
        options[0, 0] = 0
        cuts.append(options.argmin(1))
        cost = options.min(1)
    ends = [len(values)]
    for cut in reversed(cuts):
        if ends[-1] > 0:
            ends.append(int(cut[ends[-1]]))
    return tuple(int(values[end - 1]) for end in reversed(ends) if end > 0)


def few_buckets(examples: Encoded, batch_size: int) -> tuple[int, ...]:
    """`bucket_lengths` of these examples: one for each 50 batches, which make up for the seconds
    that compiling for another shape takes, and 4 at most."""
    batches = -(-len(examples) // batch_size)
    return bucket_lengths(examples.lengths, most=min(4, 1 + batches // 50))


class BucketLoader:
    """Batches of examples of about the same length, in as many shapes as there are buckets.

    The order of an epoch is a function of `(seed, epoch)` and a batch one of its number, as with
    `DataLoader`. Rows that fill up a batch repeat others and have `example_weight` 0.

    **Arguments:**

    - `examples`: what to give.
    - `batch_size`: examples in a batch.
    - `buckets`: lengths to pad to; by default `few_buckets` of these examples.
    - `shuffle`, `seed`: as of `DataLoader`.
    """

    def __init__(
        self,
        examples: Encoded,
        batch_size: int,
        *,
        buckets: Sequence[int] | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` has to be at least 1.")
        if len(examples) == 0:
            raise ValueError("There are no examples.")
        self.examples = examples
        self.batch_size = batch_size
        self.buckets = tuple(sorted(buckets or few_buckets(examples, batch_size)))
        longest = int(examples.lengths.max())
        if longest > self.buckets[-1]:
            raise ValueError(
                f"An example has {longest} tokens, more than the longest of `buckets="
                f"{self.buckets}`."
            )
        self.shuffle = shuffle
        self.seed = seed
        self._bucket = np.searchsorted(self.buckets, examples.lengths)
        counts = np.bincount(self._bucket, minlength=len(self.buckets))
        # What fills no batch moves on to the next bucket, and the last batch is filled up.
        self._batches: list[tuple[int, int]] = []
        rest = 0
        for bucket, count in enumerate(counts):
            whole, rest = divmod(rest + int(count), batch_size)
            self._batches += [(bucket, batch_size)] * whole
        if rest:
            self._batches.append((len(self.buckets) - 1, rest))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.batches(0)

    def order(self, epoch: int) -> list[tuple[int, Rows]]:
        """The batches of an epoch: lengths, and rows."""
        key = [self.seed, epoch]
        generator = np.random.Generator(np.random.Philox(key=key))
        rows = np.arange(len(self.examples))
        if self.shuffle:
            rows = generator.permutation(rows)
        waiting: list[Rows] = []
        found: list[tuple[int, Rows]] = []
        rest: Rows = rows[:0]
        for bucket, length in enumerate(self.buckets):
            waiting = [rest, rows[self._bucket[rows] == bucket]]
            here = np.concatenate(waiting)
            whole = len(here) // self.batch_size * self.batch_size
            found += [(length, part) for part in here[:whole].reshape(-1, self.batch_size)]
            rest = here[whole:]
        if len(rest):
            found.append((self.buckets[-1], rest))
        if self.shuffle:
            found = [found[i] for i in generator.permutation(len(found))]
        return found

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from number `start` on."""
        for length, rows in self.order(epoch)[start:]:
            yield self.batch(length, rows)

    def batch(self, length: int, rows: Rows) -> dict[str, Any]:
        filled = np.resize(rows, self.batch_size)
        weight = (np.arange(self.batch_size) < len(rows)).astype(np.float32)
        return self.examples.batch(filled, length) | {"example_weight": weight}

    @property
    def batch_shapes(self) -> list[Any]:
        """Abstract batches of all shapes there are."""
        used = sorted({self.buckets[bucket] for bucket, _ in self._batches})
        first = np.zeros(1, np.int64)
        return [
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.batch(length, first)
            )
            for length in used
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": self.examples.fingerprint(),
            "examples": len(self.examples),
            "batch_size": self.batch_size,
            "buckets": list(self.buckets),
            "shuffle": self.shuffle,
            "seed": self.seed,
        }
