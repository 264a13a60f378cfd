"""Calls of the C library that Python's `os` lacks, for the tools."""

from __future__ import annotations

import ctypes
import os
import signal

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
CLONE_NEWNS = 0x00020000


def call(function: str, *arguments: object) -> None:
    """Call a function of libc. Raises OSError if the call fails."""
    if getattr(LIBC, function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), function)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send the signal `number` to this process once the thread that started it has ended."""
    call("prctl", PR_SET_PDEATHSIG, number)
