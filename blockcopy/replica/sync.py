"""`blockcopy sync`: a replica without a mount."""

from __future__ import annotations

from typing import TextIO

import trio

from blockcopy.replica import hook
from blockcopy.replica.engine import open_replica
from blockcopy.replica.notify import Notifier
from blockcopy.replica.replica import Plan


async def sync(plan: Plan, terminal: TextIO | None, notifier: Notifier) -> None:
    """Make the destination the source's copy. `terminal` gets a progress bar, `notifier` the status.

    SourceError, DeviceError, DestinationRefusedError, in exception groups.
    """
    async with open_replica(plan) as replica:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.keep_telling, replica)
            if terminal is not None:
                from blockcopy.replica import bar  # what draws it is loaded where it is drawn

                await bar.show(replica, terminal)
            await replica.wait_complete()
            nursery.cancel_scope.cancel()
        snapshot = replica.snapshot()
    if plan.on_complete:  # the destination is nobody's any more
        await hook.run(plan.on_complete, snapshot, plan.command.folder)
