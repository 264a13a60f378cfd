"""A device in pieces: where it has data, and reading that. What lies between, its holes, is not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable, NamedTuple, TypeVar

from blockcopy.block.buffers import ZEROS
from blockcopy.block.device import Device
from blockcopy.block.geometry import MAX_POSITION, Extent, join_extents
from blockcopy.errors import DeviceError

Result = TypeVar("Result")

PIECE_SIZE = 4 * 1024 * 1024
"""Bytes that one thread looks at, or reads, and compares before it hands over: with a quarter of that, threads
are half of their time busy with one another. No block is larger."""


class Piece(NamedTuple):
    """`length` bytes at `position`, of which those in `data`, whole blocks, can be other than zeros."""

    position: int
    length: int
    data: list[Extent]

    def without(self, blocks: frozenset[int], block_size: int) -> Piece:
        """The same, of which `blocks`, counted in bytes from its beginning, need not be read."""
        if not blocks:
            return self
        data = (
            Extent(offset, min(block_size, extent.end - offset))
            for extent in self.data
            for offset in range(extent.offset, extent.end, block_size)
            if offset - self.position not in blocks
        )
        return Piece(self.position, self.length, join_extents(data))

    def read(self, device: Device, room: memoryview) -> int:
        """Have what is in `data` in `room`, each byte in its place. How many bytes of the piece the
        device has; fewer than its length only where it ends before. DeviceError."""
        for extent in self.data:
            start = extent.offset - self.position
            count = device.read_into(extent.offset, room[start : start + extent.length])
            if count < extent.length:
                return start + count
        # The end may lie in a hole.
        end = self.position + self.length
        if self.data and self.data[-1].end == end:
            return self.length
        return max(0, min(end, device.size()) - self.position)

    def read_skipping_errors(
        self, device: Device, room: memoryview, block_size: int
    ) -> tuple[int, dict[int, DeviceError]]:
        """Read as `read`, and pass over blocks that cannot be read, so that a bad sector costs its own block only.

        Returns how many bytes of the piece the device has, and the error of each block that was passed over, by
        its offset in the piece. The room has no bytes of these.
        """
        try:
            return self.read(device, room), {}
        except DeviceError:
            errors: dict[int, DeviceError] = {}
        for at in range(0, self.length, block_size):
            block = self.block(at, block_size)
            try:
                count = block.read(device, room[at : at + block_size])
            except DeviceError as error:
                errors[at] = error
                continue
            if count < block.length:
                return at + count, errors
        return self.length, errors

    def block(self, at: int, block_size: int) -> Piece:
        """Return the block that begins `at` bytes into the piece."""
        position = self.position + at
        length = min(block_size, self.length - at)
        return Piece(position, length, [Extent(position, length)] if self._has_data(position) else [])

    def examine_view(self, device: Device, examine: Callable[[memoryview], Result]) -> Result | None:
        """Return `examine(view)`, where `view` shows the piece's bytes in the page cache without a copy.

        `examine` must access only the ranges in `data`, and must not keep the view. See `Device.view`.

        Returns None if the kernel cannot map the bytes, or if the device shrank meanwhile. Call
        `read_skipping_errors` then, which reports the reason. Raises DeviceError if the device's size is unknown.
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
        """Each block of what `read` or `view` gave: its length, and its bytes; None where these are zeros."""
        solid = self.data == [(self.position, self.length)]
        for start in range(0, self.length, block_size):
            block = data[start : min(start + block_size, self.length)]
            zeros = not (solid or self._has_data(self.position + start)) or ZEROS.startswith(block)
            yield len(block), None if zeros else block

    def _has_data(self, position: int) -> bool:
        return any(extent.offset <= position < extent.end for extent in self.data)


class PieceScanner:
    """Where `device` has data. For one thread at a time.

    What was found last is remembered: to look for the end of much data takes long on some file systems.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._from = 0  # there is a hole from here up to _data, if anything
        self._data = Extent(0, 0)

    def next_data(self, offset: int) -> Extent:
        """The first that is no hole from `offset` on; at MAX_POSITION where there is none."""
        if not self._from <= offset < self._data.end:
            extents = self._device.data_extents(offset, MAX_POSITION - offset)
            self._from, self._data = offset, next(extents, Extent(MAX_POSITION, 0))
        start = max(offset, self._data.offset)
        return Extent(start, self._data.end - start)

    def piece(self, position: int, length: int, block_size: int) -> Piece:
        """With blocks of `block_size` from `position` on."""
        end = position + length
        data: list[Extent] = []
        at = position
        while at < end and (found := self.next_data(at)).offset < end:
            start = position + (found.offset - position) // block_size * block_size
            at = min(end, position - (position - found.end) // block_size * block_size)
            data.append(Extent(start, at - start))
        return Piece(position, length, join_extents(data))

    def pieces_with_data(self, position: int, length: int, block_size: int) -> Iterator[Piece]:
        """Of the pieces that `length` bytes at `position` fall into, those that are not all hole."""
        most = PIECE_SIZE // block_size * block_size
        at, end = position, position + length
        while at < end and (found := self.next_data(at).offset) < end:
            at = position + (found - position) // most * most
            yield self.piece(at, min(most, end - at), block_size)
            at += most
