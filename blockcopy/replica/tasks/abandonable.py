"""Calls that may never return, in threads and processes that can be abandoned.

The event loop itself touches no path of a user. Such a path may lie on a file system that does not answer. It may
lie in the mount that the event loop serves.
"""

from __future__ import annotations

import errno
import math
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import trio

T = TypeVar("T")

# With vfork() a child that hangs before its program begins stops all threads here: its parent keeps the GIL.
subprocess._USE_VFORK = False  # type: ignore[misc]  # documented for this use

EXIT_SECONDS = 5
"""Seconds to wait for the exit of a killed process. A system call on a dead disk may keep the process for ever."""

_NO_LIMIT = trio.CapacityLimiter(math.inf)
"""The default limiter: an abandoned thread takes no other thread's place."""


async def run(work: Callable[[], T], *, limiter: trio.CapacityLimiter = _NO_LIMIT) -> T:
    """Call `work` in a thread, and return its result. Cancellation abandons the thread.

    `limiter`: bounds the threads.
    """
    return await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)


async def run_within(work: Callable[[], T], seconds: float, *, limiter: trio.CapacityLimiter = _NO_LIMIT) -> T:
    """Call `work` in a thread, and return its result. Cancellation does not end the call early.

    `limiter`: bounds the threads. Raises TimeoutError if the call takes longer than `seconds`. The thread is then
    abandoned.
    """
    with trio.CancelScope(shield=True, deadline=trio.current_time() + seconds):
        return await run(work, limiter=limiter)
    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


async def start_process(make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Start a process in a thread, and return it.

    `make`: called without arguments, starts the process and returns it.
    On cancellation the process is killed as soon as it exists. The caller waits for that, EXIT_SECONDS at most.
    """
    made: Future[subprocess.Popen[bytes]] = Future()

    def make_process() -> subprocess.Popen[bytes]:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            made.set_exception(error)
        return made.result()

    def end_process() -> None:
        if made.exception() is None:  # waits until `make` has returned
            _end(made.result())

    await trio.lowlevel.checkpoint()  # from now on `make` is called, even on cancellation
    try:
        return await run(make_process)
    except trio.Cancelled:
        with suppress(TimeoutError):
            await run_within(end_process, EXIT_SECONDS)
        raise


def abandon_process(process: subprocess.Popen[bytes]) -> threading.Thread:
    """Kill `process`, close its pipes, and wait for its exit in a thread. Returns the thread at once."""
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
    """Wait until `process` exits. Returns its exit status in the form of `subprocess`."""
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    return process.wait()
