"""What of a device cannot be read: how many bytes, the first of the ranges, and the first reason.

Bounded, however much of a disk is bad.
"""

from __future__ import annotations

import bisect
import threading

from blockcopy.block.geometry import Extent, join_extents

MAX_RANGES = 16
"""Ranges that are kept, and told."""


class UnreadableRanges:
    """Ranges that could not be read. Thread-safe."""

    def __init__(self) -> None:
        self.bytes = 0
        self.ranges: list[Extent] = []
        """Ascending, at most MAX_RANGES; neighbours are one range."""
        self.more = False
        """There are others."""
        self.reason = ""
        """Why the first that was met cannot be read."""
        self._lock = threading.Lock()

    def add(self, extent: Extent, reason: str) -> None:
        """Add a range. A range that is there already is not counted again, as far as the ranges are kept."""
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
        """Return bytes, ranges and reason, for people."""
        return f"{self.bytes} bytes ({listed(self.ranges, more=self.more)}): {self.reason}"


def listed(ranges: list[Extent], *, more: bool) -> str:
    """Return ranges as OFFSET:LENGTH, as `verify` and `prefetch` have them."""
    words = ", ".join(f"{each.offset}:{each.length}" for each in ranges)
    return f"{words} and more" if more else words
