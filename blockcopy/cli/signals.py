"""SIGINT and SIGTERM of commands without an event loop."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from blockcopy.errors import BlockcopyError, Interrupted


def raise_on_signals() -> None:
    """Let the first SIGINT or SIGTERM raise Interrupted in the main thread. The second one kills the process.

    The first one kills it, too, while modules are loaded: Python loses or wraps exceptions then.
    A signal that is ignored, as under nohup, stays ignored.
    """

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if _loads_module(frame):
            die_of(signum)
        raise Interrupted(signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, interrupt)


def _loads_module(frame: FrameType | None) -> bool:
    """Return whether `frame` or one of its callers loads a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def die_of(signum: int) -> NoReturn:
    """Kill this process by the signal `signum`, so that its parent sees that cause.

    Raises BlockcopyError if the signal is blocked.
    """
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    raise BlockcopyError(f"signal {signum} is blocked")
