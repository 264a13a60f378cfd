"""Where the state of a destination is kept, and how a record is ended by those who do not read it.

What is in the file is `replica.journal`'s to know. But whoever writes to a destination without
keeping its record has to end it: it would be believed later, and is true no more.

    DEFAULT.state       the record, at its default place
    DEFAULT.elsewhere   the token of the one record that is believed though it is kept elsewhere (`--state`)

Each command that writes to a destination knows its default place. So it ends every record by removing these two,
wherever the record is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from blockcopy.block.device import Device
from blockcopy.block.identity import destination_identity
from blockcopy.errors import StateError, StateWriteError
from blockcopy.paths import durable
from blockcopy.paths.trust import distrust_reason


def default_path(destination: Device) -> Path:
    """Where the state is kept unless the user says otherwise: named after what the destination is."""
    identity = json.dumps(destination_identity(destination), sort_keys=True)
    return default_folder().resolve() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.state"


def default_folder() -> Path:
    """Of this user's states."""
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
        raise StateError("this user has no home for states: set HOME or XDG_STATE_HOME") from error


def invalidate_records(destination: Device) -> None:
    """End every record of `destination`, before it is written. Raises StateError if one cannot be removed."""
    invalidate(default_path(destination))
    invalidate(_note_path(destination))


def invalidate(path: Path) -> None:
    """Remove the record at `path`; no loss of power brings it back. Raises StateError if that fails."""
    try:
        durable.remove(path)
    except OSError as error:
        raise StateError(
            f"the state in {path} would not be true any more, and cannot be removed ({error.strerror}); do it first"
        ) from error


def make_authoritative(token: str, destination: Device) -> None:
    """Make the record with this token the only one of `destination` that is believed, though it is kept elsewhere.

    Raises StateError if the record at the default place cannot be removed, StateWriteError if the token cannot
    be kept.
    """
    invalidate(default_path(destination))
    path = _note_path(destination)
    try:
        durable.make_folder(path.parent)
        if why := distrust_reason(path.parent):
            raise StateWriteError(f"cannot note in {path} which state is true: {why}")
        durable.write(path, token)
    except OSError as error:
        raise StateWriteError(f"cannot note in {path} which state is true: {error.strerror}") from error


def is_authoritative(token: str, destination: Device) -> bool:
    """Whether the record with this token, which is kept elsewhere, is the last one of `destination`."""
    path = _note_path(destination)
    with contextlib.suppress(OSError):
        return not distrust_reason(path.parent) and path.read_text(encoding="utf-8", errors="replace") == token
    return False


def make_default_authoritative(destination: Device) -> None:
    """Believe no record of `destination` but the one at its default place. Raises StateError."""
    invalidate(_note_path(destination))


def _note_path(destination: Device) -> Path:
    return default_path(destination).with_suffix(".elsewhere")
