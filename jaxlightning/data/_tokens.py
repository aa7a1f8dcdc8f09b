"""Rows of tokens out of one flat file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ._fingerprint import BYTES, ROWS, sampled_rows

_MAGIC = b"\x93NUMPY"


class TokenFile:
    """A memory-mapped file of token ids, cut into rows: a source for a `DataLoader`.

        rows = TokenFile("train.bin", 1025, overlap=1, vocab_size=50257)
        loader = DataLoader(rows, 32, shuffle=True)  # {"input_ids": int32 (32, 1025)}

    The file is the ids one after the other, as `array.tofile` of numpy writes them (nanoGPT's
    `train.bin`, Megatron's `.bin`), or an `.npy` file of one axis. Row `i` holds the ids from
    `i * (length - overlap)` on; what is left at the end and fills no row is left out. To predict
    the next token, write one more than the model sees and `overlap=1`: inputs are then
    `ids[:, :-1]`, targets `ids[:, 1:]`, and every token but the first is a target once.

    A batch is one gather, without a loop over rows. Nothing is held open that a fork or a pickle
    would break: a copy in another process maps the file itself.

    **Arguments:**

    - `length`: ids in a row.
    - `overlap`: how many of them the next row begins with.
    - `dtype`: of the ids in the file; that of an `.npy` is in its header, otherwise by default
      `"uint16"`. Numbers are little-endian unless the dtype says so (`">u2"`).
    - `vocab_size`: with it, ids that are no smaller raise an error where they are read.

    **Raises:** `FileNotFoundError`, and `ValueError` for a file that is too short for a row, no
    multiple of an id's size, or no such `.npy`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int,
        *,
        overlap: int = 0,
        dtype: Any = None,
        vocab_size: int | None = None,
    ):
        if length < 1 or not 0 <= overlap < length:
            raise ValueError(
                f"`length={length}` and `overlap={overlap}` make no rows: `length` has to be "
                "positive, and `overlap` at least 0 and smaller than `length`."
            )
        self.path = Path(path).absolute()
        self.length = length
        self.overlap = overlap
        self.vocab_size = vocab_size
        self._given_dtype = dtype
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file of tokens at `{path}`.")
        self._tokens = _mapped(self.path, dtype)
        self._header = self.path.stat().st_size - self._tokens.nbytes
        if len(self._tokens) < length:
            raise ValueError(
                f"The file `{path}` holds {len(self._tokens)} ids, too few for one row of "
                f"`length={length}`."
            )
        item = self._tokens.itemsize
        stride = length - overlap
        rows = (len(self._tokens) - overlap) // stride
        self._rows = np.lib.stride_tricks.as_strided(
            self._tokens, (rows, length), (stride * item, item), writeable=False
        )

    @property
    def dtype(self) -> np.dtype:
        """Of the ids in the file."""
        return self._tokens.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> dict[str, Int[np.ndarray, "*rows length"]]:
        """`{"input_ids": int32 (rows, length)}` for an array of row numbers, `(length,)` for one.

        **Raises:** `ValueError` for ids out of range, with the row and the place in the file.
        """
        found = self._rows[rows]
        self._check(found, rows)
        return {"input_ids": found.astype(np.int32)}

    def _check(self, found: np.ndarray, rows: Any) -> None:
        limit = 2**31 if self.vocab_size is None else self.vocab_size
        # What the dtype itself rules out is not looked for.
        bounds = np.iinfo(self.dtype)
        if not found.size or (bounds.min >= 0 and bounds.max < limit):
            return
        if found.min() >= 0 and found.max() < limit:
            return
        wrong = (found < 0) | (found >= limit)
        nth, position = divmod(int(np.argmax(wrong)), self.length)
        row = int(np.atleast_1d(np.arange(len(self))[rows])[nth])
        value = found.reshape(-1, self.length)[nth, position]
        index = row * (self.length - self.overlap) + position
        byte = self._header + index * self.dtype.itemsize
        vocab = f"`vocab_size={self.vocab_size}` allows"
        bound = "fits int32" if self.vocab_size is None else vocab
        raise ValueError(
            f"Row {row} of the tokens `{self.path}` has the id {value} at position {position} "
            f"(byte {byte} of the file), which is not from 0 to {limit - 1}, as {bound}. Is the "
            f"file of another dtype than {self.dtype.name}, or of another tokenizer?"
        )

    def fingerprint(self) -> dict[str, Any]:
        """The number of ids, how they are cut, and a checksum of at most 256 pieces of the file,
        evenly spaced, together at most 1 MiB. The path and the file's times are not in it, so a
        file may be moved; another dtype, length or tokenizer is noticed, a few changed ids in a
        large file are not."""
        digest = hashlib.sha256()
        size, piece = self._tokens.nbytes, BYTES // ROWS
        # By reads: where the map is touched far apart, the system reads megabytes ahead each time.
        with self.path.open("rb", buffering=0) as file:
            for number in sampled_rows(-(-size // piece)):
                file.seek(self._header + number * piece)
                digest.update(file.read(piece))
        return {
            "tokens": len(self._tokens),
            "dtype": self.dtype.name,
            "length": self.length,
            "overlap": self.overlap,
            "checksum": digest.hexdigest()[:16],
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would be a copy of the file.
        options = (self.overlap, self._given_dtype, self.vocab_size)
        return _reopened, (self.path, self.length, *options)

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}, {self.length}, overlap={self.overlap})"


def _reopened(path: Path, length: int, overlap: int, dtype: Any, vocab_size: Any) -> TokenFile:
    return TokenFile(path, length, overlap=overlap, dtype=dtype, vocab_size=vocab_size)


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    with path.open("rb") as file:
        is_npy = file.read(len(_MAGIC)) == _MAGIC
    if is_npy:
        return _mapped_npy(path, dtype)
    kind = np.dtype("uint16" if dtype is None else dtype)
    if kind.byteorder == "=":
        kind = kind.newbyteorder("<")
    _check_dtype(kind, path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"The file `{path}` is empty: it holds no tokens.")
    if size % kind.itemsize:
        raise ValueError(
            f"The file `{path}` has {size} bytes, which is no multiple of {kind.itemsize}, the "
            f"size of one {kind.name}. It is cut short, or `dtype=` is wrong."
        )
    return np.memmap(path, kind, mode="r")


def _mapped_npy(path: Path, dtype: Any) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"The file `{path}` begins as an `.npy` does, but is none that can be mapped: {error}"
        ) from None
    _check_dtype(tokens.dtype, path)
    if tokens.ndim != 1:
        raise ValueError(
            f"The file `{path}` holds an array of shape {tokens.shape}, where one axis of ids is "
            "expected. Rows that are cut already need no `TokenFile`: "
            f'`DataLoader({{"input_ids": numpy.load({str(path)!r}, mmap_mode="r")}}, 32)`.'
        )
    if dtype is not None and np.dtype(dtype) != tokens.dtype:
        raise ValueError(
            f"The file `{path}` holds {tokens.dtype.name}, but `dtype={np.dtype(dtype).name}` was "
            "asked for. Leave `dtype` out: an `.npy` file knows its own."
        )
    return tokens


def _check_dtype(dtype: np.dtype, path: Path) -> None:
    if dtype.kind not in "iu":
        raise ValueError(f"Token ids are integers, but `{path}` would hold {dtype.name}.")
