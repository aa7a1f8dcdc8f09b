"""Metrics as JSON, one object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import SupportsFloat

from ._lines import LineLogger
from ._logger import as_json, as_record


class JSONLLogger(LineLogger):
    """Writes `metrics.jsonl`, such as `{"step": 50, "train/loss": 0.25, "val/loss": "NaN"}`.

    Strict JSON: floats that are not finite are the strings `"NaN"`, `"Infinity"` and
    `"-Infinity"`, which `float` turns back. Hyper-parameters go to `hparams.json` beside it.
    """

    file_name = "metrics.jsonl"

    def log_metrics(self, metrics: Mapping[str, SupportsFloat], step: int) -> None:
        record = as_json(as_record(metrics, step))
        self._append(json.dumps(record, allow_nan=False, ensure_ascii=False))

    def _until(self, lines: list[str], step: int) -> list[str]:
        return [line for line in lines if is_until(line, step)]


def is_until(line: str, step: int) -> bool:
    """Whether a line is a record in JSON, of `step` or before."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
