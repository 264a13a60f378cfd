"""`status` on a terminal: once, or `--watch`, live on the whole of it until `q`."""

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
from blockcopy_fuse.screen import screen

_SECONDS = 0.5

_ROWS = 2
"""Of the map, where the status is shown once."""

_OTHERS = 14
"""Rows of the whole terminal that are not the map's."""

_MOST_CELLS = 4096
"""Of the map: the mount counts them between the reads that it serves, and must not keep those waiting."""


def show(mountpoint: str) -> None:
    """The status, once. MountError."""
    console = Console(highlight=False)
    snapshot = control_client.read_status(mountpoint)
    console.print(screen(snapshot, control_client.read_map(mountpoint, _ROWS * console.width)))


def watch(mountpoint: str) -> None:
    """Until `q`, SIGINT, or the mount goes, which is a MountError. One that stands still may go on again."""
    console = Console(highlight=False)
    snapshot = control_client.read_status(mountpoint)
    answered_at, asking = time.monotonic(), None
    try:
        with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                silence = time.monotonic() - answered_at if asking else 0
                cells = [] if asking else control_client.read_map(mountpoint, _cells(console))
                live.update(screen(snapshot, cells, silence=silence), refresh=True)
                if select.select(keys, [], [], _SECONDS)[0] and os.read(keys[0], 1) in (b"q", b"Q", b""):
                    return
                asking = asking or control_client.asked_for_status(mountpoint)
                if (answer := asking.answer(_SECONDS)) is not None:
                    snapshot, answered_at, asking = answer, time.monotonic(), None
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:
            raise


def _cells(console: Console) -> int:
    """Whole rows of them."""
    rows = min(console.height - _OTHERS, _MOST_CELLS // console.width)
    return max(_ROWS, rows) * console.width


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Standard input, which gives each key at once; nothing where it is no terminal."""
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
