"""The runtime directory: a private folder for the sockets of one user, until the machine restarts."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from pathlib import Path

from blockcopy.errors import DeviceError

_YOUNG_SECONDS = 60
"""A socket is kept for so long in any case: its owner may not listen yet."""


def make_runtime_dir() -> Path:
    """Return the Path of this user's runtime directory. Creates the directory with mode 0700 if it is missing.

    Removes the sockets there that killed programs have left.
    Raises DeviceError if the directory cannot be created or hold a socket, or if other users may enter it.
    """
    folder = runtime_dir_candidates(os.geteuid())[0]
    with DeviceError.on_os_error("make the folder", str(folder)):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder, os.geteuid()):
        raise DeviceError(f"{folder} is not a folder of this user alone")
    with DeviceError.on_os_error("make a socket in", str(folder)):
        _try_socket(folder / f"try-{os.urandom(4).hex()}")
    _remove_left_sockets(folder)
    return folder


def _remove_left_sockets(folder: Path) -> None:
    """Remove the sockets in `folder` on which nobody listens any more."""
    with contextlib.suppress(OSError):  # others may remove the same
        for path in folder.iterdir():
            status = path.lstat()
            if stat.S_ISSOCK(status.st_mode) and time.time() - status.st_mtime > _YOUNG_SECONDS:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.setblocking(False)
                    try:
                        probe.connect(str(path))
                    except ConnectionRefusedError:
                        path.unlink()
                    except BlockingIOError:
                        pass  # its owner is busy


def _try_socket(path: Path) -> None:
    """Create and remove a socket at the Path `path`, with a second name, as ssh creates its own.

    Raises OSError if that fails.
    """
    second = path.with_suffix(".link")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(str(path))
            os.link(path, second)
        finally:
            for each in (path, second):
                with contextlib.suppress(OSError):
                    each.unlink()


def runtime_dir_candidates(uid: int) -> list[Path]:
    """Return the list of Paths where the runtime directory of user `uid` can be.

    For our own user, `make_runtime_dir()` uses the first one.
    """
    if uid == 0:
        return [Path("/run/blockcopy")]
    folders = [Path(f"/tmp/blockcopy-{uid}"), Path(f"/run/user/{uid}/blockcopy")]
    if uid == os.geteuid() and (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        folders.insert(0, Path(runtime) / "blockcopy")
    return folders


def is_private(folder: Path, uid: int) -> bool:
    """Return True if the Path `folder` is an existing folder, not a link, that only user `uid` may enter."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o077
