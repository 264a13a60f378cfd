"""Programs that run in the guest as process 1: `agent`, which they share, and one for each scenario that has one.

They use the standard library, and the installed blockcopy.
"""

from pathlib import Path

INIT = "/run/carried/files/init"
"""The path in the guest of what starts such a program."""

_SCRIPT = """#!/bin/sh
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp
exec /opt/blockcopy/bin/python3 /run/carried/files/{name}.py
"""


def files(name: str) -> dict[str, str | Path]:
    """Return the files that a guest must carry to run the program `name`, for `lab.machine`."""
    here = Path(__file__).parent
    programs = {f"{each}.py": here / f"{each}.py" for each in ("agent", name)}
    return {"init": _SCRIPT.format(name=name), **programs}
