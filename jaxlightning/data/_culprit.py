"""Which row of a batch it was that raised."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from .._listing import counted

_SEARCH_S = 10.0
_SHOWN = 20


def first_failing(
    rows: Iterable[int], attempt: Callable[[int], Any], error: Exception
) -> int | None:
    """The first row for which `attempt` raises what `error` is, tried one at a time.

    `None` where none does, or none within ten seconds.
    """
    end = time.monotonic() + _SEARCH_S
    for row in rows:
        try:
            attempt(row)
        except Exception as found:
            if type(found) is type(error):
                return row
        if time.monotonic() > end:
            return None
    return None


def listed(rows: list[int]) -> str:
    """Rows for a message, the first twenty of many."""
    return f"[{counted(rows, _SHOWN)}]"
