"""The ground of a round: its marked processes, its source and its destination."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

MARK = "BLOCKCOPY_CHAOS_ID"
"""An environment variable of all processes of a round. It finds the processes that a round leaves behind."""

BLOCK = 128 * 1024
TIME_LIMIT = 20
"""Time limit in seconds of everything that should take a moment."""


class WrongError(Exception):
    """A broken promise of blockcopy, or a fault of the round."""


def processes(mark: str) -> dict[int, list[str]]:
    """Find the running processes with `mark`. Returns the arguments of each, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if is_ours and (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z":
                found[int(entry.name)] = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")[:-1]
    return found


def is_mounted(point: Path) -> bool:
    """Tell whether something is mounted on `point`. Does not touch the mount."""
    return f" {point} " in os.fsdecode(Path("/proc/mounts").read_bytes())


def losetup(*arguments: object) -> str:
    """Run losetup with `arguments`. Returns its output. Raises CalledProcessError if it fails."""
    command = ["losetup", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TIME_LIMIT).stdout.strip()


def until(condition: Callable[[], object], what: str, seconds: float = TIME_LIMIT) -> None:
    """Wait until `condition()` is true. `what`: the event, for messages. Raises WrongError after `seconds`."""
    end = time.monotonic() + seconds
    pause = 0.005
    while not condition():
        if time.monotonic() > end:
            raise WrongError(f"{what}: not within {seconds} seconds")
        time.sleep(pause)
        pause = min(1.3 * pause, 0.04)  # a check costs the time of what is waited for


class Ends:
    """The source and the destination of a round: two files, or loop devices on them.

    `size`: bytes of each. `choose` makes all random choices. `make` creates both.
    """

    def __init__(self, folder: Path, size: int, choose: random.Random) -> None:
        self.source_file = folder / "source"
        self.size = size
        self._choose = choose
        self.relation = "nothing yet"
        """How the destination differs from the source at first, in words."""
        self.sent_before = 0
        """Bytes that earlier sources had to send."""
        self._disk = folder / "disk"
        self._loops: dict[str, str] = {}  # the devices of "source" and "destination"
        self._source_is_loop = False
        self._replaced = 0
        self._differed = 0  # bytes in differing blocks when this source was new

    def make(self) -> None:
        """Create the source and the destination."""
        choose, size = self._choose, self.size
        data = bytearray(choose.randbytes(size))
        for start in range(0, size, 5 * BLOCK):  # every fifth block is zeros, as on an empty disk
            data[start : start + BLOCK] = bytes(len(data[start : start + BLOCK]))
        self.source_file.write_bytes(data)
        self.relation = choose.choice(["equal", "part differs", "zeros", "all differs"])
        if self.relation == "part differs":
            self._change(data, choose.uniform(0.1, 0.7))
        elif self.relation != "equal":
            data = bytearray(size if self.relation == "zeros" else choose.randbytes(size))
        self._disk.write_bytes(data)
        self._attach_destination()
        self._source_is_loop = os.geteuid() == 0 and choose.random() < 0.5
        self._attach_source()
        self._differed = self.differing(but_zeros=True)

    def __str__(self) -> str:
        kinds = ["file", "loop device"]
        return f"{kinds[self._source_is_loop]} to {kinds[os.geteuid() == 0]}, {self.relation}"

    def _attach_destination(self) -> None:
        if os.geteuid() == 0:
            self._loops["destination"] = losetup("--find", "--show", self._disk)

    def _attach_source(self) -> None:
        if self._source_is_loop:
            self._loops["source"] = losetup("--read-only", "--find", "--show", self.source_file)

    def _change(self, data: bytearray, part: float) -> None:
        """Change the share `part` (0 to 1) of the blocks of `data`, each in one byte or wholly."""
        for start in range(0, len(data), BLOCK):
            if self._choose.random() < part:
                end = min(len(data), start + self._choose.choice([1, BLOCK]))
                data[start:end] = self._choose.randbytes(end - start)

    def replace_source(self) -> None:
        """Replace the source by another file of the same size.

        Keeps the earlier file: a reused inode would look unchanged.
        """
        data = self._next_source()
        if self._source_is_loop:
            losetup("--detach", self._loops.pop("source"))
        self._replaced += 1
        self.source_file.rename(f"{self.source_file}.{self._replaced}")
        self.source_file.write_bytes(data)
        self._attach_source()
        self._differed = self.differing(but_zeros=True)

    def rewrite_source(self) -> None:
        """Write other bytes into the source's file, and set its mtime back.

        Does nothing for a loop device, which cannot show the change.
        """
        if self._source_is_loop:
            return
        data, before = self._next_source(), self.source_file.stat()
        with self.source_file.open("r+b") as file:
            file.write(data)
        os.utime(self.source_file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._differed = self.differing(but_zeros=True)

    def _next_source(self) -> bytearray:
        """Return the bytes of the next source. Counts the bytes that the current one had to send."""
        self.sent_before += self._differed - self.differing(but_zeros=True)
        data = bytearray(self.source_file.read_bytes())
        self._change(data, self._choose.choice([0.02, 0.5, 1]))
        return data

    @property
    def source(self) -> str:
        """The path of the source: its device, or its file."""
        return self._loops.get("source", str(self.source_file))

    @property
    def destination(self) -> str:
        """The path of the destination: its device, or its file."""
        return self._loops.get("destination", str(self._disk))

    def different(self, *, but_zeros: bool = False) -> list[int]:
        """Return the byte offsets of the blocks that differ, ascending. Call only while nothing is mounted.

        `but_zeros`: without blocks that are zeros in the source, for which the source sends no bytes.
        """
        found = []
        with self.source_file.open("rb") as source, open(self.destination, "rb") as destination:
            for offset in range(0, self.size, BLOCK):
                block = source.read(BLOCK)
                if block != destination.read(len(block)) and not (but_zeros and block.count(0) == len(block)):
                    found.append(offset)
        return found

    def differing(self, *, but_zeros: bool = False) -> int:
        """Return the number of bytes in the blocks that differ. `but_zeros`: as for `different`."""
        return sum(min(BLOCK, self.size - offset) for offset in self.different(but_zeros=but_zeros))

    @property
    def needed(self) -> int:
        """Bytes of the blocks that had to be sent, by all sources.

        For each source: blocks that differed when it was new, and are equal when it is replaced, or at the end.
        """
        return self.sent_before + self._differed - self.differing(but_zeros=True)

    def detach(self) -> list[str]:
        """Detach the loop devices.

        Returns descriptions of other loop devices on the same files, which should not exist.
        """
        for device in self._loops.values():
            losetup("--detach", device)
        files = losetup("--list", "--noheadings", "--output", "BACK-FILE").splitlines() if self._loops else []
        self._loops.clear()  # from now on, `source` and `destination` are the files
        return [f"loop device of {file}" for file in files if file.startswith(str(self.source_file.parent))]
