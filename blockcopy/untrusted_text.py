"""Untrusted text made safe for terminals and logs: one line, no control characters, bounded.

Text is untrusted if another host, process or user chose it: output of a source, paths, names, variables.
"""

from __future__ import annotations

import time

MAX_TEXT_LENGTH = 4096
"""Characters shown of one text."""

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
    """A rate limit for logged lines: `lines` a minute. Not thread-safe."""

    def __init__(self, lines: int = _LINES) -> None:
        self._lines = lines
        self._began_at, self._left = time.monotonic(), lines
        self._dropped = 0

    @property
    def left(self) -> int:
        """Number of lines that may be logged now."""
        now = time.monotonic()
        if now - self._began_at >= _SECONDS:
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
