"""The time limit `--timeout`: the seconds for which a source that owes an answer may make no progress.

Progress is a whole answer, or MIN_PROGRESS_BYTES. Fewer bytes are no progress: a source that sends one byte a
second would keep its caller waiting for ever. One thread receives and reports all that arrives. Tasks of trio ask
and watch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

MIN_PROGRESS_BYTES = 32 * 1024
"""Bytes within the time limit that count as progress without a whole answer: a slow link, and no trickle.

The default limit of 30 seconds makes them 9 kbit/s. A link of 56 kbit/s that carries two connections has three
times as much.
"""


class ProgressTimeout:
    """The clock of a source's progress. Make it in trio's thread."""

    def __init__(self, timeout: float) -> None:
        """Start the clock. `timeout`: seconds without progress after which the time is up."""
        self.timeout = timeout
        self.answered_at: float | None = None
        """The time of the last whole answer, by trio's clock. None before the first one."""
        self.taking = False
        """True while an answer is being processed: the time that the destination needs does not count."""
        self._began_at = trio.current_time()
        self._bytes = 0  # received since then
        self._clock_starts_at = trio.current_time() - time.perf_counter()

    @property
    def ends_at(self) -> float:
        """The time when the source has made no progress for too long, by trio's clock."""
        return self._began_at + self.timeout

    def begin(self) -> None:
        """Restart the clock, because the source was asked and owed nothing before. Thread-safe."""
        self._began_at, self._bytes = self._now(), 0

    def receive(self, count: int) -> None:
        """Count `count` bytes that arrived. Restarts the clock at MIN_PROGRESS_BYTES."""
        self._bytes += count
        if self._bytes >= MIN_PROGRESS_BYTES:
            self.begin()

    def answer(self) -> None:
        """Note a whole answer, and restart the clock."""
        self.begin()
        self.answered_at = self._began_at

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Stop the clock during the `with` block, which processes what arrived. Yields nothing."""
        self.taking, before = True, self._now()
        try:
            yield
        finally:
            now = self._now()
            self._began_at = min(now, self._began_at + now - before)
            self.taking = False

    def _now(self) -> float:
        """Return the time by trio's clock. Thread-safe."""
        return time.perf_counter() + self._clock_starts_at
