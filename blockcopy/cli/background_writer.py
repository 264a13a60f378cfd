"""A thread that writes for others. Who has something to say never waits for who reads it, and never fails by it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import Callable, Generic, TypeVar

Item = TypeVar("Item")

_MOST_WAITING = 1000
"""Items that wait to be written; then the oldest is dropped for each that comes."""


class BackgroundWriter(Generic[Item]):
    """Items on their way to `write`, in order, in a thread that lives as long as there are some."""

    def __init__(self, write: Callable[[Item], None], dropped: Callable[[int], Item]) -> None:
        """`dropped`: makes the item that tells how many were dropped. What `write` raises is passed over."""
        self._write = write
        self._tell_dropped = dropped
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[Item] = deque()
        self._dropped = 0
        self._busy = False

    def put(self, item: Item) -> None:
        """Queue `item` for the writing thread. Thread-safe, and returns at once."""
        if self._pid != os.getpid():
            self._begin()  # the thread, and what waited for it, are those of the process that forked
        with self._changed:
            if len(self._waiting) == _MOST_WAITING:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(item)
            if not self._busy:
                with contextlib.suppress(RuntimeError):  # no thread can be had: the next item tries again
                    threading.Thread(target=self._run, name="outlet", daemon=True).start()
                    self._busy = True

    def drain(self, seconds: float) -> bool:
        """Wait until all is written, for `seconds` at most. Returns False if some is not."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            # Nobody reads, the disk is full, or it cannot be shown: there is nobody to tell, and others go on.
            with contextlib.suppress(Exception):
                self._write(item)

    def _next(self) -> Item | None:
        with self._changed:
            if self._dropped:
                count, self._dropped = self._dropped, 0
                return self._tell_dropped(count)
            if self._waiting:
                return self._waiting.popleft()
            self._busy = False
            self._changed.notify_all()
            return None
