"""What the source has, against what the asker says it has → the frames that make these equal.

One `Run` is answered by one worker of `retrieve`, in a buffer that is lent to it. Blocks that the asker
has as zeros are not read into that, where the first bytes tell that they differ: they go from the device
to the pipe without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from blockcopy.block.buffers import ZEROS
from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent
from blockcopy.block.pieces import Piece
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import DeviceError
from blockcopy.protocol import wire
from blockcopy.protocol.digests import Digest
from blockcopy.stage.compressors import Compressor
from blockcopy.stage.streams import FromDevice, Output


class Terms(NamedTuple):
    """How is answered what is asked from now on."""

    digest: Digest
    compressor: Compressor
    unreadable: UnreadableRanges
    """Gets what cannot be read where nothing can be said of it."""
    joined: bool = False
    """Blocks that follow one another in one frame, zeros as `zero`."""
    agreed: bool = False
    """The asker is told what cannot be answered."""


class Run(NamedTuple):
    """Blocks of `block_size` that make up `piece`, the last perhaps short, and the digests of the asker's."""

    piece: Piece
    block_size: int
    theirs: bytes | None
    """None: send all, whatever the asker has."""
    terms: Terms

    @property
    def size(self) -> int:
        return self.piece.length

    def answer(self, source: Device, room: memoryview) -> list[Output]:
        """Return the frames to send. They may hold views of `room`, which has `size` bytes."""
        view = self.piece.view(source)
        if view is not None:
            try:
                frames = _Answers(self, source, view, in_place=True).frames()
            finally:
                whole = self.piece.release_view(source)
            if whole:
                return frames
        return _Answers(self, source, room, in_place=False).frames()


_EQUAL, _ZEROS, _DATA, _UNREAD, _FAILED = "equal", "zeros", "data", "data that was not read", "failed"

_HEAD_SIZE = 4096
"""Bytes that tell, of most blocks, that they are not zeros."""


class _Answers:
    """The blocks of a run, read; `at` is always where one begins, counted from the run's position."""

    def __init__(self, run: Run, source: Device, room: memoryview, *, in_place: bool) -> None:
        """`room` is to be read into; or, where it is `in_place`, a view of the source, to be looked at now."""
        self._piece, self._block_size, self._theirs, self._terms = run
        self._source = source
        self._room = room
        self._in_place = in_place
        self._failures: dict[int, DeviceError] = {}
        self._available = self._piece.length
        self._blocks = range(0, self._piece.length, self._block_size)
        self._unread: frozenset[int] = frozenset()
        if not in_place:
            self._read()

    def frames(self) -> list[Output]:
        """What is to be sent."""
        frames: list[Output] = []
        start, kind = 0, _EQUAL
        for at, found in zip(self._blocks, self._kinds()):
            if found is not kind:
                frames += self._say(kind, start, at)
                start, kind = at, found
        return frames + self._say(kind, start, self._piece.length)

    def _read(self) -> None:
        if self._terms.compressor.sends_unread:
            self._unread = self._find_unread()
        read = self._piece.without(self._unread, self._block_size)
        self._available, self._failures = read.read_skipping_errors(self._source, self._room, self._block_size)

    def _find_unread(self) -> frozenset[int]:
        """The blocks of which the asker has zeros, or nothing, and the source has no zeros."""
        return frozenset(at for at in self._blocks if self._wanted_unless_zeros(at) and self._has_head(at))

    def _wanted_unless_zeros(self, at: int) -> bool:
        if self._theirs is None:
            return True
        size, digest = min(self._block_size, self._piece.length - at), self._terms.digest
        return self._theirs.startswith(digest.of_zeros(size), at // self._block_size * digest.size)

    def _has_head(self, at: int) -> bool:
        block = self._block(at)
        head = self._room[at : at + min(block.length, _HEAD_SIZE)]
        try:
            whole = bool(block.data) and block.position + block.length <= self._source.size()
            return whole and self._source.read_into(block.position, head) > 0 and not ZEROS.startswith(head)
        except DeviceError:
            return False  # found once more, and told, when it is read

    def _block(self, at: int) -> Piece:
        return self._piece.block(at, self._block_size)

    def _kinds(self) -> Iterator[str]:
        """What is to be said of each block."""
        digest, theirs = self._terms.digest, self._theirs
        odd = self._unread or self._failures or self._available < self._piece.length
        for index, (size, block) in enumerate(self._piece.blocks(self._room, self._block_size)):
            if odd and (kind := self._odd_kind(index * self._block_size, size)):
                yield kind
                continue
            their = None if theirs is None else theirs[index * digest.size : (index + 1) * digest.size]
            has_zeros = their == digest.of_zeros(size)
            if block is None:
                yield _EQUAL if has_zeros else _ZEROS
            else:
                yield _DATA if their is None or has_zeros or digest(block) != their else _EQUAL

    def _odd_kind(self, at: int, size: int) -> str | None:
        """Of a block that was not read, or not wholly; None of any other."""
        if at in self._unread:
            return _UNREAD
        ours = self._room[at : min(at + size, self._available)]
        if at in self._failures or (self._terms.agreed and len(ours) < size):
            return _FAILED
        if not ours:
            return _EQUAL  # the source ends before: there is nothing to send
        if len(ours) < size:
            return _ZEROS if not self._block(at).data or ZEROS.startswith(ours) else _DATA
        return None

    def _say(self, kind: str, start: int, end: int) -> list[Output]:
        """That the blocks from `start` to `end` are of that kind."""
        position, joined = self._piece.position, self._terms.joined
        step = self._block_size * (max(1, wire.MAX_BLOCK_SIZE // self._block_size) if joined else 1)
        frames: list[Output] = []
        if kind is _EQUAL:
            return []
        if kind is _FAILED:
            for at in range(start, end, self._block_size):
                frames += self._say_failed(at, self._reason(at))
            return frames
        if kind is _UNREAD:
            return [self._say_from_device(at, min(step, end - at)) for at in range(start, end, step)]
        end = min(end, self._available)
        if kind is _ZEROS and joined:
            return [wire.encode(wire.Zero(position + start, end - start))]
        for at in range(start, end, step):
            size = min(step, end - at)
            data = memoryview(ZEROS)[:size] if kind is _ZEROS else self._room[at : at + size]
            packed = self._terms.compressor.frame(position + at, data)
            # The kernel sends by itself a block that goes out as it is.
            in_place = self._in_place and kind is _DATA and packed[-1] is data
            frames += [self._say_from_device(at, size)] if in_place else packed
        return frames

    def _say_from_device(self, at: int, size: int) -> Output:
        position = self._piece.position + at
        header = wire.frame_header(wire.Data, position, size)
        return FromDevice(self._source, position, size, header, partial(self._say_each, at, at + size))

    def _say_each(self, start: int, end: int) -> list[Output]:
        """Read each of the blocks from `start` to `end`, which could not be had without that."""
        frames: list[Output] = []
        for at in range(start, end, self._block_size):
            position, length, _ = self._block(at)
            try:
                data = self._source.read(position, length)
            except DeviceError as error:
                frames += self._say_failed(at, str(error))
            else:
                frames += [wire.frame_header(wire.Data, position, length), data]
        return frames

    def _say_failed(self, at: int, reason: str) -> list[Output]:
        position, length, _ = self._block(at)
        if self._terms.agreed:
            return [wire.encode(wire.Failure(position, reason))]
        self._terms.unreadable.add(Extent(position, length), reason)
        return []

    def _reason(self, at: int) -> str:
        if at in self._failures:
            return str(self._failures[at])
        block = self._block(at)
        return (
            f"cannot read {block.length} bytes at {block.position} of {self._source.path}: "
            f"it is shorter than it was, or than it says, and ends at {self._piece.position + self._available}"
        )
