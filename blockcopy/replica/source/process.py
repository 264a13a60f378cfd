"""A child process of ours with its three pipes, for trio.

It may have been started before trio was there: loading that takes as long as a `retrieve` does to begin.
"""

from __future__ import annotations

import logging
import os
import subprocess

import trio

from blockcopy.errors import SourceError
from blockcopy.replica.tasks import abandonable
from blockcopy.transport.command import Command
from blockcopy.transport.hints import explain_failed_start

logger = logging.getLogger(__name__)


class Process:
    """`stdin` and `stderr` for tasks, `stdout` a descriptor for a thread. To be closed by `aclose`."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        """Of one that was started with three pipes, unbuffered."""
        self._popen = popen
        self._ended = os.pidfd_open(popen.pid)
        self._waiting = trio.Lock()
        self._killed = trio.Event()
        self._left = False
        self.stdout = _own(popen.stdout)
        self.stdin = trio.lowlevel.FdStream(_own(popen.stdin))
        self.stderr = trio.lowlevel.FdStream(_own(popen.stderr))

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """As subprocess has it; None as long as `wait` has not returned."""
        return self._popen.returncode

    def kill(self) -> None:
        """End it, if it did not end yet. Call from trio's thread only."""
        self._popen.kill()
        self._killed.set()

    async def wait(self) -> None:
        """Return when it has ended and is reaped, or is left behind: killed, and in a call that does not return."""
        async with self._waiting:  # one task at a time may wait for a descriptor
            if self._popen.returncode is None and not self._left:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._leave, nursery.cancel_scope)
                    await trio.lowlevel.wait_readable(self._ended)
                    self._popen.wait()
                    nursery.cancel_scope.cancel()

    async def _leave(self, waiting: trio.CancelScope) -> None:
        """Some seconds after it was killed, end `waiting`."""
        await self._killed.wait()
        await trio.sleep(abandonable.EXIT_SECONDS)
        self._left = True
        logger.warning("process %d was killed, and waits for its disk: it is left behind", self.pid)
        abandonable.abandon_process(self._popen)
        waiting.cancel()

    async def aclose(self) -> None:
        """Kill it, and return when nothing of it is left that can be ended."""
        with trio.CancelScope(shield=True):
            if self._popen.returncode is None:
                self.kill()
            await self.wait()
            await self.stdin.aclose()
            await self.stderr.aclose()
        os.close(self.stdout)
        os.close(self._ended)


def _own(file: object) -> int:
    """The descriptor of a pipe of Popen's, which lets go of it."""
    if not hasattr(file, "fileno"):
        raise ValueError("it was started without three pipes")
    with file:  # type: ignore[attr-defined]
        return os.dup(file.fileno())


async def start(command: Command) -> Process:
    """Start a process without waiting for a path in trio's thread. Raises SourceError if it cannot be started."""
    try:
        return Process(await abandonable.start_process(command.start))
    except OSError as error:
        raise SourceError(explain_failed_start(command, error)) from error
