"""Examples in files: tables of tab- or comma-separated values, JSON lines, parquet; or `datasets`.

All become rows of Python values by column, and know their file and line for messages.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlightning._nearest import nearest

from ._text import _lines

SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")

_LONGEST = 1 << 30  # characters of a cell


class Table:
    """Rows by column.

    **Arguments:**

    - `rows`: dicts with the same keys.
    - `source`: what they are from, for messages.
    - `lines`: the line of each row in its file, where it has one.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], source: str, lines: Sequence[int] | None = None
    ):
        if not rows:
            raise ValueError(f"`{source}` holds no example. Give it at least one row.")
        self.rows = rows
        self.source = source
        self.columns = tuple(rows[0])
        self._used: set[str] = set()
        self._lines = lines

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """The place of a row, for a message."""
        if self._lines is None:
            return f"row {row} of `{self.source}`"
        return f"line {self._lines[row]} of `{self.source}`"

    def usage(self) -> str:
        """Which columns have been asked for by now, and which have not, in a sentence."""

        def listed(used: bool) -> str:
            return ", ".join(f"`{n}`" for n in self.columns if (n in self._used) is used)

        ignored = listed(False)
        return f"Of `{self.source}`: {listed(True)}" + (f"; not used: {ignored}." * bool(ignored))

    def column(self, wanted: str | None, known: Iterable[str], what: str, option: str) -> str:
        """The name of a column: `wanted`, else the first of `known` that is there.

        **Raises:** `ValueError` with the columns found.
        """
        found = self.optional(wanted, known, option)
        if found is None:
            listed = ", ".join(f"`{name}`" for name in self.columns)
            raise ValueError(
                f"`{self.source}` has no column that is known to hold {what}: none of "
                f"{', '.join(f'`{name}`' for name in known)}. Found: {listed}. Name one: "
                f"`{option} NAME`."
                + (" (SQuAD's files are for `--task qa`.)" if "data" in self.columns else "")
            )
        return found

    def optional(self, wanted: str | None, known: Iterable[str], option: str) -> str | None:
        """As `column`, or `None` where no name is wanted and none of `known` is there."""
        if wanted is not None:
            if wanted not in self.columns:
                listed = ", ".join(f"`{name}`" for name in self.columns)
                raise ValueError(
                    f"`{self.source}` has no column `{wanted}`, which `{option}` names. Found: "
                    f"{listed}.{nearest(wanted, self.columns)}"
                )
            found: str | None = wanted
        else:
            found = next((name for name in known if name in self.columns), None)
        if found is not None:
            self._used.add(found)
        return found

    def strings(self, column: str) -> list[str]:
        """A column of text.

        **Raises:** `ValueError` with the place of one that is empty, or no string.
        """
        self._used.add(column)
        found = []
        for number, row in enumerate(self.rows):
            text = row[column]
            if not isinstance(text, str) or not text.strip():
                what = "is empty" if text is None or isinstance(text, str) else f"holds {text!r}"
                raise ValueError(
                    f"The `{column}` in {self.where(number)} {what}, but has to be a text. Leave "
                    "the row out."
                )
            found.append(text)
        return found


def read_table(path: str | Path) -> Table:
    """Rows of a file, by its suffix: `.tsv` (a header, no quotes), `.csv` (a header, quotes),
    `.jsonl`, `.ndjson` and `.json` (an object a line), `.parquet`; or of a folder that
    `datasets.Dataset.save_to_disk` wrote, or of a dataset on the hub, `owner/name:split`.

    **Raises:** `FileNotFoundError`; `ValueError` for a broken file, with the line.
    """
    given, path = str(path), Path(path)
    if not path.exists() and path.suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"There is no file `{path}`.")
    if not path.is_file():
        return _dataset(given)
    if path.stat().st_size == 0:
        raise ValueError(f"The file `{path}` is empty.")
    if path.suffix.lower() in (".tsv", ".csv"):
        return _separated(path)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return _json_lines(path)
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    listed = ", ".join(f"`{suffix}`" for suffix in SUFFIXES)
    raise ValueError(f"`{path}` ends in none of {listed}. Rename it, or convert it.")


def _separated(path: Path) -> Table:
    tabs = path.suffix.lower() == ".tsv"
    how: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    )
    # A generator, so that what is no UTF-8 is found where it stands.
    reader = csv.reader((line + "\n" for line in _lines(path)), strict=True, **how)
    header: list[str] | None = None
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    before = csv.field_size_limit(_LONGEST)  # of the whole process, and so put back
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise ValueError(f"`{path}` has several columns `{twice[0]}`. Rename them.")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"Line {reader.line_num} of `{path}` has {len(cells)} columns, but its header "
                    f"names {len(header)}: {', '.join(f'`{name}`' for name in header)}."
                )
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"`{path}` is broken on line {reader.line_num}: {error}.") from None
    finally:
        csv.field_size_limit(before)
    return Table(rows, str(path), lines)


def _json_lines(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"`{path}` is broken on line {number}: {error}. Every line has to be one JSON "
                "object. (A SQuAD file is for `--task qa`.)"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"`{path}` has a JSON {type(row).__name__} on line {number}.")
        if rows and set(row) != set(rows[0]):
            other = ", ".join(f"`{name}`" for name in sorted(set(row) ^ set(rows[0])))
            raise ValueError(
                f"Line {number} of `{path}` has other keys than the first: they differ in {other}."
            )
        rows.append(row)
        lines.append(number)
    return Table(rows, str(path), lines)


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return Table(pyarrow.parquet.read_table(path).to_pylist(), str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"`{path}` cannot be read as parquet: {error}") from None


def _of(number: Any, names: Any) -> str | None:
    """The class of that number, if it has one."""
    known = isinstance(number, int) and 0 <= number < len(names)
    return names[number] if known else None


def _dataset(name: str) -> Table:
    """Of a folder or the hub; classes become their names."""
    import datasets

    folder, _, split = name.partition(":")
    try:
        if Path(folder).is_dir():
            found = datasets.load_from_disk(folder)
            if isinstance(found, datasets.DatasetDict):
                found = found[split or "train"]
        else:
            found = datasets.load_dataset(folder, split=split or "train")
    except Exception as error:
        raise FileNotFoundError(
            f"`{name}` is no file or folder of a dataset here, and the hub did not give one of "
            f"that name: {type(error).__name__}: {error}"
        ) from error
    rows = found.to_list()
    for column, feature in found.features.items():
        names = getattr(feature, "names", None)
        inner = getattr(getattr(feature, "feature", None), "names", None)
        for row in rows if names or inner else ():
            value = row[column]
            row[column] = [_of(one, inner) for one in value] if inner else _of(value, names)
    return Table(rows, name)
