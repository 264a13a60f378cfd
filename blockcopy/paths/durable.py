"""Names that a loss of power does not bring back or take away: made, removed and renamed on the disk.

A name is a part of its folder. What these functions did is durable when they return: whatever follows from it is
never on the disk without it. All of them raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def create(path: Path) -> None:
    """Make an empty file, readable and writable by its owner. Raises FileExistsError if something is there."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, of its owner alone, and the folders that it is in, unless they are there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove what is at `path`, if anything. Its folder is synced in any case: the disk may still have the name."""
    if os.path.lexists(path):  # else a file system that is read only refuses
        path.unlink(missing_ok=True)
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    sync_folder(folder)


def rename(path: Path, new: Path) -> None:
    """Give a file another name in its folder, in place of whatever has it."""
    path.replace(new)
    sync_folder(new.parent)


def write(path: Path, text: str) -> None:
    """Write a file with this text: all of it or, if the power is lost before, what was there."""
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    rename(new, path)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk as they are now, if it has a disk that is written."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # who may write into it need not be allowed to read it
        os.sync()
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS):
            raise
    finally:
        os.close(fd)
