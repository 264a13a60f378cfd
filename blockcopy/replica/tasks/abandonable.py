"""Calls that can hang, in threads that may be left behind: the event loop itself touches no path of a user.

A path can lie on a file system that gives no answer. It can lie in the mount that the event loop serves.
"""

from __future__ import annotations

import errno
import math
import os
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import trio

T = TypeVar("T")

# With vfork() a child that hangs before its program begins stops all threads here: its parent keeps the GIL.
subprocess._USE_VFORK = False  # type: ignore[misc]  # documented for this use

EXIT_SECONDS = 5
"""How long a killed process is waited for. It may be in a call that nothing ends, of a disk that is away."""

_NO_LIMIT = trio.CapacityLimiter(math.inf)
"""A thread that was left behind takes nobody's place."""


async def run(work: Callable[[], T], *, limiter: trio.CapacityLimiter = _NO_LIMIT) -> T:
    """Return `work()`, from a thread. Cancelled, the caller goes on and leaves the thread behind."""
    return await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)


async def run_within(work: Callable[[], T], seconds: float, *, limiter: trio.CapacityLimiter = _NO_LIMIT) -> T:
    """Return `work()`, from a thread; no cancellation ends it early.

    Raises TimeoutError if `work` takes longer than `seconds`: the thread is left behind then.
    """
    with trio.CancelScope(shield=True, deadline=trio.current_time() + seconds):
        return await run(work, limiter=limiter)
    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


async def start_process(make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Return the process that `make` starts.

    Cancelled, the process is killed whenever it comes to be. The caller waits for that, EXIT_SECONDS at most.
    """
    made: list[subprocess.Popen[bytes]] = []
    unwanted = False
    deciding = threading.Lock()  # who ends a process that nobody wants
    finished = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def make_process() -> subprocess.Popen[bytes]:
        try:
            process = make()
            with deciding:
                made.append(process)
                mine = unwanted
            if mine:
                _end(process)
            return process
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(finished.set)

    try:
        return await run(make_process)
    except trio.Cancelled:
        with deciding:
            unwanted = True
        with suppress(TimeoutError):
            if made:
                await run_within(partial(_end, made[0]), EXIT_SECONDS)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + EXIT_SECONDS):
            await finished.wait()
        raise


def abandon_process(process: subprocess.Popen[bytes]) -> threading.Thread:
    """Kill a process, and close its pipes. Returns the thread that waits for its end, however long that takes."""
    thread = threading.Thread(target=_end, args=(process,), daemon=True)
    thread.start()
    return thread


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.wait()


async def wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    """Return the status of a process once it has ended, as subprocess has it."""
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    return process.wait()
