"""Durable changes of file names: a power loss neither undoes nor revives one.

A file name is part of its folder, so each function syncs the folder. When a function returns, its change is on the
disk. All functions raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def create(path: Path) -> None:
    """Create an empty file with mode 0600 at the Path `path`. Raises FileExistsError if something is there."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create `folder`, a Path, with mode 0700, and all missing folders above it.

    Does nothing if `folder` exists.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove the file at the Path `path`, if any, and sync its folder.

    The folder is synced even if there is no such file, because the disk may still have the name.
    """
    if os.path.lexists(path):  # else a read-only file system refuses
        path.unlink(missing_ok=True)
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    sync_folder(folder)


def rename(path: Path, new: Path) -> None:
    """Rename the file at the Path `path` to `new`, a Path in the same folder. Replaces a file at `new`."""
    path.replace(new)
    sync_folder(new.parent)


def write(path: Path, text: str) -> None:
    """Replace the content of the file at the Path `path` by `text`, atomically. Creates the file with mode 0600."""
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
    """Write the names in `folder`, a Path, to the disk, and wait until the disk has them.

    Does nothing on a file system that is read-only or cannot sync a folder.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a user may be allowed to write into a folder, and not to read it
        os.sync()
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS):
            raise
    finally:
        os.close(fd)
