"""dm-clone does the same job beside blockcopy, over NBD: first byte, completion, bytes that crossed."""

from __future__ import annotations

from guests.lab import Lab
from guests.machine import Disk
from guests.modules import dm_clone
from guests.play import INSIDE, play, stage
from guests.steps import empty_file, noise_file

SIZE = 32 << 20
SECONDS = 900
"""Time limit. On an idle machine it takes three minutes."""


def run(lab: Lab) -> dict[str, object]:
    """Copy to an equal, a nearly equal and an empty destination, by both. Returns the figures of each."""
    with dm_clone(lab.image, lab.say) as module:
        disks = [
            Disk("source", noise_file(lab, "source", SIZE), readonly=True),
            Disk("copy", empty_file(lab, "copy", SIZE)),
            Disk("meta", empty_file(lab, "meta", 16 << 20)),
        ]
        files = {"far": INSIDE / "far", "dm-clone.ko": module}
        return play(lab, stage(lab, "clone", disks=disks, files=files), SECONDS)
