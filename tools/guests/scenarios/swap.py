"""The guest, short of memory, swaps to a writable mount while the copy hydrates: nothing hangs, no page is lost."""

from __future__ import annotations

from guests.lab import Lab
from guests.machine import Disk
from guests.play import INSIDE, play, stage
from guests.steps import empty_file, noise_file

SIZE = 256 << 20
MEMORY = 384
"""MiB of the guest."""

SECONDS = 1200
"""Time limit. On an idle machine it takes six minutes."""


def run(lab: Lab) -> dict[str, object]:
    """Mount, swap, fill the memory, check it until the copy is complete. Returns how much was swapped."""
    disks = [
        Disk("source", noise_file(lab, "source", SIZE), readonly=True),
        Disk("copy", empty_file(lab, "copy", SIZE)),
    ]
    guest = stage(lab, "swap", disks=disks, files={"hog.py": INSIDE / "hog.py"}, memory=MEMORY)
    return play(lab, guest, SECONDS)
