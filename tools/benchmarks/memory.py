"""Free memory that is there at once.

A virtual machine may give what is free back to its host. The first touch of each such page then takes several
times what copying it does, and who fills the page cache is measured by what was freed, and when, before it began.
"""

from __future__ import annotations

import mmap
from pathlib import Path

BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
REPORTING = 5
"""The bit among the device's features, from the section on the balloon device in the virtio specification."""

MADV_POPULATE_WRITE = 23

NOTE = (
    "free memory, which this virtual machine gives back to its host, was touched before each read in order, "
    "and of what is here"
)


def is_given_back() -> bool:
    return any(each.read_text()[REPORTING] == "1" for each in BALLOONS.glob("virtio*/features"))


def touch(size: int) -> None:
    """So much of what is free, or nearly all of it. It takes a second for a few GiB, or ten of them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))
    with mmap.mmap(-1, min(size, free // 16 * 15)) as memory:
        try:
            memory.madvise(MADV_POPULATE_WRITE)
        except OSError:  # before Linux 5.14
            for at in range(0, len(memory), mmap.PAGESIZE):
                memory[at] = 1
