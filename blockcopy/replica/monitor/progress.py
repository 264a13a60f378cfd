"""The progress of a replica, reported while it runs."""

from __future__ import annotations

import trio

from blockcopy.progress.reporter import Progress
from blockcopy.replica.monitor.status import MonitoredReplica, State

_SECONDS = 0.2
"""Interval between two reports."""


async def report(replica: MonitoredReplica, progress: Progress) -> None:
    """Report the counts of `replica` to `progress` until the replica is settled, or until cancelled.

    Call from trio's thread only.
    """
    if progress.silent:
        await replica.settled.wait()
        return
    try:
        while not replica.settled.is_set():
            progress.update(replica.status().counts)
            with trio.move_on_after(_SECONDS):
                await replica.settled.wait()
    finally:
        status = replica.status()
        progress.update(status.counts)
        if status.state is State.COMPLETE:
            progress.finish()
