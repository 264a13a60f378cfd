"""Reads a file and tells how long it took, as JSON: a program of its own, that any user can run.

    reader.py random FILE SOURCE SEED COUNT SECONDS     4 KiB at random, each in a block of its own
    reader.py order FILE SOURCE [BYTES]                 all of it, or the first so many bytes, twice

What is read is compared with SOURCE; exit status 1 where it differs.
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
    """The time of each read, in ms. Fewer reads than `count` where so many seconds are over."""
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
            sys.exit(f"what was read at {at} is not what the source has")
        if time.monotonic() > end:
            break
    return {"ms": times}


def in_order(file: str, source: str, most: str = "") -> dict[str, object]:
    """MB/s of the first reading and of the one after it, of `most` bytes; then a third one, that compares."""
    rates = []
    buffer, known = bytearray(PIECE), bytearray(PIECE)
    end = int(most) if most else os.stat(file).st_size
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
                sys.exit(f"what was read before {reading.tell()} is not what the source has")
    return {"first": rates[0], "again": rates[1]}


if __name__ == "__main__":
    how = {"random": at_random, "order": in_order}[sys.argv[1]]
    print(json.dumps(how(*sys.argv[2:])))
