"""The full pass: brings everything that is still missing, in order, a bounded window at a time."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from blockcopy.errors import BlockcopyError
from blockcopy.geometry import Geometry
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.materialiser import BATCH_BLOCKS, Lane, Materialiser

WINDOW = 6
"""Batches asked for at a time: 12 MiB, which hides a round trip of 10 ms at 1 GB/s."""


async def hydrate(materialiser: Materialiser, blockmap: BlockMap, geometry: Geometry, lane: Lane) -> None:
    """Return when nothing is missing. Raises the first error; what is in flight then still lands."""
    room = trio.Semaphore(WINDOW)
    first_error: BlockcopyError | None = None

    async def bring(blocks: range) -> None:
        nonlocal first_error
        try:
            await materialiser.ensure(blocks, lane)
        except BlockcopyError as error:
            first_error = first_error or error
        finally:
            room.release()

    while not blockmap.complete:  # once, unless a failed sync made it forget what was behind the sweep
        async with trio.open_nursery() as nursery:
            for blocks in _missing_batches(blockmap, geometry):
                await room.acquire()
                if first_error is not None:
                    room.release()
                    break
                nursery.start_soon(bring, blocks)
        if first_error is not None:
            raise first_error


def _missing_batches(blockmap: BlockMap, geometry: Geometry) -> Iterator[range]:
    """Ranges of at most BATCH_BLOCKS that begin with a block missing at the time they are reached."""
    start = 0
    while True:
        first = next(blockmap.missing(range(start, geometry.blocks)), None)
        if first is None:
            return
        start = min(first + BATCH_BLOCKS, geometry.blocks)
        yield range(first, start)
