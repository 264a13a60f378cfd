"""The dry run of a sync: it compares both ends, counts what would be copied, and writes nothing anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from blockcopy.block.claim import check_room
from blockcopy.block.destination import Destination
from blockcopy.block.geometry import BLOCK_SIZE, Extent, Geometry
from blockcopy.errors import ForeignContentError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.replica.overwrite_guard import refuse_foreign_content, warn
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.verify import Verdict, compare, missing_extents

_HOLES_BYTES = 64 << 30
"""Bytes of the source whose holes are requested at once. This bounds the memory of an answer."""


async def dry_run(plan: Plan, device: Destination | None, progress: Progress) -> Verdict:
    """Compare the blocks that `plan` wants of its destination `device` with the source. Returns the verdict.

    `device`: None if the destination must be created. `progress`: gets the bytes compared so far.
    Bytes beyond the end of `device` are not compared. They differ, except holes of the source.
    Raises SourceError or DeviceError, in exception groups. Raises DestinationRefusedError if `device` is too small.
    """
    async with trio.open_nursery() as nursery:
        local_size = device.size() if device else 0
        connector = Connector(plan, size_guess=local_size)
        pool = Pool(connector, nursery, give_up_after=plan.reconnect_timeout)
        await pool.open()
        nursery.start_soon(pool.run)
        geometry = Geometry(connector.identity["size"] if connector.identity else 0)
        wanted = plan.blocks_to_copy(geometry)
        verdict = Verdict(geometry.size, sum(map(geometry.bytes_of, wanted)))
        if device is not None:
            check_room(device, geometry.size)
            if not plan.force:
                await _warn_of_foreign_content(device, pool)

            def completed(count: int) -> None:
                progress.update(Counts(count, verdict.compared_bytes))

            verdict = await compare(device, geometry, pool, lambda _: None, completed, wanted=wanted)
        missing = list(missing_extents(geometry, wanted, local_size))
        missing_bytes, hole_bytes = sum(each.length for each in missing), await _hole_bytes(pool, missing)
        verdict.uncompared_bytes = missing_bytes - hole_bytes
        verdict.differing_bytes += -hole_bytes if device else verdict.uncompared_bytes
        await pool.check()
        verdict.sent_bytes, verdict.received_bytes = pool.sent_bytes, pool.received_bytes
        await pool.close()
    return verdict


async def _warn_of_foreign_content(device: Destination, pool: Pool) -> None:
    """Warn if `device` holds what the source of `pool` does not hold. A state file may make this no obstacle."""
    try:
        await refuse_foreign_content(device, pool)
    except ForeignContentError as error:
        warn(error)


async def _hole_bytes(pool: Pool, extents: Sequence[Extent]) -> int:
    """Return how many bytes of `extents` are holes of the source of `pool`, as far as the source says so."""
    found = 0
    for extent in extents:
        for start in range(extent.offset, extent.end, _HOLES_BYTES):
            part = Extent(start, min(_HOLES_BYTES, extent.end - start))
            holes = await pool.holes(part, BLOCK_SIZE, trio.current_time())
            found += sum(each.length for each in holes)
    return found
