"""Encoded text on disk: tokens, and where documents and sentences begin.

FOLDER/tokens.bin       all tokens, one document after the other, each closed by a [SEP]
FOLDER/offsets.npy      where documents begin, and the end
FOLDER/sentences.npy    where sentences begin
FOLDER/checksums.npy    CRC-32 of each mebibyte of `tokens.bin`
FOLDER/header.json      what it was made of; written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Shaped, UInt32

from ._corpus import Document
from ._files import write_json
from ._sentences import sentences
from ._tokenizer import SpecialIds, of_plain_text, special_ids, tokenizer_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 3
_DTYPES = ("<u2", "<i4")  # for vocabularies up to 65,536 pieces, and larger ones
_CHUNK = 1 << 20  # characters that are encoded at once
_BLOCK = 1 << 20  # bytes of one checksum
_CHECKED = 32  # blocks that are checked whenever a store is opened


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Encoded documents, memory-mapped: `tokens[offsets[i]:offsets[i + 1]]` is document i.

    Each document ends in a [SEP] and has no [CLS]. `sentences` has where sentences begin, those
    of all documents in order. `header` says what the tokens were made with.
    """

    folder: Path
    tokens: Shaped[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " documents_and_one"]
    sentences: Int[np.ndarray, " sentences"]
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
    """Encodes documents into a token store, on all cores.

    A document's sentences are encoded one by one and joined: a new line counts as a space, and
    ends a sentence. The folder appears whole or not at all. Where the process ends before, the
    same call goes on after the last block of documents that was encoded; it reads the documents
    before that again, but does not encode them.

    **Arguments:**

    - `text`: the fingerprint of the text, kept in the header.
    - `progress`: called with the number of characters done so far.

    **Raises:** `ValueError` where there is nothing to encode, or another process encodes into the
    same folder.
    """
    folder = Path(folder)
    special = special_ids(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype(_DTYPES[vocab_size > 1 << 16])
    made_of = {
        "format": _FORMAT,
        "dtype": dtype.str,
        "vocab_size": vocab_size,
        "special": special._asdict(),
        "tokenizer": tokenizer_hash(tokenizer),
        "text": text,
    }
    plain = of_plain_text(tokenizer)
    unfinished = folder.with_name(f".{folder.name}-part")
    with _alone(unfinished):
        part = _Part(unfinished, made_of)
        source = iter(documents)
        done = sum(len(document.text) for document in islice(source, part.read))
        for block in _blocks(source):
            texts = [sentences(document.text) for document in block]
            encoded = iter(plain.encode_batch_fast(list(chain(*texts)), add_special_tokens=False))
            tokens: list[int] = []
            lengths: list[int] = []
            inner: list[int] = []
            for own in texts:
                found = [ids for ids in (next(encoded).ids for _ in own) if ids]
                if not found:
                    continue
                before = len(tokens)
                for ids in found:
                    inner.append(len(ids))
                    tokens.extend(ids)
                tokens.append(special.sep)
                inner[-1] += 1
                lengths.append(len(tokens) - before)
            part.add(np.asarray(tokens, dtype), lengths, inner, len(block))
            done += sum(len(document.text) for document in block)
            if progress is not None:
                progress(done)
        part.finish(folder)
    return open_tokens(folder)


class _Part:
    """A store that is not finished: what is there of it counts as far as `progress.json` says."""

    _FILES = ("tokens.bin", "lengths.bin", "inner.bin")

    def __init__(self, folder: Path, made_of: dict[str, Any]):
        self.folder = folder
        self.made_of = made_of
        self.sizes = dict.fromkeys(self._FILES, 0)
        self.read = 0
        """Documents that have been read."""
        try:
            before = json.loads((folder / "progress.json").read_text())
            whole = before["made_of"] == json.loads(json.dumps(made_of)) and all(
                (folder / name).stat().st_size >= before["sizes"][name] for name in self._FILES
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if whole:
            self.sizes, self.read = before["sizes"], before["read"]
        else:
            for path in folder.iterdir():  # the folder itself is what the lock is on
                path.unlink()
        for name in self._FILES:
            with (folder / name).open("ab") as file:
                file.truncate(self.sizes[name])

    def add(
        self,
        tokens: Shaped[np.ndarray, " tokens"],
        lengths: list[int],
        inner: list[int],
        read: int,
    ) -> None:
        arrays: tuple[Any, ...] = (
            tokens,
            np.asarray(lengths, np.int64),
            np.asarray(inner, np.int32),
        )
        for name, array in zip(self._FILES, arrays, strict=True):
            with (self.folder / name).open("ab") as file:
                array.tofile(file)
            self.sizes[name] += array.nbytes
        self.read += read
        content = {"made_of": self.made_of, "sizes": self.sizes, "read": self.read}
        write_json(self.folder / "progress.json", content)

    def finish(self, folder: Path) -> None:
        lengths = np.fromfile(self.folder / "lengths.bin", np.int64)
        inner = np.fromfile(self.folder / "inner.bin", np.int32)
        if not len(lengths):
            shutil.rmtree(self.folder)
            raise ValueError("There is no text to encode: no document has a token.")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        np.save(self.folder / "offsets.npy", offsets)
        begins = np.concatenate([[0], np.cumsum(inner, dtype=np.int64)[:-1]])
        np.save(self.folder / "sentences.npy", begins)
        np.save(self.folder / "checksums.npy", _checksums(self.folder / "tokens.bin"))
        header = self.made_of | {
            "tokens": int(offsets[-1]),
            "documents": len(lengths),
            "sentences": len(begins),
        }
        (self.folder / "header.json").write_text(json.dumps(header, indent=1))
        for name in ("lengths.bin", "inner.bin", "progress.json"):
            (self.folder / name).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(self.folder, folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder where there is none, and keeps others out of it: two that encode into one
    folder would add their blocks to the same files. No kill leaves a lock behind.

    **Raises:** `ValueError` where another one is at it.
    """
    held = -1
    while held < 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # it was finished, and renamed, a moment ago
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(
                f"Another process encodes into `{folder}`. Wait until it is done, or encode into "
                "another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        if not folder.exists() or not os.path.samestat(os.fstat(held), folder.stat()):
            os.close(held)  # as above
            held = -1
    try:
        yield
    finally:
        os.close(held)


def _checksums(path: Path) -> UInt32[np.ndarray, " blocks"]:
    found = []
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.append(zlib.crc32(block))
    return np.asarray(found, np.uint32)


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
    """Opens a token store, and checks that it is whole and made of what is expected: all sizes,
    and the checksums of some blocks, of all in a store of up to 32 MiB.

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
        if header["format"] != _FORMAT:
            raise ValueError(f"their format is {header['format']}, not {_FORMAT}")
        dtype = np.dtype(header["dtype"])
        # Mapped, so that what it says of its size is held against the file before memory is asked.
        offsets, begins, checksums = (
            np.array(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("offsets", "sentences", "checksums")
        )
        size = (folder / "tokens.bin").stat().st_size
        whole = (
            size == header["tokens"] * dtype.itemsize
            and (offsets.dtype, offsets.shape) == (np.int64, (header["documents"] + 1,))
            and (offsets[0], offsets[-1]) == (0, header["tokens"])
            and bool((np.diff(offsets) > 0).all())
            and (begins.dtype, begins.shape) == (np.int64, (header["sentences"],))
            and bool((np.diff(begins) > 0).all() and np.isin(offsets[:-1], begins).all())
            and bool(begins[-1] < header["tokens"])
            and (checksums.dtype, checksums.shape) == (np.uint32, (-(-size // _BLOCK),))
        )
        SpecialIds(**header["special"])
        if whole:
            _check_blocks(folder / "tokens.bin", checksums)
    except (
        OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, IndexError,
    ) as error:  # fmt: skip
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
    return TokenStore(folder, tokens, offsets, begins, header)


def _check_blocks(path: Path, checksums: UInt32[np.ndarray, " blocks"]) -> None:
    chosen = np.unique(np.linspace(0, len(checksums) - 1, _CHECKED).astype(np.int64))
    with path.open("rb") as file:
        for number in chosen.tolist():
            file.seek(number * _BLOCK)
            if zlib.crc32(file.read(_BLOCK)) != checksums[number]:
                raise ValueError(f"block {number} of `tokens.bin` has another checksum")
