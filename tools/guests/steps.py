"""Steps that several scenarios take in a guest."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from guests.lab import Lab
from guests.machine import Machine, WrongError

FILES = "/run/carried/files"
"""The folder in the guest of the scenario's files."""

LOG_IN = r"""
set -e
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
cat ~/.ssh/id_ed25519.pub >>~/.ssh/authorized_keys
echo '127.0.0.1 source' >>/etc/hosts
ssh -o StrictHostKeyChecking=accept-new root@source true 2>/dev/null
"""
"""The host `source`, which is the guest itself, is known to root, who logs in with a key."""


def until(guest: Machine, condition: str, seconds: int, what: str) -> None:
    """Wait in the guest until the shell command `condition` succeeds. `what`: what the user waits for.

    Raises WrongError if that takes longer than `seconds`.
    """
    loop = f"until {condition}; do sleep 1; done"
    done = guest.try_ssh(f"timeout {seconds} bash -c {shlex.quote(loop)}", seconds=seconds + 60)
    if done.returncode:
        raise WrongError(f"{what}: not within {seconds} s: {done.stdout[-1000:]}{done.stderr[-1000:]}")


def status(guest: Machine, mountpoint: str) -> dict[str, Any]:
    """Return the status of the mount on `mountpoint` in the guest."""
    found: dict[str, Any] = json.loads(guest.ssh(f"cat {mountpoint}/status.json"))
    return found


def percent(found: dict[str, Any]) -> float:
    """Return the percentage of a copy that is present, from its status."""
    return round(100 * found["hydrated_bytes"] / found["size"], 1)


def noise_file(lab: Lab, name: str, size: int) -> Path:
    """Make a file of `size` random bytes in the folder of the scenario."""
    path = lab.folder / name
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(lab.choose.randbytes(1 << 20))
    return path


def empty_file(lab: Lab, name: str, size: int) -> Path:
    """Make a file of `size` zeros in the folder of the scenario."""
    path = lab.folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def must_be_equal(first: Path, second: Path) -> None:
    """Compare two files. Raises WrongError if they differ."""
    with first.open("rb") as one, second.open("rb") as other:
        offset = 0
        while data := one.read(1 << 20):
            if data != other.read(len(data)):
                raise WrongError(f"{second.name} differs from {first.name} in the MiB at {offset}")
            offset += len(data)
