"""Metrics as a table of comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import SupportsFloat

from ._lines import LineLogger
from ._logger import as_record


class CSVLogger(LineLogger):
    """Writes `metrics.csv`: a column `step`, and one for each metric there ever was.

    One row a call, empty where a metric was not logged; `nan` and `inf` as they are. A metric that
    is new gets a column at the right, for which the file is rewritten. Hyper-parameters go to
    `hparams.json` beside it.
    """

    file_name = "metrics.csv"
    _columns: list[str] | None = None

    def log_metrics(self, metrics: Mapping[str, SupportsFloat], step: int) -> None:
        record = as_record(metrics, step)
        columns = self._read_columns()
        new = [name for name in record if name not in columns]
        if new:
            columns += new
            rows = [row + "," * len(new) for row in self._lines()[1:]]
            self._rewrite([_header(columns), *rows])
        self._append(",".join(repr(record[name]) if name in record else "" for name in columns))

    def _read_columns(self) -> list[str]:
        if self._columns is None:
            self._columns = next(csv.reader(self._lines()), [])
        return self._columns

    def _until(self, lines: list[str], step: int) -> list[str]:
        width = len(self._read_columns())

        def is_until(row: str) -> bool:
            cells = row.split(",")
            number = cells[0]
            is_step = len(cells) == width and len(number) < 20 and number.isdecimal()
            return is_step and int(number) <= step

        return [*lines[:1], *filter(is_until, lines[1:])]


def _header(columns: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(columns)
    return line.getvalue()
