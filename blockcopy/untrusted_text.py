"""Words of others, for terminals and logs: in one line, without commands for a terminal, and bounded.

Foreign is all that another host, process or user chose: what a source says, paths, names, variables.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Callable

MOST_TEXT = 4096
"""Characters of one text that are shown."""

_MOST_LINE = 4096
"""Bytes of a line that are kept; of a longer one the last."""

_LAST_LINES = 5

_AT_ONCE = 64 * 1024
"""Bytes that are read at once."""

_LINES = 200
_SECONDS = 60


def printable(text: str, most: int = MOST_TEXT) -> str:
    """Return `text` as one line that every terminal can show, and none takes for a command.

    All other characters are written as in Python: `\\x1b`, `\\n`, `\\u202e`. A byte that is no text is `\\xff`.
    """
    if len(text) > most:
        text = f"{text[:most]}..."
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if character == "\t":
        return " "
    if "\udc80" <= character <= "\udcff":  # of a path: see os.fsdecode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class LineBudget:
    """Lines that may be logged: `lines` in any `seconds`, the first at once."""

    def __init__(self, lines: int = _LINES, seconds: float = _SECONDS) -> None:
        self._lines, self._seconds = lines, seconds
        self._began_at, self._left = time.monotonic(), lines
        self._dropped = 0

    @property
    def left(self) -> int:
        """How many there may be now."""
        now = time.monotonic()
        if now - self._began_at >= self._seconds:
            self._began_at, self._left = now, self._lines
        return self._left

    def take(self) -> bool:
        """Whether there may be one more, which counts."""
        if not self.left:
            self._dropped += 1
            return False
        self._left -= 1
        return True

    def drop(self, count: int) -> None:
        """Note that so many were not even looked at."""
        self._dropped += count

    def take_dropped(self) -> int:
        """Return how many were dropped since this was last asked, once some may be logged again."""
        if not self.left:
            return 0
        count, self._dropped = self._dropped, 0
        return count


class StderrLines:
    """The lines that a process elsewhere writes to standard error: each is `note`d, the `last` ones are kept.

    Not thread-safe. The `budget` is that of all connections to the same place.
    """

    def __init__(self, note: Callable[[str], None], budget: LineBudget) -> None:
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._note = note
        self._budget = budget
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was read. A line without an end is not waited for: the last of it is kept."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_MOST_LINE:]
        unseen = len(lines) - self._budget.left - _LAST_LINES
        if unseen > 0:
            first = len(lines) - _LAST_LINES - unseen
            del lines[first : first + unseen]
        for line in lines:
            self._take(line)
        self._budget.drop(max(0, unseen))

    def read_to_end(self, fd: int) -> None:
        """Take all that comes from a descriptor, to its end. Blocks; for a thread."""
        while data := os.read(fd, _AT_ONCE):
            self.feed(data)
        self.finish()

    def finish(self) -> None:
        """Take what is left without an end; there is no more."""
        self._take(self._rest)
        self._rest = b""

    def _take(self, line: bytes) -> None:
        # A terminal shows the last part only: a bar draws over what it drew before.
        text = line[-_MOST_LINE:].decode(errors="replace").strip().rpartition("\r")[2].strip()
        if not text:
            return
        self.last.append(text)
        if dropped := self._budget.take_dropped():
            self._note(f"{dropped} more lines were not logged")
        if self._budget.take():
            self._note(text)
