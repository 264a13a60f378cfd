"""The full pass: brings everything that is still missing, in order, at the pace it is given."""

from __future__ import annotations

import trio

from blockcopy.errors import BlockcopyError
from blockcopy.geometry import Geometry
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.materialiser import Lane, Materialiser
from blockcopy.replica.pace import Pace


async def hydrate(
    materialiser: Materialiser, blockmap: BlockMap, geometry: Geometry, lane: Lane, pace: Pace
) -> None:
    """Return when nothing is missing. Raises the first error; what is in flight then still lands."""
    first_error: BlockcopyError | None = None

    async def bring(blocks: range) -> None:
        nonlocal first_error
        try:
            await materialiser.ensure(blocks, lane)
        except BlockcopyError as error:
            first_error = first_error or error
        finally:
            pace.give_back(len(blocks))

    while not blockmap.complete:  # once, unless a failed sync made it forget what was behind the sweep
        async with trio.open_nursery() as nursery:
            start = 0
            while first_error is None:
                await pace.admit()
                first = next(blockmap.missing(range(start, geometry.blocks)), None)
                if first is None:
                    break
                start = min(first + pace.batch_blocks, geometry.blocks)
                pace.take(start - first)
                nursery.start_soon(bring, range(first, start))
        if first_error is not None:
            raise first_error
