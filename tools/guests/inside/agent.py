"""What the programs in the guest share: events for the host, disks by their serial numbers, runs of blockcopy.

Events are lines of JSON. Two are told by this module:

    ["say", text]      a line that somebody may want to read
    ["wrong", text]    a promise is broken, or the program in the guest has failed
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

SHARE, STATE = Path("/run/guest/share"), Path("/run/guest/state")
"""The folder that the host can see; the folder of the program's state files."""

MODULES = (
    "blockcopy.cli.main blockcopy.replica.commands blockcopy_fuse.commands blockcopy_fuse.mounting "
    "blockcopy_fuse.control_client blockcopy.replica.sync blockcopy.replica.comparison blockcopy.progress.lines"
)
"""Modules of the program that are imported once: a start takes seconds under emulation."""


def _open_events() -> int:
    """Open the port for events. The kernel makes it some time after the boot."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open("/dev/vport0p1", os.O_RDWR)
        time.sleep(0.02)


_events = _open_events()
_lock = threading.Lock()


def tell(*event: object) -> None:
    """Write an event. Returns once the host has it."""
    line = json.dumps(event).encode() + b"\n"
    with _lock:
        while line:
            line = line[os.write(_events, line) :]


def await_line() -> str:
    """Return the next line that the host writes."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(_events, 65536)
    return line.decode()


def run(*words: object) -> None:
    """Run a program. Raises CalledProcessError if it fails."""
    subprocess.run([str(each) for each in words], check=True)


def device(serial: str) -> str:
    """Return the path of the disk with this serial number."""
    for entry in Path("/sys/block").glob("vd*"):
        if (entry / "serial").read_text().strip() == serial:
            return f"/dev/{entry.name}"
    raise LookupError(serial)


def mount_disk(serial: str, system: str, point: Path, *, make: bool) -> None:
    """Mount the disk with the file `system` on `point`. `make`: make the file system first."""
    run("modprobe", system)
    if make:
        # By default a small ext4 has blocks of 1 KiB. Then a cut may tear a page, which the model holds for whole.
        options = ["-F", "-b", "4096"] if system == "ext4" else ["-f"]
        run(f"mkfs.{system}", "-q", *options, device(serial))
    point.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", system, device(serial), point)


def mount_share() -> None:
    """Mount the folder that the host can see."""
    SHARE.mkdir(parents=True)
    run("mount", "-t", "9p", "-o", "trans=virtio,msize=500000", "share", SHARE)


class Program:
    """A run of blockcopy: a fork of this process, which has imported it. Its state is in STATE."""

    def __init__(self, *words: object, on_line: Callable[[str], None] | None = None) -> None:
        """Start blockcopy with the arguments `words`. `on_line`: called with each line of both outputs."""
        self.lines: list[str] = []
        """The lines of both outputs so far."""
        self._on_line = on_line
        self._status = 0
        self._ended = threading.Event()
        ours, theirs = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.environ["STATE_DIRECTORY"] = str(STATE)
            for number in (1, 2):
                os.dup2(theirs, number)
            os.close(ours)
            os.close(_events)
            random.seed()
            _run_program([str(each) for each in words])
        os.close(theirs)
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()

    def show_where(self) -> None:
        """Have the program print where its threads are."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    @property
    def is_running(self) -> bool:
        """Whether the program has not ended."""
        return not self._ended.is_set()

    def wait(self, seconds: float | None = None) -> int:
        """Return the exit status, once there is one. Raises TimeoutError after `seconds`."""
        if not self._ended.wait(seconds):
            raise TimeoutError(f"blockcopy does not end within {seconds} s: {self.lines[-5:]}")
        return self._status

    def _read(self, pipe: int) -> None:
        with open(pipe, errors="replace") as lines:
            for line in lines:
                self.lines.append(line.rstrip())
                if self._on_line is not None:
                    self._on_line(line.rstrip())
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()


def _run_program(words: list[str]) -> NoReturn:
    from blockcopy.cli.main import main

    sys.argv = ["blockcopy", *words]
    faulthandler.register(signal.SIGUSR1)
    status = 1
    try:
        status = main() or 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def as_process_one(main: Callable[[], None]) -> NoReturn:
    """Run `main` as process 1, which must never end. Imports the program before. Tells the host of an error."""
    try:
        for each in MODULES.split():
            importlib.import_module(each)
        main()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the host must know
        tell("wrong", f"the guest: {error!r}")
    while True:
        time.sleep(1000)
