"""Use more memory than there is, and check all of it, until the copy below the swap is complete.

hog.py MIB DEVICE STATUS

MIB: how much to use. DEVICE: where the kernel swaps to. STATUS: the status file of the mount that serves DEVICE.
There are two rounds at least. At the end half of the memory is freed, DEVICE is switched off, and the rest is
checked.
"""

import json
import mmap
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

PAGE = 4096
ROUNDS = 2
ANEW = 0.1
"""How likely a page is written anew in a round."""

SAMPLE = 500
"""Pages that a round checks in random order, besides all in order."""


class Memory:
    """Memory in which each page has its number and its version, many times."""

    def __init__(self, mebibytes: int) -> None:
        """Fill it."""
        self.pages = (mebibytes << 20) // PAGE
        self.checked = 0
        self._versions = bytearray(self.pages)
        self._memory = mmap.mmap(-1, self.pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(self.pages):
            self._write(page)

    def check(self, pages: Iterable[int]) -> None:
        """Exit with an error unless each of `pages` is as it was written."""
        for page in pages:
            if self._memory[page * PAGE : (page + 1) * PAGE] != self._content(page):
                sys.exit(f"@wrong page {page} of the memory is not what was written")
            self.checked += 1

    def check_and_change(self, choose: random.Random, pages: Iterable[int]) -> None:
        """Check `pages`, and write some of them anew. Then check a sample."""
        for number, page in enumerate(pages):
            if number % 8192 == 0:
                print(f"{number * 100 // self.pages} % of a round", flush=True)
            self.check([page])
            if choose.random() < ANEW:
                self._versions[page] = (self._versions[page] + 1) % 256
                self._write(page)
        self.check(choose.sample(range(self.pages), SAMPLE))

    def free(self, pages: int) -> None:
        """Give the first `pages` back to the kernel."""
        self._memory.madvise(mmap.MADV_DONTNEED, 0, pages * PAGE)

    def _content(self, page: int) -> bytes:
        return struct.pack("<QQ", page, self._versions[page]) * (PAGE // 16)

    def _write(self, page: int) -> None:
        self._memory[page * PAGE : (page + 1) * PAGE] = self._content(page)


def swapped(device: str) -> int:
    """Return how many MiB the kernel has swapped to `device`."""
    (line,) = [line for line in Path("/proc/swaps").read_text().splitlines() if line.startswith(f"{device} ")]
    return int(line.split()[3]) >> 10


def main(mebibytes: str, device: str, status: str) -> None:
    """Use the memory."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if there must be a victim, it is this program
    choose = random.Random(1)
    began = time.monotonic()
    memory = Memory(int(mebibytes))
    most = swapped(device)
    print(f"filled after {time.monotonic() - began:.0f} s, {most} MiB are swapped", flush=True)
    rounds, is_complete = 0, False
    while rounds < ROUNDS or not is_complete:
        # What was used last is still there, so each round turns back.
        memory.check_and_change(choose, range(memory.pages)[:: -1 if rounds % 2 == 0 else 1])
        rounds += 1
        now = swapped(device)
        most = max(most, now)
        copy = json.loads(Path(status).read_text())
        is_complete = copy["hydrated_bytes"] == copy["size"]
        print(f"round {rounds} ended after {time.monotonic() - began:.0f} s, {now} MiB are swapped", flush=True)
    memory.free(memory.pages // 2)
    subprocess.run(["swapoff", device], check=True)
    memory.check(range(memory.pages // 2, memory.pages))
    print(f"@figure {most} MiB swapped at most", flush=True)
    print(f"@figure {memory.checked} pages checked", flush=True)
    print(f"@figure {rounds} rounds", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
