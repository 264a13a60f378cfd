"""A child process of ours with its three pipes, for trio.

It may have been started before trio was there: loading that takes as long as a `retrieve` does to begin.
"""

from __future__ import annotations

import os
import subprocess

import trio

from blockcopy.errors import SourceError
from blockcopy.remote import Command
from blockcopy.replica import losable


class Process:
    """`stdin` and `stderr` for tasks, `stdout` a descriptor for a thread. To be closed by `aclose`."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        """Of one that was started with three pipes, unbuffered."""
        self._popen = popen
        self._ended = os.pidfd_open(popen.pid)
        self._waiting = trio.Lock()
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
        """End it, if it did not end yet."""
        self._popen.kill()

    async def wait(self) -> None:
        """Return when it has ended, and is reaped."""
        async with self._waiting:  # one task at a time may wait for a descriptor
            if self._popen.returncode is None:
                await trio.lowlevel.wait_readable(self._ended)
                self._popen.wait()

    async def aclose(self) -> None:
        """Kill it, and return when nothing of it is left."""
        with trio.CancelScope(shield=True):
            if self._popen.returncode is None:
                self._popen.kill()
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
        return Process(await losable.start(command.start))
    except OSError as error:
        raise SourceError(f"cannot run `{command.argv[0]}`: {error.strerror}") from error
