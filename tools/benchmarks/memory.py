"""Free memory that is available at once.

A virtual machine may give its free memory back to the host. Then the first touch of a page takes several times as
long as copying it. A program that fills the page cache would be measured by what was freed before, and when.
"""

from __future__ import annotations

import mmap
from pathlib import Path

BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
REPORTING = 5
"""The number of the feature bit, from the virtio specification, section on the balloon device."""

MADV_POPULATE_WRITE = 23

NOTE = (
    "this virtual machine gives free memory back to its host, so free memory was touched before sequential reads "
    "and reads of present blocks"
)


def is_given_back() -> bool:
    """Tell whether this is a virtual machine that gives free memory back to its host."""
    return any(each.read_text()[REPORTING] == "1" for each in BALLOONS.glob("virtio*/features"))


def touch(size: int) -> None:
    """Touch `size` bytes of free memory, or nearly all if less is free. Takes 1 to 10 seconds for a few GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))
    with mmap.mmap(-1, min(size, free // 16 * 15)) as memory:
        try:
            memory.madvise(MADV_POPULATE_WRITE)
        except OSError:  # before Linux 5.14
            for at in range(0, len(memory), mmap.PAGESIZE):
                memory[at] = 1
