"""Bad lines between two network namespaces, with real ssh: delay, loss, reordering, a rate, a cut of a minute."""

from __future__ import annotations

from guests.lab import Lab
from guests.machine import Disk
from guests.play import INSIDE, play, stage
from guests.steps import empty_file, noise_file

SIZE = 12 << 20
SECONDS = 600
"""Time limit. It takes four minutes on a busy machine."""


def run(lab: Lab) -> dict[str, object]:
    """Copy over each line. Returns times, and the share of the line that was used."""
    disks = [
        Disk("source", noise_file(lab, "source", SIZE), readonly=True),
        Disk("copy", empty_file(lab, "copy", SIZE)),
    ]
    return play(lab, stage(lab, "net", disks=disks, files={"far": INSIDE / "far"}), SECONDS)
