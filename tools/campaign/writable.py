"""A round of a writable mount: programs that read and write through it, and a model that checks each read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign import worker
from campaign.events import EVENTS, remount
from campaign.ground import TIME_LIMIT, Ends, WrongError, is_mounted, losetup
from campaign.pages import PAGE, Pages
from campaign.rounds import Round
from checkout import CHECKOUT

FAULTY_DISK = CHECKOUT / "tools/standins/faulty_disk"
WORKERS = 3
PATIENCE = 60
"""Seconds in which an operation must end, though the source is away."""

REFUSALS = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.ENODEV}
"""The errors that an operation may get: the source may be away, and the mount may be absent or dying."""


class WritableEnds(Ends):
    """A source, and a destination whose disk may lose what was not synced."""

    def __init__(self, folder: Path, size: int, choose: random.Random) -> None:
        super().__init__(folder, size - 512 * choose.choice([0, 1, 9]), choose)
        self._is_loop = os.geteuid() == 0 and choose.random() < 0.5
        self._is_volatile = choose.random() < 0.7
        self._volatile_at = folder / "volatile"
        self._standin: subprocess.Popen[str] | None = None

    def _attach_destination(self) -> None:
        if self._is_volatile:
            self._volatile_at.mkdir()
            words = [sys.executable, FAULTY_DISK, "--volatile", self._choose.randrange(1 << 30), self._disk]
            command = [str(each) for each in (*words, self._volatile_at)]
            self._standin = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            self._await("ready")
            self._disk = self._volatile_at / "disk"
        if self._is_loop:
            self._loops["destination"] = losetup("--find", "--show", self._disk)

    def _await(self, word: str) -> None:
        if self._standin is None or self._standin.stdout is None or self._standin.stdout.readline() != f"{word}\n":
            raise RuntimeError(f"the disk is not {word}")

    def cut_power(self) -> bool:
        """Lose a random part of what was not synced. Nobody uses the destination. Returns False if it cannot."""
        if self._standin is None:
            return False
        self._standin.send_signal(signal.SIGUSR1)
        self._await("cut")
        return True

    def fail_next_sync(self) -> bool:
        """Fail the next sync of the destination. Returns False if that is impossible.

        Only a loop device has a page cache. What a sync lost is read from there until it is dropped.
        """
        if self._standin is None or not self._is_loop:
            return False
        self._standin.send_signal(signal.SIGUSR2)
        self._await("set")
        return True

    def __str__(self) -> str:
        kind = f"{'volatile ' * self._is_volatile}{'loop device' if self._is_loop else 'file'}"
        return f"{'loop device' if self._source_is_loop else 'file'} to {kind}, {self.relation}"

    def detach(self) -> list[str]:
        """Detach the loop devices, and end the disk. Returns descriptions of other loop devices on the files."""
        left = super().detach()
        if self._standin is not None:
            self._standin.terminate()
            self._standin.wait(TIME_LIMIT)
            if self._standin.stdout is not None:
                self._standin.stdout.close()
            if is_mounted(self._volatile_at):
                left.append(f"mount {self._volatile_at}")
        return left


class Driver(threading.Thread):
    """A thread that has one worker do random operations while `go_on` is set. `choose` makes all choices."""

    def __init__(self, a: WritableRound, choose: random.Random) -> None:
        super().__init__(daemon=True)
        self._round = a
        self._pages = a.pages
        self._choose = choose
        self.process: subprocess.Popen[bytes] | None = None
        self.in_operation = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: str | None = None
        self.ends = False

    def run(self) -> None:
        """Operate until `ends` is set, or until something is wrong."""
        try:
            while not self.ends:
                self._round.go_on.wait()
                with self.in_operation:
                    if self._round.go_on.is_set() and not self.ends:
                        self._operate()
                time.sleep(0.002)  # the mount needs the processors more
        except WrongError as error:
            self.wrong = str(error)
        except Exception as error:  # noqa: BLE001 - a fault of chaos itself, which the round reports
            self.wrong = repr(error)

    def _operate(self) -> None:
        choose = self._choose
        way = choose.random()
        if way < 0.45:
            self._write(
                choose.choice(["plain", "plain", "plain", "direct", "sync", "dsync", "direct sync", "mmap"])
            )
        elif way < 0.9:
            self._read(*self._extent(), choose.choice(["plain", "direct"]))
        else:
            began = self._pages.flush_began()
            if self.call(do="fsync", way=choose.choice(["fsync", "fdatasync"])) is not None:
                self._pages.flushed(began)

    def _extent(self, unit: int = 1) -> tuple[int, int]:
        """Return a random offset and a length, which are multiples of `unit`."""
        choose, size = self._choose, self._pages.size
        length = choose.choice([1, 512, 3000, PAGE, PAGE, 3 * PAGE, 65536, 131072, 300_000])
        offset = choose.randrange(size)
        if choose.random() < 0.5:
            offset, length = offset // PAGE * PAGE, -(-length // PAGE) * PAGE
        if choose.random() < 0.5:  # writers and readers meet more often
            offset %= 2 << 20
        offset, length = offset // unit * unit, -(-length // unit) * unit
        return offset, min(length, size - offset)

    def _write(self, way: str) -> None:
        offset, length = self._extent(512 if way.startswith("direct") else 1)
        if way == "mmap" and self._round.sync_fails:
            way = "plain"  # the kernel drops a store that cannot be written back, and tells nobody
        elif way == "mmap":
            length = min(length, 64, PAGE - offset % PAGE)  # a crash may tear a longer store
        if (page := self._pages.doubtful_edge(offset, length)) is not None:
            self._read(page * PAGE, min(PAGE, self._pages.size - page * PAGE), "plain")
        seed = self._choose.randrange(1 << 30)
        data = random.Random(seed).randbytes(length)
        number = self._pages.begin_write(offset, data)
        if number is None:
            return
        written = 0
        try:
            found = self.call(do="write", way=way, offset=offset, length=length, seed=seed)
            written = 0 if found is None else int(found)
        finally:
            self._pages.end_write(number, offset, data, written, durable="sync" in way)
        self.counts[f"{way} writes"] += written == length

    def _read(self, offset: int, length: int, way: str) -> None:
        if way == "direct" and offset % 512:
            way = "plain"
        check = self._pages.reading(offset, length)
        data = self.call(do="read", way=way, offset=offset, length=length)
        if isinstance(data, bytes):
            self.counts["reads"] += 1
            if wrong := check(data):
                raise WrongError(f"a read ({way}) of {length} bytes at {offset}: {wrong}")

    def call(self, **operation: Any) -> bytes | int | None:
        """Do an operation. Returns the bytes of a read, the number of any other, or None if it was refused."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._round.start_worker(self)
        process = self.process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(operation).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:  # a page that was mapped could not be had
            status = process.wait(TIME_LIMIT)
            if status not in (-signal.SIGBUS, -signal.SIGKILL):
                raise WrongError(f"a worker ended with {status}")
            self.counts["refused: SIGBUS"] += 1
            return None
        result = json.loads(line)
        if (number := result.get("errno")) is not None:
            if number not in REFUSALS and not (number == errno.EROFS and self._round.sync_fails):
                raise WrongError(f"{operation}: {os.strerror(number)}")
            self.counts[f"refused: {errno.errorcode[number]}"] += 1
            time.sleep(0.02)
            return None
        length = int(result["length"])
        return process.stdout.read(length) if operation["do"] == "read" else length


class WritableRound(Round):
    """One round of a writable mount. Call `run`, then always `clean_up`."""

    OPTIONS = (("--verify", 0.2),)
    MOUNT_OPTIONS = ("--writable", "--timeout", 6, "--reconnect-timeout", 5)
    ENDS = WritableEnds
    ends: WritableEnds

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.go_on = threading.Event()
        self.pages = Pages(b"")
        self._drivers: list[Driver] = []
        self.sync_fails = False
        """Whether the disk fails a sync of this mount, so that no more can be written."""

    def rate(self) -> str:
        """Return a random rate. A copy takes some seconds, so that writes and hydration meet."""
        return f"{self.ends.size // self.choose.randint(4, 20) // 1024}K"

    def start_worker(self, driver: Driver) -> subprocess.Popen[bytes]:
        """Start the process of `driver`, and return it."""
        number = self._drivers.index(driver)
        if (old := self._readers.get(number)) is not None:
            self._close_pipes(old)
        command = [sys.executable, "-E", "-s", "-S", worker.__file__, self.file]
        process = self._readers[number] = subprocess.Popen(
            [str(each) for each in command],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        return process

    def start_readers(self) -> None:
        """Let the drivers go on."""
        if not self._drivers:
            self.pages = Pages(self.ends.source_file.read_bytes())
            self._drivers = [Driver(self, random.Random(self.choose.random())) for _ in range(WORKERS)]
            for each in self._drivers:
                each.process = self.start_worker(each)
                each.start()
        self.go_on.set()

    def stop_readers(self, *_: object) -> None:
        """Do nothing: `down` has stopped the drivers."""

    def pause(self) -> None:
        """Stop the drivers, and close what they hold open. Raises WrongError if an operation does not end."""
        self.go_on.clear()
        for each in self._drivers:
            if not each.in_operation.acquire(timeout=PATIENCE):
                raise WrongError(f"an operation does not end within {PATIENCE} s")
            each.in_operation.release()
            each.call(do="release")

    def down(self, *, kill: bool) -> None:
        """Unmount, or kill the mount if `kill`. Then all that is in doubt is what was not flushed."""
        if not kill:
            self.pause()
        super().down(kill=kill)
        if kill:
            self.pause()
            self.pages.crashed(after_failed_sync=self.sync_fails)
        else:
            self.pages.unmounted()

    def check_copy(self) -> None:
        """Cut the power, and compare the destination with the model. Raises WrongError if they differ."""
        self.ends.cut_power()
        self.pages.check_all(self.ends.destination)

    def check_readers(self) -> None:
        """Raise WrongError if a driver has found anything wrong."""
        if wrong := [each.wrong for each in self._drivers if each.wrong]:
            raise WrongError("; ".join(wrong))

    def tally(self) -> Counter[str]:
        """Return the counts of all drivers."""
        counts: Counter[str] = Counter({"wrong reads": 0})
        for each in self._drivers:
            counts.update(each.counts)
        return counts

    def count(self) -> None:
        """Add the counts of this round to the totals. Call for a passed round only."""
        self._totals.update(self.tally())
        self._totals.update(f"survived: {event}" for event in self.events)

    def clean_up(self) -> list[str]:
        """Remove everything that the round left behind. Returns descriptions of what should not have been left."""
        for each in self._drivers:
            each.ends = True
        self.go_on.set()
        processes = [*self._readers.values()]
        left = super().clean_up()
        for process in processes:
            self._close_pipes(process)
        for each in self._drivers:
            each.join(TIME_LIMIT)
        return left

    @staticmethod
    def _close_pipes(process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def cut_power(a: WritableRound) -> None:
    """Kill the mount, lose a part of what was not synced, and mount again."""
    a.down(kill=True)
    if a.ends.cut_power():
        a.say("power cut")
    a.up()


def fail_sync(a: WritableRound) -> None:
    """Fail a sync of the disk, which loses a part of what it should cover. Kill the mount, and mount again."""
    a.pause()
    a.sync_fails = a.ends.fail_next_sync()
    a.go_on.set()
    if a.sync_fails:
        time.sleep(a.choose.uniform(0.2, 4))
        cut_power(a)
        a.sync_fails = False


def refused_sync(a: WritableRound) -> None:
    """Unmount, see that `sync` refuses to overwrite what was written, and mount again."""
    a.down(kill=a.choose.random() < 0.5)
    if a.pages.has_writes:
        words = a.command("sync")
        a.wait_for(a.popen(*words), "`blockcopy sync` over writes of a user", range(1, 126), PATIENCE)
    a.up()


WRITABLE_EVENTS: dict[str, tuple[int, Callable[[Any], object]]] = {
    **{
        name: EVENTS[name]
        for name in (
            "kill the source",
            "cut",
            "freeze",
            "trickle",
            "garble the greeting",
            "pause",
            "resume",
            "limit",
        )
    },
    "prefetch": EVENTS["prefetch"],
    "cut for long": (2, lambda a: a.disturb(a.cut, a.choose.uniform(2, 8))),
    "kill the mount": (6, lambda a: remount(a, kill=True)),
    "power cut": (8, cut_power),
    "remount": (3, lambda a: remount(a, kill=False)),
    "sync is refused": (2, refused_sync),
    "a sync fails": (4, fail_sync),
}
"""The relative frequency and the function of each event."""
