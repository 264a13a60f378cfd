"""The program's standard streams. No other module prints."""

from __future__ import annotations

import argparse
import os
import select
import sys
from typing import Callable, TextIO

from blockcopy.cli.background_writer import BackgroundWriter
from blockcopy.errors import OutputError
from blockcopy.progress.reporter import Progress
from blockcopy.stage.streams import READER_GONE, OutputStream
from blockcopy.untrusted_text import printable


def fill_closed_streams() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed.

    Otherwise the next file to be opened would become a standard stream, and messages would be written to the file.
    """
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass  # read-only, so that a write to a closed output still fails
    os.close(fd)


def redirect_to_null(*streams: int) -> None:
    """Let the descriptors `streams` lead to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in streams:
        os.dup2(null, stream)
    os.close(null)


def write(text: str) -> None:
    """Write `text` and a newline to standard output. Undecodable bytes of paths come out unchanged.

    Raises OutputError if not all of the text can be written.
    """
    OutputStream(1).write([f"{text}\n".encode(errors="surrogateescape")])


def write_line(text: str) -> None:
    """Write `text` to standard output as one printable line. Raises OutputError if that fails."""
    write(printable(text, len(text)))


def sleep(seconds: float) -> None:
    """Wait for `seconds`. Raises OutputError as soon as standard output has no reader."""
    gone = select.poll()
    gone.register(1, 0)  # reported without a request: POLLERR of a pipe, POLLHUP of a terminal
    if gone.poll(1000 * seconds):
        raise OutputError(READER_GONE)


def say(text: str | Callable[[], str]) -> None:
    """Write a line to standard error from a background thread. Never blocks and never fails. Thread-safe.

    `text`: the line, or a function that the background thread calls to make the line.
    """
    _stderr.put(text)


def drain(seconds: float) -> None:
    """Wait until every line given to `say()` is written, for at most `seconds`. Thread-safe."""
    _stderr.drain(seconds)


def _write_stderr(text: str | Callable[[], str]) -> None:
    if sys.stderr is not None:  # None if the program was started without one
        print(text if isinstance(text, str) else text(), file=sys.stderr, flush=True)


_stderr: BackgroundWriter[str | Callable[[], str]] = BackgroundWriter(
    _write_stderr, lambda count: f"{count} lines were dropped because they were not read in time"
)


def confirm(question: str) -> bool:
    """Ask `question` on the terminal. Returns whether the answer is yes, and False if there is no terminal."""
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    drain(1)
    print(f"{printable(question, len(question))} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def width() -> int | None:
    """Return the columns of the terminal that is standard output. Returns None if it is no terminal."""
    try:
        return os.get_terminal_size(1).columns or None
    except OSError:
        return None


def can_draw_screens() -> bool:
    """Return True if standard output is a terminal with cursor movement."""
    return _can_draw(sys.stdout)


def _can_draw(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def progress(args: argparse.Namespace, *, bar_by_default: bool = False) -> Progress:
    """Return the Progress that `--progress` and `--quiet` in the parsed `args` select. The reporter uses stderr.

    `bar_by_default`: draw a bar on a terminal even without `--progress`.
    """
    if args.quiet or not (args.progress or bar_by_default):
        return Progress()
    from blockcopy.progress import bar, lines  # not sent to source hosts

    if args.progress == "json":
        return lines.JsonProgress(args.command, say)
    if sys.stderr is not None and _can_draw(sys.stderr) and bar.available():
        return bar.Bar(sys.stderr)
    return lines.LineProgress(args.command, say) if args.progress else Progress()
