"""The folder of a user's sockets, for as long as the machine runs. It is nobody else's."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from blockcopy.errors import DeviceError


def make_runtime_dir() -> Path:
    """This user's, made where it is not there. DeviceError where it cannot be, or others can enter it, or no
    socket can be made in it: it may be full, or read-only."""
    folder = runtime_dir_candidates(os.geteuid())[0]
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DeviceError.from_os_error("make the folder", str(folder), error) from error
    if not is_private(folder, os.geteuid()):
        raise DeviceError(f"{folder} is not a folder of this user alone")
    try:
        _try_socket(folder / f"try-{os.urandom(4).hex()}")
    except OSError as error:
        raise DeviceError.from_os_error("make a socket in", str(folder), error) from error
    return folder


def _try_socket(path: Path) -> None:
    """Make a socket at `path`, and remove it. A second name is what ssh gives its own."""
    second = path.with_suffix(".link")
    with socket.socket(socket.AF_UNIX) as tried:
        try:
            tried.bind(str(path))
            os.link(path, second)
        finally:
            for each in (path, second):
                with contextlib.suppress(OSError):
                    each.unlink()


def runtime_dir_candidates(uid: int) -> list[Path]:
    """Where it can be, of that user; for ourselves, the first is where it is made."""
    if uid == 0:
        return [Path("/run/blockcopy")]
    folders = [Path(f"/tmp/blockcopy-{uid}"), Path(f"/run/user/{uid}/blockcopy")]
    if uid == os.geteuid() and (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        folders.insert(0, Path(runtime) / "blockcopy")
    return folders


def is_private(folder: Path, uid: int) -> bool:
    """It is there, and that user's alone: what is in it is told by nobody else."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o077
