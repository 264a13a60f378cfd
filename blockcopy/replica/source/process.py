"""A child process with its three pipes, for trio.

The process may have been started before trio was imported, which takes as long as a `retrieve` takes to begin.
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


_FIRST_FOREIGN_STATUS = 126
"""Exit statuses from 126 on are those of shells, of signals, and of ssh (255), not of a stage."""


class Process:
    """A child process. Its attributes `stdin` and `stderr` are streams for tasks.

    The attribute `stdout` is a descriptor for a thread. Call `aclose` in the end. Call from trio's thread only.
    """

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        """Take over `popen`, which was started with three unbuffered pipes."""
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._waiting = trio.Lock()
        self._killed = trio.Event()
        self._abandoned = False
        self.stdout = _take_descriptor(popen.stdout)
        self.stdin = trio.lowlevel.FdStream(_take_descriptor(popen.stdin))
        self.stderr = trio.lowlevel.FdStream(_take_descriptor(popen.stderr))

    @property
    def returncode(self) -> int | None:
        """The exit status in the form of `subprocess`. None until `wait` has returned."""
        return self._popen.returncode

    @property
    def has_failed(self) -> bool:
        """Whether the process has exited with the status of an error of its own."""
        return 0 < (self.returncode or 0) < _FIRST_FOREIGN_STATUS

    def kill(self) -> None:
        """Kill the process if it has not exited. Call from trio's thread only."""
        self._popen.kill()
        self._killed.set()

    async def wait(self) -> None:
        """Return when the process has exited and is reaped.

        A killed process in a system call that does not return is abandoned after `abandonable.EXIT_SECONDS`.
        """
        async with self._waiting:  # one task at a time may wait for a descriptor
            if self._popen.returncode is None and not self._abandoned:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._abandon_when_killed, nursery.cancel_scope)
                    await trio.lowlevel.wait_readable(self._pidfd)
                    self._popen.wait()
                    nursery.cancel_scope.cancel()

    async def _abandon_when_killed(self, waiting: trio.CancelScope) -> None:
        """Abandon the process and cancel the scope `waiting`, EXIT_SECONDS after the process was killed."""
        await self._killed.wait()
        await trio.sleep(abandonable.EXIT_SECONDS)
        self._abandoned = True
        logger.warning("process %d was killed, and waits for its disk: it is left behind", self._popen.pid)
        abandonable.abandon_process(self._popen)
        waiting.cancel()

    async def aclose(self) -> None:
        """Kill the process if it still runs, and close its pipes. Returns when it has exited or is abandoned."""
        with trio.CancelScope(shield=True):
            if self._popen.returncode is None:
                self.kill()
            await self.wait()
            await self.stdin.aclose()
            await self.stderr.aclose()
        os.close(self.stdout)
        os.close(self._pidfd)


def _take_descriptor(file: object) -> int:
    """Return a new descriptor of `file`, a pipe of Popen's, and close `file`. Raises ValueError if it is None."""
    if not hasattr(file, "fileno"):
        raise ValueError("the process was started without three pipes")
    with file:  # type: ignore[attr-defined]
        return os.dup(file.fileno())


async def start_process(command: Command) -> Process:
    """Start the process of `command`, in a thread, and return it. Raises SourceError if it cannot be started."""
    try:
        return Process(await abandonable.start_process(command.start))
    except OSError as error:
        raise SourceError(explain_failed_start(command, error)) from error
