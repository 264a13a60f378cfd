"""The destination's blocks as questions to the source: read, and digested. In worker threads.

Holes are not read, and zeros are not hashed: the digest of zeros is known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, Geometry, block_runs
from blockcopy.block.pieces import PIECE_SIZE, Piece, PieceScanner
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import DeviceError
from blockcopy.protocol.digests import Digest
from blockcopy.protocol.wire import MAX_ASKED
from blockcopy.replica.source.dialects import Signatures

_own = threading.local()


def read_signatures(
    device: Device,
    geometry: Geometry,
    blocks: Sequence[int],
    digest: Digest,
    unreadable: UnreadableRanges,
    *,
    drop_behind: bool = False,
) -> list[Signatures]:
    """What to ask about ascending `blocks`; neighbours are one question. DeviceError where the device ends before.

    Blocks that cannot be read are asked for whatever they are, and added to `unreadable`.
    `drop_behind`: they are not going to be read again soon, and need not stay in the page cache.
    """
    most = MAX_ASKED // geometry.block_size
    asked = [
        _question(device, geometry, run[start : start + most], digest, unreadable)
        for run in block_runs(blocks)
        for start in range(0, len(run), most)
    ]
    if drop_behind:
        for question in asked:
            device.drop_behind(question.position, question.length)
    return asked


def _question(
    device: Device, geometry: Geometry, run: range, digest: Digest, unreadable: UnreadableRanges
) -> Signatures:
    offset, end = geometry.extent(run[0]).offset, geometry.extent(run[-1]).end
    digests = b"".join(_digests(device, geometry, offset, end, digest, unreadable))
    return Signatures(offset, end - offset, geometry.block_size, digests)


def _digests(
    device: Device, geometry: Geometry, offset: int, end: int, digest: Digest, unreadable: UnreadableRanges
) -> Iterator[bytes]:
    pieces, block_size = PieceScanner(device), geometry.block_size
    step = PIECE_SIZE // block_size * block_size
    for position in range(offset, end, step):
        piece = pieces.piece(position, min(step, end - position), block_size)
        view = piece.view(device)
        if view is not None:
            try:
                found = _digests_of(piece, view, block_size, digest, {})
            finally:
                whole = piece.release_view(device)
            if whole:
                yield from found
                continue
        buffer = _buffer()
        there, errors = piece.read_skipping_errors(device, buffer, block_size)
        for at, error in errors.items():
            unreadable.add(Extent(*piece.block(at, block_size)[:2]), str(error))
        if there < piece.length:  # what is not there is no hole
            raise DeviceError(
                f"cannot read {piece.length} bytes at {position} of {device.path}: "
                f"it is shorter than it was, and ends after {there}"
            )
        yield from _digests_of(piece, buffer, block_size, digest, errors)


def _digests_of(
    piece: Piece, data: memoryview, block_size: int, digest: Digest, errors: Mapping[int, DeviceError]
) -> list[bytes]:
    found = []
    for index, (size, block) in enumerate(piece.blocks(data, block_size)):
        if index * block_size in errors:
            found.append(digest.impossible)
        else:
            found.append(digest.of_zeros(size) if block is None else digest(block))
    return found


def _buffer() -> memoryview:
    """One a thread, for as long as that lives."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(PIECE_SIZE))
    found: memoryview = _own.buffer
    return found
