"""Statistics of the users' reads: how many, how many bytes, and how long reads waited for the source."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from blockcopy.replica.monitor.status import ReadStatus

_MAX_WAITS = 1000
"""Most waits that are remembered."""


class ReadStats:
    """Counters of reads, and the durations of the last _MAX_WAITS waits. Call from trio's thread only."""

    def __init__(self) -> None:
        self.reads = 0
        """Number of reads so far."""
        self.bytes = 0
        """Bytes read so far."""
        self.waiting = 0
        """Number of reads that wait for the source now."""
        self._waits: deque[float] = deque(maxlen=_MAX_WAITS)  # seconds

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Measure a wait for the source: use as a context manager around the wait. Yields nothing."""
        self.waiting += 1
        since = trio.current_time()
        try:
            yield
        finally:
            self.waiting -= 1
            self._waits.append(trio.current_time() - since)

    def status(self) -> ReadStatus:
        """Return the counts and the latencies as fields of the status. Call from trio's thread only."""
        waits = sorted(self._waits)

        def at(fraction: float) -> float | None:
            return round(waits[min(int(fraction * len(waits)), len(waits) - 1)], 6) if waits else None

        return ReadStatus(
            reads=self.reads,
            bytes=self.bytes,
            waiting=self.waiting,
            latency_p50_seconds=at(0.5),
            latency_p99_seconds=at(0.99),
            latency_max_seconds=at(1),
        )
