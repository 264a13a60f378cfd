"""What users read, and how long those of their reads took that had to wait for the source."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

_WINDOW = 1000
"""Waits that are remembered."""


class ReadStats:
    """Counts; of the waits, the last _WINDOW."""

    def __init__(self) -> None:
        self.reads = 0
        self.bytes = 0
        self.waiting = 0
        """Reads that wait for the source now."""
        self._waits: deque[float] = deque(maxlen=_WINDOW)  # seconds

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around a read that has to wait for the source."""
        self.waiting += 1
        since = trio.current_time()
        try:
            yield
        finally:
            self.waiting -= 1
            self._waits.append(trio.current_time() - since)

    def as_json(self) -> dict[str, Any]:
        """Latencies are null where nobody had to wait."""
        waits = sorted(self._waits)

        def at(fraction: float) -> float | None:
            return round(waits[min(int(fraction * len(waits)), len(waits) - 1)], 6) if waits else None

        return {
            "reads": self.reads,
            "bytes": self.bytes,
            "waiting": self.waiting,
            "latency_p50_seconds": at(0.5),
            "latency_p99_seconds": at(0.99),
            "latency_max_seconds": at(1),
        }
