"""The source's end of a push: a `receive` on another host is started, and its questions are answered.

    source → retrieve, here → (pipe) ssh → receive → destination

A connection that breaks is made again. What was written stays, and is found equal then.
"""

from __future__ import annotations

import collections
import logging
import math
import subprocess
import threading
import time

from blockcopy.advice import TRANSPORT_FAILED, advice
from blockcopy.device import Device
from blockcopy.errors import BlockcopyError, OutputError, PeerError, StreamError, how_ended
from blockcopy.progress import Counts, Progress
from blockcopy.remote import MOST_NOISE, Command
from blockcopy.retrieve import retrieve
from blockcopy.stages import InputStream, OutputStream
from blockcopy.wire import MAX_ASKED

logger = logging.getLogger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 1, 30
"""Seconds between two attempts; each is twice the one before. As of a link that pulls."""

_ITS_ERROR = "ERROR (receive): "
"""What it begins the line with that says how it ended."""


class _LostError(PeerError):
    """The connection broke after it had been there."""


class _Paced(Progress):
    """Tells another; and who tells it of more than `limit` bytes a second, is held up."""

    def __init__(self, progress: Progress, limit: int) -> None:
        self._progress = progress
        self._limit = limit
        self._started = time.monotonic()
        self._before = self._passed = 0

    def update(self, counts: Counts) -> None:
        self._progress.update(counts)
        step, self._before = counts.done - self._before, counts.done
        if 0 < step <= MAX_ASKED:  # else it began again, or went over a hole, which costs nothing
            self._passed += step
        ahead = self._passed / self._limit - (time.monotonic() - self._started)
        if ahead > 0:
            time.sleep(ahead)

    def finish(self) -> None:
        self._progress.finish()


def push(
    command: Command,
    source: Device,
    *,
    patience: float = math.inf,
    limit: int | None = None,
    progress: Progress,
) -> None:
    """Have a `receive` make its destination the copy of `source`; synced there when this returns.

    `patience`: seconds for which a connection that broke is tried again. `limit`: bytes of the source a second,
    equal or not. `progress` is told the position that was answered, and how many bytes were sent. Errors:
    PeerError where the host cannot be reached or goes away; what `receive` fails with, with its exit code;
    DeviceError of the source.
    """
    delay, lost_at = _FIRST_DELAY, math.inf
    paced = _Paced(progress, limit) if limit else progress
    while True:
        try:
            _push(command, source, paced)
            return
        except _LostError as error:
            failure: PeerError = error
            delay, lost_at = _FIRST_DELAY, time.monotonic()
        except PeerError as error:
            if math.isinf(lost_at):
                raise  # it was never there
            failure = error
        if time.monotonic() + delay - lost_at > patience:
            raise failure
        logger.warning("the link is lost, and is made again: %s", failure)
        time.sleep(delay)
        delay = min(delay * 2, _LONGEST_DELAY)


def _push(command: Command, source: Device, progress: Progress) -> None:
    try:
        process = command.start()
    except OSError as error:
        raise PeerError(f"cannot run `{command.argv[0]}`: {error.strerror}") from error
    receiver = _Receiver(command, process)
    failure: BlockcopyError | None = None
    try:
        with receiver:
            receiver.serve(source, progress)
    except (StreamError, OutputError) as error:
        failure = error  # most often because it is gone: then it has said why
    if process.returncode or failure or not receiver.begun:
        raise receiver.why(failure)


class _Receiver:
    """The `receive` process, or what leads to it. Left, it has ended."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("it was started without pipes")
        self._command = command
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._said: collections.deque[str] = collections.deque(maxlen=5)
        self._listener = threading.Thread(target=self._listen, name="listen")
        self.begun = not command.mark
        """It came to run, and was not only on its way."""

    def __enter__(self) -> _Receiver:
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and not issubclass(kind, BlockcopyError):
            self._process.kill()  # interrupted: it is not waited for
        self._stdin.close()
        if kind is not None:
            self._stdout.close()  # it may still ask, and would wait for us; else ssh may take it for a break
        self._process.wait()
        self._listener.join()
        self._stdout.close()
        self._stderr.close()

    def serve(self, source: Device, progress: Progress) -> None:
        """Answer what is asked, to the end. Nothing is asked where it never begins. StreamError, OutputError,
        DeviceError."""
        output = OutputStream(self._stdin.fileno())
        with InputStream(self._stdout.fileno()) as questions:
            if self._command.mark:
                output.write([self._command.opening])
                self.begun, noise = questions.skip_past(self._command.mark, MOST_NOISE)
                if not self.begun:
                    self._said.extend(_lines(noise))
                    return
            retrieve(source, questions, output, progress=progress)

    def _listen(self) -> None:
        """What it says on standard error is kept. Said by the way, it is shown with the host's name."""
        for line in self._stderr:
            self._said.extend(_lines(line))
            if self.begun and not line.startswith(_ITS_ERROR.encode()):
                logger.warning("%s: %s", self._command.location, line.decode(errors="replace").strip())

    def why(self, failure: BlockcopyError | None) -> BlockcopyError:
        """What to tell of an end that was not in order."""
        command, status = self._command, self._process.returncode
        lost = self.begun and (status == TRANSPORT_FAILED or status < 0)
        todo = advice(command, status, "\n".join(self._said), begun=self.begun and not lost)
        more = f" – {todo}" if todo else ""
        own = next((text for text in self._said if text.startswith(_ITS_ERROR)), None)
        if own is not None:
            message = own[len(_ITS_ERROR) :]
            return BlockcopyError.told(f"{command.location.host or 'this host'}: {message}{more}", status)
        told = f"; it said: {' | '.join(self._said)}" if self._said else ""
        if failure is not None and not told:
            told = f": {failure}"
        return (_LostError if lost else PeerError)(
            f"the receive process of {command.location} {how_ended(status)}{told}{more}"
        )


def _lines(text: bytes) -> list[str]:
    return [line for line in map(str.strip, text.decode(errors="replace").split("\n")) if line]
