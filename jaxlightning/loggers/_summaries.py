"""tensorboardX's `SummaryWriter` over a logger's own event file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.writer import FileWriter


def summaries_of(
    write: Callable[[Event], None], flush: Callable[[], None], log_dir: str
) -> SummaryWriter:
    """One that gives its events to `write`, where `SummaryWriter` has a file and a thread."""
    return _Summaries(_Into(_Events(write, flush, log_dir)))


class _Events:
    """What a `FileWriter` writes to."""

    def __init__(self, write: Callable[[Event], None], flush: Callable[[], None], log_dir: str):
        self.add_event, self.flush, self._log_dir = write, flush, log_dir

    def get_logdir(self) -> str:
        return self._log_dir

    def close(self) -> None:
        """The logger closes its file."""


class _Into(FileWriter):
    def __init__(self, events: _Events):
        self.event_writer = events
        self._default_metadata: dict[str, Any] = {}


class _Summaries(SummaryWriter):
    def __init__(self, into: FileWriter):
        self._into = into
        super().__init__(into.get_logdir(), write_to_disk=False)

    def _get_file_writer(self) -> FileWriter:
        return self._into
