"""Signatures of the destination: its blocks, read and digested, as requests to the source.

Holes are not read, and zeros are not hashed: the digest of zeros is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockcopy.block.device import Device
from blockcopy.block.geometry import Geometry, block_runs
from blockcopy.block.pieces import PIECE_SIZE, PieceScanner
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.protocol.digests import Digest
from blockcopy.protocol.wire import MAX_ASKED
from blockcopy.replica.source.batches import Signatures
from blockcopy.stage.signature import digest_piece


def read_signatures(
    device: Device,
    geometry: Geometry,
    blocks: Sequence[int],
    digest: Digest,
    unreadable: UnreadableRanges,
    *,
    drop_behind: bool = False,
) -> list[Signatures]:
    """Read `blocks` of `device`, and digest each with `digest`. Call from a worker thread: this blocks.

    Returns the signatures, ascending. Consecutive blocks share one `Signatures`.
    `blocks`: block numbers in `geometry`, ascending.
    `unreadable`: collects blocks that cannot be read. Their digest is one that no block has, so they are fetched.
    `drop_behind`: drop the bytes from the page cache afterwards, because nobody will read them again soon.
    Raises DeviceError if the device ends early.
    """
    max_blocks = MAX_ASKED // geometry.block_size
    found = []
    for run in block_runs(blocks):
        for first in run[::max_blocks]:
            offset = geometry.extent(first).offset
            end = geometry.extent(min(first + max_blocks, run.stop) - 1).end
            digests = b"".join(_digests(device, geometry, offset, end, digest, unreadable))
            found.append(Signatures(offset, end - offset, geometry.block_size, digests))
    if drop_behind:
        for each in found:
            device.drop_behind(each.position, each.length)
    return found


def _digests(
    device: Device, geometry: Geometry, offset: int, end: int, digest: Digest, unreadable: UnreadableRanges
) -> Iterator[bytes]:
    pieces, block_size = PieceScanner(device), geometry.block_size
    step = PIECE_SIZE // block_size * block_size
    for position in range(offset, end, step):
        piece = pieces.piece(position, min(step, end - position), block_size)
        found = digest_piece(device, piece, block_size, digest, unreadable)
        for at, each in zip(range(0, piece.length, block_size), found, strict=True):
            yield each or digest.of_zeros(min(block_size, piece.length - at))
