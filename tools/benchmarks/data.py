"""Sources and destinations: created from the seed, restored, read into the page cache, compared."""

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
"""Pairs of offset and length, in bytes."""


@dataclass(frozen=True)
class Case:
    """A source and a destination of the part `sync`."""

    name: str
    words: str
    """A description of the case."""
    source: Path
    before: Path
    """The file with the destination's content before each run."""
    differing: Extents
    """The ranges that a run changes in the destination."""


def noise(path: Path, extents: Extents, size: int, seed: object) -> Path:
    """Give the file `path` a size, and random bytes of `seed` in `extents`. Creates it if missing. Returns `path`.

    The other bytes stay, or are a hole.
    """
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
    """Split extents into pieces of at most `size` bytes."""
    for offset, length in extents:
        for at in range(offset, offset + length, size):
            yield at, min(size, offset + length - at)


def copy(source: Path | str, destination: Path | str, extents: Extents, piece: int = PIECE) -> None:
    """Copy the bytes of `extents`, zeros too, `piece` bytes at a time, and sync.

    Creates the destination if missing.
    """
    reading, writing = os.open(source, os.O_RDONLY), os.open(destination, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for offset, length in pieces(extents, piece):
            os.pwrite(writing, os.pread(reading, length, offset), offset)
        os.fdatasync(writing)
    finally:
        os.close(reading)
        os.close(writing)


def cases(folder: Path, size: int, seed: int) -> list[Case]:
    """Create the cases of the part `sync` in `folder`. Zeros are written out, not holes.

    `size`: bytes, a multiple of two blocks.
    """
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
        Case("destination zero", "the destination is zeros, written out", base, zeros, whole),
        Case(
            "source half zero",
            "the second half of the source is zeros, written out; it is random in the destination",
            half_zero,
            base,
            half,
        ),
    ]


def warm(*paths: Path | str) -> None:
    """Read files into the page cache."""
    buffer = bytearray(PIECE)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(*paths: Path | str) -> None:
    """Drop files from the page cache. Syncs first: dirty pages would stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def compare(source: Path | str, destination: Path | str, who: str) -> None:
    """Raise BenchError if a copy differs from its source, or is shorter. Skips ranges that are holes in both.

    `who`: the contestant, for the message.
    """
    with open(source, "rb", buffering=0) as one, open(destination, "rb", buffering=0) as other:
        size = os.lseek(one.fileno(), 0, os.SEEK_END)
        if os.lseek(other.fileno(), 0, os.SEEK_END) < size:
            raise BenchError(f"{who}: the destination is shorter than the source")
        at = 0
        while (at := min(next_data(one.fileno(), at, size), next_data(other.fileno(), at, size))) < size:
            length = min(PIECE, size - at)
            if os.pread(one.fileno(), length, at) != os.pread(other.fileno(), length, at):
                raise BenchError(f"{who}: the destination differs from the source, from {at} to {at + length}")
            at += length


def next_data(fd: int, offset: int, size: int) -> int:
    """Return the offset of the next data from `offset` on, or `size` if there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return size
        return offset  # no holes are reported, as for a device: all is data
