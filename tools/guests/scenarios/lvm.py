"""LVM: the snapshot of a busy LV is copied to an LV; one in use is refused; a reboot changes device numbers."""

from __future__ import annotations

from checkout import CHECKOUT
from guests.lab import Lab
from guests.machine import Disk
from guests.play import play, stage
from guests.steps import empty_file

SIZE = 160 << 20
SECONDS = 600
"""Time limit of a life. On an idle machine it takes a minute."""


def run(lab: Lab) -> dict[str, object]:
    """Copy a part, reboot, copy the rest. Returns the figures of both lives."""
    disks = [Disk(name, empty_file(lab, name, SIZE)) for name in ("old", "new")]
    guest = stage(lab, "lvm", disks=disks, files={"machine.py": CHECKOUT / "tools/demo.d/machine.py"})
    first = play(lab, guest, SECONDS)
    return first | play(lab, guest, SECONDS)
