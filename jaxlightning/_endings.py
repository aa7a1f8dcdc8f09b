"""Closing all that an entry point opened, so that no failure stops the rest or hides another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def note(failure: BaseException, second: Exception) -> None:
    """Tells of an error that came up while `failure` was handled."""
    failure.add_note(f"While this was handled, {type(second).__name__}: {second}")


def run_all(endings: Iterable[Callable[[], Any]], failure: BaseException | None) -> None:
    """Calls all of them, whatever fails.

    **Raises:** the first error, unless `failure` is under way already, which notes them.
    """
    found: list[Exception] = []
    for end in endings:
        try:
            end()
        except Exception as error:
            found.append(error)
    for second in found:
        if failure is None:
            raise second
        note(failure, second)
