"""Sources and destinations: made from the seed, put back as they were, read into the cache, compared."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ground import BenchError

MIB = 1 << 20
BLOCK = 128 * 1024
PIECE = 4 * MIB

Extents = list[tuple[int, int]]
"""Offsets and lengths."""


@dataclass(frozen=True)
class Case:
    name: str
    words: str
    source: Path
    before: Path
    """What the destination is before each run."""
    differing: Extents
    """All that a run changes in the destination."""


def noise(path: Path, extents: Extents, size: int, seed: object) -> Path:
    """A file of that size; random bytes in the extents, the rest as it was, or a hole."""
    choose = random.Random(f"{seed}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.truncate(fd, size)
        for offset, length in pieces(extents):
            os.pwrite(fd, choose.randbytes(length), offset)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    return path


def pieces(extents: Extents, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """The same, none longer than `size`."""
    for offset, length in extents:
        for at in range(offset, offset + length, size):
            yield at, min(size, offset + length - at)


def copy(source: Path | str, destination: Path | str, extents: Extents, piece: int = PIECE) -> None:
    """Write the bytes of these extents, zeros too, so many at once, and sync."""
    reading, writing = os.open(source, os.O_RDONLY), os.open(destination, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for offset, length in pieces(extents, piece):
            os.pwrite(writing, os.pread(reading, length, offset), offset)
        os.fdatasync(writing)
    finally:
        os.close(reading)
        os.close(writing)


def cases(folder: Path, size: int, seed: int) -> list[Case]:
    """Those of the part `sync`. `size` is of whole pairs of blocks. Zeros are written out, not holes."""
    whole, half = [(0, size)], [(size // 2, size // 2)]
    base = noise(folder / "base", whole, size, f"{seed} base")
    blocks = range(size // BLOCK)
    chosen = sorted(random.Random(f"{seed} blocks").sample(blocks, max(1, len(blocks) // 20)))
    some = [(block * BLOCK, BLOCK) for block in chosen]
    changed, zeros, half_zero = folder / "changed", folder / "zeros", folder / "half-zero"
    copy(base, changed, whole)
    noise(changed, some, size, f"{seed} changed")
    noise(zeros, [], size, seed)
    copy(base, half_zero, [(0, size // 2)])
    os.truncate(half_zero, size)
    copy(zeros, half_zero, half)
    return [
        Case("equal", "the destination is equal to the source", base, base, []),
        Case("5 % differ", "a random 5 % of the 128 KiB blocks differ, wholly", base, changed, some),
        Case("destination zero", "the destination is of zeros that are written out", base, zeros, whole),
        Case(
            "source half zero",
            "the second half of the source is of zeros that are written out, and random in the destination",
            half_zero,
            base,
            half,
        ),
    ]


def warm(*paths: Path | str) -> None:
    """Read them into the page cache."""
    buffer = bytearray(PIECE)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(*paths: Path | str) -> None:
    """Drop them from the page cache. What is to be written is written first: it would stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def compare(source: Path | str, destination: Path | str, who: str) -> None:
    """BenchError where they differ. Where both are holes, nothing is read."""
    with open(source, "rb", buffering=0) as one, open(destination, "rb", buffering=0) as other:
        size = os.lseek(one.fileno(), 0, os.SEEK_END)
        if os.lseek(other.fileno(), 0, os.SEEK_END) < size:
            raise BenchError(f"{who}: the destination is shorter than the source")
        at = 0
        while (at := min(next_data(one.fileno(), at, size), next_data(other.fileno(), at, size))) < size:
            length = min(PIECE, size - at)
            if os.pread(one.fileno(), length, at) != os.pread(other.fileno(), length, at):
                raise BenchError(f"{who}: the destination is not what the source is, from {at} to {at + length}")
            at += length


def next_data(fd: int, offset: int, size: int) -> int:
    """Where data begins, from `offset` on; `size` where there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return size
        return offset  # nobody tells of holes here, as in a device: all of it is data
