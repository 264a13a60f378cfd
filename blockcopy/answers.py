"""What the source has, against what the asker says it has → the frames that make these equal.

One `Run` is answered by one worker of `retrieve`, in a buffer that is lent to it.
"""

from __future__ import annotations

from typing import NamedTuple

from blockcopy import wire
from blockcopy.device import ZEROS, Device
from blockcopy.digests import Buffer, Digest
from blockcopy.errors import DeviceError
from blockcopy.geometry import Extent
from blockcopy.packing import Packing
from blockcopy.pieces import Piece


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

    def answer(self, source: Device, room: memoryview) -> list[Buffer]:
        """What is to be sent; it has views of `room`, of `size` bytes, in it. DeviceError unless `agreed`."""
        frames: list[Buffer] = []
        answers = _Answers(self, source, room)
        start, kind = 0, _EQUAL
        for at in answers.blocks:
            found = answers.judge(at)
            if found is not kind:
                frames += answers.say(kind, start, at)
                start, kind = at, found
        return frames + answers.say(kind, start, self.size)


_EQUAL, _ZEROS, _DATA, _FAILED = "equal", "zeros", "data", "failed"


class _Answers:
    """The blocks of a run, read; `at` is always where one begins, counted from the run's position."""

    def __init__(self, run: Run, source: Device, room: memoryview) -> None:
        self._piece, self._block_size, self._theirs, self._terms = run
        self._path = source.path
        self._room = room
        self._failures: dict[int, str] = {}
        self._available = self._piece.length
        self.blocks = range(0, self._piece.length, self._block_size)
        try:
            self._available = self._piece.read(source, room)
        except DeviceError:
            if not self._terms.agreed:
                raise
            self._read_block_by_block(source)

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

    def say(self, kind: str, start: int, end: int) -> list[Buffer]:
        """That the blocks from `start` to `end` are of that kind."""
        position, joined = self._piece.position, self._terms.joined
        if kind is _EQUAL:
            return []
        if kind is _FAILED:
            blocks = range(start, end, self._block_size)
            return [wire.encode(wire.Failure(position + at, self._reason(at))) for at in blocks]
        end = min(end, self._available)
        if kind is _ZEROS and joined:
            return [wire.encode(wire.Zero(position + start, end - start))]
        frames: list[Buffer] = []
        step = end - start if joined else self._block_size
        for at in range(start, end, step):
            size = min(step, end - at)
            data = memoryview(ZEROS)[:size] if kind is _ZEROS else self._room[at : at + size]
            frames += self._terms.packing.frame(position + at, data)
        return frames

    def _reason(self, at: int) -> str:
        block = self._block(at)
        return self._failures.get(at) or (
            f"cannot read {block.length} bytes at {block.position} of {self._path}: "
            f"it is shorter than it was, and ends at {self._piece.position + self._available}"
        )
