"""Facts about a host, as a JSON object for `doctor`, which asks both ends.

The object has these names:

    program, python, user     versions, and the user whom a copy would run as
    digests                   name → MB/s of one core
    zstd                      true if this host has zstd
    size                      bytes of the file or device, if a path was given
"""

from __future__ import annotations

import getpass
import os
import platform
import sys
from typing import Any

from blockcopy import __version__
from blockcopy.block.device import open_source
from blockcopy.protocol import digests, zstd

_ECHO_BYTES = 64
"""Bytes that are written back at once."""


def facts(path: str | None = None) -> dict[str, Any]:
    """Return a dict of facts about this host, with the size of the file or device at `path`, if given.

    Raises DeviceError if `path` cannot be opened.
    """
    found: dict[str, Any] = {
        "program": f"blockcopy {__version__}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "user": _user(),
        "digests": digests.speeds(),
        "zstd": zstd.available(),
    }
    if path is not None:
        with open_source(path) as device:
            found["size"] = device.size()
    return found


def echo(source: int, sink: int) -> None:
    """Write what comes from the descriptor `source` to `sink`, until `source` ends."""
    while data := os.read(source, _ECHO_BYTES):
        os.write(sink, data)


def _user() -> str:
    """Return the name of this user, or the number if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        return str(os.geteuid())
