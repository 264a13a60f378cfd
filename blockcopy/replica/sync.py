"""The `sync` command: a replica without a mount."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from blockcopy.progress.reporter import Progress
from blockcopy.replica.engine import open_replica
from blockcopy.replica.monitor import on_complete, prometheus
from blockcopy.replica.monitor.progress import report, report_start
from blockcopy.replica.monitor.sd_notify import Notifier
from blockcopy.replica.monitor.status import Status
from blockcopy.replica.plan import Plan
from blockcopy.replica.tasks.runner import run_optional


async def sync(
    plan: Plan, progress: Progress, notifier: Notifier, note_status: Callable[[Status], object] = lambda _: None
) -> None:
    """Make the copy of `plan` complete, then run `plan.on_complete`.

    `progress` and `notifier` get the status meanwhile. `note_status`: called with the last one, also if this fails.
    Raises SourceError, DeviceError or DestinationRefusedError, in exception groups.
    """
    report_start(progress)
    async with open_replica(plan) as replica, trio.open_nursery() as nursery:
        for name, part in (
            ("sd_notify", partial(notifier.keep_notifying, replica)),
            ("--metrics", partial(prometheus.keep_writing, plan.metrics, replica.status)),
            ("the progress", partial(report, replica, progress)),
        ):
            nursery.start_soon(run_optional, name, part)
        try:
            await replica.wait_complete()
        finally:
            status = replica.status()
            note_status(status)
        nursery.cancel_scope.cancel()
    await run_optional("--on-complete", partial(on_complete.run, plan, status))  # the destination is closed by now
