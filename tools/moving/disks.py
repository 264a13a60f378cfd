"""The disks of a fleet, and what each must hold at the end: its first bytes, and what the services wrote since."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from moving.service import PAGE, page, read

MIB = 1 << 20


@dataclass
class Disk:
    """A disk of a move. `number`: the place among the service's disks. `destination`: a path on its new machine."""

    name: str
    number: int
    size: int
    source: str
    destination: str
    mountpoint: str
    source_file: Path
    """The file behind `source`, as the campaign sees it."""
    destination_file: Path

    def first_bytes(self) -> bytes:
        """Return what the disk held before any service wrote: a fifth of it zeros."""
        choose = random.Random(f"{self.source_file.name} {self.size}")
        data = bytearray(choose.randbytes(self.size))
        for at in range(0, self.size, 5 * MIB):
            data[at : at + MIB] = bytes(len(data[at : at + MIB]))
        return bytes(data)


@dataclass
class Journal:
    """What a service wrote in one place."""

    writes: list[tuple[str, int, int, int]]
    """Where the service was started, the number, the disk and the page of each write."""
    synced: int
    """The last number that was synced."""

    @classmethod
    def of(cls, folder: Path, name: str) -> Journal:
        """Read the journal of the service `name` in `folder`."""
        lines = read(folder, name)
        writes = [(each[1], each[2], each[3], each[4]) for each in lines if each[0] == "write"]
        synced = max((each[1] for each in lines if each[0] == "synced"), default=0)
        return cls(writes, synced)  # type: ignore[arg-type]


def wrong_pages(data: bytes, disk: Disk, name: str, journals: list[Journal]) -> list[int]:
    """Return the numbers of the pages of `data`, the content of `disk`, that no history of writes explains.

    `name`: the service. `journals`: what it wrote, in this order. A page holds what was synced last, or any write
    after that.
    """
    first = disk.first_bytes()
    if len(data) != len(first):
        return [min(len(data), len(first)) // PAGE]
    allowed: dict[int, set[bytes]] = {}
    for journal in journals:
        for where, number, at, place in journal.writes:
            if at != disk.number:
                continue
            if number <= journal.synced:
                allowed[place] = set()
            elif place not in allowed:
                allowed[place] = {first[place * PAGE :][:PAGE]}
            allowed[place].add(page(name, where, number))
    found = []
    for at in range(len(first) // PAGE):
        span = slice(at * PAGE, (at + 1) * PAGE)
        if data[span] not in allowed.get(at, (first[span],)):
            found.append(at)
    return found
