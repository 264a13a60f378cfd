"""The scenario `faults` in the guest: device-mapper below both ends, whose tables are swapped while blockcopy runs.

["figure", name, value]           for the verdict
["check", {…}]                    the host compares the disks and the state files, which lie in the share, and
answers with a line. Nothing is flushed for it
["done"]
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent import SHARE, STATE, Program, as_process_one, await_line, device, mount_disk, mount_share, run, tell

BLOCK = 128 * 1024
PAGE = 4096
SIZE = int(os.environ.get("SIZE", 16 << 20))
BAD = 37
"""The block with a bad sector."""

SECONDS = 300
"""Time limit of everything that must not hang. The guest is slow."""

CASES = """
    bad_sector_of_the_source source_fails_for_a_while destination_that_errs destination_that_errs_now_and_then
    destination_that_drops_writes slow_ends destination_that_does_not_answer writes_to_a_destination_that_fails
"""
"""The cases: methods of Faults, in this order. The last one leaves a destination that holds writes of a user."""

POINT = Path("/run/guest/mnt")
FILE = POINT / "copy"


class Mapped:
    """A device of device-mapper over a disk, whose table can be swapped."""

    def __init__(self, name: str, disk: str) -> None:
        self.path = f"/dev/mapper/{name}"
        self._name, self._disk = name, disk
        self._sectors = SIZE // 512
        self._dmsetup("create", self.linear())

    def linear(self) -> str:
        """Return the table of a disk that works."""
        return f"0 {self._sectors} linear {self._disk} 0"

    def error(self) -> str:
        """Return the table of a disk that fails each request."""
        return f"0 {self._sectors} error"

    def bad_sector(self, offset: int) -> str:
        """Return the table of a disk with a bad sector at `offset`, in bytes."""
        at = offset // 512
        rest = f"{at + 8} {self._sectors - at - 8} linear {self._disk} {at + 8}"
        return f"0 {at} linear {self._disk} 0\n{at} 8 error\n{rest}"

    def flakey(self, up: int, down: int, feature: str) -> str:
        """Return the table of a disk that works `up` seconds, then has the `feature` for `down` seconds."""
        return f"0 {self._sectors} flakey {self._disk} 0 {up} {down} 1 {feature}"

    def delay(self, milliseconds: int) -> str:
        """Return the table of a disk that delays each request."""
        return f"0 {self._sectors} delay {self._disk} 0 {milliseconds}"

    def swap(self, table: str) -> None:
        """Put `table` in place of the current one, while the device is in use."""
        self._dmsetup("reload", table)
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self._name)
        run("dmsetup", "resume", self._name)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let no request of the block get an answer."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self._name)
        try:
            yield
        finally:
            run("dmsetup", "resume", self._name)

    def forget(self) -> None:
        """Drop the page cache of the device."""
        run("blockdev", "--flushbufs", self.path)

    def _dmsetup(self, verb: str, table: str) -> None:
        subprocess.run(["dmsetup", verb, self._name], input=table, text=True, check=True)


class Wrong(Exception):
    """A broken promise."""


def must(condition: object, text: str) -> None:
    """Raise Wrong with `text` unless `condition` holds."""
    if not condition:
        raise Wrong(text)


def blockcopy(*words: object, right: set[int]) -> Program:
    """Run blockcopy to its end. Raises Wrong if it hangs, or if its exit status is not `right`."""
    began = time.monotonic()
    program = Program(*words)
    status = program.wait(SECONDS)
    tell("say", f"{words[0]}: status {status} after {time.monotonic() - began:.0f} s: {program.lines[-2:]}")
    must(status in right, f"`blockcopy {words[0]}` ended with {status}: {program.lines[-8:]}")
    return program


def result(program: Program) -> dict[str, Any]:
    """Return the result that a `--json` has printed."""
    return dict(json.loads(next(each for each in program.lines if each.startswith('{"schema'))))


def check(**what: object) -> None:
    """Have the host compare what is on the disks and on record now."""
    left = SHARE / "left"
    shutil.rmtree(left, ignore_errors=True)
    left.mkdir()
    for path in STATE.iterdir():
        if path.is_file():
            shutil.copyfile(path, left / path.name)
    tell("check", what)
    await_line()


def until(condition: Any, what: str) -> None:
    """Wait until `condition()` is true. Raises Wrong after SECONDS."""
    end = time.monotonic() + SECONDS
    while not condition():
        must(time.monotonic() < end, f"{what}: not within {SECONDS} s")
        time.sleep(0.1)


def mount(source: Mapped, destination: Mapped, *options: object) -> Program:
    """Mount in the foreground, and return the program once the file is there."""
    POINT.mkdir(exist_ok=True)
    words = ["mount", "-f", "--progress=json", "--name", "copy", "--timeout", SECONDS, *options]
    program = Program("-v", *words, source.path, destination.path, POINT)
    until(lambda: FILE.exists() or not program.is_running, "the mount")
    must(program.is_running, f"the mount ended: {program.lines[-8:]}")
    return program


def progress(program: Program) -> dict[str, Any]:
    """Return the last line of progress of `program`."""
    lines = [each for each in program.lines if each.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {"done_bytes": 0, "state": ""}


def read(offset: int, length: int = PAGE) -> bytes | int:
    """Read from the mount, past the page cache. Returns the bytes, or the number of the error."""
    try:
        file = os.open(FILE, os.O_RDONLY | os.O_DIRECT)
        try:
            room = mmap.mmap(-1, length)
            os.preadv(file, [room], offset)
            return bytes(room)
        finally:
            os.close(file)
    except OSError as error:
        return error.errno or errno.EIO


def of_source(disk: str, offset: int, length: int = PAGE) -> bytes:
    """Return what the source's disk has."""
    with open(disk, "rb") as file:
        file.seek(offset)
        return file.read(length)


class Faults:
    """The cases, one after the other. Each begins with working disks."""

    def __init__(self) -> None:
        self.source_disk = device("source")
        self.source, self.destination = Mapped("src", self.source_disk), Mapped("dst", device("device"))

    def bad_sector_of_the_source(self) -> None:
        """Cost its block alone, and no more once the sector is good again."""
        self.source.swap(self.source.bad_sector(BAD * BLOCK + 50_000))
        self.source.forget()
        done = result(blockcopy("sync", "--json", self.source.path, self.destination.path, right={3}))
        must(done["unreadable_bytes"] == BLOCK, f"unreadable: {done}")
        check(complete=True, bad=[BAD])
        program = mount(self.source, self.destination)
        found = read(BAD * BLOCK)
        must(found == errno.EIO, f"a read of the bad block returned {found!r}")
        must(read(5 * BLOCK) == of_source(self.source_disk, 5 * BLOCK), "a read of a good block is wrong")
        self.end(program, right={3, 75})
        self.source.swap(self.source.linear())
        self.source.forget()
        done = result(blockcopy("sync", "--json", self.source.path, self.destination.path, right={0}))
        tell("figure", "bytes fetched once the sector was good", done["fetched_bytes"])
        check(complete=True)

    def source_fails_for_a_while(self) -> None:
        """Make reads of missing blocks fail, and no others. The next run completes the copy."""
        program = mount(self.source, self.destination, "--recheck", "--limit", "2M")
        first = read(0)
        must(first == of_source(self.source_disk, 0), "the first read is wrong")
        self.source.swap(self.source.error())
        self.source.forget()
        missing = SIZE - BLOCK
        began = time.monotonic()
        found = read(missing)
        tell("figure", "seconds to EIO from a source that fails", round(time.monotonic() - began, 1))
        must(found == errno.EIO, f"a read of a missing block returned {found!r}"[:200])
        must(read(0) == first, "a read of a present block fails with its source")
        self.source.swap(self.source.linear())
        self.source.forget()
        began = time.monotonic()
        until(lambda: read(missing) == of_source(self.source_disk, missing), "the read once the source is back")
        tell("figure", "seconds to the bytes of a source that is back", round(time.monotonic() - began, 1))
        self.end(program, right={0, 3, 75})  # in the background, blocks that failed are left to the next run
        blockcopy("sync", self.source.path, self.destination.path, right={0})
        check(complete=True)

    def destination_fails(self, table: str, name: str) -> None:
        """End a sync with an error, and have only on record what is on the disk."""
        spoil(self.destination.path)
        program = Program(
            "-v", "sync", "--recheck", "--limit", "3M", "--progress=json", self.source.path, self.destination.path
        )
        until(lambda: progress(program)["done_bytes"] > SIZE // 4 or not program.is_running, "the progress")
        began = time.monotonic()
        self.destination.swap(table)
        status = program.wait(SECONDS)
        tell("figure", f"{name}: exit status", status)
        tell("figure", f"{name}: seconds to the end", round(time.monotonic() - began, 1))
        must(status != 0, f"a sync to a disk that fails ended with 0: {program.lines[-8:]}")
        check()
        self.destination.swap(self.destination.linear())
        self.destination.forget()
        check()
        blockcopy("sync", self.source.path, self.destination.path, right={0})
        check(complete=True)

    def destination_that_errs(self) -> None:
        """Swap the destination's table to `error`."""
        self.destination_fails(self.destination.error(), "dm-error")

    def destination_that_errs_now_and_then(self) -> None:
        """Swap the destination's table to `flakey`, which fails writes every other second."""
        self.destination_fails(self.destination.flakey(1, 1, "error_writes"), "dm-flakey error_writes")

    def destination_that_drops_writes(self) -> None:
        """Show what no program can see in time: a disk that loses writes and says nothing. `verify` finds them."""
        spoil(self.destination.path)
        self.destination.swap(self.destination.flakey(0, 1000, "drop_writes"))
        blockcopy("sync", "--recheck", self.source.path, self.destination.path, right={0})
        self.destination.swap(self.destination.linear())
        self.destination.forget()
        blockcopy("verify", self.source.path, self.destination.path, right={1, 5})
        blockcopy("sync", self.source.path, self.destination.path, right={0})
        check(complete=True)

    def slow_ends(self) -> None:
        """Delay each request of both ends by 100 ms."""
        for each in (self.source, self.destination):
            each.swap(each.delay(100))
        spoil(self.destination.path)
        began = time.monotonic()
        blockcopy("sync", "--recheck", self.source.path, self.destination.path, right={0})
        tell("figure", "dm-delay 100 ms: seconds of a sync", round(time.monotonic() - began, 1))
        for each in (self.source, self.destination):
            each.swap(each.linear())
        check(complete=True)

    def destination_that_does_not_answer(self) -> None:
        """Suspend the destination for 20 seconds: the mount reports its status meanwhile, and goes on later."""
        spoil(self.destination.path)
        program = mount(self.source, self.destination, "--recheck", "--limit", "2M")
        until(lambda: progress(program)["done_bytes"] > SIZE // 8, "the progress")
        with self.destination.suspended():
            time.sleep(20)
            status = blockcopy("status", "--json", POINT, right={0})
            must(any('"state"' in each for each in status.lines), f"no status: {status.lines}")
        until(lambda: progress(program)["state"] == "complete", "the completion")
        self.end(program, right={0})
        check(complete=True)

    def writes_to_a_destination_that_fails(self) -> None:
        """Refuse what cannot be flushed, and keep what was."""
        spoil(self.destination.path)
        program = mount(self.source, self.destination, "--recheck", "--writable", "--limit", "1M")
        writes = [
            (offset, length, seed)
            for seed, (offset, length) in enumerate([(3 * BLOCK, PAGE), (SIZE - 9000, 700), (100 * BLOCK, BLOCK)])
        ]
        file = os.open(FILE, os.O_RDWR)
        for offset, length, seed in writes:
            os.pwrite(file, random.Random(seed).randbytes(length), offset)
        os.fsync(file)
        check(writes=writes)
        self.destination.swap(self.destination.error())
        error = None
        try:
            os.pwrite(file, random.Random(99).randbytes(PAGE), 50 * BLOCK)
            os.fsync(file)
        except OSError as refused:
            error = refused.errno
        must(error is not None, "an fsync to a disk that fails was answered")
        tell("figure", "fsync to a disk that fails", errno.errorcode[error or 0])
        try:
            os.close(file)
        except OSError as refused:
            tell("say", f"close: {refused}")
        doubtful = [50 * BLOCK // PAGE]
        self.end(program, right=set(range(1, 126)))
        self.destination.swap(self.destination.linear())
        self.destination.forget()
        check(writes=writes, doubtful=doubtful)
        blockcopy("sync", self.source.path, self.destination.path, right=set(range(1, 126)))
        program = mount(self.source, self.destination, "--writable")
        for offset, length, seed in writes:
            with FILE.open("rb") as reader:
                reader.seek(offset)
                must(reader.read(length) == random.Random(seed).randbytes(length), f"the write at {offset} is lost")
        until(lambda: progress(program)["state"] == "complete", "the completion")
        self.end(program, right={0})
        check(complete=True, writes=writes, doubtful=doubtful)

    def end(self, program: Program, *, right: set[int]) -> None:
        """Unmount, and check the status of the mount's `program`."""
        Program("umount", POINT).wait(SECONDS)
        status = program.wait(SECONDS)
        must(status in right, f"the mount ended with {status}: {program.lines[-8:]}")


def spoil(path: str) -> None:
    """Overwrite half of the blocks of the device at `path`."""
    with open(path, "r+b", buffering=0) as file:
        for block in range(0, SIZE // BLOCK, 2):
            file.seek(block * BLOCK)
            file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())
    run("blockdev", "--flushbufs", path)


def main() -> None:
    """Run the cases."""
    os.environ["DM_DISABLE_UDEV"] = "1"
    for each in ("dm-mod", "dm-flakey", "dm-delay"):
        run("modprobe", each)
    mount_share()
    mount_disk("state", "ext4", STATE, make=True)
    these = Faults()
    for name in CASES.split():
        tell("say", f"case: {name.replace('_', ' ')}")
        began = time.monotonic()
        try:
            getattr(these, name)()
        except (Wrong, TimeoutError) as error:
            raise Wrong(f"{name}: {error}") from error
        tell("passed", name.replace("_", " "), round(time.monotonic() - began))
    tell("done")


as_process_one(main)
