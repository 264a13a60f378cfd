"""The guard of a destination that holds something else than an older copy of the source.

Superblocks tell what a device holds. The destination may have those that the source has at the same place, with the
same UUID. It may have any if its state file proves that it is a copy of this source. So a nightly copy of one
source onto one destination is never refused. Zeros and plain data have no superblock.
"""

from __future__ import annotations

import logging
from functools import partial

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.device import Device
from blockcopy.block.geometry import Geometry
from blockcopy.block.superblocks import head_of, refuse_foreign, superblocks
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import ForeignContentError
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.state import recovery
from blockcopy.replica.state.statefile import Record

logger = logging.getLogger(__name__)


async def refuse_foreign_content(device: Device, pool: Pool, record: Record | None = None) -> None:
    """Raise ForeignContentError if the destination `device` holds what the source of `pool` does not hold.

    `pool` must be connected. `record`: the usable one of `device`, or None.
    Raises SourceError if the source does not answer.
    """
    head = await trio.to_thread.run_sync(head_of, device)
    held = superblocks(head)
    identity = pool.connector.identity
    if not held or (record and identity and recovery.is_copy_of_same(record, device, identity)):
        return
    source_head, is_whole = await _source_head(device, head, pool)
    source = str(pool.connector.command.location)
    refuse_foreign(device.path, held, source, superblocks(source_head), is_whole=is_whole)


async def warn_of_foreign_remote(device: Device, pool: Pool) -> None:
    """Warn if the destination, at the other end of `pool`, holds what the source `device` does not hold.

    Raises SourceError if the destination does not answer.
    """
    head = await trio.to_thread.run_sync(head_of, device)
    remote, _ = await _source_head(device, head, pool)
    held = superblocks(remote)
    try:
        refuse_foreign(str(pool.connector.command.location), held, device.path, superblocks(head))
    except ForeignContentError as error:
        warn(error)


def warn(error: ForeignContentError) -> None:
    """Log what a sync would do about the `error`."""
    logger.warning("%s. A sync asks before it overwrites that, or needs --force", error.held)


class _Head:
    """A sink that makes the first bytes of the source from those of the destination."""

    def __init__(self, head: bytes) -> None:
        self.bytes = bytearray(head)

    def data(self, position: int, payload: Buffer) -> None:
        """Take the source's bytes at `position`, the `payload`."""
        self.bytes[position : position + len(payload)] = payload

    def zeros(self, position: int, length: int) -> None:
        """Take `length` zeros at `position`."""
        self.bytes[position : position + length] = bytes(length)


async def _source_head(device: Device, head: bytes, pool: Pool) -> tuple[bytes, bool]:
    """Return the first bytes of the source of `pool`, by its differences from `head`, the first of `device`.

    Bytes that the source cannot read are zeros. Returns also whether it could read all of them.
    Raises SourceError if the source does not answer.
    """
    is_whole = True
    identity = pool.connector.identity
    geometry = Geometry(min(len(head), identity["size"] if identity else 0))
    sink = _Head(head[: geometry.size])
    if geometry.size:
        since = trio.current_time()
        digest = await pool.digest(since)
        blocks = range(geometry.block_count)
        read = partial(read_signatures, device, geometry, blocks, digest, UnreadableRanges())
        answer = await pool.ask(await trio.to_thread.run_sync(read), sink, since)
        for each in answer.unreadable:
            sink.zeros(*each.extent)
            is_whole = False
    return bytes(sink.bytes), is_whole
