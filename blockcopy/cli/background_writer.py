"""A queue with a writing thread. Nobody who logs or reports waits for a slow reader, or fails with it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import Callable, Generic, TypeVar

Item = TypeVar("Item")

_MAX_WAITING = 1000
"""Items that may wait. Each further one displaces the oldest."""


class BackgroundWriter(Generic[Item]):
    """A queue of items, which a thread writes in order. The thread ends when the queue is empty."""

    def __init__(self, write: Callable[[Item], None], describe_dropped: Callable[[int], Item]) -> None:
        """Make an empty queue.

        `write`: called with each item. Its exceptions are ignored. `describe_dropped`: called with the number of
        displaced items, returns an item that reports this number.
        """
        self._write = write
        self._describe_dropped = describe_dropped
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[Item] = deque()
        self._dropped = 0
        self._running = False

    def put(self, item: Item) -> None:
        """Queue `item` and return at once. Thread-safe."""
        if self._pid != os.getpid():
            self._reset()  # after a fork, the thread and the queue belong to the parent
        with self._changed:
            if len(self._waiting) == _MAX_WAITING:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(item)
            if not self._running:
                with contextlib.suppress(RuntimeError):  # no thread to be had: the next item tries again
                    threading.Thread(target=self._run, name="background writer", daemon=True).start()
                    self._running = True

    def drain(self, seconds: float) -> bool:
        """Wait until the queue is written, for at most `seconds`. Returns False if items are left. Thread-safe."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            # The reader is gone, the disk is full, or the item has no text. Later items may still work.
            with contextlib.suppress(Exception):
                self._write(item)

    def _next(self) -> Item | None:
        """Take and return the next item of the queue. Returns None, and ends the thread, if there is none."""
        with self._changed:
            if self._dropped:
                count, self._dropped = self._dropped, 0
                return self._describe_dropped(count)
            if self._waiting:
                return self._waiting.popleft()
            self._running = False
            self._changed.notify_all()
            return None
