"""Where the state of a destination is kept, and how a record is ended by those who do not read it.

What is in the file is `replica.journal`'s to know. But whoever writes to a destination without
keeping its record has to end it: it would be believed later, and is true no more.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from blockcopy.device import Device
from blockcopy.errors import StateError
from blockcopy.identity import of_destination


def default_path(destination: Device) -> Path:
    """Where the state is kept unless the user says otherwise: named after what the destination is."""
    identity = json.dumps(of_destination(destination), sort_keys=True)
    return default_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.state"


def default_folder() -> Path:
    """Of this user's states."""
    systemd = os.environ.get("STATE_DIRECTORY")  # of a unit with StateDirectory=
    if systemd:
        return Path(systemd.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/blockcopy")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "blockcopy"


def retire(path: Path) -> None:
    """Have no record at `path`. StateError where there is one that cannot be removed."""
    if not os.path.lexists(path):
        return
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StateError(
            f"the state in {path} would not be true any more, and cannot be removed ({error.strerror}); do it first"
        ) from error
