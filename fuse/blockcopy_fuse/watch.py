"""`status` on a terminal: shown once, or live on the whole terminal with `--watch`, until `q`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live

from blockcopy.errors import Interrupted
from blockcopy_fuse import control_client
from blockcopy_fuse.control_client import StatusRequest
from blockcopy_fuse.screen import screen

_INTERVAL_SECONDS = 0.5
"""Interval between two looks at the mount."""

_MIN_ROWS = 2
"""Fewest rows of the map. Also its rows when the status is shown once."""

_OTHER_ROWS = 14
"""Rows of a whole terminal that the map leaves to the rest."""

_MAX_CELLS = 4096
"""Most cells of the map. Reads wait while the mount computes them."""


def show(mountpoint: str) -> None:
    """Show the status of the mount on `mountpoint` once.

    Raises MountError if no replica is mounted there, or if the mount does not answer.
    """
    console = Console(highlight=False)
    status = control_client.read_status(mountpoint)
    console.print(screen(status, control_client.read_map(mountpoint, _MIN_ROWS * console.width)))


def watch(mountpoint: str) -> None:
    """Show the status of the mount on `mountpoint` live, until `q` or SIGINT.

    An unresponsive mount is shown with its last status, because it may continue.
    Raises MountError when the mount goes away.
    """
    console = Console(highlight=False)
    status = control_client.read_status(mountpoint)
    answered_at, request = time.monotonic(), None
    try:
        with _keyboard_fds() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                unanswered = time.monotonic() - answered_at if request else 0
                cells = [] if request else control_client.read_map(mountpoint, _max_cells(console))
                live.update(screen(status, cells, unanswered_seconds=unanswered), refresh=True)
                if select.select(keys, [], [], _INTERVAL_SECONDS)[0] and os.read(keys[0], 1) in (b"q", b"Q", b""):
                    return
                request = request or StatusRequest(control_client.mount_on(mountpoint))
                if (answer := request.status(_INTERVAL_SECONDS)) is not None:
                    request.close()
                    status, answered_at, request = answer, time.monotonic(), None
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:
            raise


def _max_cells(console: Console) -> int:
    """Return how many cells of the map fill whole rows of the terminal of `console`."""
    rows = min(console.height - _OTHER_ROWS, _MAX_CELLS // console.width)
    return max(_MIN_ROWS, rows) * console.width


@contextlib.contextmanager
def _keyboard_fds() -> Iterator[list[int]]:
    """Yield a list with the descriptor of standard input, which then gives each key at once.

    Yields an empty list if standard input is no terminal.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield []
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield [fd]
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
