"""Byte ranges, and the division of a device into blocks. Pure arithmetic, no I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Callable, NamedTuple

BLOCK_SIZE = 128 * 1024
"""Bytes of a block: the unit that the original program hashes and sends."""

MAX_POSITION = 2**63 - 1
"""The last offset that Linux can address: its off_t is signed."""


class Extent(NamedTuple):
    """A byte range: `length` bytes from `offset` on."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The offset of the first byte behind the range."""
        return self.offset + self.length


class Geometry(NamedTuple):
    """The division of `size` bytes into blocks of `block_size` bytes. The last block may be shorter."""

    size: int
    block_size: int = BLOCK_SIZE

    @property
    def block_count(self) -> int:
        """Number of blocks, including a shorter last one."""
        return -(-self.size // self.block_size)

    def extent(self, block: int) -> Extent:
        """Return the Extent of block number `block`. Raises IndexError if there is no such block."""
        if not 0 <= block < self.block_count:
            raise IndexError(f"block {block} of {self.block_count}")
        offset = block * self.block_size
        return Extent(offset, min(self.block_size, self.size - offset))

    def bytes_of(self, blocks: range) -> int:
        """Return the number of bytes that the range `blocks`, of block numbers, has on this device."""
        return max(0, min(blocks.stop * self.block_size, self.size) - blocks.start * self.block_size)

    def span(self, offset: int, length: int) -> range:
        """Return the range of block numbers that `length` bytes at byte `offset` touch.

        No block is beyond the end.
        """
        end = min(offset + length, self.size)
        if length <= 0 or offset >= end:
            return range(0)
        return range(offset // self.block_size, -(-end // self.block_size))


def block_runs(blocks: Iterable[int]) -> Iterator[range]:
    """Yield the ranges of consecutive numbers in `blocks`, which are ascending block numbers."""
    for _, group in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        run = [block for _, block in group]
        yield range(run[0], run[-1] + 1)


class ExtentJoiner:
    """Byte ranges that arrive one by one, joined where they overlap or touch. Not thread-safe."""

    def __init__(self, emit: Callable[[Extent], object], *, gap: int = 0, max_length: int = MAX_POSITION) -> None:
        """Pass each joined range, an Extent, to `emit` when it is complete.

        `gap`: bytes that may lie between two ranges that are joined. They become part of the joined range.
        `max_length`: a joined range of so many bytes is not extended any more.
        """
        self._emit = emit
        self._gap = gap
        self._max_length = max_length
        self._joined = Extent(0, 0)

    def add(self, extent: Extent) -> None:
        """Join `extent` with the previous range. If this is impossible, pass the previous range to `emit` first."""
        offset, length = self._joined
        if length and offset <= extent.offset <= offset + length + self._gap and length < self._max_length:
            self._joined = Extent(offset, max(length, extent.end - offset))
        else:
            self.flush()
            self._joined = extent

    def flush(self) -> None:
        """Emit the last range, if any, as complete."""
        extent, self._joined = self._joined, Extent(0, 0)
        if extent.length:
            self._emit(extent)


def join_extents(extents: Iterable[Extent], *, gap: int = 0) -> list[Extent]:
    """Return a list of `extents`, ascending, joined where they overlap or are at most `gap` bytes apart."""
    joined: list[Extent] = []
    joiner = ExtentJoiner(joined.append, gap=gap)
    for extent in extents:
        joiner.add(extent)
    joiner.flush()
    return joined


def subtract(extents: Iterable[Extent], others: Iterable[Extent]) -> list[Extent]:
    """Return the parts of `extents` that lie in none of `others`, in the order of `extents`."""
    left = list(extents)
    for other in others:
        left = [
            Extent(start, end - start)
            for each in left
            for start, end in ((each.offset, min(each.end, other.offset)), (max(each.offset, other.end), each.end))
            if start < end
        ]
    return left
