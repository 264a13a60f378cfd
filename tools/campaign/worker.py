"""Read and write a file as told, in each of the ways that a program may choose. A program of its own.

worker.py FILE

Each line of standard input is a JSON object, an operation. The answer is a JSON line on standard output. It has
`errno` after a failure, else `length`. As many bytes follow the line, if they were read.

    {"do": "read", "way": WAY, "offset": N, "length": N}
    {"do": "write", "way": WAY, "offset": N, "length": N, "seed": N}      random bytes, decided by the seed
    {"do": "fsync", "way": WAY}
    {"do": "release"}                                                     close what is held open
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
from typing import Any

PAGE = 4096
FLAGS = {"direct": os.O_DIRECT, "sync": os.O_SYNC, "dsync": os.O_DSYNC, "direct sync": os.O_DIRECT | os.O_DSYNC}
"""The flags of open(2) in each way. The ways `plain`, `fdatasync` and `mmap` have none."""

held: list[tuple[int, mmap.mmap]] = []
"""A descriptor and a mapping that stay open until the next operation."""


def release() -> None:
    """Close what is held open. Raises OSError if the kernel cannot write what was mapped."""
    while held:
        fd, mapping = held.pop()
        mapping.close()
        os.close(fd)


def operate(file: str, do: str, way: str = "plain", offset: int = 0, length: int = 0, seed: int = 0) -> bytes | int:
    """Do an operation on `file`. Returns the bytes that were read, or how many were written. Raises OSError."""
    release()
    if do == "release":
        return 0
    fd = os.open(file, (os.O_RDONLY if do == "read" else os.O_RDWR) | FLAGS.get(way, 0))
    try:
        if do == "fsync":
            (os.fdatasync if way == "fdatasync" else os.fsync)(fd)
            return 0
        if do == "read":
            return read(fd, offset, length)
        data = random.Random(seed).randbytes(length)
        if way == "mmap":
            return write_mapped(fd, offset, data, hold=seed % 2 == 0)
        with mmap.mmap(-1, length) as buffer:  # aligned, as O_DIRECT wants it
            buffer.write(data)
            return os.pwrite(fd, buffer, offset)
    finally:
        if not held:
            os.close(fd)


def read(fd: int, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset` of `fd`, fewer at the end. Bypasses the kernel's cache. Raises OSError."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with mmap.mmap(-1, length) as buffer:
        return buffer[: os.preadv(fd, [buffer], offset)]


def write_mapped(fd: int, offset: int, data: bytes, *, hold: bool) -> int:
    """Store `data` at `offset` of a mapping of `fd`, which stays if `hold`. Returns how many bytes.

    A signal ends this process if a page of the mapping cannot be had.
    """
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(fd, offset - start + len(data), offset=start)
    mapping[offset - start :] = data
    if hold:
        held.append((fd, mapping))
    else:
        mapping.close()
    return len(data)


def answer(result: dict[str, Any], data: bytes = b"") -> None:
    """Write an answer."""
    sys.stdout.buffer.write(json.dumps(result).encode() + b"\n" + data)
    sys.stdout.buffer.flush()


def main(file: str) -> None:
    """Answer each line of standard input."""
    for line in sys.stdin:
        try:
            done = operate(file, **json.loads(line))
        except OSError as error:
            answer({"errno": error.errno or errno.EIO})
        else:
            answer({"length": done if isinstance(done, int) else len(done)}, b"" if isinstance(done, int) else done)


if __name__ == "__main__":
    main(*sys.argv[1:])
