"""The user's text: files of plain text, JSON lines, parquet or arrow, and the datasets library.

A source is read as often as needed (tokenizer, encoding), one document at a time, so that text
larger than memory works.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlightning._nearest import nearest

from ._corpus import Document

_OBJECTS, _TABLES = (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow")
_SUFFIXES = (".txt", *_OBJECTS, *_TABLES)


class TextFiles:
    """Documents in files: `.jsonl`, `.ndjson` and `.json` (a JSON object a line), `.parquet`,
    `.arrow`, and plain text in files of any other name, where a blank line parts documents.

    **Arguments:**

    - `patterns`: files, globs (`**` too) or folders (all files in them of the suffixes above).
    - `column`: where the text is in JSON lines and tables; by default `text`, or the only
      column of strings.

    **Raises:** `FileNotFoundError` where a pattern matches no file, `ValueError` for a column where
    all is plain text. Reading raises `ValueError` for an empty file, bytes that are no UTF-8 (file
    and offset), a broken line (file and line), and a missing column (with those found).
    """

    def __init__(self, patterns: str | Path | Sequence[str | Path], column: str | None = None):
        given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
        found = [path for pattern in given for path in _matches(str(pattern))]
        self.paths = list(dict.fromkeys(found))
        self.column = column
        if column is not None and not any(
            path.suffix.lower() in _OBJECTS + _TABLES for path in self.paths
        ):
            raise ValueError(
                f"There is no column `{column}` in plain text, which all of {given} is taken for: "
                f"{', '.join(f'`{suffix}`' for suffix in _OBJECTS + _TABLES)} have columns."
            )

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            if path.stat().st_size == 0:
                raise ValueError(f"The file `{path}` is empty. Remove it, or give it some text.")
            count = 0
            for document in self._read(path):
                count += 1
                yield document
            if count == 0:
                raise ValueError(f"The file `{path}` holds no text, only blanks.")

    def _read(self, path: Path) -> Iterator[Document]:
        if path.suffix.lower() in _OBJECTS:
            texts = _json_lines(path, self.column)
        elif path.suffix.lower() in _TABLES:
            texts = _table(path, self.column)
        else:
            texts = _plain(path)
        for number, text in enumerate(texts):
            if text.strip():
                yield Document(f"{path.name} {number}", text)

    def fingerprint(self) -> str:
        """A hash of the files' content."""
        digest = hashlib.sha256(repr(self.column).encode())
        for path in self.paths:
            digest.update(f"{path.suffix} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()[:16]


def _matches(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        files = sorted(
            path
            for path in Path(pattern).rglob("*")
            if path.is_file() and path.suffix.lower() in _SUFFIXES
        )
        if not files:
            raise FileNotFoundError(
                f"The folder `{pattern}` has no text in it: no file that ends in "
                + ", ".join(f"`{suffix}`" for suffix in _SUFFIXES)
                + "."
            )
        return files
    # A name that exists is that file, even where it looks like a glob: "notes[1].txt".
    names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    files = sorted(path for path in map(Path, names) if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"No file matches `{pattern}` (seen from `{Path.cwd()}`). Quote a glob, so that it is "
            "not the shell that expands it: `--text 'corpus/*.txt'`."
        )
    return files


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                # A byte-order mark is no text.
                yield raw.decode("utf-8-sig" if offset == 0 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                # After a byte-order mark the decoder counts without it.
                mark = 3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
                at = offset + mark + error.start
                byte = error.object[error.start]
                raise ValueError(
                    f"The file `{path}` is not UTF-8: byte 0x{byte:02x} at offset {at} "
                    f"({error.reason}). Convert it, e.g. `iconv -f latin1 -t utf-8`."
                ) from None
            offset += len(raw)


def _plain(path: Path) -> Iterator[str]:
    document: list[str] = []
    for line in _lines(path):
        if line.strip():
            document.append(line)
        elif document:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    chosen = column
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            what = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(
                f"The file `{path}` is broken on line {number}{at}: {what}. Every line has to be "
                "one JSON object."
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"The file `{path}` has a JSON {type(row).__name__} on line {number}. Every line "
                'has to be one object, such as {"text": "..."}.'
            )
        if chosen is None or chosen not in row:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            where = f"Line {number} of `{path}`"
            chosen = text_column(list(row), strings, chosen, where)
        text = row[chosen]
        if not isinstance(text, str):
            raise ValueError(
                f"Line {number} of `{path}` has no string in `{chosen}`: it is a "
                f"`{type(text).__name__}`."
            )
        yield _SURROGATE.sub("\ufffd", text)


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON can write and UTF-8 cannot: what was cut in the middle."""


def _table(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow as pa

    row = 0
    try:
        for cells in _columns(path, column):
            yield from filter(None, _strings(cells, row, path))
            row += len(cells)
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, such as no permission
            raise
        where = f" from row {row} on" if row else ""
        raise ValueError(f"`{path}` cannot be read as {path.suffix[1:]}{where}: {error}") from None


def _columns(path: Path, column: str | None) -> Iterator[Any]:
    """The column of text, piece by piece."""
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet

    with path.open("rb") as file:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            chosen = _arrow_column(table.schema_arrow, column, path)
            for batch in table.iter_batches(columns=[chosen]):
                yield batch.column(0)
            return
        try:
            reader: Any = pa.ipc.open_stream(file)
            batches: Iterator[Any] = iter(reader)
        except pa.ArrowInvalid:  # the other of arrow's two layouts
            file.seek(0)
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        chosen = _arrow_column(reader.schema, column, path)
        for batch in batches:
            yield batch.column(reader.schema.get_field_index(chosen))


def _strings(cells: Any, before: int, path: Path) -> list[str | None]:
    """**Raises:** `ValueError` with the row whose bytes are no UTF-8."""
    try:
        return cells.to_pylist()
    except UnicodeDecodeError:
        for number, cell in enumerate(cells):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise ValueError(
                    f"`{path}` is damaged: row {before + number} is not UTF-8 (byte 0x{byte:02x} "
                    f"at offset {error.start} of its text)."
                ) from None
        raise


def _arrow_column(schema: Any, column: str | None, path: Path) -> str:
    import pyarrow as pa

    strings = [f.name for f in schema if pa.types.is_string(f.type) or _large(f.type)]
    return text_column(schema.names, strings, column, f"The file `{path}`")


def _large(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def text_column(
    columns: Sequence[str], strings: Sequence[str], wanted: str | None, where: str
) -> str:
    """The column to read: `wanted`, else `text`, else the only one that holds strings.

    **Raises:** `ValueError` with the columns found, and the nearest name to `wanted`.
    """
    if wanted is None and "text" in columns:
        wanted = "text"
    if wanted is None and len(strings) == 1:
        return strings[0]
    if wanted is not None and wanted in strings:
        return wanted
    listed = ", ".join(f"`{name}`" for name in columns) or "none"
    if wanted is None:
        raise ValueError(
            f"{where} has no column `text`, and {'several' if strings else 'none'} that hold"
            f"{'' if strings else 's'} strings. Found: {listed}. Name one: `--text-column NAME`."
        )
    if wanted in columns:
        raise ValueError(f"{where} has no strings in the column `{wanted}`. Found: {listed}.")
    raise ValueError(
        f"{where} has no column `{wanted}`. Found: {listed}.{nearest(wanted, columns)}"
    )


class DatasetText:
    """Documents of a `datasets.Dataset`: the strings of one column, a row each."""

    def __init__(self, dataset: Any, column: str | None = None, *, name: str = "The dataset"):
        features = dataset.features
        strings = [
            key
            for key, value in features.items()
            if getattr(value, "dtype", None) in ("string", "large_string")
        ]
        self.dataset = dataset
        self.column = text_column(list(features), strings, column, name)
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: it has no rows.")

    def __iter__(self) -> Iterator[Document]:
        number = 0
        for batch in self.dataset.select_columns([self.column]).iter(batch_size=1000):
            for text in batch[self.column]:
                if text and text.strip():
                    yield Document(f"row {number}", text)
                number += 1

    def fingerprint(self) -> str:
        """A hash of the dataset's own fingerprint and the column."""
        what = f"{self.dataset._fingerprint} {len(self.dataset)} {self.column}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]


class StreamedText:
    """Documents of a `datasets.IterableDataset`, which is read as it comes: the strings of one
    column, a row each.

    It is told from others by its name, not by what it holds.
    """

    def __init__(self, dataset: Any, column: str | None = None, *, name: str = "The dataset"):
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name} is empty: it has no rows.")
        strings = [key for key, value in first.items() if isinstance(value, str)]
        self.dataset = dataset
        self.column = text_column(list(first), strings, column, name)
        self.name = name

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self.dataset):
            text = row[self.column]
            if text and text.strip():
                yield Document(f"row {number}", text)

    def fingerprint(self) -> str:
        """A hash of the dataset's name, version and column."""
        info = getattr(self.dataset, "info", None)
        version = getattr(info, "version", None)
        return hashlib.sha256(f"{self.name} {version} {self.column}".encode()).hexdigest()[:16]


TextSource = TextFiles | DatasetText | StreamedText
"""Documents that can be read again and again, and the fingerprint that tells them from others."""


class AllText:
    """The documents of several sources, one source after the other."""

    def __init__(self, sources: Sequence[TextSource]):
        self.sources = sources

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            yield from source

    def fingerprint(self) -> str:
        """That of the only source, or a hash of all of them."""
        found = [source.fingerprint() for source in self.sources]
        return (
            found[0] if len(found) == 1 else hashlib.sha256(repr(found).encode()).hexdigest()[:16]
        )


def open_dataset(
    name: str | Path,
    *,
    configuration: str | None = None,
    column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> TextSource:
    """Text from the `datasets` library's world.

    **Arguments:**

    - `name`: a folder made by `save_to_disk`; a folder or file of text, JSON lines, parquet or
      arrow (`TextFiles`); or a name on the hub, `owner/name`.
    - `configuration`: of a dataset on the hub that has several.
    - `column`: where the text is; by default `text`, or the only column of strings.
    - `split`: of a dataset that has several; by default `train`.
    - `streaming`: whether to read a dataset on the hub as it comes, without a download of all.

    **Raises:** `ValueError` for a column, split or configuration that is not there;
    `FileNotFoundError` where the hub has no such dataset or cannot be reached.
    """
    path = Path(name)
    saved = [path / file for file in ("dataset_info.json", "dataset_dict.json", "state.json")]
    if path.exists() and configuration is not None:
        raise ValueError(f"`{path}` is on this machine, and has no configurations to choose from.")
    if path.exists() and not any(file.is_file() for file in saved):
        _without_splits(path, split)
        return TextFiles(path, column)
    import datasets

    if path.exists():
        dataset = datasets.load_from_disk(str(path))
    else:
        try:
            dataset = datasets.load_dataset(str(name), configuration, streaming=streaming)
        except Exception as error:
            raise FileNotFoundError(
                f"`{name}` is no folder here, and the hub did not give a dataset of that name: "
                f"{type(error).__name__}: {error}"
            ) from error
    if isinstance(dataset, dict):
        wanted = split or "train"
        if wanted not in dataset:
            listed = ", ".join(f"`{found}`" for found in dataset)
            raise ValueError(f"The dataset `{name}` has no split `{wanted}`. Found: {listed}.")
        dataset = dataset[wanted]
    else:
        _without_splits(name, split)
    of = StreamedText if isinstance(dataset, datasets.IterableDataset) else DatasetText
    return of(dataset, column, name=f"The dataset `{name}`")


def _without_splits(name: str | Path, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"`{name}` has no splits, of which `{split}` could be one. Name none.")
