"""A process that reads at random and compares. A program of its own: FILE SOURCE TALLY SEED."""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import sys
import time

REFUSALS = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT}
"""What a read may fail with: there may be no mount, or one that dies. Nothing else is right."""


class WrongReadError(Exception):
    """A read gave something else than the source's bytes."""


TALLY = struct.Struct("=5Q")
TALLIED = ("reads", "bytes read", "reads refused: EIO", "reads refused: no mount", "wrong reads")


def reader(file: str, source: str, tally: str, seed: str) -> None:
    """Read at random for ever, and compare; count in the file `tally`, which outlives a SIGKILL."""
    choose = random.Random(seed)
    with open(source, "rb") as known_file, open(tally, "r+b") as tally_file:
        known = mmap.mmap(known_file.fileno(), 0, access=mmap.ACCESS_READ)
        shared = mmap.mmap(tally_file.fileno(), TALLY.size)
        counts = [0] * len(TALLIED)
        while True:
            try:
                read_some(file, known, choose, counts)
            except (OSError, WrongReadError) as error:
                if isinstance(error, OSError) and error.errno in REFUSALS:
                    counts[2 if error.errno == errno.EIO else 3] += 1
                else:
                    counts[4] += 1
                    with open(f"{tally}.wrong", "a") as log:
                        log.write(f"{error!r}\n")
                time.sleep(0.02)
            shared[:] = TALLY.pack(*counts)


def read_some(file: str, known: mmap.mmap, choose: random.Random, counts: list[int]) -> None:
    """A few reads of one opening. OSError, WrongReadError."""
    fd = os.open(file, os.O_RDONLY)
    try:
        start = choose.randrange(len(known))
        for _ in range(choose.randint(1, 8)):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the mount is asked, and not the kernel
            at, end = start, min(len(known), start + choose.choice([1, 512, 4096, 65536, 300_000]))
            while at < end:  # one that fails in its middle gives the part before first: go on there
                got, right = os.pread(fd, end - at, at), known[at:end]
                if not got or got != right[: len(got)]:
                    first = next((i for i, (one, other) in enumerate(zip(got, right)) if one != other), 0)
                    raise WrongReadError(
                        f"{len(got)} bytes at {at}, wrong from {at + first} on: {got[first:][:16]!r}"
                    )
                at += len(got)
                counts[1] += len(got)
            counts[0] += 1
            start = end if end < len(known) and choose.random() < 0.5 else choose.randrange(len(known))
    finally:
        os.close(fd)


if __name__ == "__main__":
    reader(*sys.argv[1:])
