"""SIGINT and SIGTERM of commands without an event loop."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from blockcopy.errors import BlockcopyError, Interrupted


def raise_on_signals() -> None:
    """Let the first SIGINT or SIGTERM raise Interrupted in the main thread. The second one kills the process.

    A signal that is ignored, as under nohup, stays ignored.
    """

    def interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, interrupt)


def die_of(signum: int) -> NoReturn:
    """Kill this process by the signal `signum`, so that its parent sees that cause.

    Raises BlockcopyError if the signal is blocked.
    """
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    raise BlockcopyError(f"signal {signum} is blocked")
