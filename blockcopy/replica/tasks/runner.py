"""How a trio program of ours is run: its signals, and the one error that a user has to be told."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import trio

from blockcopy.errors import BlockcopyError, Interrupted

logger = logging.getLogger(__name__)

T = TypeVar("T")

_noted: list[int] = []
"""Signals that came while trio ran and nobody received them."""


def ending_signals() -> list[signal.Signals]:
    """The signals that end a program in order; one that it was started to ignore, as by nohup, does not."""
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [each for each in wanted if signal.getsignal(each) != signal.SIG_IGN]


def run(main: Callable[[], Awaitable[T]]) -> T:
    """trio.run, with the one error that a user has to be told taken out of its exception groups."""
    try:
        with _noting():
            return trio.run(main)
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        if not all(isinstance(leaf, (BlockcopyError, Interrupted)) for leaf in leaves):
            raise  # a fault of ours: with all there is to see
        raise next((leaf for leaf in leaves if isinstance(leaf, Interrupted)), leaves[0]) from group


async def run_optional(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Run a part that the copy does without: whatever it raises is logged, and ends nothing else."""
    try:
        await part()
    except Exception as error:
        logger.error("%s ended by a fault of blockcopy's; all else goes on", name, exc_info=error)


@contextmanager
def _noting() -> Iterator[None]:
    """A signal that came just before or behind `receive_signals` would raise in trio's own midst, which breaks it.
    So it is noted: the first who receives signals gets it, or else it is raised behind the run."""
    _noted.clear()
    before = {each: signal.signal(each, lambda signum, _: _noted.append(signum)) for each in ending_signals()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if _noted:
        raise Interrupted(_noted[0])


@asynccontextmanager
async def receive_signals() -> AsyncIterator[AsyncIterator[int]]:
    """The ending signals as they come, those that came before it too."""
    with trio.open_signal_receiver(*ending_signals()) as signals:
        while _noted:
            os.kill(os.getpid(), _noted.pop())
        yield signals


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def run_interruptible(main: Callable[[], Awaitable[T]]) -> T:
    """`main()`; a signal cancels it, and is raised as Interrupted when it has come to its orderly end."""
    async with receive_signals() as signals, trio.open_nursery() as nursery:
        nursery.start_soon(_raise_interrupted, signals)
        result = await main()
        nursery.cancel_scope.cancel()
    return result


async def _raise_interrupted(signals: AsyncIterator[int]) -> None:
    async for signum in signals:
        raise Interrupted(signum)
