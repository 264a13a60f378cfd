"""What the source has, against what the asker says it has → the frames that make these equal.

One `Run` is answered by one worker of `retrieve`, in a buffer that is lent to it. Blocks that the asker
has as zeros are not read into that, where the first bytes tell that they differ: they go from the device
to the pipe without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

from blockcopy import wire
from blockcopy.device import ZEROS, Device
from blockcopy.digests import Digest
from blockcopy.errors import DeviceError
from blockcopy.geometry import Extent
from blockcopy.packing import Packing
from blockcopy.pieces import Piece
from blockcopy.stages import FromDevice, Output


class Terms(NamedTuple):
    """How is answered what is asked from now on."""

    digest: Digest
    packing: Packing
    joined: bool = False
    """Blocks that follow one another in one frame, zeros as `zero`."""
    agreed: bool = False
    """What cannot be answered is said, not passed over, and no reason to end."""


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
        """What is to be sent; it has views of `room`, of `size` bytes, in it. DeviceError unless `agreed`."""
        frames: list[Output] = []
        answers = _Answers(self, source, room)
        start, kind = 0, _EQUAL
        for at in answers.blocks:
            found = answers.judge(at)
            if found is not kind:
                frames += answers.say(kind, start, at)
                start, kind = at, found
        return frames + answers.say(kind, start, self.size)


_EQUAL, _ZEROS, _DATA, _UNREAD, _FAILED = "equal", "zeros", "data", "data that was not read", "failed"

_HEAD_SIZE = 4096
"""Bytes that tell, of most blocks, that they are not zeros."""


class _Answers:
    """The blocks of a run, read; `at` is always where one begins, counted from the run's position."""

    def __init__(self, run: Run, source: Device, room: memoryview) -> None:
        self._piece, self._block_size, self._theirs, self._terms = run
        self._source = source
        self._room = room
        self._failures: dict[int, str] = {}
        self._available = self._piece.length
        self.blocks = range(0, self._piece.length, self._block_size)
        self._unread = self._find_unread() if self._terms.packing.takes_unread else frozenset()
        try:
            self._available = self._piece.without(self._unread, self._block_size).read(source, room)
        except DeviceError:
            if not self._terms.agreed:
                raise
            self._unread = frozenset()
            self._read_block_by_block(source)

    def _find_unread(self) -> frozenset[int]:
        """The blocks of which the asker has zeros, or nothing, and the source has no zeros."""
        return frozenset(at for at in self.blocks if self._wanted_unless_zeros(at) and self._has_head(at))

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

    def _read_block_by_block(self, source: Device) -> None:
        """So that one bad sector is the fault of its own block only."""
        for at in self.blocks:
            try:
                end = self._block(at).read(source, self._room[at : at + self._block_size])
            except DeviceError as error:
                self._failures[at] = str(error)
                continue
            if end < self._block(at).length:
                self._available = at + end
                return  # it ends here

    def _block(self, at: int) -> Piece:
        position = self._piece.position + at
        length = min(self._block_size, self._piece.length - at)
        here = [extent for extent in self._piece.data if extent.offset <= position < extent.end]
        return Piece(position, length, [Extent(position, length)] if here else [])

    def judge(self, at: int) -> str:
        """What is to be said of that block."""
        if at in self._unread:
            return _UNREAD
        terms = self._terms
        size = min(self._block_size, self._piece.length - at)
        ours = self._room[at : min(at + size, self._available)]
        if at in self._failures or (terms.agreed and len(ours) < size):
            return _FAILED
        if not ours:
            return _EQUAL  # the source ends before: there is nothing to send
        zeros = self._piece.zeros_at(at, ours)
        if self._theirs is not None and len(ours) == size:
            index = at // self._block_size * terms.digest.size
            theirs = self._theirs[index : index + terms.digest.size]
            if (theirs == terms.digest.of_zeros(size)) if zeros else self._same(theirs, ours):
                return _EQUAL
        return _ZEROS if zeros else _DATA

    def _same(self, theirs: bytes, ours: memoryview) -> bool:
        """Whether ours, which are not zeros, have that digest."""
        return theirs != self._terms.digest.of_zeros(len(ours)) and self._terms.digest(ours) == theirs

    def say(self, kind: str, start: int, end: int) -> list[Output]:
        """That the blocks from `start` to `end` are of that kind."""
        position, joined = self._piece.position, self._terms.joined
        frames: list[Output] = []
        if kind is _EQUAL:
            return []
        if kind is _FAILED:
            blocks = range(start, end, self._block_size)
            return [wire.encode(wire.Failure(position + at, self._reason(at))) for at in blocks]
        if kind is _UNREAD:
            step = end - start if joined else self._block_size
            for at in range(start, end, step):
                size = min(step, end - at)
                frames += [wire.frame_header(b"data", position + at, size)]
                frames += [FromDevice(self._source, position + at, size)]
            return frames
        end = min(end, self._available)
        if kind is _ZEROS and joined:
            return [wire.encode(wire.Zero(position + start, end - start))]
        step = end - start if joined else self._block_size
        for at in range(start, end, step):
            size = min(step, end - at)
            data = memoryview(ZEROS)[:size] if kind is _ZEROS else self._room[at : at + size]
            frames += self._terms.packing.frame(position + at, data)
        return frames

    def _reason(self, at: int) -> str:
        block = self._block(at)
        return self._failures.get(at) or (
            f"cannot read {block.length} bytes at {block.position} of {self._source.path}: "
            f"it is shorter than it was, and ends at {self._piece.position + self._available}"
        )
