"""Which blocks of the destination are known to be right. Pure state: one bit a block and counters.

A block is unknown until it is marked. One that the source cannot read is set aside: missing as before, and not
wanted by the pass. Blocks on their way are the hydrator's to know. What was
marked since it was last asked for is handed out in chunks, for the journal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.unreadable import MAX_RANGES, UnreadableRanges

CHUNK_BLOCKS = 16384
"""Blocks whose bits are kept and recorded as one: 2 KiB for 2 GiB of the device."""

Kind = Literal["same", "fetched", "zero"]
"""How a block became present: it was equal, was sent, or is zeros, of which nobody sends the bytes."""

_CHUNK_BYTES = CHUNK_BLOCKS // 8

_COARSE_CELLS = 4096
"""Ranges of the device of which it is known how many zeros they have: enough for a map on a screen."""

_NOT_FULL = re.compile(rb"[^\xff]", re.DOTALL)


class BlockMap:
    """The present blocks of one destination, and where their bytes came from."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self.generation = 0
        """Grows with each `clear`: what was learnt before one must not be marked after it."""
        self.clear()

    def clear(self) -> None:
        """Nothing is known: every block has to be checked again."""
        self.generation += 1
        self._bits = bytearray(-(-self._geometry.block_count // 8))
        self._aside = bytearray()  # bits of the blocks that were set aside, once there are any
        self._fill_padding()
        self._changed: set[int] = set()
        self.resumed_bytes = 0
        """Bytes that an earlier run has recorded."""
        self.same_bytes = 0
        """Bytes the destination had already."""
        self.fetched_bytes = 0
        """Bytes that were fetched because they differed."""
        self.zero_bytes = 0
        """Bytes that the source has as zeros, and did not have to send."""
        self._last_was_missing = True  # the last block, which may be short
        self._coarse = max(1, -(-self._geometry.block_count // _COARSE_CELLS))
        self._zeros = [0] * -(-self._geometry.block_count // self._coarse)
        """Blocks of zeros, in ranges of _coarse blocks."""

    @property
    def present_bytes(self) -> int:
        return self.resumed_bytes + self.same_bytes + self.fetched_bytes + self.zero_bytes

    @property
    def complete(self) -> bool:
        return self.present_bytes == self._geometry.size

    def mark(self, blocks: range, kind: Kind) -> None:
        """`blocks` are right on the destination: all their bytes were written, or were found equal.

        Counted are those that were not marked before. IndexError outside of the device.
        """
        if not blocks:
            return
        if not 0 <= blocks.start < blocks.stop <= self._geometry.block_count:
            raise IndexError(f"blocks {blocks.start} to {blocks.stop - 1} of {self._geometry.block_count}")
        added = self._set_zeros(blocks) if kind == "zero" else _set(self._bits, blocks)
        if not added:
            return
        length = added * self._geometry.block_size
        if blocks.stop == self._geometry.block_count and self._last_was_missing:
            length -= self._geometry.block_size - self._geometry.extent(blocks[-1]).length
            self._last_was_missing = False
        self._changed.update(range(blocks.start // CHUNK_BLOCKS, blocks[-1] // CHUNK_BLOCKS + 1))
        if kind == "fetched":
            self.fetched_bytes += length
        elif kind == "zero":
            self.zero_bytes += length
        else:
            self.same_bytes += length

    def _set_zeros(self, blocks: range) -> int:
        """Do as `_set` for present blocks, and count those that were not set before, range by range."""
        added = 0
        for cell in range(blocks.start // self._coarse, blocks[-1] // self._coarse + 1):
            start = cell * self._coarse
            new = _set(self._bits, range(max(blocks.start, start), min(blocks.stop, start + self._coarse)))
            self._zeros[cell] += new
            added += new
        return added

    def count(self, blocks: range) -> tuple[int, int]:
        """How many of consecutive `blocks` are present, and how many of these about are zeros that nobody sent."""
        if not blocks:
            return 0, 0
        first, last = blocks.start >> 3, (blocks.stop - 1) >> 3
        bits = int.from_bytes(self._bits[first : last + 1], "little") >> (blocks.start & 7)
        present = (bits & (1 << len(blocks)) - 1).bit_count()
        cells = range(blocks.start // self._coarse, blocks[-1] // self._coarse + 1)
        looked_at = min(cells.stop * self._coarse, self._geometry.block_count) - cells.start * self._coarse
        zeros = sum(map(self._zeros.__getitem__, cells)) * len(blocks) // looked_at
        return present, min(present, zeros)

    def resume(self, chunks: Mapping[int, bytes]) -> None:
        """Take recorded chunks as they are; for a map of which nothing is marked yet.

        ValueError for a chunk that this device does not have, or of another length.
        """
        for number, bits in chunks.items():
            start = number * _CHUNK_BYTES
            if number < 0 or len(bits) != len(self._bits[start : start + _CHUNK_BYTES]) or not bits:
                raise ValueError(f"chunk {number} of {len(bits)} bytes")
            self._bits[start : start + len(bits)] = bits
        self._fill_padding()
        blocks, block_size = self._geometry.block_count, self._geometry.block_size
        missing = len(self._bits) * 8 - int.from_bytes(self._bits, "little").bit_count()
        self.resumed_bytes = (blocks - missing) * block_size
        self._last_was_missing = bool(blocks) and self.any_missing([blocks - 1])
        if blocks and not self._last_was_missing:
            self.resumed_bytes -= block_size - self._geometry.extent(blocks - 1).length

    def _fill_padding(self) -> None:
        """Bits behind the last block count as present, so that no search finds them."""
        if self._geometry.block_count % 8:
            self._bits[-1] |= 0xFF << self._geometry.block_count % 8 & 0xFF

    def take_changes(self) -> dict[int, bytes]:
        """The chunks that were marked in since the last time, as they are now; number → bits."""
        changes = {number: self._chunk(number) for number in sorted(self._changed)}
        self._changed.clear()
        return changes

    def restore_changes(self, numbers: Iterable[int]) -> None:
        """These chunks, taken before, could not be recorded."""
        self._changed.update(numbers)

    def _chunk(self, number: int) -> bytes:
        return bytes(self._bits[number * _CHUNK_BYTES : (number + 1) * _CHUNK_BYTES])

    def missing(self, blocks: range) -> Iterator[int]:
        """The unknown ones of consecutive `blocks`, ascending; present ones are passed over quickly."""
        block = blocks.start
        while (found := self._next_missing(block)) is not None and found < blocks.stop:
            yield found
            block = found + 1

    def mark_unreadable(self, blocks: range) -> None:
        """Note that consecutive blocks cannot be read at the source. They are missing until they are marked."""
        self._aside = self._aside or bytearray(len(self._bits))
        _set(self._aside, blocks)

    def is_unreadable(self, block: int) -> bool:
        """Return whether it was set aside, be it present by now."""
        return bool(self._aside) and bool(self._aside[block >> 3] & 1 << (block & 7))

    def fetchable(self, blocks: range) -> Iterator[int]:
        """Return those that are missing and were not set aside, as `missing` does."""
        found = self._next_wanted(blocks.start)
        while found is not None and found < blocks.stop:
            yield found
            found = self._next_wanted(found + 1)

    def _next_wanted(self, block: int) -> int | None:
        while True:
            found = self._next_missing(block)
            if found is None or not self.is_unreadable(found):
                return found
            behind = _next_clear(self._aside, found)
            if behind is None:
                return None
            block = behind

    def unreadable_ranges(self, reason: str = "") -> UnreadableRanges:
        """Return what was set aside and is missing."""
        found = UnreadableRanges()
        if not self._aside:
            return found
        found.reason = reason
        left = int.from_bytes(self._aside, "little") & ~int.from_bytes(self._bits, "little")
        found.bytes = left.bit_count() * self._geometry.block_size
        if left >> self._geometry.block_count - 1:
            found.bytes -= self._geometry.block_size - self._geometry.extent(self._geometry.block_count - 1).length
        at = 0
        while left and len(found.ranges) < MAX_RANGES:
            skipped = (left & -left).bit_length() - 1
            left >>= skipped
            run = (~left & left + 1).bit_length() - 1
            left >>= run
            first, last = self._geometry.extent(at + skipped), self._geometry.extent(at + skipped + run - 1)
            found.ranges.append(Extent(first.offset, last.end - first.offset))
            at += skipped + run
        found.more = bool(left)
        return found

    def any_missing(self, blocks: Sequence[int]) -> bool:
        """Whether one of them is unknown; quick for a range."""
        if isinstance(blocks, range):
            found = self._next_missing(blocks.start) if blocks else None
            return found is not None and found < blocks.stop
        return any(not self._bits[block >> 3] & 1 << (block & 7) for block in blocks)

    def _next_missing(self, block: int) -> int | None:
        return _next_clear(self._bits, block)


def _set(bits: bytearray, blocks: range) -> int:
    """Set the bits of `blocks`. Returns how many were not set before."""
    first, last = blocks.start >> 3, (blocks.stop - 1) >> 3
    old = int.from_bytes(bits[first : last + 1], "little")
    new = old | ((1 << len(blocks)) - 1) << (blocks.start & 7)
    bits[first : last + 1] = new.to_bytes(last + 1 - first, "little")
    return (new ^ old).bit_count()


def _next_clear(bits: bytearray, block: int) -> int | None:
    """Return the first block from `block` on whose bit is not set. Returns None if there is none."""
    index = block >> 3
    if index >= len(bits):
        return None
    byte = bits[index] | (1 << (block & 7)) - 1  # what lies before `block` does not count
    if byte == 0xFF:
        found = _NOT_FULL.search(bits, index + 1)
        if found is None:
            return None
        index = found.start()
        byte = bits[index]
    lowest_zero = ~byte & byte + 1
    return index * 8 + lowest_zero.bit_length() - 1
