"""A session with a stage on a host, for programs with threads: `push` and `doctor`.

The caller reads standard output, from which the login's noise is skipped. A thread keeps the last lines of standard
error. Another thread kills a stage that does not begin in time, or is silent for too long.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, Callable

from blockcopy.errors import BlockcopyError, OutputError, RemoteError
from blockcopy.stage.streams import InputStream, OutputStream
from blockcopy.transport import start_timeout
from blockcopy.transport.command import MAX_NOISE, Command
from blockcopy.transport.hints import explain_failed_start
from blockcopy.transport.stderr_lines import StderrLines
from blockcopy.untrusted_text import LineBudget

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
"""Seconds between two looks at the clock."""

_EXIT_SECONDS = 2
"""Seconds for a process to exit once its pipes are closed, and then for its last lines."""

_FAILURE_SECONDS = 10
"""Seconds for a stage to report why it failed."""


class SilenceTimer:
    """The seconds for which the remote end sent nothing although this end waited for it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paused = 0
        self._since = time.monotonic()

    def restart(self) -> None:
        """Count from 0 again, because the remote end was active."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Count no time until `resume` was called as often as this."""
        with self._lock:
            self._paused += 1

    def resume(self) -> None:
        """Count from 0 again, unless the timer was paused once more."""
        with self._lock:
            self._paused -= 1
            self.restart()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager within which no time counts, because the remote end waits for this end."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def seconds(self) -> float:
        """Return the seconds of silence so far. Returns 0 while the timer is paused."""
        with self._lock:
            return 0.0 if self._paused else time.monotonic() - self._since


class Session:
    """A stage and the connection to it. Entering the context starts the stage; leaving it waits for the end."""

    def __init__(
        self,
        command: Command,
        *,
        timeout: float = math.inf,
        prompts: bool = False,
        syncs: bool = False,
        report: Callable[[str], None] | None = None,
        budget: LineBudget | None = None,
    ) -> None:
        """Prepare a session with the stage that `command` runs.

        `timeout`: seconds of silence after which the stage is killed. `prompts`: a password may be asked for.
        `syncs`: the stage syncs a disk before it exits, however long that takes. `report`: called with each line
        that the stage writes to standard error, within the rate limit `budget`.
        """
        self.command = command
        self.silence = SilenceTimer()
        self.begun = False
        """Whether the stage runs. Before, the login does."""
        self.timeout_error: str | None = None
        """The message if the stage was killed, by the time limit or by `kill`."""
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None  # guarded by the lock
        self.timeout = timeout
        """Seconds of silence after which the stage is killed."""
        self._max_start = start_timeout.max_start_seconds(timeout, prompts=prompts)
        self._syncs = syncs
        self._report = report
        self._stderr = StderrLines(self._note, budget or LineBudget())
        self._left = threading.Event()

    def __enter__(self) -> Session:
        """Start the stage, and return this session. Raises RemoteError if the stage cannot be started."""
        try:
            process = self.command.start()
        except OSError as error:
            raise RemoteError(explain_failed_start(self.command, error)) from error
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("the stage was started without pipes")
        self._process = process
        self._pipes: list[IO[bytes]] = [process.stdin, process.stdout]
        self.output = _Output(process.stdin.fileno(), self)
        self.input = _Input(process.stdout.fileno(), self)
        self._listener = self._stderr.listen(process.stderr)
        with self._lock:
            self._running = process
            if self.timeout_error is not None:
                process.kill()
        self._watcher = threading.Thread(target=self._watch, name="watch")
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._left.set()
        self._watcher.join()
        if kind is not None and not issubclass(kind, BlockcopyError):
            self._process.kill()  # interrupted: do not wait
        stdin, stdout = self._pipes
        stdin.close()
        if kind is not None:
            stdout.close()  # a stage that still writes would wait; after success, ssh might see a broken connection
        try:
            self._process.wait(self._exit_timeout(failed=kind is not None))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(_EXIT_SECONDS)  # its children may hold standard error open
        with self._lock:
            self._running = None
        stdout.close()
        self.input.__exit__()

    def _exit_timeout(self, *, failed: bool) -> float | None:
        """Return the seconds to wait for the exit. Returns None if there is no limit.

        `failed`: whether the session ends by an error.
        """
        if not self.begun:
            return _EXIT_SECONDS
        return None if self._syncs and not failed else _FAILURE_SECONDS

    @property
    def status(self) -> int:
        """The exit status, negative for a signal. Valid once the session was left."""
        return self._process.returncode

    def begin(self) -> bool:
        """Send the stage to the host, and wait until it runs.

        Returns True if it runs, False if the login ends before. Raises StreamError if the login prints too much.
        """
        if self.command.mark:
            with contextlib.suppress(OutputError):  # its output may explain why it exited
                self.output.write([self.command.opening])
            self.begun = self.input.skip_past(self.command.mark, MAX_NOISE)
            self.silence.restart()
            return self.begun
        return True  # an installed program begins with its first output

    def last_lines(self) -> list[str]:
        """Return a list of the last lines on standard error.

        If the stage did not begin, the login's output comes first.
        """
        return [*([] if self.begun else start_timeout.last_lines(self.input.noise)), *self._stderr.last]

    def _note(self, line: str) -> None:
        if self.begun and self._report is not None:
            self._report(line)

    def _watch(self) -> None:
        """Enforce the time limits until the session is left."""
        started, warned, exited = time.monotonic(), False, False
        while not self._left.wait(_POLL_SECONDS):
            waited = time.monotonic() - started
            if not self.begun and waited >= self._max_start:
                return self.kill(start_timeout.not_started(self.command, self._max_start, self.last_lines()))
            if self.begun and self.silence.seconds() >= self.timeout:
                return self.kill(f"{self.command.location} sent nothing for {self.timeout:g} seconds")
            if not self.begun and not warned and waited >= start_timeout.WARN_SECONDS:
                warned = True
                logger.warning("%s", start_timeout.still_waiting(self.command, self.last_lines()))
            if exited:  # its children may hold standard output open
                self._left.wait(_EXIT_SECONDS)
                return self.input.wake()
            exited = self._process.poll() is not None

    def kill(self, why: str) -> None:
        """Kill the stage, and end all reads and writes of this session. Thread-safe.

        `why`: kept as the message. A session that has not started yet ends at its start.
        """
        with self._lock:
            self.timeout_error = self.timeout_error or why
            if self._running is not None:
                self._running.kill()
                self.input.wake()


class _Input(InputStream):
    """The stream from the stage of `session`, on the file descriptor `fd`. Each read restarts the silence timer."""

    def __init__(self, fd: int, session: Session) -> None:
        super().__init__(fd)
        self._session = session

    def read_into(self, buffer: memoryview) -> int:
        count = super().read_into(buffer)
        self._session.silence.restart()
        if count and not self._session.command.mark:
            self._session.begun = True
        return count


class _Output(OutputStream):
    """The stream to the stage of `session`, on the file descriptor `fd`.

    A thread watches the stage for silence while this one waits.
    """

    def __init__(self, fd: int, session: Session) -> None:
        super().__init__(fd)
        self._session = session
        os.set_blocking(fd, False)

    def _await_writable(self) -> None:
        writable = select.poll()
        writable.register(self._fd, select.POLLOUT)
        while not writable.poll(1000 * _POLL_SECONDS):
            if self._session.timeout_error is not None:
                raise OutputError(self._session.timeout_error)
        self._session.silence.restart()
