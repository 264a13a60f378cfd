"""The destination's blocks as questions to the source: read, and digested. In worker threads.

Holes are not read, and zeros are not hashed: the digest of zeros is known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from blockcopy.device import Device
from blockcopy.digests import Digest
from blockcopy.errors import DeviceError
from blockcopy.geometry import Geometry, runs
from blockcopy.pieces import PIECE_SIZE, Pieces
from blockcopy.replica.forms import Question
from blockcopy.wire import MAX_ASKED

_own = threading.local()


def questions(
    device: Device, geometry: Geometry, blocks: Sequence[int], digest: Digest, *, passing: bool = False
) -> list[Question]:
    """What to ask about ascending `blocks`; neighbours are one question. DeviceError where they cannot be read.

    `passing`: they are not going to be read again soon, and need not stay in the page cache.
    """
    most = MAX_ASKED // geometry.block_size
    asked = [
        _question(device, geometry, run[start : start + most], digest)
        for run in runs(blocks)
        for start in range(0, len(run), most)
    ]
    if passing:
        for question in asked:
            device.drop_behind(question.position, question.length)
    return asked


def _question(device: Device, geometry: Geometry, run: range, digest: Digest) -> Question:
    offset, end = geometry.extent(run[0]).offset, geometry.extent(run[-1]).end
    digests = b"".join(_digests(device, geometry, offset, end, digest))
    return Question(offset, end - offset, geometry.block_size, digests)


def _digests(device: Device, geometry: Geometry, offset: int, end: int, digest: Digest) -> Iterator[bytes]:
    buffer, pieces, block_size = _buffer(), Pieces(device), geometry.block_size
    step = PIECE_SIZE // block_size * block_size
    for position in range(offset, end, step):
        length = min(step, end - position)
        piece = pieces.piece(position, length, block_size)
        there = piece.read(device, buffer)
        if there < length:  # what is not there is no hole
            raise DeviceError(
                f"cannot read {length} bytes at {position} of {device.path}: "
                f"it is shorter than it was, and ends after {there}"
            )
        for at in range(0, length, block_size):
            own = buffer[at : min(at + block_size, length)]
            yield digest.of_zeros(len(own)) if piece.zeros_at(at, own) else digest(own)


def _buffer() -> memoryview:
    """One a thread, for as long as that lives."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(PIECE_SIZE))
    found: memoryview = _own.buffer
    return found
