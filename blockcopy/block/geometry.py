"""Size and block size → block index, offset, length. Pure arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

BLOCK_SIZE = 128 * 1024
"""Bytes in a block: what the original program hashes and sends as one."""


MAX_POSITION = 2**63 - 1
"""The last offset Linux can address (off_t is signed)."""


class Extent(NamedTuple):
    """A byte range: `length` bytes from `offset` on."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Geometry(NamedTuple):
    """How `size` bytes fall into blocks of `block_size`; the last one may be short."""

    size: int
    block_size: int = BLOCK_SIZE

    @property
    def block_count(self) -> int:
        """Number of blocks, the short last one included."""
        return -(-self.size // self.block_size)

    def extent(self, block: int) -> Extent:
        """Where `block` lies. IndexError outside 0 … blocks-1."""
        if not 0 <= block < self.block_count:
            raise IndexError(f"block {block} of {self.block_count}")
        offset = block * self.block_size
        return Extent(offset, min(self.block_size, self.size - offset))

    def span(self, offset: int, length: int) -> range:
        """The blocks that the byte range touches, cut to the size; empty where it touches none."""
        end = min(offset + length, self.size)
        if length <= 0 or offset >= end:
            return range(0)
        return range(offset // self.block_size, -(-end // self.block_size))


def block_runs(blocks: Iterable[int]) -> Iterator[range]:
    """Ascending block numbers → ranges of consecutive ones."""
    start = stop = -1
    for block in blocks:
        if block != stop:
            if start >= 0:
                yield range(start, stop)
            start = block
        stop = block + 1
    if start >= 0:
        yield range(start, stop)
