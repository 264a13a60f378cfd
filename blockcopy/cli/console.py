"""The standard streams of the program: the only place that prints."""

from __future__ import annotations

import argparse
import os
import select
import sys
from typing import Callable, TextIO

from blockcopy.cli.background_writer import BackgroundWriter
from blockcopy.errors import OutputError
from blockcopy.progress import bar
from blockcopy.progress.reporter import JsonProgress, LineProgress, Progress
from blockcopy.stage.streams import GONE, OutputStream
from blockcopy.untrusted_text import printable


def fill_closed_streams() -> None:
    """Where 0, 1 or 2 is closed, the next file to be opened would be taken for it, and written to."""
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass  # read-only: what is written to a closed output fails, as it should
    os.close(fd)


def write(text: str) -> None:
    """A line, or several, to standard output, in full. OutputError where that cannot be.

    Paths that are no text come out as the bytes that they are.
    """
    OutputStream(1).write([f"{text}\n".encode(errors="surrogateescape")])


def write_line(text: str) -> None:
    """Write one line for people, whatever is in `text`, to standard output. Raises OutputError."""
    write(printable(text, len(text)))


def sleep(seconds: float) -> None:
    """Wait, for as long as somebody reads standard output. Raises OutputError once nobody does."""
    gone = select.poll()
    gone.register(1, 0)  # what is told unasked: POLLERR of a pipe without a reader, POLLHUP of a terminal
    if gone.poll(1000 * seconds):
        raise OutputError(GONE)


def say(text: str | Callable[[], str]) -> None:
    """Write a line, or what a function returns, to standard error, if there is one. Returns at once, never fails.

    Nobody who reads it, or has stopped to, ends what the program does, or keeps it waiting.
    """
    _standard_error.put(text)


def drain(seconds: float) -> None:
    """Wait until all is written that was said, for so long at most."""
    _standard_error.drain(seconds)


def _say(text: str | Callable[[], str]) -> None:
    if sys.stderr is not None:  # None where the program was started without one
        print(text if isinstance(text, str) else text(), file=sys.stderr, flush=True)


_standard_error: BackgroundWriter[str | Callable[[], str]] = BackgroundWriter(
    _say, lambda count: f"{count} lines were dropped: nobody read them in time"
)


def terminal() -> TextIO | None:
    """Where a progress bar can be drawn, if anywhere."""
    return sys.stderr if _can_draw(sys.stderr) else None


def shows_screens() -> bool:
    """Whether standard output is a terminal that more than lines can be drawn on."""
    return _can_draw(sys.stdout)


def _can_draw(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def progress(args: argparse.Namespace, *, unasked: bool = False) -> Progress:
    """What tells, on standard error, how far the command of `args` is: as its `quiet` and `progress` say.

    `unasked`: a bar is drawn even where nobody asked for progress.
    """
    if args.quiet:
        return Progress()
    if args.progress == "json":
        return JsonProgress(args.command, say)
    stream = terminal()
    if stream is not None and (args.progress or unasked) and bar.available():
        return bar.Bar(stream)
    return LineProgress(args.command, say) if args.progress else Progress()
