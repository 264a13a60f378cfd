"""`status` on a terminal: once, or `--watch`, live on the whole of it until `q`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live

from blockcopy.errors import Interrupted
from blockcopy_fuse import control
from blockcopy_fuse.screen import screen

_SECONDS = 0.5

_ROWS = 2
"""Of the map, where the status is shown once."""

_OTHERS = 14
"""Rows of the whole terminal that are not the map's."""


def show(mountpoint: str) -> None:
    """The status, once. MountError."""
    console = Console(highlight=False)
    snapshot = control.read_status(mountpoint)
    console.print(screen(snapshot, control.read_map(snapshot, _ROWS * console.width)))


def watch(mountpoint: str) -> None:
    """Until `q`, SIGINT, or the mount goes, which is a MountError."""
    console = Console(highlight=False)
    snapshot = control.read_status(mountpoint)
    try:
        with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                rows = max(_ROWS, console.height - _OTHERS)
                live.update(screen(snapshot, control.read_map(snapshot, rows * console.width)), refresh=True)
                if select.select(keys, [], [], _SECONDS)[0] and os.read(keys[0], 1) in (b"q", b"Q", b""):
                    return
                snapshot = control.read_status(mountpoint)
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:
            raise


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
