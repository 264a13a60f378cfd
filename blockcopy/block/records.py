"""State records of destinations: their paths, which one is authoritative, and their invalidation.

A record is a state file; `replica.state.statefile` knows its content. At most one record of a destination is
authoritative, and a later run believes no other. A command that writes to the destination without updating that
record must invalidate it first.

    DEFAULT.state       the record at the default path
    DEFAULT.elsewhere   the token of the authoritative record, if that is at another path (`--state`)
    DEFAULT.writes      exists if the destination holds writes of a user (see `user_writes`)

Every command can find the default path of a destination. By removing the first two files, it invalidates the
record at any path. While the third one exists, no command may do so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from blockcopy.block.device import Device
from blockcopy.block.identity import destination_identity
from blockcopy.errors import StateError, StateRemovedError, StateWriteError
from blockcopy.paths import durable
from blockcopy.paths.trust import distrust_reason


def default_path(destination: Device) -> Path:
    """Return the Path of the state file of `destination`, if `--state` is not given.

    The file name is a hash of the destination's identity.
    """
    identity = json.dumps(destination_identity(destination), sort_keys=True)
    return default_folder().resolve() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.state"


def default_folder() -> Path:
    """Return the Path of the folder of this user's state files.

    Raises StateError if the user has no home folder.
    """
    systemd = os.environ.get("STATE_DIRECTORY")  # of a unit with StateDirectory=
    if systemd:
        return Path(systemd.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/blockcopy")
    return Path(os.environ.get("XDG_STATE_HOME") or _home() / ".local/state") / "blockcopy"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise StateError("this user has no home for state files: set HOME or XDG_STATE_HOME") from error


def invalidate_records(destination: Device) -> None:
    """Invalidate every record of `destination`, wherever it is. Call before the destination is written.

    Raises StateError if a file cannot be removed.
    """
    invalidate(default_path(destination))
    invalidate(_token_path(destination))


def invalidate(path: Path) -> None:
    """Remove the file at `path`, a Path, if any, so that no power loss brings it back.

    Raises StateError if that fails.
    """
    try:
        durable.remove(path)
    except OSError as error:
        raise StateError(
            f"the state file {path} is no longer valid, and cannot be removed: {error.strerror}. Remove it first"
        ) from error


def make_authoritative(token: str, destination: Device) -> None:
    """Make a record that is not at the default path the authoritative record of `destination`.

    `token`: the random text that the record contains. Raises StateError if the record at the default path cannot
    be removed, StateWriteError if the token cannot be written durably.
    """
    invalidate(default_path(destination))
    path = _token_path(destination)
    try:
        durable.make_folder(path.parent)
        if why := distrust_reason(path.parent):
            raise StateWriteError(f"cannot write {path}, which names the valid state file: {why}")
        durable.write(path, token)
    except OSError as error:
        raise StateWriteError(f"cannot write {path}, which names the valid state file: {error.strerror}") from error


def is_authoritative(token: str, destination: Device) -> bool:
    """Return True if the record with `token` is the authoritative one of `destination`.

    Ask only for a record that is not at the default path.
    """
    path = _token_path(destination)
    with contextlib.suppress(OSError):
        return not distrust_reason(path.parent) and path.read_text(encoding="utf-8", errors="replace") == token
    return False


def make_default_authoritative(destination: Device) -> None:
    """Make the record at the default path the authoritative record of `destination`.

    Raises StateError if the token of another record cannot be removed.
    """
    invalidate(_token_path(destination))


def _token_path(destination: Device) -> Path:
    return default_path(destination).with_suffix(".elsewhere")


class FilesInPlace:
    """Files of a record that are open. Somebody may remove or replace them. The open files are then of no use."""

    def __init__(self, *paths: Path) -> None:
        """Note which files are at `paths` now. Raises StateWriteError if one is missing."""
        self._files: dict[Path, tuple[int, int]] = {}
        for path in paths:
            self.add(path)

    def add(self, path: Path) -> None:
        """Note which file is at `path` now, unless that is known. Raises StateWriteError if there is none."""
        try:
            if path not in self._files:
                self._files[path] = _file_id(path)
        except OSError as error:
            raise StateWriteError(f"cannot examine {path}: {error.strerror}") from error

    def check(self) -> None:
        """Check that the same files are at the paths now. Thread-safe.

        Raises StateRemovedError if not, StateWriteError if a path cannot be examined.
        """
        for path, known in self._files.items():
            try:
                found = _file_id(path)
            except FileNotFoundError as error:
                raise StateRemovedError(f"{path} was removed while it was in use") from error
            except OSError as error:
                raise StateWriteError(f"cannot examine {path}: {error.strerror}") from error
            if found != known:
                raise StateRemovedError(f"{path} was replaced while it was in use")


def _file_id(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
