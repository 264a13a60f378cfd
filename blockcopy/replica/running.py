"""How a trio program of ours is run: its signals, and the one error that a user has to be told."""

from __future__ import annotations

import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import trio

from blockcopy.errors import BlockcopyError, Interrupted


def ending_signals() -> list[signal.Signals]:
    """The signals that end a program in order; one that it was started to ignore, as by nohup, does not."""
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [each for each in wanted if signal.getsignal(each) != signal.SIG_IGN]


T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]]) -> T:
    """trio.run, with the one error that a user has to be told taken out of its exception groups."""
    gc.freeze()  # what was imported stays: looking through it for garbage again and again costs a few percent
    try:
        return trio.run(main)
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


async def interruptible(main: Callable[[], Awaitable[T]]) -> T:
    """`main()`; a signal cancels it, and is raised as Interrupted when it has come to its orderly end."""
    with trio.open_signal_receiver(*ending_signals()) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_raise_interrupted, signals)
            result = await main()
            nursery.cancel_scope.cancel()
        return result


async def _raise_interrupted(signals: AsyncIterator[int]) -> None:
    async for signum in signals:
        raise Interrupted(signum)
