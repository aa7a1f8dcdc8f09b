"""Reading in a thread, a bounded number of items ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

_END = object()
_JOIN_S = 1.0


class _Failure(NamedTuple):
    error: BaseException


class ReadAhead:
    """Runs a generator in a thread, at most `depth` items ahead, and closes it there."""

    def __init__(self, items: Generator[Any, None, None], depth: int, poll: Callable[[], None]):
        self.wait_s = 0.0
        self._poll = poll
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._room.put(depth)
        self._closed = False
        # Room is given back by halves: a change of threads costs more than reading a small batch.
        self._share = max(depth // 2, 1)
        self._thread = threading.Thread(
            target=self._run, args=(items,), name="jaxlightning-feed", daemon=True
        )
        self._thread.start()

    def _run(self, items: Generator[Any, None, None]) -> None:
        try:
            while room := self._room.get():
                for _ in range(room):
                    if self._closed:
                        return
                    item = next(items, _END)
                    self._ready.put(item)
                    if item is _END:
                        return
        except BaseException as error:
            self._ready.put(_Failure(error))
        finally:
            items.close()

    def __iter__(self) -> Iterator[Any]:
        taken = 0
        while True:
            try:
                item = self._ready.get_nowait()
            except queue.Empty:
                item = self._wait()
            if item is _END:
                return
            if isinstance(item, _Failure):
                raise item.error
            taken += 1
            if taken == self._share:
                self._room.put(taken)
                taken = 0
            yield item

    def _wait(self) -> Any:
        start = time.perf_counter()
        while True:
            self._poll()
            try:
                item = self._ready.get(timeout=0.1)
            except queue.Empty:
                continue
            self.wait_s += time.perf_counter() - start
            return item

    def close(self) -> None:
        """Ends the thread, so that nobody else reads the loader. Where it hangs in the loader, it
        ends after that."""
        self._closed = True
        self._room.put(0)
        if self._thread is not threading.current_thread():  # as garbage, it may be
            self._thread.join(_JOIN_S)
