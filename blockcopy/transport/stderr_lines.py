"""The standard error of a stage or of ssh, an untrusted text: its last lines, logged within a rate limit."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import IO, Callable

from blockcopy.untrusted_text import LineBudget

_MAX_LINE_BYTES = 4096
"""Bytes kept of a line. Of a longer line, the last bytes are kept."""

_LAST_LINES = 5

_READ_BYTES = 64 * 1024


class StderrLines:
    """The standard error of another process, split into lines. Not thread-safe.

    Each line is logged within a rate limit. `last` has the last lines, oldest first.
    """

    def __init__(self, log: Callable[[str], None], budget: LineBudget) -> None:
        """Call `log` with each line, within the rate limit of `budget`. The text may be unprintable.

        All connections to one host share one `budget`.
        """
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._log = log
        self._budget = budget
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take `data`, any number of bytes from standard error. Of an unfinished line, only the end is kept."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_MAX_LINE_BYTES:]
        skipped = len(lines) - self._budget.left - _LAST_LINES
        if skipped > 0:
            first = len(lines) - _LAST_LINES - skipped
            del lines[first : first + skipped]
        for line in lines:
            self._take(line)
        self._budget.drop(max(0, skipped))

    def listen(self, pipe: IO[bytes]) -> threading.Thread:
        """Start a daemon thread that reads standard error from `pipe` until its end, and closes `pipe` then.

        Returns the Thread.
        """
        listener = threading.Thread(target=self._read_to_end, args=[pipe], name="listen", daemon=True)
        listener.start()
        return listener

    def _read_to_end(self, pipe: IO[bytes]) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), _READ_BYTES):
                self.feed(data)
            self.finish()

    def finish(self) -> None:
        """Take an unfinished last line. Call when standard error has ended."""
        self._take(self._rest)
        self._rest = b""

    def _take(self, line: bytes) -> None:
        # A terminal shows only the last part: a progress bar overwrites its line.
        text = line[-_MAX_LINE_BYTES:].decode(errors="replace").strip().rpartition("\r")[2].strip()
        if not text:
            return
        self.last.append(text)
        if dropped := self._budget.take_dropped():
            self._log(f"{dropped} more lines were not logged")
        if self._budget.take():
            self._log(text)
