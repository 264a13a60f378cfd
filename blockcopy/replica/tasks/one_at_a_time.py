"""Work in threads, one piece of work at a time, with a time limit. Other work may go before it, without a limit.

A change of threads costs as much as a quick sync of a disk. So a sync, and the record of what it covers, share one.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio


class OneAtATime:
    """Threads for work that must not overlap, and may never return. Call from trio's thread only."""

    def __init__(self, seconds: float) -> None:
        """Allow `seconds` for each piece of work, and for its wait for the one before."""
        self._seconds = seconds
        self._working = threading.Lock()
        self._gave_up = False

    async def run(self, work: Callable[[], None], *, after: Callable[[], None] | None = None) -> None:
        """Call `after`, which has no time limit, then `work`, in one thread. Cancellation does not end them early.

        Raises TimeoutError if `work` takes too long: the thread is then abandoned. Raises it at once after `after`
        while such a thread is left. Raises what `after` raises, without a call of `work`, and what `work` raises.
        """
        is_stuck = self._gave_up and self._working.locked()
        is_abandoned = False

        def in_turn() -> None:
            if is_stuck:
                raise _timeout()
            with self._working:
                if not is_abandoned:  # else it is too late: newer work may have been done before
                    work()

        try:
            await _run_within(in_turn, self._seconds, after)
        except TimeoutError:
            is_abandoned = self._gave_up = True
            raise
        self._gave_up = False


async def run(work: Callable[[], None]) -> None:
    """Call `work` in a thread, as trio.to_thread does, but in half the time. Cancellation does not end the call.

    It has no limiter and no context variables. Raises what `work` raises.
    """
    await _run_within(work, None, None)


async def _run_within(work: Callable[[], None], seconds: float | None, after: Callable[[], None] | None) -> None:
    """Call `after`, then `work`, in a thread. Cancellation does not end the calls early.

    `seconds`: how long `work` may take, or None. Raises TimeoutError after that, and abandons the thread.
    """
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()
    outcomes: list[Any] = []
    began: list[float] = [] if after is not None else [time.monotonic()]

    def in_thread() -> None:
        if after is not None:
            after()
            began.append(time.monotonic())
        work()

    def deliver(outcome: Any) -> None:
        outcomes.append(outcome)
        with suppress(trio.RunFinishedError):  # the thread was abandoned
            token.run_sync_soon(ended.set)

    await trio.lowlevel.checkpoint_if_cancelled()
    trio.lowlevel.start_thread_soon(in_thread, deliver)
    patience = math.inf if seconds is None else seconds
    while not outcomes:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + patience):
            await ended.wait()
        if not outcomes and began and time.monotonic() - began[0] >= patience:
            raise _timeout()
    outcomes[0].unwrap()


def _timeout() -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
