"""Scenarios that are a script in a guest without systemd, which boots in seconds: see `inside/init`.

The script runs with `bash -eu -o pipefail`. The lines that it prints reach the host at once. Some have a meaning:

    @figure VALUE NAME    a result
    @wrong TEXT           a promise was broken
    @cut                  the host cuts the power now, and all is well
    @end STATUS           the end of the script
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from guests.lab import Lab
from guests.machine import Disk, Machine, WrongError

INSIDE = Path(__file__).parent / "inside"
"""The programs that run in a guest."""

_SHOWN = 30
"""How many of its last lines are shown of a script that failed."""


def stage(
    lab: Lab,
    name: str,
    *,
    disks: Sequence[Disk] = (),
    files: Mapping[str, bytes | str | Path] | None = None,
    memory: int = 1024,
) -> Machine:
    """Return a guest, off, for the script `inside/NAME`. Its folder has `files`, and `functions`."""
    ours = {"init": INSIDE / "init", "functions": INSIDE / "functions", "script": INSIDE / name}
    return lab.machine(
        name, disks=disks, files={**ours, **(files or {})}, init="/run/carried/files/init", memory=memory
    )


def play(
    lab: Lab, guest: Machine, seconds: float, each: Callable[[str], object] = lambda _: None
) -> dict[str, object]:
    """Boot `guest`, and run its script to the end. Returns the figures. `each`: called with each line.

    Raises WrongError if the script fails, or does not end within `seconds`.
    """
    figures: dict[str, object] = {}
    lines: list[str] = []
    status = None
    end = time.monotonic() + seconds
    guest.boot()
    while (left := end - time.monotonic()) > 0 and (line := guest.next_event(left)) is not None:
        lines.append(line)
        lab.say(line)
        each(line)
        kind, _, rest = line.partition(" ")
        if kind == "@figure":
            value, _, name = rest.partition(" ")
            figures[name] = _number(value)
        elif kind == "@cut":
            guest.cut()
            status = 0
        elif kind == "@end":
            status = int(rest)
            break
    if status != 0:
        broken = next((line.partition(" ")[2] for line in lines if line.startswith("@wrong")), None)
        said = "\n      ".join(lines[-_SHOWN:])
        ended = "did not end in time" if status is None else f"ended with {status}"
        raise WrongError(f"{broken or f'the script {ended}'}; it printed\n      {said}")
    guest.wait_until_off()
    return figures


def _number(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text) if "." in text else int(text)
    return text
