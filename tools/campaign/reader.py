"""Read a file at random for ever, and compare it with its source. A program of its own.

reader.py FILE SOURCE TALLY SEED
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import sys
import time

REFUSALS = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT}
"""The errors that a read may get: the mount may be absent, or may be dying. Any other error is a failure."""


class WrongReadError(Exception):
    """A read that returned other bytes than the source's."""


TALLY = struct.Struct("=5Q")
"""The format of the tally file: the counts of TALLIED, in this order."""

TALLIED = ("reads", "bytes read", "reads refused: EIO", "reads refused: no mount", "wrong reads")


def reader(file: str, source: str, tally: str, seed: str) -> None:
    """Read `file` at random for ever, and compare with `source`. `seed` decides the positions.

    Counts in the file `tally`, which keeps the counts after a SIGKILL.
    """
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
            time.sleep(0.005)  # the mount needs the processors more than its readers


def read_some(file: str, known: mmap.mmap, choose: random.Random, counts: list[int]) -> None:
    """Open `file`, and read it up to 8 times. `known`: the expected bytes.

    Adds to `counts`, in the order of TALLIED. Raises OSError if a read fails, WrongReadError if its bytes differ.
    """
    fd = os.open(file, os.O_RDONLY)
    try:
        start = choose.randrange(len(known))
        for _ in range(choose.randint(1, 8)):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the mount answers, and not the page cache
            at, end = start, min(len(known), start + choose.choice([1, 512, 4096, 65536, 300_000]))
            while at < end:  # a read that fails in the middle returns the part before: continue there
                data, expected = os.pread(fd, end - at, at), known[at:end]
                if not data or data != expected[: len(data)]:
                    first = next((i for i, (one, other) in enumerate(zip(data, expected)) if one != other), 0)
                    raise WrongReadError(
                        f"{len(data)} bytes at {at}, wrong from {at + first} on: {data[first:][:16]!r}"
                    )
                at += len(data)
                counts[1] += len(data)
            counts[0] += 1
            start = end if end < len(known) and choose.random() < 0.5 else choose.randrange(len(known))
    finally:
        os.close(fd)


if __name__ == "__main__":
    reader(*sys.argv[1:])
