"""`blockcopy sync`: a replica without a mount."""

from __future__ import annotations

from blockcopy.progress import Progress
from blockcopy.replica.engine import open_replica
from blockcopy.replica.replica import Plan
from blockcopy.replica.report import report


async def sync(plan: Plan, progress: Progress) -> None:
    """Make the destination the source's copy. `progress` is told how far it is.

    SourceError, DeviceError, DestinationRefusedError, in exception groups.
    """
    async with open_replica(plan) as replica:
        await report(replica, progress)
        await replica.wait_complete()
