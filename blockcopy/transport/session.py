"""A stage on a host, worked with by threads: `push` and `doctor` start it, listen to it, and watch it.

standard output  the login's noise, passed over; then the stage's, read by the caller
standard error   a thread keeps the last lines
the clock        a thread ends a stage that does not begin in time, or that is silent for too long
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
from blockcopy.transport.command import MOST_NOISE, Command
from blockcopy.transport.hints import cannot_run
from blockcopy.untrusted_text import LineBudget, StderrLines

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
"""Between two looks at the clock."""

_FAREWELL_SECONDS = 2
"""For the end of a process whose pipes are closed, and for the last words of one that has ended."""

_FAILURE_SECONDS = 10
"""For a stage to say why it failed."""


class Clock:
    """The seconds for which the other end gave nothing although it was its turn. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ours = 0
        self._since = time.monotonic()

    def sign(self) -> None:
        """Note a sign of life."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Do not count the time in which we work, and the other end waits."""
        with self._lock:
            self._ours += 1
        try:
            yield
        finally:
            with self._lock:
                self._ours -= 1
                self.sign()

    def silence(self) -> float:
        """Return the seconds since the last sign; 0 while we work."""
        with self._lock:
            return 0.0 if self._ours else time.monotonic() - self._since


class Session:
    """A stage and the way to it, from its start to its end. To be entered; left, it has ended."""

    def __init__(
        self,
        command: Command,
        *,
        timeout: float = math.inf,
        prompts: bool = False,
        syncs: bool = False,
        tell: Callable[[str], None] | None = None,
        budget: LineBudget | None = None,
    ) -> None:
        """`timeout`: seconds of silence after which it is ended. `prompts`: a password may be asked for. `syncs`:
        at its end the stage syncs a disk, which takes as long as it takes.

        `tell` gets each line that the stage says on standard error, as far as the `budget` goes.
        """
        self.command = command
        self.clock = Clock()
        self.begun = False
        """The stage runs; what came before was a login."""
        self.given_up: str | None = None
        """Why the watch ended it, in words."""
        self._timeout = timeout
        self._longest = start_timeout.limit(timeout, prompts=prompts)
        self._syncs = syncs
        self._tell = tell
        self._said = StderrLines(self._note, budget or LineBudget())
        self._left = threading.Event()

    def __enter__(self) -> Session:
        """Start it. Raises RemoteError if it cannot be run."""
        try:
            process = self.command.start()
        except OSError as error:
            raise RemoteError(cannot_run(self.command, error)) from error
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("it was started without pipes")
        self._process = process
        self._pipes: list[IO[bytes]] = [process.stdin, process.stdout]
        self.output = _Output(process.stdin.fileno(), self)
        self.input = _Input(process.stdout.fileno(), self)
        self._listener = threading.Thread(target=self._listen, args=[process.stderr], name="listen", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watch")
        self._listener.start()
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._left.set()
        self._watcher.join()
        if kind is not None and not issubclass(kind, BlockcopyError):
            self._process.kill()  # interrupted: it is not waited for
        stdin, stdout = self._pipes
        stdin.close()
        if kind is not None:
            stdout.close()  # it may still ask, and would wait for us; else ssh may take it for a break
        try:
            self._process.wait(self._farewell(failed=kind is not None))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(_FAREWELL_SECONDS)  # what it has started may hold its standard error open
        stdout.close()
        self.input.__exit__()

    def _farewell(self, *, failed: bool) -> float | None:
        """Return the seconds to wait for the end; None for as long as it takes."""
        if not self.begun:
            return _FAREWELL_SECONDS
        return None if self._syncs and not failed else _FAILURE_SECONDS

    @property
    def status(self) -> int:
        """The exit status, as subprocess has it, once the session was left."""
        return self._process.returncode

    def begin(self) -> bool:
        """Send the stage there, and wait until it runs. Returns False if the login ends without that.

        Raises StreamError if it prints too much.
        """
        if self.command.mark:
            with contextlib.suppress(OutputError):  # what it printed may tell why it went away
                self.output.write([self.command.opening])
            self.begun = self.input.skip_past(self.command.mark, MOST_NOISE)
            self.clock.sign()
            return self.begun
        return True  # a program that is there already: its first words will tell

    def said(self) -> list[str]:
        """Return the last lines that were said, and before the stage began those that a login printed."""
        return [*([] if self.begun else start_timeout.printed(self.input.noise)), *self._said.last]

    def _listen(self, stderr: IO[bytes]) -> None:
        with stderr:
            self._said.read_to_end(stderr.fileno())

    def _note(self, line: str) -> None:
        if self.begun and self._tell is not None:
            self._tell(line)

    def _watch(self) -> None:
        """Look at the clock until the session is left, or somebody has to be woken."""
        started, told, ended = time.monotonic(), False, False
        while not self._left.wait(_LOOK_SECONDS):
            waited = time.monotonic() - started
            if not self.begun and waited >= self._longest:
                return self._give_up(start_timeout.too_late(self.command, self._longest, self.said()))
            if self.begun and self.clock.silence() >= self._timeout:
                return self._give_up(f"{self.command.location} gave nothing for {self._timeout:g} seconds")
            if not self.begun and not told and waited >= start_timeout.TELL_SECONDS:
                told = True
                logger.warning("%s", start_timeout.still_waiting(self.command, self.said()))
            if ended:  # what it has started may hold its standard output open
                self._left.wait(_FAREWELL_SECONDS)
                return self.input.wake()
            ended = self._process.poll() is not None

    def _give_up(self, why: str) -> None:
        self.given_up = self.given_up or why
        self._process.kill()
        self.input.wake()


class _Input(InputStream):
    """The stream from the stage. Each byte is a sign of life."""

    def __init__(self, fd: int, session: Session) -> None:
        super().__init__(fd)
        self._session = session

    def read_into(self, buffer: memoryview) -> int:
        count = super().read_into(buffer)
        self._session.clock.sign()
        if count and not self._session.command.mark:
            self._session.begun = True
        return count


class _Output(OutputStream):
    """The stream to the stage. A stage that takes nothing is watched."""

    def __init__(self, fd: int, session: Session) -> None:
        super().__init__(fd)
        self._session = session
        os.set_blocking(fd, False)

    def _await_room(self) -> None:
        room = select.poll()
        room.register(self._fd, select.POLLOUT)
        while not room.poll(1000 * _LOOK_SECONDS):
            if self._session.given_up is not None:
                raise OutputError(self._session.given_up)
        self._session.clock.sign()
