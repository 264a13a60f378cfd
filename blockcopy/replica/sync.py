"""`blockcopy sync`: a replica without a mount."""

from __future__ import annotations

from functools import partial

import trio

from blockcopy.progress.progress import Progress
from blockcopy.replica.engine import open_replica
from blockcopy.replica.monitor import hook, metrics
from blockcopy.replica.monitor.notify import Notifier
from blockcopy.replica.monitor.report import report
from blockcopy.replica.plan import Plan
from blockcopy.replica.tasks.running import expendable


async def sync(plan: Plan, progress: Progress, notifier: Notifier) -> None:
    """Make the destination the source's copy. `progress` is told how far it is, and `notifier` too.

    SourceError, DeviceError, DestinationRefusedError, in exception groups.
    """
    async with open_replica(plan) as replica:
        async with trio.open_nursery() as nursery:
            for name, part in (
                ("sd_notify", partial(notifier.keep_telling, replica)),
                ("--metrics", partial(metrics.keep_writing, plan.metrics, replica.snapshot)),
                ("the progress", partial(report, replica, progress)),
            ):
                nursery.start_soon(expendable, name, part)
            await replica.wait_complete()
            nursery.cancel_scope.cancel()
        snapshot = replica.snapshot()
    if plan.on_complete:  # the destination is nobody's any more
        await expendable("--on-complete", partial(hook.run, plan.on_complete, snapshot, plan.command.folder))
