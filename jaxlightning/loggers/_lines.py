"""Text files that grow line by line and survive a kill at any moment, and loggers of such files."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TextIO

from ._logger import FileLogger, begin_sync, replace_file


class LineFile:
    """One file in a folder that exists as soon as there is something to write.

    A line is in the hands of the operating system as soon as it is appended, so that only the
    machine's own death can lose it before `save`. A last line that was cut short is dropped.
    """

    def __init__(self, path: str):
        self.path = path
        self._file: TextIO | None = None
        self._count: int | None = None

    @property
    def count(self) -> int:
        """How many complete lines there are. Known without reading the file again."""
        if self._count is None:
            self._count = len(self.lines())
        return self._count

    def lines(self) -> list[str]:
        """All complete lines, without their ends."""
        try:
            with open(self.path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        return content.decode("utf-8", errors="replace").split("\n")[:-1]

    def rewrite(self, lines: list[str]) -> None:
        """Replaces the whole file."""
        self.close()
        replace_file(self.path, "".join(f"{line}\n" for line in lines))
        self._count = len(lines)

    def append(self, line: str) -> None:
        if self._file is None:
            with open(self.path, "ab+") as file:  # What a kill left of a last line.
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        count = self.count
        self._file.write(f"{line}\n")
        self._file.flush()
        self._count = count + 1

    def save(self) -> None:
        """Makes what was appended durable."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def begin_save(self) -> Callable[[], None]:
        """See `Logger.begin_save`."""
        return begin_sync(self._file) if self._file is not None else lambda: None

    def close(self) -> None:
        if self._file is not None:
            self.save()
            self._file.close()
            self._file = None
            self._count = None  # Others may write now.


class LineLogger(FileLogger):
    """Appends one line a call to one `LineFile`."""

    file_name: ClassVar[str]
    _written: LineFile | None = None

    @abc.abstractmethod
    def _until(self, lines: list[str], step: int) -> list[str]:
        """Those lines that can be read, and are of `step` or before."""

    def state_dict(self) -> dict[str, Any]:
        file = self._written or LineFile(self._file_path)
        return {"lines": file.count}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        if os.path.exists(self._file_path):
            self._rewrite(self._until(self._lines()[: state.get("lines")], step))

    def save(self) -> None:
        if self._written is not None:
            self._written.save()

    def begin_save(self) -> Callable[[], None]:
        return self._written.begin_save() if self._written is not None else lambda: None

    def finalize(self, status: str) -> None:
        if self._written is not None:
            self._written.close()

    @property
    def _file_path(self) -> str:
        return os.path.join(self.log_dir, self.file_name)

    def _lines(self) -> list[str]:
        return LineFile(self._file_path).lines()

    def _rewrite(self, lines: list[str]) -> None:
        self._open().rewrite(lines)

    def _append(self, line: str) -> None:
        self._open().append(line)

    def _open(self) -> LineFile:
        if self._written is None:
            self._written = LineFile(self.path(self.file_name))
        return self._written
