"""Power cuts during sync, mount, pause, commit and completion: what is on record is on the disk, no write is lost.

A round has new disks: the state on ext4, XFS or btrfs, the destination a device or a file. Each life ends with a
cut: at a random time, or in the middle of a flush. After each cut the host compares, from outside, what is left.
The last life of a round goes on to the end: then the destination is the copy, with all acknowledged writes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import time
from collections import Counter
from typing import Any

from campaign.pages import Pages
from guests.comparison import BLOCK, PAGE, pages_of, read_record
from guests.disks import ForgetfulDisk, Loss
from guests.inside import INIT, files
from guests.lab import Lab
from guests.machine import Disk, WrongError

SYSTEMS = ("ext4", "xfs", "btrfs")
FORMS = ((False, False), (True, True), (False, True), (True, False))
"""Whether the destination is a file, and whether the mount is writable. Twelve rounds have each on each system."""

SIZE = 24 << 20
STATE_SIZE = 320 << 20  # XFS needs 300 MiB
BOOT_SECONDS = 240
LIFE_SECONDS = 300
"""Time limit of a life, from the start of the program."""


def run(lab: Lab) -> dict[str, object]:
    """Run rounds until there were `--cuts` cuts. Returns what they were and what they cost."""
    totals: Counter[str] = Counter()
    kinds = zip(itertools.cycle(SYSTEMS), itertools.cycle(FORMS), strict=True)
    longest = max(1, min(6, lab.options.cuts // 3))
    rig = Rig(lab)
    began = time.monotonic()
    for number, (system, (is_file, writes)) in enumerate(kinds):
        if totals["cuts"] >= lab.options.cuts:
            break
        this = Round(lab, rig, system, is_file=is_file, writes=writes, totals=totals)
        try:
            this.run(min(lab.choose.randint(1, longest), lab.options.cuts - totals["cuts"]))
        except WrongError as error:
            raise WrongError(f"round {number}, {this}: {error}; so far {dict(totals)}") from error
        except SystemExit:
            print(f"power: ended in round {number}; so far {dict(totals)}", flush=True)
            raise
    totals["seconds a cut"] = round((time.monotonic() - began) / totals["cuts"])
    return dict(totals)


class Rig:
    """The guest, its disks, and its memory after the boot, from which each life begins.

    Nothing of the disks is in that memory. So a life from there differs from a boot in its speed only.
    """

    def __init__(self, lab: Lab) -> None:
        """Make the disks, boot the guest, and save its memory."""
        self.source = lab.folder / "source"
        self.disks: dict[str, ForgetfulDisk] = {}
        self._saved = lab.folder / "saved"
        for name, size in (("source", SIZE), ("state", STATE_SIZE), ("device", SIZE), ("files", STATE_SIZE)):
            image = lab.folder / name
            with image.open("wb") as file:
                file.truncate(size)
            if name != "source":
                self.disks[name] = ForgetfulDisk(image, lab.folder / f"{name}.nbd", lab.choose)
                lab.on_end(self.disks[name].close)
        self.guest = lab.machine(
            disks=[
                Disk("source", self.source, readonly=True),
                *(Disk(name, disk.url) for name, disk in self.disks.items()),
            ],
            files=files("power"),
            init=INIT,
            memory=768,
        )
        self.guest.boot()
        while (event := self.guest.next_event(BOOT_SECONDS)) != '["booted"]':
            if event is None:
                raise WrongError(f"the guest does not boot; its console is in {self.guest.log}")
        self.guest.save(self._saved)

    def renew(self, source: bytes, device: bytes | None) -> None:
        """Make new disks: the `source`, the `device` if it is the destination, and empty ones."""
        self.source.write_bytes(source)
        for name, disk in self.disks.items():
            size = disk.image.stat().st_size
            with disk.image.open("r+b") as file:
                file.truncate(0)
                file.truncate(size)
                if name == "device" and device is not None:
                    file.write(device)

    def start(self, orders: dict[str, Any]) -> None:
        """Begin a life with these `orders`."""
        self.guest.boot(self._saved)
        self.guest.tell(json.dumps({**orders, "now": time.time(), "chance": os.urandom(64).hex()}))

    def cut(self) -> list[Loss]:
        """Have the disks forget. The guest is off."""
        return [each.cut() for each in self.disks.values()]


class Round:
    """A source, a state and a destination, from the first copy to a complete one. `totals` are added to."""

    def __init__(
        self, lab: Lab, rig: Rig, system: str, *, is_file: bool, writes: bool, totals: Counter[str]
    ) -> None:
        self._lab = lab
        self._rig = rig
        self._guest = rig.guest
        self._choose = choose = random.Random(lab.choose.random())
        self._system = system
        self._is_file = is_file
        self._writes = writes
        self._totals = totals
        self._say: list[str] = []
        self._done = 0  # bytes that the last life reported as present
        self._recorded = 0  # blocks that the last cut has left on record
        data = bytearray(choose.randbytes(SIZE))
        for start in range(0, SIZE, 7 * BLOCK):
            data[start : start + BLOCK] = bytes(BLOCK)
        source = bytes(data)
        self._pages = Pages(source)
        self._written: set[int] = set()  # pages that a write has touched
        self._write: tuple[int, int, bytes] | None = None  # number, offset, data of the write under way
        self._flush: int | None = None
        for start in range(0, SIZE, BLOCK):
            if choose.random() < 0.6:
                data[start : start + BLOCK] = bytes(BLOCK)
        rig.renew(source, None if is_file else data)
        self._disk = rig.disks["files" if is_file else "device"]
        if is_file:
            (self._guest.share / "first").write_bytes(data)

    def __str__(self) -> str:
        kind = "file" if self._is_file else "device"
        return f"{kind}, state on {self._system}{', writable' * self._writes}"

    def run(self, lives: int) -> None:
        """Live and cut `lives` times, then complete the copy. Raises WrongError if a promise is broken."""
        for number in range(lives):
            self._boot(number, **self._orders())
            self._live()
            self._cut()
            self._totals["cuts"] += 1
            self._totals[f"cuts: {self}"] += 1
        self._complete(lives)

    def _orders(self) -> dict[str, Any]:
        """Return what the guest shall do in the next life."""
        choose = self._choose
        options = ["--limit", str(SIZE // choose.randint(3, 8))]
        if self._writes:
            options.append("--writable")
        command = "mount" if self._writes else choose.choice(["sync", "mount"])
        pauses = command == "mount" and choose.random() < 0.4
        return {"command": command, "options": options, "pauses": pauses, "reads": True, "is_last": False}

    def _boot(self, number: int, **orders: Any) -> None:
        """Boot with `orders`, and check what the last cut has left. `number`: of the life."""
        shutil.rmtree(self._guest.share / "left", ignore_errors=True)
        orders |= {"make": number == 0, "system": self._system, "is_file": self._is_file, "size": SIZE}
        orders |= {"writes": self._writes, "seed": self._choose.randrange(1 << 30)}
        orders["doubtful"] = sorted(self._pages.doubtful)
        self._lab.say(f"{self}: life {number}, {orders['command']} {orders['options']}")
        self._say.clear()
        self._rig.start(orders)
        self._until("ready", BOOT_SECONDS)
        if number:
            self._check()

    def _until(self, name: str, seconds: float) -> list[Any]:
        """Read events up to the event `name`, and return it. Raises WrongError if it does not come in `seconds`."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            event = self._event(left)
            if event is not None and event[0] == name:
                return event
            if event is None and not self._guest.is_running:
                break
        raise WrongError(f"no event `{name}` within {seconds:.0f} s: {self._said()}")

    def _said(self) -> str:
        """Return the last lines of the program and of the guest's console."""
        console = self._guest.log.read_text(errors="replace").splitlines()
        return "\n      ".join([*self._say[-12:], *console[-5:]])

    def _event(self, seconds: float) -> list[Any] | None:
        """Return the next event of the guest, once the model knows of it. Returns None after `seconds`."""
        line = self._guest.next_event(seconds)
        if line is None:
            return None
        event: list[Any] = json.loads(line)
        kind, values = event[0], event[1:]
        if kind in ("ready", "started", "ended", "finished", "say"):
            self._lab.say(line)
        if kind == "say":
            self._say.append(values[0])
            if "ignoring state file" in values[0] or "cannot be used" in values[0]:
                self._totals["records refused after a cut"] += 1
                self._totals["blocks to be checked again"] += self._recorded
        elif kind == "progress":
            self._done = values[0]["done_bytes"]
        elif kind == "wrong":
            raise WrongError(f"{values[0]}: {self._said()}")
        elif kind == "ended" and values[0]:
            raise WrongError(f"the program ended with {values[0]}: {self._said()}")
        elif kind == "write":
            offset, length, seed = values
            data = random.Random(seed).randbytes(length)
            number = self._pages.begin_write(offset, data)
            if number is None:
                raise RuntimeError("the guest writes to a page in doubt")
            self._write = number, offset, data
            self._written.update(self._pages.touched(offset, length))
        elif kind == "wrote" and self._write is not None:
            self._pages.end_write(*self._write, values[0], durable=False)
            self._write = None
            self._totals["writes"] += 1
        elif kind == "fsync":
            self._flush = self._pages.flush_began()
        elif kind == "synced" and self._flush is not None:
            self._pages.flushed(self._flush)
            self._totals["fsyncs acknowledged"] += 1
        return event

    def _live(self) -> None:
        """Let the guest live up to the moment of the cut."""
        choose = self._choose
        self._done = 0
        part, rest = choose.uniform(-0.1, 1.1), choose.uniform(0, 1.3)
        way = choose.choice(["time", "state", "destination"])
        disk = {"state": self._rig.disks["state"], "destination": self._disk}.get(way)
        self._until("started", BOOT_SECONDS)
        if disk is not None:
            disk.halt_at(choose.randint(1, 24))
        end = time.monotonic() + LIFE_SECONDS
        cut_at = end
        while (now := time.monotonic()) < cut_at:
            event = self._event(min(0.02, cut_at - now))
            if disk is not None and disk.halted.is_set():
                self._totals["cuts in a flush"] += 1
                return
            is_done = event is not None and (event[0] == "ended" or (event[0] == "progress" and self._done == SIZE))
            if is_done or (disk is None and self._done >= part * SIZE):
                part = 2.0
                cut_at = min(cut_at, now + rest)
            if event is None and not self._guest.is_running:
                raise WrongError(f"the guest has ended: {self._said()}")
        if cut_at == end:
            raise WrongError(f"no progress within {LIFE_SECONDS} s: {self._said()}")
        self._totals["cuts after completion" if self._done == SIZE else "cuts at random times"] += 1

    def _cut(self) -> None:
        """Cut the power, and have the disks forget."""
        self._guest.cut()
        while self._event(0) is not None:  # what was acknowledged before
            pass
        if self._write is not None:
            self._pages.end_write(*self._write, 0, durable=False)
            self._write = None
        self._flush = None
        self._pages.crashed(after_failed_sync=False)
        losses = self._rig.cut()
        self._totals["sectors lost"] += sum(each.lost for each in losses)
        self._lab.say(f"cut at {100 * self._done // SIZE} %: {losses}")

    def _check(self) -> None:
        """Compare what the cut has left with what is on record, and with what was acknowledged."""
        left = self._guest.share / "left"
        data = (left / "copy" if self._is_file else self._disk.image).read_bytes()
        present, users = read_record(left, SIZE)
        pages = pages_of(present) | (users & self._written)
        if lost := (self._written - self._pages.doubtful) - pages:
            raise WrongError(f"{len(lost)} pages with acknowledged writes are not on record, such as {min(lost)}")
        wrong = [page for page in sorted(pages) if self._is_wrong(page, data)]
        self._totals["blocks on record"] += len(present)
        self._totals["pages on record that differ"] += len(wrong)
        self._recorded = len(present)
        again = max(0, self._done // BLOCK - len(present))
        self._totals["blocks to be checked again"] += again
        self._lab.say(f"on record: {len(present)} blocks; to be checked again: {again}; wrong pages: {len(wrong)}")
        if wrong:
            raise WrongError(f"{len(wrong)} pages on record differ, such as {wrong[:5]}")

    def _is_wrong(self, page: int, data: bytes) -> bool:
        part = data[page * PAGE : (page + 1) * PAGE]
        return self._pages.reading(page * PAGE, PAGE)(part) is not None

    def _complete(self, number: int) -> None:
        """Live without a cut until the copy is complete, then cut. All of the destination must be right."""
        command = "mount" if self._writes else "sync"
        options = ["--writable"] * self._writes
        self._boot(number, command=command, options=options, pauses=False, reads=False, is_last=True)
        self._until("finished", LIFE_SECONDS)
        self._guest.cut()
        self._rig.cut()
        data = (self._guest.share / "left/last" if self._is_file else self._disk.image).read_bytes()
        if wrong := [page for page in range(SIZE // PAGE) if self._is_wrong(page, data)]:
            raise WrongError(
                f"the complete copy is wrong in {len(wrong)} pages, such as {wrong[:5]}: {self._said()}"
            )
        self._totals["complete copies compared"] += 1
