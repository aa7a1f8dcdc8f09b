"""Loggers of text files that grow line by line, and survive a kill at any moment."""

from __future__ import annotations

import abc
import os
from typing import ClassVar, TextIO

from ._logger import FileLogger, replace_file


class LineLogger(FileLogger):
    """Appends one line a call to one file.

    A line is in the hands of the operating system as soon as it is logged, so that only the
    machine's own death can lose it before `save`. A last line that was cut short is dropped.
    """

    file_name: ClassVar[str]
    _file: TextIO | None = None

    @abc.abstractmethod
    def _until(self, lines: list[str], step: int) -> list[str]:
        """Those lines that can be read, and are of `step` or before."""

    def resume(self, step: int) -> None:
        if os.path.exists(os.path.join(self.log_dir, self.file_name)):
            self._rewrite(self._until(self._lines(), step))

    def save(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def finalize(self, status: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self.save()
            self._file.close()
            self._file = None

    def _lines(self) -> list[str]:
        """All complete lines, without their ends."""
        try:
            with open(os.path.join(self.log_dir, self.file_name), "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        return content.decode("utf-8", errors="replace").split("\n")[:-1]

    def _rewrite(self, lines: list[str]) -> None:
        self._close()
        replace_file(self.path(self.file_name), "".join(f"{line}\n" for line in lines))

    def _append(self, line: str) -> None:
        if self._file is None:
            path = self.path(self.file_name)
            with open(path, "ab+") as file:  # What a kill left of a last line.
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._file.write(f"{line}\n")
        self._file.flush()
