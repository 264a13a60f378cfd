"""The block map: which blocks of the destination are present, in one bit per block and counters. No I/O.

A present block has the source's bytes. All others are missing. A block that the source cannot read is marked
unreadable: it stays missing, and background hydration does not fetch it. The hydrator knows which blocks are being
fetched. The bits that changed are handed out in chunks, for the state file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.unreadable_ranges import MAX_RANGES, UnreadableRanges

CHUNK_BLOCKS = 16384
"""Blocks of a chunk, whose bits are recorded together: 2 KiB for 2 GiB of the device."""

Kind = Literal["same", "fetched", "zero"]
"""How a block became present: its bytes were equal, or were sent, or are zeros, which are not sent."""

_CHUNK_BYTES = CHUNK_BLOCKS // 8

_COARSE_CELLS = 4096
"""Parts of the device whose blocks of zeros are counted: enough for a map on a screen."""

_NOT_FULL = re.compile(rb"[^\xff]", re.DOTALL)


class BlockMap:
    """The present blocks of one destination, and counters of how they became present. Not thread-safe."""

    def __init__(self, geometry: Geometry) -> None:
        """Start with no block present. `geometry`: size and block size of the destination."""
        self.geometry = geometry
        """Size and block size of the destination once it is a copy: those of the source."""
        self.generation = 0
        """Grows with each `clear`. What was learnt in one generation must not be marked in a later one."""
        self.clear()

    def clear(self) -> None:
        """Make every block missing, so that each is checked again."""
        self.generation += 1
        self._bits = bytearray(-(-self.geometry.block_count // 8))
        self._unreadable = bytearray()  # bits of the unreadable blocks, if there are any
        self._fill_padding()
        self._changed: set[int] = set()
        self.resumed_bytes = 0
        """Present bytes that an earlier run recorded."""
        self.same_bytes = 0
        """Present bytes that the destination had before."""
        self.fetched_bytes = 0
        """Present bytes that were sent because they differed."""
        self.zero_bytes = 0
        """Present bytes that are zeros at the source, and were not sent."""
        self._coarse = max(1, -(-self.geometry.block_count // _COARSE_CELLS))
        self._zeros = [0] * -(-self.geometry.block_count // self._coarse)
        """The number of zero blocks in each part of _coarse blocks."""

    @property
    def present_bytes(self) -> int:
        """The present bytes of the device, whatever their origin."""
        return self.resumed_bytes + self.same_bytes + self.fetched_bytes + self.zero_bytes

    @property
    def complete(self) -> bool:
        """Whether all blocks are present."""
        return self.present_bytes == self.geometry.size

    def mark(self, blocks: range, kind: Kind) -> None:
        """Make the range `blocks` present, once all their bytes were written or found equal.

        `kind`: how they became present, a Kind. Counts only blocks that were missing. Raises IndexError if a block
        is outside of the device.
        """
        if not blocks:
            return
        if not 0 <= blocks.start < blocks.stop <= self.geometry.block_count:
            raise IndexError(f"blocks {blocks.start} to {blocks.stop - 1} of {self.geometry.block_count}")
        with_last = blocks.stop == self.geometry.block_count and self.any_missing(blocks[-1:])
        added = self._set_zeros(blocks) if kind == "zero" else _set(self._bits, blocks)
        if not added:
            return
        length = self._length(added, with_last=with_last)
        self._changed.update(range(blocks.start // CHUNK_BLOCKS, blocks[-1] // CHUNK_BLOCKS + 1))
        if kind == "fetched":
            self.fetched_bytes += length
        elif kind == "zero":
            self.zero_bytes += length
        else:
            self.same_bytes += length

    def _length(self, count: int, *, with_last: bool) -> int:
        """Return the bytes of `count` blocks. `with_last`: whether the device's last block, maybe short, is in."""
        excess = self.geometry.block_count * self.geometry.block_size - self.geometry.size
        return count * self.geometry.block_size - (excess if with_last else 0)

    def _set_zeros(self, blocks: range) -> int:
        """Make the range `blocks` present, and count their zeros. Returns how many were missing."""
        added = 0
        for cell in range(blocks.start // self._coarse, blocks[-1] // self._coarse + 1):
            start = cell * self._coarse
            new = _set(self._bits, range(max(blocks.start, start), min(blocks.stop, start + self._coarse)))
            self._zeros[cell] += new
            added += new
        return added

    def count(self, blocks: range) -> tuple[int, int]:
        """Return two numbers for the range `blocks`: the present ones, and about how many of these are zeros.

        Zeros are counted if the source did not send them.
        """
        if not blocks:
            return 0, 0
        first, last = blocks.start >> 3, (blocks.stop - 1) >> 3
        bits = int.from_bytes(self._bits[first : last + 1], "little") >> (blocks.start & 7)
        present = (bits & (1 << len(blocks)) - 1).bit_count()
        cells = range(blocks.start // self._coarse, blocks[-1] // self._coarse + 1)
        looked_at = min(cells.stop * self._coarse, self.geometry.block_count) - cells.start * self._coarse
        zeros = sum(map(self._zeros.__getitem__, cells)) * len(blocks) // looked_at
        return present, min(present, zeros)

    def resume(self, chunks: Mapping[int, bytes]) -> None:
        """Make the blocks of recorded `chunks` (number → bits) present, in a map with no block present.

        Raises ValueError if the device has no such chunk, or if its length is another.
        """
        for number, bits in chunks.items():
            start = number * _CHUNK_BYTES
            if number < 0 or len(bits) != len(self._bits[start : start + _CHUNK_BYTES]) or not bits:
                raise ValueError(f"chunk {number} of {len(bits)} bytes")
            self._bits[start : start + len(bits)] = bits
        self._fill_padding()
        blocks = range(self.geometry.block_count)
        missing = len(self._bits) * 8 - int.from_bytes(self._bits, "little").bit_count()
        self.resumed_bytes = self._length(len(blocks) - missing, with_last=not self.any_missing(blocks[-1:]))

    def _fill_padding(self) -> None:
        """Set the bits behind the last block, so that no search finds them missing."""
        if self.geometry.block_count % 8:
            self._bits[-1] |= 0xFF << self.geometry.block_count % 8 & 0xFF

    def take_changes(self) -> dict[int, bytes]:
        """Return the chunks (number → bits) that changed since the last call, as they are now."""
        changes = {number: self._chunk(number) for number in sorted(self._changed)}
        self._changed.clear()
        return changes

    def restore_changes(self, numbers: Iterable[int]) -> None:
        """Mark the chunks with these `numbers` as changed again, because they could not be recorded."""
        self._changed.update(numbers)

    def _chunk(self, number: int) -> bytes:
        return bytes(self._bits[number * _CHUNK_BYTES : (number + 1) * _CHUNK_BYTES])

    def missing(self, blocks: range) -> Iterator[int]:
        """Yield the missing block numbers in the range `blocks`, ascending. Skips present blocks quickly."""
        block = blocks.start
        while (found := _next_clear(self._bits, block)) is not None and found < blocks.stop:
            yield found
            block = found + 1

    def mark_unreadable(self, blocks: range) -> None:
        """Note that the source cannot read the range `blocks`. They stay missing until they are marked present."""
        self._unreadable = self._unreadable or bytearray(len(self._bits))
        _set(self._unreadable, blocks)

    def is_unreadable(self, block: int) -> bool:
        """Return whether `block` was marked unreadable, even if it is present by now."""
        return bool(self._unreadable) and bool(self._unreadable[block >> 3] & 1 << (block & 7))

    def fetchable(self, blocks: range) -> Iterator[int]:
        """Yield the block numbers in the range `blocks` that are missing and not marked unreadable, ascending."""
        found = self._next_fetchable(blocks.start)
        while found is not None and found < blocks.stop:
            yield found
            found = self._next_fetchable(found + 1)

    def _next_fetchable(self, block: int) -> int | None:
        while True:
            found = _next_clear(self._bits, block)
            if found is None or not self.is_unreadable(found):
                return found
            behind = _next_clear(self._unreadable, found)
            if behind is None:
                return None
            block = behind

    def unreadable_ranges(self, reason: str = "") -> UnreadableRanges:
        """Return the UnreadableRanges that are still missing: the first MAX_RANGES ranges, and the bytes of all.

        `reason`: the source's words, kept in the result, if known.
        """
        found = UnreadableRanges()
        if not self._unreadable:
            return found
        found.reason = reason
        left = int.from_bytes(self._unreadable, "little") & ~int.from_bytes(self._bits, "little")
        with_last = bool(left >> self.geometry.block_count - 1)
        found.bytes = self._length(left.bit_count(), with_last=with_last)
        at = 0
        while left and len(found.ranges) < MAX_RANGES:
            skipped = (left & -left).bit_length() - 1
            left >>= skipped
            run = (~left & left + 1).bit_length() - 1
            left >>= run
            first, last = self.geometry.extent(at + skipped), self.geometry.extent(at + skipped + run - 1)
            found.ranges.append(Extent(first.offset, last.end - first.offset))
            at += skipped + run
        found.more = bool(left)
        return found

    def any_missing(self, blocks: Sequence[int]) -> bool:
        """Return whether one of `blocks`, block numbers, is missing. Fast if `blocks` is a range."""
        if isinstance(blocks, range):
            found = _next_clear(self._bits, blocks.start) if blocks else None
            return found is not None and found < blocks.stop
        return any(not self._bits[block >> 3] & 1 << (block & 7) for block in blocks)


def _set(bits: bytearray, blocks: range) -> int:
    """Set the bits of the range `blocks` in `bits`. Returns how many were not set before."""
    first, last = blocks.start >> 3, (blocks.stop - 1) >> 3
    old = int.from_bytes(bits[first : last + 1], "little")
    new = old | ((1 << len(blocks)) - 1) << (blocks.start & 7)
    bits[first : last + 1] = new.to_bytes(last + 1 - first, "little")
    return (new ^ old).bit_count()


def _next_clear(bits: bytearray, block: int) -> int | None:
    """Return the first block from `block` on whose bit in `bits` is not set. Returns None if there is none."""
    index = block >> 3
    if index >= len(bits):
        return None
    byte = bits[index] | (1 << (block & 7)) - 1  # bits before `block` do not count
    if byte == 0xFF:
        found = _NOT_FULL.search(bits, index + 1)
        if found is None:
            return None
        index = found.start()
        byte = bits[index]
    lowest_zero = ~byte & byte + 1
    return index * 8 + lowest_zero.bit_length() - 1
