"""How far a replica is, told to a progress bar while it goes on."""

from __future__ import annotations

import trio

from blockcopy.progress.reporter import Progress
from blockcopy.replica.monitor.status import Watched, counts_of

_SECONDS = 0.2


async def report(replica: Watched, progress: Progress) -> None:
    """Until the replica is settled, or the caller cancels."""
    if progress.silent:
        await replica.settled.wait()
        return
    try:
        while not replica.settled.is_set():
            progress.update(counts_of(replica.snapshot()))
            with trio.move_on_after(_SECONDS):
                await replica.settled.wait()
    finally:
        snapshot = replica.snapshot()
        progress.update(counts_of(snapshot))
        if snapshot["state"] == "complete":
            progress.finish()
