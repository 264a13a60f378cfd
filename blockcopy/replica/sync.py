"""`blockcopy sync`: a replica without a mount."""

from __future__ import annotations

from typing import TextIO

from blockcopy.replica.engine import open_replica
from blockcopy.replica.replica import Plan


async def sync(plan: Plan, terminal: TextIO | None) -> None:
    """Make the destination the source's copy. `terminal` gets a progress bar.

    SourceError, DeviceError, DestinationRefusedError, in exception groups.
    """
    async with open_replica(plan) as replica:
        if terminal is not None:
            from blockcopy.replica import bar  # what draws it is loaded where it is drawn

            await bar.show(replica, terminal)
        await replica.wait_complete()
