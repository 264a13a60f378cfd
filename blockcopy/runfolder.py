"""The folder of this user's sockets, for as long as the machine runs. It is nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blockcopy.errors import DeviceError


def run_folder() -> Path:
    """Made where it is not there. DeviceError where it cannot be, or others can enter it."""
    if os.geteuid() == 0:
        folder = Path("/run/blockcopy")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(runtime) / "blockcopy"
    else:
        folder = Path(f"/tmp/blockcopy-{os.geteuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise DeviceError.of("make the folder", str(folder), error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DeviceError(f"{folder} is not a folder of this user alone")
    return folder
