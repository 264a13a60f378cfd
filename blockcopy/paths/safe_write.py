"""Files that this program writes for a user, in folders that may be another's: nothing planted there is followed.

A whole file is written under a name that nobody can guess, and renamed: a link of that name is replaced, and its
target stays as it is. A log is opened as it is, so it must be a regular file, with one name, of ours or of root.
On the way to the folder, links are followed that are ours or root's, and no others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from blockcopy.paths.places import absolute

_NO_FILE = "it is no regular file"

_MOST_LINKS = 40
"""Links on the way to a folder, as the kernel has it."""

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOG = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def replace(path: str, data: bytes, mode: int) -> os.stat_result:
    """Put a new regular file with `data` at `path`, all at once. Raises OSError.

    `path` must not be a folder, a device or a FIFO. Returns the status of the new file.
    """
    temporary = f".{os.urandom(8).hex()}.new"
    with _folder_of(path) as (folder, name):
        _refuse_special(folder, name)
        fd = os.open(temporary, _NEW, 0o600, dir_fd=folder)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, mode)
                status = os.fstat(fd)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
    return status


def remove(path: str, ours: os.stat_result) -> None:
    """Remove the file that `replace` has made. What another process has put there, or cannot be removed, stays."""
    with contextlib.suppress(OSError), _folder_of(path) as (folder, name):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if os.path.samestat(found, ours) and found.st_mtime_ns == ours.st_mtime_ns:
            os.unlink(name, dir_fd=folder)


def open_log(path: str) -> int:
    """Open a log file to append to, or create it. Raises OSError if it is anything but a file of ours."""
    with _folder_of(path) as (folder, name):
        try:
            fd = os.open(name, _LOG, 0o644, dir_fd=folder)
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


@contextlib.contextmanager
def _folder_of(path: str) -> Iterator[tuple[int, str]]:
    """Give a descriptor of the folder of `path`, and the name in it. Raises OSError, also for a link of others."""
    parent, name = os.path.split(absolute(path))
    parts = parent.split("/")[:0:-1]  # what is still to be gone through, the next one last
    links = 0
    folder = os.open("/", _FOLDER)
    try:
        while parts:
            part = parts.pop()
            try:
                step = os.open(part or ".", _FOLDER, dir_fd=folder)
            except OSError as error:
                target = _link_of_ours(folder, part, error)
                links += 1
                if links > _MOST_LINKS:
                    raise
                parts += target.rstrip("/").split("/")[::-1]
                if not target.startswith("/"):
                    continue
                step = os.open("/", _FOLDER)
            os.close(folder)
            folder = step
        yield folder, name
    finally:
        os.close(folder)


def _link_of_ours(folder: int, name: str, error: OSError) -> str:
    """Return the target of a link on the way. Raises `error` if it is no link, OSError if it is another user's."""
    status = os.stat(name or ".", dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        raise error
    if status.st_uid not in (os.geteuid(), os.stat("/").st_uid):
        raise OSError(errno.EPERM, f"the link {name} on the way there is another user's")
    return os.readlink(name, dir_fd=folder)


def _refuse_foreign(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, _NO_FILE)
    if status.st_nlink != 1:
        raise OSError(errno.EINVAL, "the file has other names as well")
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, "the file is another user's")


def _refuse_special(folder: int, name: str) -> None:
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, _NO_FILE)
