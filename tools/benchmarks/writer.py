"""Write to a file, and print how long it took, as JSON. A program of its own.

    writer.py order FILE BYTES                  write the first BYTES in pieces of 1 MiB, then sync
    writer.py random FILE SEED SECONDS          write 4 KiB at random, each page once, then sync
    writer.py fsync FILE SEED COUNT HOW         write 4 KiB and sync, COUNT times. HOW: `same` page, or each in a
                                                `new` block

Reads what it wrote, without the cache of a mount. The exit status is 1 if it differs.
"""

import json
import os
import random
import sys
import time

BLOCK = 128 * 1024
PAGE = 4096
PIECE = 1024 * 1024


def content(at: int, length: int = PAGE) -> bytes:
    """Return `length` bytes for the offset `at`, which no other offset has."""
    return at.to_bytes(16, "big") * (length // 16)


def check(fd: int, pieces: dict[int, bytes]) -> None:
    """Exit with 1 if `pieces` (offset → bytes) are not in the open file `fd`."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for at, wanted in pieces.items():
        if os.pread(fd, len(wanted), at) != wanted:
            sys.exit(f"the data at {at} is not what was written")


def in_order(fd: int, size: str) -> dict[str, object]:
    """Return the MB/s until the end of the sync."""
    pieces = {at: content(at, PIECE) for at in range(0, int(size), PIECE)}
    began = time.monotonic()
    for at, piece in pieces.items():
        os.pwrite(fd, piece, at)
    written = time.monotonic() - began
    os.fdatasync(fd)
    seconds = time.monotonic() - began
    check(fd, pieces)
    return {"rate": int(size) / written / 1e6, "rate_synced": int(size) / seconds / 1e6}


def at_random(fd: int, seed: str, seconds: str) -> dict[str, object]:
    """Return the writes per second. Ends after `seconds`, or when each page is written."""
    pages = list(range(os.lseek(fd, 0, os.SEEK_END) // PAGE))
    random.Random(seed).shuffle(pages)
    count = 0
    began = time.monotonic()
    end = began + float(seconds)
    for count, page in enumerate(pages, 1):  # noqa: B007
        os.pwrite(fd, content(page * PAGE), page * PAGE)
        if time.monotonic() > end:
            break
    taken = time.monotonic() - began
    os.fdatasync(fd)
    check(fd, {page * PAGE: content(page * PAGE) for page in pages[:count]})
    return {"depth_1": count / taken}


def synced(fd: int, seed: str, count: str, how: str) -> dict[str, object]:
    """Return the milliseconds of each sync."""
    blocks = list(range(1, os.lseek(fd, 0, os.SEEK_END) // BLOCK))
    random.Random(seed).shuffle(blocks)
    times, pieces = [], {}
    for number in range(int(count) + 1):
        at = blocks[number if how == "new" else 0] * BLOCK
        pieces[at] = content(at + number)
        os.pwrite(fd, pieces[at], at)
        began = time.perf_counter()
        os.fdatasync(fd)
        times.append((time.perf_counter() - began) * 1000)
    check(fd, pieces)
    return {"ms": times[1:]}  # the first writes the note that there are writes


if __name__ == "__main__":
    action = {"order": in_order, "random": at_random, "fsync": synced}[sys.argv[1]]
    print(json.dumps(action(os.open(sys.argv[2], os.O_RDWR), *sys.argv[3:])))
