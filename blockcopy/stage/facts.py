"""What a host can do for a copy, as an object of JSON: for `doctor`, which asks both ends.

program, python, user     who would work there
digests                   each with its speed there, in MB/s of one core
zstd                      whether it has it
size                      of the file or device that was asked about, if one was, in bytes
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


def facts(path: str | None = None) -> dict[str, Any]:
    """Of this host. DeviceError where `path` cannot be opened."""
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


def _user() -> str:
    """Return this user's name; the number where nobody knows it."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        return str(os.geteuid())
