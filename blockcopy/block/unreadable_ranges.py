"""The unreadable ranges of a device: number of bytes, the first ranges, and the first reason.

Memory is bounded, however much of a disk is bad.
"""

from __future__ import annotations

import bisect
import threading

from blockcopy.block.geometry import Extent, join_extents

MAX_RANGES = 16
"""Number of ranges that are kept and reported."""


class UnreadableRanges:
    """The ranges of one device that could not be read. False if empty. Thread-safe."""

    def __init__(self) -> None:
        self.bytes = 0
        """Number of unreadable bytes."""
        self.ranges: list[Extent] = []
        """The first MAX_RANGES ranges, ascending. Adjacent ranges are joined."""
        self.more = False
        """True if there are more ranges than those in `ranges`."""
        self.reason = ""
        """The reason of the first range that was added."""
        self._lock = threading.Lock()

    def add(self, extent: Extent, reason: str) -> None:
        """Add `extent`, which cannot be read for `reason`, a text.

        A range within those of the attribute `ranges` counts only once.
        """
        with self._lock:
            if any(each.offset <= extent.offset and extent.end <= each.end for each in self.ranges):
                return
            self.reason = self.reason or reason
            self.bytes += extent.length
            bisect.insort(self.ranges, extent)
            self.ranges = join_extents(self.ranges)
            if len(self.ranges) > MAX_RANGES:
                self.more = True
                self.ranges.pop()

    def __bool__(self) -> bool:
        return bool(self.bytes)

    def __str__(self) -> str:
        """Return the text "BYTES bytes (OFFSET:LENGTH, …): REASON", for users."""
        ranges = ", ".join(f"{each.offset}:{each.length}" for each in self.ranges)
        return f"{self.bytes} bytes ({ranges}{' and more' if self.more else ''}): {self.reason}"
