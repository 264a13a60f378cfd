"""The runner of trio programs: it handles signals, and raises the one error to report to the user."""

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
"""Signals that arrived while trio ran and no task received signals."""


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a program in order, without those that it ignores, as under nohup."""
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [each for each in wanted if signal.getsignal(each) != signal.SIG_IGN]


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run `main`, an async function without arguments, in trio. Returns its result.

    If `main` raises an exception group of BlockcopyError and Interrupted, raises one of these instead. Raises
    Interrupted if a signal arrived that no task received.
    """
    try:
        with _noting():
            return trio.run(main)
    except BaseExceptionGroup as group:
        if group.split((BlockcopyError, Interrupted))[1]:
            raise  # an internal error, with all tracebacks
        error: BaseException = group.subgroup(Interrupted) or group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group


async def run_optional(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Await `part`, an async function that the copy does not need. Logs whatever it raises.

    `name`: what the log calls the part.
    """
    try:
        await part()
    except Exception as error:
        logger.error("internal error in %s; everything else continues", name, exc_info=error)


@contextmanager
def _noting() -> Iterator[None]:
    """Keep ending signals that arrive while no task receives signals. Yields nothing.

    Such a signal would raise inside of trio, which breaks trio. The first `receive_signals` gets it, or else it is
    raised as Interrupted behind the `with` block.
    """
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
    """Receive the ending signals in an `async with` block.

    Yields an iterator of their numbers, also of signals that arrived before.
    """
    with trio.open_signal_receiver(*ending_signals()) as signals:
        while _noted:
            os.kill(os.getpid(), _noted.pop())
        yield signals


async def run_interruptible(main: Callable[[], Awaitable[T]]) -> T:
    """Await `main`, an async function without arguments, and return its result.

    On a signal, cancels `main`, and raises Interrupted once `main` has ended.
    """
    async with receive_signals() as signals, trio.open_nursery() as nursery:
        nursery.start_soon(_raise_interrupted, signals)
        result = await main()
        nursery.cancel_scope.cancel()
    return result


async def _raise_interrupted(signals: AsyncIterator[int]) -> None:
    async for signum in signals:
        raise Interrupted(signum)
