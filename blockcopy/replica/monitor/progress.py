"""The progress of a replica, reported while it runs."""

from __future__ import annotations

import logging

import trio

from blockcopy.progress.reporter import Counts, Progress
from blockcopy.replica.monitor.status import MonitoredReplica, State

logger = logging.getLogger(__name__)

_SECONDS = 0.2
"""Interval between two reports."""


def report_start(progress: Progress) -> None:
    """Report to `progress` that a replica is about to be opened. Its source may take long to answer."""
    try:
        progress.update(Counts(0, None, {"same": 0, "fetched": 0, "zero": 0}, state=State.STARTING))
    except Exception as error:  # no reporter ends a copy
        logger.error("internal error in the progress; everything else continues", exc_info=error)


async def report(replica: MonitoredReplica, progress: Progress) -> None:
    """Report the counts of `replica` to `progress` until the replica is settled, or until cancelled.

    Call from trio's thread only.
    """
    if progress.silent:
        await replica.settled.wait()
        return
    try:
        while not replica.settled.is_set():
            progress.update(replica.counts)
            with trio.move_on_after(_SECONDS):
                await replica.settled.wait()
    finally:
        progress.update(replica.counts)
        if replica.succeeded:
            progress.finish()
