"""SIGINT and SIGTERM as flags that the loop polls, so that a run ends between two steps."""

from __future__ import annotations

import signal
import threading
import types
from typing import Any


class Interrupted(BaseException):
    """A signal asked the run to end, and it is at a point where it can."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class Signals:
    """While entered, the first SIGINT or SIGTERM only sets a flag; a second SIGINT stops at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received = None  # or the run after an interrupted one would end at once
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            # A handler that somebody installed over ours stays.
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: types.FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt("second SIGINT: stopped without saving")
        self.received = signum

    def poll(self) -> None:
        """**Raises:** `Interrupted` once a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)
