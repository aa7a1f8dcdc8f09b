"""Closing all that an entry point opened, so that no failure stops the rest or hides another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ._checkpoint import SaveFailed
from ._signals import Interrupted


def note(failure: BaseException, second: BaseException) -> None:
    """Tells of an error that came up while `failure` was handled."""
    failure.add_note(f"While this was handled, {type(second).__name__}: {second}")


def run_all(
    endings: Iterable[Callable[[], Any]], failure: BaseException | None
) -> BaseException | None:
    """Calls all of them, whatever fails, and returns what is to be raised: the first failure, of
    which `failure` is one that was there before. The others are notes on it.

    What must not be lost among them: that the user stopped the run at once, and that what an
    interrupted run was to go on from could not be saved.
    """
    for end in endings:
        try:
            end()
        except BaseException as error:
            if failure is None:
                failure = error
            elif error is not failure:
                failure = _the_graver(failure, error)
    return failure


def _the_graver(first: BaseException, second: BaseException) -> BaseException:
    stops = isinstance(second, KeyboardInterrupt) and not isinstance(first, KeyboardInterrupt)
    loses = isinstance(second, SaveFailed) and isinstance(first, Interrupted)
    if stops or loses:
        second.add_note(f"Before that, {type(first).__name__}: {first}")
        return second
    note(first, second)
    return first
