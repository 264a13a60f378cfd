"""Signatures of the destination: its blocks, read and digested, as requests to the source.

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
    """Read `blocks` of `device` and digest them. Call from a worker thread: this blocks.

    `blocks`: block numbers, ascending. Consecutive blocks share one `Signatures`, up to `wire.MAX_ASKED` bytes.
    `unreadable`: collects blocks that cannot be read. Their digest is one that no block has, so they are fetched.
    `drop_behind`: drop the bytes from the page cache afterwards, because nobody will read them again soon.
    Raises DeviceError if the device ends early.
    """
    max_blocks = MAX_ASKED // geometry.block_size
    found = [
        _signatures(device, geometry, run[start : start + max_blocks], digest, unreadable)
        for run in block_runs(blocks)
        for start in range(0, len(run), max_blocks)
    ]
    if drop_behind:
        for each in found:
            device.drop_behind(each.position, each.length)
    return found


def _signatures(
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
                is_valid = piece.release_view(device)
            if is_valid:
                yield from found
                continue
        buffer = _buffer()
        count, errors = piece.read_skipping_errors(device, buffer, block_size)
        for at, error in errors.items():
            unreadable.add(Extent(*piece.block(at, block_size)[:2]), str(error))
        if count < piece.length:  # bytes beyond the end are no hole
            raise DeviceError(
                f"cannot read {piece.length} bytes at {position} of {device.path}: "
                f"it is shorter than it was, and ends after {count}"
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
    """Return the buffer of this thread. Each thread has one, for as long as the thread lives."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(PIECE_SIZE))
    found: memoryview = _own.buffer
    return found
