"""A life of the guest in the scenario `power`: hand the host what the last cut left, then copy until the next cut.

Process 1 of the guest. It imports the program and tells ["booted"]. Then the host saves the memory, and each life
begins here: with a line of JSON, the orders of the host. What the guest tells is lines of JSON, too:

    ["ready"]                       what the last cut left lies in the share, in `left`
    ["say", text]                   a line of the program's log
    ["progress", {…}]               a line of its progress
    ["started"]                     the program starts
    ["ended", status]               the program has ended
    ["finished"]                    the program has ended and the destination lies in the share, if it is a file
    ["wrong", text]                 a read through the mount returned wrong bytes
    ["write", offset, length, seed] a write begins; ["wrote", length] it has ended
    ["fsync"], ["synced"]           an fsync begins; it has returned

An event that the host has read happened before the cut.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import Any

from agent import SHARE, STATE, Program, as_process_one, await_line, device, mount_disk, mount_share, run, tell

BLOCK = 128 * 1024
PAGE = 4096
DESTINATION, POINT = Path("/run/guest/destination"), Path("/run/guest/mnt")
STALL_SECONDS = 100
"""Seconds after which a program that does not go on shows where it is."""

LENGTHS = (1, 700, PAGE, PAGE, 3 * PAGE, 40_000, BLOCK)

RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
"""From <linux/random.h>."""


def await_orders() -> dict[str, Any]:
    """Return the orders of the host, once there are some. Sets the clock, and what the kernel knows of chance."""
    orders: dict[str, Any] = json.loads(await_line())
    time.clock_settime(time.CLOCK_REALTIME, orders["now"])
    chance = bytes.fromhex(orders["chance"])
    with open("/dev/random", "wb") as file:
        fcntl.ioctl(file, RNDADDENTROPY, struct.pack("ii", 8 * len(chance), len(chance)) + chance)
        fcntl.ioctl(file, RNDRESEEDCRNG)
    return orders


class Life:
    """What the guest does from boot to cut, by the `orders` of the host."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.choose = random.Random(orders["seed"])
        self.size: int = orders["size"]
        self.source = device("source")
        self.destination = device("device")
        self.file = POINT / "copy"
        self.program: Program | None = None
        self.complete = threading.Event()
        self.progress: dict[str, Any] = {}

    def prepare(self) -> None:
        """Mount the disks, and hand the host what the last cut left."""
        orders = self.orders
        mount_disk("state", orders["system"], STATE, make=orders["make"])
        if orders["is_file"]:
            mount_disk("files", orders["system"], DESTINATION, make=orders["make"])
            self.destination = str(DESTINATION / "copy")
            if orders["make"]:
                shutil.copyfile(SHARE / "first", self.destination)
        left = SHARE / "left"
        left.mkdir()
        for path in STATE.iterdir():
            if path.is_file():
                shutil.copyfile(path, left / path.name)
        if orders["is_file"]:
            shutil.copyfile(self.destination, left / "copy")
        if orders["make"]:
            os.sync()
        tell("ready")

    def start(self) -> None:
        """Start the program that the orders name."""
        words = ["-v", self.orders["command"], "--progress=json", "--connections", "1", "--timeout", "120"]
        words += [*self.orders["options"], self.source, self.destination]
        if self.orders["command"] == "mount":
            POINT.mkdir(parents=True, exist_ok=True)
            words += ["-f", "--name", "copy", str(POINT)]
        self.program = Program(*words, on_line=self._relay)
        for each in (self._await_end, self._watch):
            threading.Thread(target=each, args=(self.program,), daemon=True).start()

    def _relay(self, line: str) -> None:
        if line.startswith("{"):
            progress = self.progress = json.loads(line)
            tell("progress", progress)
            if progress["state"] == "complete":
                self.complete.set()
        else:
            tell("say", line)

    def _await_end(self, program: Program) -> None:
        status = program.wait()
        self.complete.set()
        tell("ended", status)

    def _watch(self, program: Program) -> None:
        """Have the program show where it is, if it does not go on."""
        while program.is_running and not self.complete.is_set():
            before = self.progress
            time.sleep(STALL_SECONDS)
            if before.get("done_bytes") == self.progress.get("done_bytes"):
                tell("say", f"stalled: {self.progress}")
                program.show_where()

    def is_running(self) -> bool:
        """Whether the program runs."""
        return self.program is not None and self.program.is_running

    def use(self) -> None:
        """Read, pause and write, as the orders say, until the cut or the end of the program."""
        while self.is_running() and not self.file.exists():
            time.sleep(0.05)
        if self.orders["pauses"]:
            threading.Thread(target=self._pause, daemon=True).start()
        try:
            if self.orders["writes"]:
                self._write()
            elif self.orders["reads"]:
                self._read()
        except OSError as error:
            if self.is_running():
                tell("wrong", f"the mount: {error}")

    def finish(self) -> None:
        """Wait until the copy is complete and the program has ended, and hand the host the destination."""
        self.complete.wait()
        if self.orders["command"] == "mount":
            run("blockcopy", "umount", POINT)
        if self.program is not None:
            self.program.wait()
        if self.orders["is_file"]:
            shutil.copyfile(self.destination, SHARE / "left/last")
        tell("finished")

    def _pause(self) -> None:
        """Pause and resume the copy, again and again."""
        while self.is_running():
            for word in ("pause", "resume"):
                time.sleep(self.choose.uniform(0.2, 1.5))
                program = Program(word, POINT, on_line=lambda line: tell("say", line))
                try:
                    program.wait(STALL_SECONDS)
                except TimeoutError as error:
                    program.show_where()
                    tell("say", str(error))
                    program.wait()

    def _read(self) -> None:
        """Read random blocks through the mount, and compare them with the source."""
        with self.file.open("rb", 0) as mounted, open(self.source, "rb", 0) as source:
            while self.is_running():
                offset = self.choose.randrange(self.size // PAGE) * PAGE
                mounted.seek(offset)
                source.seek(offset)
                if mounted.read(3 * PAGE) != source.read(3 * PAGE):
                    tell("wrong", f"a read at {offset} differs from the source")
                time.sleep(0.1)

    def _write(self) -> None:
        """Write and flush at random, and tell the host of each."""
        doubtful = set(self.orders["doubtful"])
        mounted = os.open(self.file, os.O_RDWR)
        while self.is_running():
            offset, length = self.choose.randrange(self.size), self.choose.choice(LENGTHS)
            if self.choose.random() < 0.5:  # more writes meet
                offset %= 2 << 20
            end = min(offset + length, self.size)
            if self.choose.random() < 0.5 or not doubtful.isdisjoint((offset // PAGE, (end - 1) // PAGE)):
                offset, end = offset // PAGE * PAGE, min(-(-end // PAGE) * PAGE, self.size)
            seed = self.choose.randrange(1 << 30)
            tell("write", offset, end - offset, seed)
            tell("wrote", os.pwrite(mounted, random.Random(seed).randbytes(end - offset), offset))
            if self.choose.random() < 0.3:
                tell("fsync")
                os.fsync(mounted)
                tell("synced")
            time.sleep(self.choose.choice([0, 0, 0.1]))


def main() -> None:
    """Live as the host orders."""
    for disk in Path("/dev").glob("vd[b-z]"):
        run("blockdev", "--flushbufs", disk)  # nothing of them may be in memory
    tell("booted")
    orders = await_orders()
    mount_share()
    life = Life(orders)
    life.prepare()
    if life.orders["command"]:
        life.start()
        tell("started")
        if life.orders["is_last"]:
            life.finish()
        elif life.orders["command"] == "mount":
            life.use()
    threading.Event().wait()


as_process_one(main)
