"""Read a file, and print how long it took, as JSON. A program of its own, which any user can run.

    reader.py random FILE SOURCE SEED COUNT SECONDS     read 4 KiB at random, each in another block
    reader.py order FILE SOURCE [BYTES]                 read the file, or its first BYTES, twice

Compares the data with SOURCE. The exit status is 1 if the data differs.
"""

import json
import os
import random
import sys
import time

BLOCK = 128 * 1024
PAGE = 4096
PIECE = 1024 * 1024


def at_random(file: str, source: str, seed: str, count: str, seconds: str) -> dict[str, object]:
    """Return the time of each read in milliseconds. Ends after `count` reads or `seconds`."""
    fd, known = os.open(file, os.O_RDONLY), os.open(source, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    choose = random.Random(seed)
    blocks = os.fstat(fd).st_size // BLOCK
    times = []
    end = time.monotonic() + float(seconds)
    for block in choose.sample(range(blocks), min(blocks, int(count))):
        at = block * BLOCK + choose.randrange(BLOCK // PAGE) * PAGE
        began = time.perf_counter()
        got = os.pread(fd, PAGE, at)
        times.append((time.perf_counter() - began) * 1000)
        if got != os.pread(known, PAGE, at):
            sys.exit(f"the data at {at} differs from the source")
        if time.monotonic() > end:
            break
    return {"ms": times}


def in_order(file: str, source: str, limit: str = "") -> dict[str, object]:
    """Return the MB/s of a first and a second read. A third read compares.

    `limit`: bytes to read; by default all.
    """
    rates = []
    buffer, known = bytearray(PIECE), bytearray(PIECE)
    end = int(limit) if limit else os.stat(file).st_size
    for _ in range(2):
        size = 0
        began = time.perf_counter()
        with open(file, "rb", buffering=0) as reading:
            while size < end and (got := reading.readinto(buffer)):
                size += got
        rates.append(size / (time.perf_counter() - began) / 1e6)
    with open(file, "rb") as reading, open(source, "rb") as knowing:
        while reading.tell() < end and (got := knowing.readinto(known)):
            if reading.readinto(buffer) != got or buffer[:got] != known[:got]:
                sys.exit(f"the data before {reading.tell()} differs from the source")
    return {"first": rates[0], "again": rates[1]}


if __name__ == "__main__":
    how = {"random": at_random, "order": in_order}[sys.argv[1]]
    print(json.dumps(how(*sys.argv[2:])))
