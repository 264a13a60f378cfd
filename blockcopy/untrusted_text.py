"""Untrusted text made safe for terminals and logs: one line, no control characters, bounded.

Text is untrusted if another host, process or user chose it: output of a source, paths, names, variables.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import IO, Callable

MAX_TEXT_LENGTH = 4096
"""Characters shown of one text."""

_MAX_LINE_BYTES = 4096
"""Bytes kept of a line. Of a longer line, the last bytes are kept."""

_LAST_LINES = 5

_READ_BYTES = 64 * 1024

_LINES = 200
_SECONDS = 60


def printable(text: str, max_length: int = MAX_TEXT_LENGTH) -> str:
    r"""Return `text` as one line of printable characters, cut to `max_length` characters.

    Other characters are escaped as in Python: `\x1b`, `\n`, `\u202e`. An undecodable byte becomes `\xff`.
    A tab becomes a space.
    """
    if len(text) > max_length:
        text = f"{text[:max_length]}..."
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    if character == "\t":
        return " "
    if "\udc80" <= character <= "\udcff":  # of a path: see os.fsdecode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class LineBudget:
    """A rate limit for logged lines: `lines` within `seconds` seconds. Not thread-safe."""

    def __init__(self, lines: int = _LINES, seconds: float = _SECONDS) -> None:
        self._lines, self._seconds = lines, seconds
        self._began_at, self._left = time.monotonic(), lines
        self._dropped = 0

    @property
    def left(self) -> int:
        """Number of lines that may be logged now."""
        now = time.monotonic()
        if now - self._began_at >= self._seconds:
            self._began_at, self._left = now, self._lines
        return self._left

    def take(self) -> bool:
        """Count one line. Returns True if the line may be logged, else False: then it counts as dropped."""
        if not self.left:
            self._dropped += 1
            return False
        self._left -= 1
        return True

    def drop(self, count: int) -> None:
        """Count `count` lines as dropped without examining them."""
        self._dropped += count

    def take_dropped(self) -> int:
        """Return the number of lines dropped since the last call. Returns 0 if no line may be logged now."""
        if not self.left:
            return 0
        count, self._dropped = self._dropped, 0
        return count


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
