"""Signatures: the digests of a device's blocks, which tell the source what to send.

`checksum`, `receive` and the replica read their signatures here. Holes are not read. Blocks of zeros are not
digested, because both ends know the digest of zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Container

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent
from blockcopy.block.pieces import PIECE_SIZE, Piece
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import DeviceError
from blockcopy.protocol.digests import Digest

_own = threading.local()


def digest_piece(
    device: Device, piece: Piece, block_size: int, digest: Digest, unreadable: UnreadableRanges
) -> list[bytes | None]:
    """Read `piece` of `device`, and digest its blocks of `block_size` bytes by `digest`. Thread-safe.

    Returns the list of digests, with None for a block of zeros. Blocks that cannot be read are added to
    `unreadable`. Their digest is `digest.impossible`, so the source sends these blocks.

    Raises DeviceError if the device ends within the piece.
    """
    found = piece.examine_view(device, lambda view: digest_blocks(piece, view, block_size, digest))
    if found is not None:
        return found
    buffer = _buffer()
    count, errors = piece.read_skipping_errors(device, buffer, block_size)
    for at, error in errors.items():
        position, length, _ = piece.block(at, block_size)
        unreadable.add(Extent(position, length), str(error))
    if count < piece.length:  # bytes beyond the end are no hole
        raise DeviceError.ended_early(device.path, piece.position, piece.length, count)
    return digest_blocks(piece, buffer, block_size, digest, errors)


def digest_blocks(
    piece: Piece, data: memoryview, block_size: int, digest: Digest, unreadable: Container[int] = ()
) -> list[bytes | None]:
    """Digest the blocks of `piece`, whose bytes are in `data`, by `digest`. Thread-safe.

    `block_size`: bytes. `unreadable`: byte offsets of unreadable blocks in the piece. Returns the list of digests,
    with None for a block of zeros and `digest.impossible` for an unreadable block.
    """
    return [
        digest.impossible if index * block_size in unreadable else None if block is None else digest(block)
        for index, (_, block) in enumerate(piece.blocks(data, block_size))
    ]


def _buffer() -> memoryview:
    """Return the buffer of this thread, which lasts as long as the thread."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(PIECE_SIZE))
    buffer: memoryview = _own.buffer
    return buffer
