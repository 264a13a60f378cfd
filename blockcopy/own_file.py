"""Files that this program writes for a user, in folders that may be another's: nothing planted there is followed.

A whole file is written under a name that nobody can guess, and renamed: a link of that name is replaced, and its
target stays as it is. A log is opened as it is, so it must be a regular file, with one name, of ours or of root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

_NO_FILE = "it is no regular file"


def replace(path: str, data: bytes, mode: int) -> os.stat_result:
    """Have a new regular file with `data` at `path`, all at once. Raises OSError.

    `path` must not be a folder, a device or a FIFO. Returns the status of the new file.
    """
    _refuse_special(path)
    temporary = Path(path).parent / f".{os.urandom(8).hex()}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            status = os.fstat(fd)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return status


def remove(path: str, ours: os.stat_result) -> None:
    """Remove the file that `replace` has made. What another process has put there, or cannot be removed, stays."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if os.path.samestat(found, ours) and found.st_mtime_ns == ours.st_mtime_ns:
            os.unlink(path)


def open_log(path: str) -> int:
    """Open a log file to append to, or create it. Raises OSError if it is anything but a file of ours."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a symbolic link; name the file itself") from error
        if error.errno == errno.ENXIO:  # a FIFO that nobody reads
            raise OSError(error.errno, _NO_FILE) from error
        raise
    try:
        _refuse_foreign(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_foreign(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, _NO_FILE)
    if status.st_nlink != 1:
        raise OSError(errno.EINVAL, "the file has other names as well")
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, "the file is another user's")


def _refuse_special(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, _NO_FILE)
