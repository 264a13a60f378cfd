"""What the kernel lets be set of a mount: by root how far ahead it reads, by its owner how much at once.

The default of 128 KiB ahead makes requests of 128 KiB, two at a time. With READ_AHEAD_KB they are of
1 MiB, and several are on their way. Not before the first requests: when the kernel and libfuse greet each
other, which they do after the mount is there, the kernel goes back to what it had said. And before a file
is open, since that keeps what it finds.
"""

from __future__ import annotations

import logging
from pathlib import Path

from blockcopy_fuse import mountinfo

logger = logging.getLogger(__name__)

READ_AHEAD_KB = 4096

MAX_BACKGROUND = 256
"""Reads that may wait at once. To the kernel they are requests of its read-ahead, of which it sends 12 by itself:
when these wait for the source, no other read is answered, not even of what is here."""

CONNECTIONS = Path("/sys/fs/fuse/connections")
"""The file system `fusectl`: a folder for each FUSE mount, and that is its owner's."""


def tune(mountpoint: str) -> None:
    """Set what we may. Does not touch the mount, which we serve ourselves."""
    entry = mountinfo.at(mountpoint)
    if entry is None:
        return
    _set(Path("/sys/class/bdi", entry.device, "read_ahead_kb"), READ_AHEAD_KB)
    connection = CONNECTIONS / entry.device.partition(":")[2]
    _set(connection / "max_background", MAX_BACKGROUND)
    _set(connection / "congestion_threshold", MAX_BACKGROUND * 3 // 4)  # above it the kernel reads no more ahead


def _set(file: Path, value: int) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        logger.debug("%s stays as it is: %s", file, error.strerror)
