"""Which blocks of the destination are known to be right. Pure state: one bit a block and counters.

A block is unknown until it is marked. Blocks on their way are the materialiser's to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from blockcopy.geometry import Geometry

_NOT_FULL = re.compile(rb"[^\xff]", re.DOTALL)


class BlockMap:
    """The present blocks of one destination, and where their bytes came from."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self.generation = 0
        """Grows with each `forget_all`: what was learnt before one must not be marked after it."""
        self.forget_all()

    def forget_all(self) -> None:
        """Nothing is known: every block has to be checked again."""
        self.generation += 1
        blocks = self._geometry.blocks
        self._bits = bytearray(-(-blocks // 8))
        if blocks % 8:  # bits behind the last block count as present, so that no search finds them
            self._bits[-1] = 0xFF << blocks % 8 & 0xFF
        self.same_bytes = 0
        """Bytes the destination had already."""
        self.fetched_bytes = 0
        """Bytes that were fetched because they differed."""

    @property
    def present_bytes(self) -> int:
        return self.same_bytes + self.fetched_bytes

    @property
    def complete(self) -> bool:
        return self.present_bytes == self._geometry.size

    def mark(self, block: int, *, fetched: bool) -> None:
        """`block` is right on the destination: all its bytes were written, or were found equal."""
        length = self._geometry.extent(block).length
        index, bit = block >> 3, 1 << (block & 7)
        if self._bits[index] & bit:
            return
        self._bits[index] |= bit
        if fetched:
            self.fetched_bytes += length
        else:
            self.same_bytes += length

    def missing(self, blocks: range) -> Iterator[int]:
        """The unknown ones of consecutive `blocks`, ascending; present ones are passed over quickly."""
        block = blocks.start
        while (found := self._next_missing(block)) is not None and found < blocks.stop:
            yield found
            block = found + 1

    def any_missing(self, blocks: Iterable[int]) -> bool:
        return any(not self._bits[block >> 3] & 1 << (block & 7) for block in blocks)

    def _next_missing(self, block: int) -> int | None:
        index = block >> 3
        if index >= len(self._bits):
            return None
        byte = self._bits[index] | (1 << (block & 7)) - 1  # what lies before `block` does not count
        if byte == 0xFF:
            found = _NOT_FULL.search(self._bits, index + 1)
            if found is None:
                return None
            index = found.start()
            byte = self._bits[index]
        lowest_zero = ~byte & byte + 1
        return index * 8 + lowest_zero.bit_length() - 1
