"""What the kernel lets root set of a mount: how far ahead it reads, and how much at once.

The default of 128 KiB ahead makes requests of 128 KiB, two at a time. With READ_AHEAD_KB they are of
1 MiB, and several are on their way. Not before the first requests: when the kernel and libfuse greet each
other, which they do after the mount is there, the kernel goes back to what it had said. And before a file
is open, since that keeps what it finds.
"""

from __future__ import annotations

import logging
from pathlib import Path

from blockcopy_fuse import mounts

logger = logging.getLogger(__name__)

READ_AHEAD_KB = 4096

MAX_BACKGROUND = 64
"""Requests of the kernel's own read-ahead that may be on their way; it says 12 by itself."""


def tune(mountpoint: str) -> None:
    """As far as we may; nobody but root may. Does not touch the mount, which we serve ourselves."""
    entry = mounts.at(mountpoint)
    if entry is None:
        return
    _set(Path("/sys/class/bdi", entry.device, "read_ahead_kb"), READ_AHEAD_KB)
    _set(Path("/sys/fs/fuse/connections", entry.device.partition(":")[2], "max_background"), MAX_BACKGROUND)


def _set(file: Path, value: int) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        logger.debug("%s stays as it is: %s", file, error.strerror)
