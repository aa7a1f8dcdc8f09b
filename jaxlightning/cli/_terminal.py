"""What reaches the terminal: names and messages come from files of anybody, and a terminal obeys
some characters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def one_line(text: str) -> str:
    r"""`text` with all that does not print as an escape, such as `\x1b`. Line breaks are among it:
    a name must not pass for a line of its own."""
    return _escaped(text, "")


def _escaped(text: str, kept: str) -> str:
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode()
        for char in text
    )


class _Stream:
    """A text stream to which only printable characters, line breaks and tabs get."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_escaped(text, "\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_only() -> Iterator[None]:
    """Lets nothing else through to stdout and stderr, whoever prints it."""
    streams: list[Any] = [_Stream(sys.stdout), _Stream(sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield
