"""The time for which a source that was asked has made no progress. The clock of `--timeout`.

Progress is a whole answer, or LEAST_BYTES. Bytes alone are none: a source that sends one a second would keep
who waits for ever. One thread receives, and tells of all that it takes; tasks of trio ask, and watch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

LEAST_BYTES = 32 * 1024
"""Bytes within the time limit that show a slow link, and no trickle, as long as no whole answer comes. With the
default of 30 seconds these are 9 kbit/s: a link of 56 kbit/s that carries two connections brings the threefold."""


class ProgressTimeout:
    """See the module. Made in trio's thread."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds without progress that are too many."""
        self.timeout = timeout
        self.answered_at: float | None = None
        """When the last whole answer came, in trio's time. None before the first one."""
        self.taking = False
        """Something that came is being taken: the time that the destination needs for it is no silence."""
        self._began_at = trio.current_time()
        self._bytes = 0  # received since then
        self._clock_starts_at = trio.current_time() - time.perf_counter()

    @property
    def ends_at(self) -> float:
        """Return when it has lasted too long, in trio's time."""
        return self._began_at + self.timeout

    def begin(self) -> None:
        """Begin anew: the source was asked, and owed nothing before."""
        self._began_at, self._bytes = self._now(), 0

    def receive(self, count: int) -> None:
        """Count bytes that came."""
        self._bytes += count
        if self._bytes >= LEAST_BYTES:
            self.begin()

    def answer(self) -> None:
        """Note a whole answer."""
        self.begin()
        self.answered_at = self._began_at

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While what came is being taken, the clock stands still."""
        self.taking, before = True, self._now()
        try:
            yield
        finally:
            now = self._now()
            self._began_at = min(now, self._began_at + now - before)
            self.taking = False

    def _now(self) -> float:
        """Return trio's time. Thread-safe."""
        return time.perf_counter() + self._clock_starts_at
