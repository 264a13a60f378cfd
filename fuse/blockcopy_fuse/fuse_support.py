"""FUSE on this host: /dev/fuse, fusermount3, /etc/fuse.conf, and what the kernel limits or lets us set.

Root may set the read-ahead of a mount, in /sys/class/bdi. The owner of a mount may set how many requests
are under way, in /sys/fs/fuse/connections. This folder is the file system `fusectl`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path

from blockcopy_fuse import mountinfo

logger = logging.getLogger(__name__)

FUSE_CONF = "/etc/fuse.conf"

_FUSE_CONF_LINE = 256
"""Bytes of fusermount3's buffer for a line of fuse.conf, with the byte that ends the text."""

_FUSERMOUNT = "fusermount3"

CONNECTIONS = Path("/sys/fs/fuse/connections")
"""The mountpoint of `fusectl`: a folder for each FUSE mount."""

READ_AHEAD_KB = 4096
"""How far the kernel reads ahead, in KiB.

Its default of 128 makes requests of 128 KiB, two at a time. With 4096, requests are of 1 MiB, several at a time.
"""

MAX_BACKGROUND = 256
"""Reads that may wait for the source at once.

The kernel counts them as requests of its read-ahead, and by default sends 12. If 12 requests wait for the source,
no other read is answered, not even of bytes that are present.
"""

_TIMEOUTS = Path("/proc/sys/fs/fuse")

_TIMEOUT_MARGIN = 20
"""Seconds by which a read ends before the kernel's limit. The kernel looks each 15 seconds for old requests."""


def device_problem() -> str | None:
    """Return why this user cannot use /dev/fuse, and what to do. Returns None if the device can be used."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse: load the module (modprobe fuse), or give the container the device"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user may not use /dev/fuse: chmod 666 /dev/fuse, as distributions have it"
    return None


def fusermount() -> str | None:
    """Return the path of fusermount3, which mounts and unmounts for users. Returns None if it is not installed."""
    return shutil.which(_FUSERMOUNT)


FUSERMOUNT_MISSING = f"{_FUSERMOUNT} is not installed: apt install fuse3"


def users_may_share() -> bool:
    """Return whether fuse.conf sets user_allow_other, without which only root may mount with `-o allow_other`.

    Reads the file by the same rules as fusermount3 (libfuse, util/fusermount.c).
    """
    try:
        lines = Path(FUSE_CONF).read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return False  # fusermount3 treats a file that it cannot read as an empty one
    # A `#` begins a comment. fusermount3 ignores a line that is too long, or has no newline.
    whole = (line for line in lines if line.endswith("\n") and len(line) < _FUSE_CONF_LINE)
    return any(line.partition("#")[0].strip() == "user_allow_other" for line in whole)


def request_timeouts() -> dict[str, int]:
    """Return the kernel's time limits for a request, in seconds, by the name of the sysctl. Unset ones are absent.

    The kernel ends a whole mount if one request takes longer. Kernels before 6.14 have no such limit.
    """
    names = ("default_request_timeout", "max_request_timeout")
    return {f"fs.fuse.{name}": seconds for name in names if (seconds := _number(_TIMEOUTS / name))}


def longest_read() -> float:
    """Return how many seconds a read may take before the kernel ends the whole mount. Infinite without a limit."""
    return min([math.inf, *(max(1, seconds - _TIMEOUT_MARGIN) for seconds in request_timeouts().values())])


def max_pipe_size() -> int | None:
    """Return the size in bytes to which a user may enlarge a pipe. Returns None if the kernel does not say."""
    return _number(Path("/proc/sys/fs/pipe-max-size"))


def tune(mountpoint: str) -> None:
    """Set read-ahead and MAX_BACKGROUND for the mount at `mountpoint`, as far as this user may.

    Call after the first requests: when the kernel and libfuse negotiate, after mount(2), the kernel resets both.
    Call before a file is opened, because an open file keeps its read-ahead. Never touches the mount itself.
    """
    mount = mountinfo.mount_at(mountpoint)
    if mount is None:
        return
    _set(Path("/sys/class/bdi", mount.device, "read_ahead_kb"), READ_AHEAD_KB)
    connection = CONNECTIONS / mount.connection
    _set(connection / "max_background", MAX_BACKGROUND)
    _set(connection / "congestion_threshold", MAX_BACKGROUND * 3 // 4)  # above it the kernel stops its read-ahead


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _set(file: Path, value: int) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        logger.debug("%s stays as it is: %s", file, error.strerror)
