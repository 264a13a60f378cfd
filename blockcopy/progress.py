"""The `--progress` lines of the stages. They count completed work, and percents are floored."""

from __future__ import annotations

import time
from typing import Callable

_SECONDS = 60
_PERCENT = 5


class LineProgress:
    """The original's plain lines: one each 5 percent or 60 seconds, whichever comes first."""

    def __init__(self, total: int | None, write: Callable[[str], None]) -> None:
        """`total` bytes to come; None where nobody can know, and then only the end is told."""
        self._total = total
        self._write = write
        self._started = self._told_at = time.monotonic()
        self._told = 0.0

    def update(self, completed: int, position: int) -> None:
        """`completed` bytes are done, up to `position` of the device."""
        if not self._total:
            return
        percent = 100 * completed / self._total
        now = time.monotonic()
        if now - self._told_at >= _SECONDS or percent - self._told >= _PERCENT:
            self._told_at, self._told = now, percent
            floored = int(percent * 100) / 100
            self._write(
                f"Checksum progress: {position / 2**30:7.2f} GB / {self._total / 2**30:.2f} GB ({floored:5.2f}%)"
            )

    def finish(self) -> None:
        self._write(f"Checksum done in {time.monotonic() - self._started:.3f} seconds")
