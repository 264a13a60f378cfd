"""The files of a state file: made, checked before SQLite opens them, set aside if they cannot be believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blockcopy.errors import StateError, StateWriteError
from blockcopy.paths import durable
from blockcopy.paths.trust import distrust_reason

APPLICATION_ID = 0x62637079  # "bcpy"
FORMAT, OLD_FORMAT = 3, 2
"""The version of the format. Version 1 had no ctime, and version 2 no writes of a user. Version 2 is still read."""


class UnusableError(Exception):
    """The content of the file cannot be believed. The message tells why."""


def make(path: Path) -> bool:
    """Create `path` if it does not exist. Returns False if it exists.

    Raises StateError if it is not a regular file. Raises StateWriteError if it cannot be created, or if other users
    can replace it.
    """
    try:
        durable.make_folder(path.parent)
        if why := distrust_reason(
            path.parent
        ):  # or they could replace the file between the check and SQLite's open
            raise StateWriteError(f"cannot keep the state in {path}: {why}")
        durable.create(path)
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StateError(f"cannot keep the state in {path}: not a regular file") from None
        return False
    except OSError as error:
        raise StateWriteError(f"cannot keep the state in {path}: {error.strerror}") from error
    return True


def check(path: Path) -> int:
    """Check the database `path` and the files beside it, before SQLite opens them: it writes to any database.

    Returns the size of the database in bytes. Raises UnusableError if a file cannot be believed. The header has
    100 bytes. The write version is at 18, the read version at 19. The user version is at 60, the application id at
    68. Source: https://www.sqlite.org/fileformat.html, section 1.3.
    """
    try:
        for each in _beside(path):
            _check_owner(each, each.lstat())
        with path.open("rb") as file:
            status, header = os.fstat(file.fileno()), file.read(100)
    except OSError as error:
        raise UnusableError(str(error.strerror)) from error
    _check_owner(path, status)
    if not header:
        return 0
    if header[:16] != b"SQLite format 3\0" or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        raise UnusableError("it is not a state file of blockcopy")
    version = int.from_bytes(header[60:64], "big")
    if version not in (FORMAT, OLD_FORMAT):
        raise UnusableError(f"its format is {version}, and this program reads {FORMAT}")
    if header[18:20] not in (b"\1\1", b"\2\2"):  # 2: a crash has left a write-ahead log
        raise UnusableError("it is damaged")
    return status.st_size


def _check_owner(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnusableError(f"{path} is not a regular file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UnusableError(f"others can write to {path}")


def log_of(path: Path) -> Path:
    """Return the Path of the write-ahead log of the database `path`."""
    return path.with_name(f"{path.name}-wal")


def _beside(path: Path) -> list[Path]:
    """Return the existing files beside the database `path` that SQLite would read."""
    found = (path.with_name(f"{path.name}-{kind}") for kind in ("journal", "wal", "shm"))
    return [each for each in found if os.path.lexists(each)]


def set_aside(path: Path) -> Path:
    """Rename `path`, and the files of SQLite beside it, to a free name. Returns the new path.

    Raises StateWriteError if that is not possible.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.unusable-{number}")).exists():
        number += 1
    try:
        for each in [path, *_beside(path)]:
            durable.rename(each, path.with_name(each.name.replace(path.name, aside.name, 1)))
    except OSError as error:
        raise StateWriteError(f"cannot set the unusable state file {path} aside: {error.strerror}") from error
    return aside
