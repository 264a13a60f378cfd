"""`blockcopy sync`: a replica without a mount. Also how any trio program of ours is run."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TextIO

import trio

from blockcopy.errors import BlockcopyError, Interrupted
from blockcopy.replica import bar
from blockcopy.replica.engine import Plan, open_replica

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(main: Callable[[], Awaitable[object]]) -> None:
    """trio.run, with the one error that a user has to be told taken out of its exception groups."""
    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        if not all(isinstance(leaf, (BlockcopyError, Interrupted)) for leaf in leaves):
            raise  # a fault of ours: with all there is to see
        raise next((leaf for leaf in leaves if isinstance(leaf, Interrupted)), leaves[0]) from group


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def sync(plan: Plan, terminal: TextIO | None) -> dict[str, object]:
    """Make the destination the source's copy; the last snapshot. `terminal` gets a progress bar.

    SourceError, DeviceError, DestinationRefusedError, or Interrupted after an orderly end.
    """
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_raise_interrupted, signals)
            async with open_replica(plan) as replica:
                if terminal is not None:
                    await bar.show(replica, terminal)
                await replica.wait_complete()
            nursery.cancel_scope.cancel()
            return replica.snapshot()


async def _raise_interrupted(signals: object) -> None:
    async for signum in signals:  # type: ignore[attr-defined]  # trio does not name the type
        raise Interrupted(signum)
