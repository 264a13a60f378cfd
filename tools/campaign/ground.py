"""What a round stands on: processes that can be found again, a source and a destination."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

MARK = "BLOCKCOPY_CHAOS_ID"
"""In the environment of all that a round starts, so that what it leaves is found."""

BLOCK = 128 * 1024
PATIENCE = 20
"""Seconds for what has to happen soon."""


class WrongError(Exception):
    """Something that must not be."""


def processes(mark: str) -> dict[int, list[str]]:
    """Those that run and have the mark: their arguments."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if is_ours and (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z":
                found[int(entry.name)] = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")[:-1]
    return found


def is_mounted(point: Path) -> bool:
    return f" {point} " in os.fsdecode(Path("/proc/mounts").read_bytes())


def losetup(*words: object) -> str:
    command = ["losetup", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE).stdout.strip()


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise WrongError(f"{what}: not within {seconds} seconds")
        time.sleep(0.01)


class Ends:
    """The source and the destination of a round, both with files behind them."""

    def __init__(self, folder: Path, size: int, choose: random.Random) -> None:
        self.source_file = folder / "source"
        self.size = size
        self._choose = choose
        self.relation = "nothing yet"
        self.brought = 0
        """Bytes of earlier sources that had to be brought."""
        self._disk = folder / "disk"
        self._loops: dict[str, str] = {}  # of source and destination: the device
        self._source_is_loop = False
        self._replaced = 0
        self._differed = 0  # bytes, when this source was new

    def make(self) -> None:
        choose, size = self._choose, self.size
        data = bytearray(choose.randbytes(size))
        for start in range(0, size, 5 * BLOCK):  # some blocks are those of an empty disk
            data[start : start + BLOCK] = bytes(len(data[start : start + BLOCK]))
        self.source_file.write_bytes(data)
        self.relation = choose.choice(["equal", "part differs", "zeros", "all differs"])
        if self.relation == "part differs":
            self._change(data, choose.uniform(0.1, 0.7))
        elif self.relation != "equal":
            data = bytearray(size if self.relation == "zeros" else choose.randbytes(size))
        self._disk.write_bytes(data)
        is_root = os.geteuid() == 0
        if is_root:
            self._loops["destination"] = losetup("--find", "--show", self._disk)
        self._source_is_loop = is_root and choose.random() < 0.5
        self._attach_source()
        self._differed = self.differing(but_zeros=True)

    def __str__(self) -> str:
        kinds = ["file", "loop device"]
        return f"{kinds[self._source_is_loop]} to {kinds[os.geteuid() == 0]}, {self.relation}"

    def _attach_source(self) -> None:
        if self._source_is_loop:
            self._loops["source"] = losetup("--read-only", "--find", "--show", self.source_file)

    def _change(self, data: bytearray, part: float) -> None:
        """So large a part of the blocks, in one byte or wholly."""
        for start in range(0, len(data), BLOCK):
            if self._choose.random() < part:
                end = min(len(data), start + self._choose.choice([1, BLOCK]))
                data[start:end] = self._choose.randbytes(end - start)

    def replace_source(self) -> None:
        """By another of the same size. The earlier one is kept: a reused inode would look unchanged."""
        data = self._next_source()
        if self._source_is_loop:
            losetup("--detach", self._loops.pop("source"))
        self._replaced += 1
        self.source_file.rename(f"{self.source_file}.{self._replaced}")
        self.source_file.write_bytes(data)
        self._attach_source()
        self._differed = self.differing(but_zeros=True)

    def rewrite_source(self) -> None:
        """Write other bytes into the source's file, and put its mtime back. A loop device shows nothing of that,
        so a device stays as it is."""
        if self._source_is_loop:
            return
        data, before = self._next_source(), self.source_file.stat()
        with self.source_file.open("r+b") as file:
            file.write(data)
        os.utime(self.source_file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._differed = self.differing(but_zeros=True)

    def _next_source(self) -> bytearray:
        """Return the bytes of another source. What was brought of this one is counted."""
        self.brought += self._differed - self.differing(but_zeros=True)
        data = bytearray(self.source_file.read_bytes())
        self._change(data, self._choose.choice([0.02, 0.5, 1]))
        return data

    @property
    def source(self) -> str:
        return self._loops.get("source", str(self.source_file))

    @property
    def destination(self) -> str:
        return self._loops.get("destination", str(self._disk))

    def different(self, *, but_zeros: bool = False) -> list[int]:
        """Return the offsets of blocks that differ. For when nothing is mounted. `but_zeros`: those that have to be
        sent, because the source's are not zeros."""
        found = []
        with self.source_file.open("rb") as source, open(self.destination, "rb") as destination:
            for offset in range(0, self.size, BLOCK):
                block = source.read(BLOCK)
                if block != destination.read(len(block)) and not (but_zeros and block.count(0) == len(block)):
                    found.append(offset)
        return found

    def differing(self, *, but_zeros: bool = False) -> int:
        """Return the number of bytes in the blocks that differ."""
        return sum(min(BLOCK, self.size - offset) for offset in self.different(but_zeros=but_zeros))

    @property
    def needed(self) -> int:
        """Bytes of blocks that had to be sent: of each source, those that differed when it was first
        connected to, and do no more when the next one takes its place, or in the end."""
        return self.brought + self._differed - self.differing(but_zeros=True)

    def detach(self) -> list[str]:
        """The loop devices that are left then, for the same files."""
        for device in self._loops.values():
            losetup("--detach", device)
        files = losetup("--list", "--noheadings", "--output", "BACK-FILE").splitlines() if self._loops else []
        self._loops.clear()  # the files are read from now on
        return [f"loop device of {file}" for file in files if file.startswith(str(self.source_file.parent))]
