"""The standard streams of the program: the only place that prints."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from blockcopy.stages import OutputStream


def fill_closed_streams() -> None:
    """Where 0, 1 or 2 is closed, the next file to be opened would be taken for it, and written to."""
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass  # read-only: what is written to a closed output fails, as it should
    os.close(fd)


def write(text: str) -> None:
    """A line, or several, to standard output, in full. OutputError where that cannot be."""
    OutputStream(1).write([f"{text}\n".encode()])


def say(text: str) -> None:
    """A line to standard error, if there is one."""
    if sys.stderr is not None:  # None where the program was started without one
        print(text, file=sys.stderr, flush=True)


def terminal() -> TextIO | None:
    """Where a progress bar can be drawn, if anywhere."""
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None
