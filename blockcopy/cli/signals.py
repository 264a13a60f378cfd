"""SIGINT and SIGTERM of a command without an event loop."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from blockcopy.errors import BlockcopyError, Interrupted


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted in the main thread, once; a second one kills."""

    def interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) != signal.SIG_IGN:  # started with nohup and the like
            signal.signal(each, interrupt)


def die_of(signum: int) -> NoReturn:
    """End as a program that the signal killed: what a shell and a parent expect to see."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    raise BlockcopyError(f"signal {signum} is blocked")  # cannot be reached unless it is
