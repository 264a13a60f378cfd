"""A page on a terminal: through a pager if there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from blockcopy.cli import console
from blockcopy_fuse.manual import text
from blockcopy_fuse.manual.pages import Page

_WIDTH = 80
"""Columns of a page that is not shown on a terminal, and the most on a terminal."""

_NOT_RUN = (126, 127)
"""Exit statuses of a shell that could not run the program."""


def show(page: Page) -> None:
    """Write `page` as text to standard output, through a pager if that is a terminal.

    Raises OutputError if it cannot be written.
    """
    if not console.can_draw_screens():
        console.write(text.page(page.blocks, _WIDTH))
        return
    width = min(_WIDTH, shutil.get_terminal_size().columns)
    shown = f"{text.page(page.blocks, width, styled=True)}\n"
    if not _paged(shown):
        console.write(shown.rstrip("\n"))


def _paged(shown: str) -> bool:
    """Give the text `shown` to a pager, and wait for it. Returns False if there is no pager."""
    pager = os.environ.get("PAGER") or shutil.which("less")
    if not pager or sys.stdin is None or not sys.stdin.isatty():
        return False
    environment = {"LESS": "FRX", "LESSCHARSET": "utf-8", **os.environ}
    try:
        done = subprocess.run(pager, input=shown.encode(), shell=True, env=environment, check=False)
    except OSError:
        return False
    return done.returncode not in _NOT_RUN
