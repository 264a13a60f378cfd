"""The delta: frames that make the client's blocks equal to the source's.

A worker thread of `retrieve` answers each `Request`, in a borrowed buffer. If the client has zeros and the block's
first bytes here are not zeros, the block differs. The kernel splices such a block from the device to the pipe if
possible. Otherwise the block is read and written.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from blockcopy.block.buffers import ZEROS
from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent
from blockcopy.block.pieces import Piece
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import DeviceError
from blockcopy.protocol import wire
from blockcopy.protocol.digests import Digest
from blockcopy.stage.compressors import Compressor
from blockcopy.stage.streams import DeviceFrame, Output


class Terms(NamedTuple):
    """The terms on which requests are answered. The forms are those of `wire`."""

    digest: Digest
    compressor: Compressor
    unreadable: UnreadableRanges
    """Collects unreadable blocks if the client knows no `fail`."""
    extended: bool = False
    """Extended form: adjacent blocks share a frame, and zeros are `zero`."""
    negotiated: bool = False
    """Negotiated form: `fail` tells the client of each block that cannot be read."""


class Request(NamedTuple):
    """A request for the blocks of `piece` that differ from the client's, answered on `terms`.

    `block_size`: bytes. The last block may be short.
    """

    piece: Piece
    block_size: int
    remote_digests: bytes | None
    """The client's digests, joined. None requests all blocks."""
    terms: Terms

    @property
    def size(self) -> int:
        """Bytes of the piece."""
        return self.piece.length

    def answer(self, source: Device, buffer: memoryview) -> list[Output]:
        """Compare the piece of `source` with the client's digests. Returns a list of frames to send. Thread-safe.

        `buffer`: memoryview to read into, as long as the piece or longer. The frames may be views of the buffer.
        """
        frames = self.piece.examine_view(source, lambda view: _Delta(self, source, view, is_view=True).frames())
        return _Delta(self, source, buffer, is_view=False).frames() if frames is None else frames


_EQUAL, _ZEROS, _DATA, _UNREAD, _FAILED = "equal", "zeros", "data", "unread", "failed"
"""Kinds of blocks. "unread": differs, and is not read here, but spliced. "failed": cannot be read."""

_HEAD_SIZE = 4096
"""Bytes at a block's start that suffice, for most blocks, to show that it is not all zeros."""


class _Delta:
    """The comparison for one request. Everywhere here, `at` is the byte position of a block in the piece."""

    def __init__(self, request: Request, source: Device, buffer: memoryview, *, is_view: bool) -> None:
        """Read the piece of `request` from `source` into `buffer`.

        `is_view`: the buffer is a view of the source already, so nothing is read.
        """
        self._piece, self._block_size, self._remote, self._terms = request
        self._source = source
        self._buffer = buffer
        self._is_view = is_view
        self._failures: dict[int, DeviceError] = {}
        self._available = self._piece.length
        self._blocks = range(0, self._piece.length, self._block_size)
        self._unread: frozenset[int] = frozenset()
        if not is_view:
            self._read()

    def frames(self) -> list[Output]:
        """Return the list of frames to send. Adjacent blocks of one kind are handled together."""
        frames: list[Output] = []
        start, kind = 0, _EQUAL
        for at, found in zip(self._blocks, self._kinds()):
            if found is not kind:
                frames += self._frames_of(kind, start, at)
                start, kind = at, found
        return frames + self._frames_of(kind, start, self._piece.length)

    def _read(self) -> None:
        """Read the piece into the buffer.

        Without compression, the kernel splices blocks from the device to the pipe. Those stay unread here.
        """
        if self._terms.compressor.kind is wire.Data:
            wanted = filter(self._wanted_unless_zeros, self._blocks)
            self._unread = frozenset(filter(self._is_not_zeros, wanted))
        piece = self._piece.without(self._unread, self._block_size)
        self._available, self._failures = piece.read_skipping_errors(self._source, self._buffer, self._block_size)

    def _wanted_unless_zeros(self, at: int) -> bool:
        if self._remote is None:
            return True
        size, digest = min(self._block_size, self._piece.length - at), self._terms.digest
        return self._remote.startswith(digest.of_zeros(size), at // self._block_size * digest.size)

    def _is_not_zeros(self, at: int) -> bool:
        """Return True if the head of the block at `at` has a byte that is not zero. False if the block is short."""
        block = self._block(at)
        head = self._buffer[at : at + min(block.length, _HEAD_SIZE)]
        try:
            is_whole = bool(block.data) and block.position + block.length <= self._source.size()
            return is_whole and self._source.read_into(block.position, head) > 0 and not ZEROS.startswith(head)
        except DeviceError:
            return False  # reading the whole block meets and reports the error again

    def _block(self, at: int) -> Piece:
        return self._piece.block(at, self._block_size)

    def _kinds(self) -> Iterator[str]:
        """Yield the kind of each block, in order."""
        digest, remote = self._terms.digest, self._remote
        odd = self._unread or self._failures or self._available < self._piece.length
        for index, (size, block) in enumerate(self._piece.blocks(self._buffer, self._block_size)):
            if odd and (kind := self._odd_kind(index * self._block_size, size)):
                yield kind
                continue
            own = None if remote is None else remote[index * digest.size : (index + 1) * digest.size]
            has_zeros = own == digest.of_zeros(size)
            if block is None:
                yield _EQUAL if has_zeros else _ZEROS
            else:
                yield _DATA if own is None or has_zeros or digest(block) != own else _EQUAL

    def _odd_kind(self, at: int, size: int) -> str | None:
        """Return the kind of the block of `size` bytes at `at` if a part was not read. Returns None otherwise."""
        if at in self._unread:
            return _UNREAD
        local = self._buffer[at : min(at + size, self._available)]
        if at in self._failures or (self._terms.negotiated and len(local) < size):
            return _FAILED
        if not local:
            return _EQUAL  # the source ends before this block: nothing to send
        if len(local) < size:
            return _ZEROS if not self._block(at).data or ZEROS.startswith(local) else _DATA
        return None

    def _frames_of(self, kind: str, start: int, end: int) -> list[Output]:
        """Return the list of frames for adjacent blocks, which are all of `kind`.

        `start`, `end`: byte positions in the piece, `end` exclusive.
        """
        position, extended = self._piece.position, self._terms.extended
        step = self._block_size * (max(1, wire.MAX_BLOCK_SIZE // self._block_size) if extended else 1)
        frames: list[Output] = []
        if kind is _EQUAL:
            return []
        if kind is _FAILED:
            for at in range(start, end, self._block_size):
                frames += self._failed(at, self._reason(at))
            return frames
        if kind is _UNREAD:
            return [self._device_frame(at, min(step, end - at)) for at in range(start, end, step)]
        end = min(end, self._available)
        if kind is _ZEROS and extended:
            return [wire.encode(wire.Zero(position + start, end - start))]
        for at in range(start, end, step):
            size = min(step, end - at)
            data = memoryview(ZEROS)[:size] if kind is _ZEROS else self._buffer[at : at + size]
            frame = self._terms.compressor.frame(position + at, data)
            # An uncompressed block of a view goes from the device to the pipe.
            goes_unread = self._is_view and kind is _DATA and frame[-1] is data
            frames += [self._device_frame(at, size)] if goes_unread else frame
        return frames

    def _device_frame(self, at: int, size: int) -> Output:
        position = self._piece.position + at
        header = wire.frame_header(wire.Data, position, size)
        return DeviceFrame(self._source, position, size, header, partial(self._read_each, at, at + size))

    def _read_each(self, start: int, end: int) -> list[Output]:
        """Read the blocks of a range one by one, and return the list of their frames.

        `start`, `end`: byte positions in the piece, `end` exclusive.
        """
        frames: list[Output] = []
        for at in range(start, end, self._block_size):
            position, length, _ = self._block(at)
            try:
                data = self._source.read(position, length)
            except DeviceError as error:
                frames += self._failed(at, str(error))
            else:
                frames += [wire.frame_header(wire.Data, position, length), data]
        return frames

    def _failed(self, at: int, reason: str) -> list[Output]:
        """Return a list with the message `fail` for the block at `at`, which cannot be read for `reason`.

        If the client knows no `fail`, notes the block and returns [].
        """
        position, length, _ = self._block(at)
        if self._terms.negotiated:
            return [wire.encode(wire.Failure(position, reason))]
        self._terms.unreadable.add(Extent(position, length), reason)
        return []

    def _reason(self, at: int) -> str:
        position, length, _ = self._block(at)
        ended_early = DeviceError.ended_early(self._source.path, position, length, max(0, self._available - at))
        return str(self._failures.get(at, ended_early))
