"""The pieces in which a device is read: each knows where it has data. Holes between the data are not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable, NamedTuple, TypeVar

from blockcopy.block.buffers import ZEROS
from blockcopy.block.device import Device
from blockcopy.block.geometry import MAX_POSITION, Extent, join_extents
from blockcopy.errors import DeviceError

Result = TypeVar("Result")

PIECE_SIZE = 4 * 1024 * 1024
"""Bytes that one thread reads or views, and hashes, at a time. No block is larger.

With a quarter of this size, threads spend half of their time waiting for one another.
"""


class Piece(NamedTuple):
    """A part of a device: `length` bytes at offset `position`.

    `data`: its byte ranges that may not be zeros, in offsets of the device, ascending, in whole blocks.
    """

    position: int
    length: int
    data: list[Extent]

    def without(self, blocks: frozenset[int], block_size: int) -> Piece:
        """Return a copy of this piece whose data lacks `blocks` of `block_size` bytes.

        `blocks`: set of byte offsets in the piece, at which these blocks begin.
        """
        if not blocks:
            return self
        data = (
            Extent(offset, min(block_size, extent.end - offset))
            for extent in self.data
            for offset in range(extent.offset, extent.end, block_size)
            if offset - self.position not in blocks
        )
        return Piece(self.position, self.length, join_extents(data))

    def read(self, device: Device, buffer: memoryview) -> int:
        """Read the data of this piece from `device` into `buffer`, each byte at its offset in the piece.

        Returns how many bytes of the piece the device has, fewer than all only if the device ends early.
        Raises DeviceError if a range cannot be read.
        """
        for extent in self.data:
            start = extent.offset - self.position
            count = device.read_into(extent.offset, buffer[start : start + extent.length])
            if count < extent.length:
                return start + count
        # The end may lie in a hole.
        end = self.position + self.length
        if self.data and self.data[-1].end == end:
            return self.length
        return max(0, min(end, device.size()) - self.position)

    def read_skipping_errors(
        self, device: Device, buffer: memoryview, block_size: int
    ) -> tuple[int, dict[int, DeviceError]]:
        """Read the data of this piece from `device` into `buffer`. Skip unreadable blocks of `block_size` bytes.

        Returns a tuple: how many bytes of the piece the device has, and a dict of the skipped blocks' errors. Its
        keys are the blocks' byte offsets in the piece. The bytes of these blocks in the buffer are undefined.
        """
        try:
            return self.read(device, buffer), {}
        except DeviceError:
            errors: dict[int, DeviceError] = {}
        for at in range(0, self.length, block_size):
            block = self.block(at, block_size)
            try:
                count = block.read(device, buffer[at : at + block_size])
            except DeviceError as error:
                errors[at] = error
                continue
            if count < block.length:
                return at + count, errors
        return self.length, errors

    def block(self, at: int, block_size: int) -> Piece:
        """Return one block of this piece as a Piece: up to `block_size` bytes at byte offset `at` in this piece."""
        position = self.position + at
        length = min(block_size, self.length - at)
        return Piece(position, length, [Extent(position, length)] if self._has_data(position) else [])

    def examine_view(self, device: Device, examine: Callable[[memoryview], Result]) -> Result | None:
        """Return the result of `examine`, called with a memoryview of this piece of `device`, without a copy.

        `examine` must access only the piece's data, and must not keep the memoryview. See `Device.view()`.

        Returns None if the kernel cannot map the bytes, or if the device shrank meanwhile. Call
        `read_skipping_errors()` then, which reports the reason. Raises DeviceError if the device's size is unknown.
        """
        view = device.view(self.position, self.length, self.data)
        if view is None:
            return None
        try:
            result = examine(view)
        finally:
            is_valid = device.release_view(self.position, self.length)
        return result if is_valid else None

    def blocks(self, data: memoryview, block_size: int) -> Iterator[tuple[int, memoryview | None]]:
        """Yield a tuple for each block of this piece: its length, and its bytes or None if they are zeros.

        `data`: memoryview of the piece, read or mapped. `block_size`: bytes.
        """
        solid = self.data == [(self.position, self.length)]
        for start in range(0, self.length, block_size):
            block = data[start : min(start + block_size, self.length)]
            zeros = not (solid or self._has_data(self.position + start)) or ZEROS.startswith(block)
            yield len(block), None if zeros else block

    def _has_data(self, position: int) -> bool:
        return any(extent.offset <= position < extent.end for extent in self.data)


class PieceScanner:
    """A search for the data of `device`, which cuts it into pieces. Not thread-safe.

    It remembers the last range of data. Some file systems take long to find the end of a long range.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._from = 0  # from here to _data is a hole
        self._data = Extent(0, 0)

    def next_data(self, offset: int) -> Extent:
        """Return the next Extent of data at or behind byte `offset`.

        The Extent begins at MAX_POSITION if there is none.
        """
        if not self._from <= offset < self._data.end:
            extents = self._device.data_extents(offset, MAX_POSITION - offset)
            self._from, self._data = offset, next(extents, Extent(MAX_POSITION, 0))
        start = max(offset, self._data.offset)
        return Extent(start, self._data.end - start)

    def piece(self, position: int, length: int, block_size: int) -> Piece:
        """Return the Piece of `length` bytes at byte `position`. Its data is whole blocks of `block_size` bytes."""
        end = position + length
        data: list[Extent] = []
        at = position
        while at < end and (found := self.next_data(at)).offset < end:
            start = position + (found.offset - position) // block_size * block_size
            at = min(end, position - (position - found.end) // block_size * block_size)
            data.append(Extent(start, at - start))
        return Piece(position, length, join_extents(data))

    def pieces_with_data(self, position: int, length: int, block_size: int) -> Iterator[Piece]:
        """Yield the Pieces of `length` bytes at byte `position` that have data.

        Pieces that are all hole are left out. Each piece has up to PIECE_SIZE bytes, in whole blocks of
        `block_size` bytes counted from `position`.
        """
        max_length = PIECE_SIZE // block_size * block_size
        at, end = position, position + length
        while at < end and (found := self.next_data(at).offset) < end:
            at = position + (found - position) // max_length * max_length
            yield self.piece(at, min(max_length, end - at), block_size)
            at += max_length

    def pieces(self, position: int, length: int, block_size: int) -> Iterator[Piece]:
        """Yield the Pieces of `length` bytes at byte `position`. One Piece without data stands for each hole.

        `block_size`: as in `pieces_with_data()`.
        """
        at, end = position, position + length
        for piece in self.pieces_with_data(position, length, block_size):
            if at < piece.position:
                yield Piece(at, piece.position - at, [])
            yield piece
            at = piece.position + piece.length
        if at < end:
            yield Piece(at, end - at, [])
