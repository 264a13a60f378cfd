"""Safe writing of files into folders of other users, who may have planted links or FIFOs there.

`replace` writes a file under an unguessable name and renames it. So a link at the path is replaced, and its target
stays as it is. `open_log` accepts only a regular file with one name that belongs to us or root. On the way to
the folder, only links that belong to us or root are followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from blockcopy.paths.places import absolute

_NOT_REGULAR = "it is not a regular file"

_MAX_LINKS = 40
"""Symbolic links followed on the way to a folder: the kernel's limit."""

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOG = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def replace(path: str, data: bytes, mode: int) -> os.stat_result:
    """Write `data` to a new regular file at `path`, with permissions `mode`, atomically.

    Returns the stat_result of the new file, which `remove()` needs. Raises OSError if `path` is a folder, a device
    or a FIFO, or if it cannot be written.
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


def remove(path: str, written: os.stat_result) -> None:
    """Remove the file at `path` if `written`, which `replace()` returned, describes it.

    Does nothing if another process has replaced the file, or if it cannot be removed.
    """
    with contextlib.suppress(OSError), _folder_of(path) as (folder, name):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if os.path.samestat(found, written) and found.st_mtime_ns == written.st_mtime_ns:
            os.unlink(name, dir_fd=folder)


def open_log(path: str) -> int:
    """Open or create the log file at `path`, and return a file descriptor that appends to it. The caller closes it.

    Raises OSError if the file cannot be opened, is not regular, has a second name, or belongs to another user.
    A symbolic link is refused as well.
    """
    with _folder_of(path) as (folder, name):
        try:
            fd = os.open(name, _LOG, 0o644, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(error.errno, "it is a symbolic link; name the file itself") from error
            if error.errno == errno.ENXIO:  # a FIFO that nobody reads
                raise OSError(error.errno, _NOT_REGULAR) from error
            raise
    try:
        _refuse_foreign(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _folder_of(path: str) -> Iterator[tuple[int, str]]:
    """Open the folder of `path` without following links of other users. Raises OSError if there is one.

    Yields a tuple: a file descriptor of the folder, and the file name in it.
    """
    parent, name = os.path.split(absolute(path))
    parts = parent.split("/")[:0:-1]  # names still to follow, the next one last
    links = 0
    folder = os.open("/", _FOLDER)
    try:
        while parts:
            part = parts.pop()
            try:
                step = os.open(part or ".", _FOLDER, dir_fd=folder)
            except OSError as error:
                target = _trusted_link(folder, part, error)
                links += 1
                if links > _MAX_LINKS:
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


def _trusted_link(folder: int, name: str, error: OSError) -> str:
    """Return the target of the link `name` in `folder`, a file descriptor.

    Raises `error`, the failure to open the name, if this is no link. Raises OSError if another user owns the link.
    """
    status = os.stat(name or ".", dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        raise error
    if status.st_uid not in (os.geteuid(), os.stat("/").st_uid):
        raise OSError(errno.EPERM, f"the link {name} in its path belongs to another user")
    return os.readlink(name, dir_fd=folder)


def _refuse_foreign(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, _NOT_REGULAR)
    if status.st_nlink != 1:
        raise OSError(errno.EINVAL, "the file has more than one name")
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, "the file belongs to another user")


def _refuse_special(folder: int, name: str) -> None:
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, _NOT_REGULAR)
