"""An sshd on loopback, reached over a line: the far end of the part `ssh`, and what it costs there."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sshd
from benchmarks.ground import BenchError, Ground, until
from benchmarks.measure import round_trips

HOST = sshd.HOST
RELAY = Path(__file__).with_name("relay.py")
TICKS = os.sysconf("SC_CLK_TCK")
"""Units of CPU time per second in /proc."""

PATIENCE = 5
"""Seconds in which a process ends that was asked to."""

INTERVAL = 0.05
"""Seconds between two looks at the CPU time of stages."""


@dataclass(frozen=True)
class Line:
    """A line to the far end."""

    ssh: list[str]
    """The ssh command line, without the host."""
    ground: Ground

    @property
    def options(self) -> list[Any]:
        """The options of blockcopy for this line. The stages are sent, as without --blockcopy-path."""
        return ["-e", shlex.join(self.ssh), "--python", self.ground.python]

    def channels(self, count: int, size: int) -> float:
        """Return the seconds in which `count` channels of one login bring `size` bytes in all. It is logged in."""
        shared = [*self.ssh, "-S", "control"]  # in the ground's folder, because paths of sockets must be short
        control = self.ground.folder / "control"
        master = self.ground.popen([*shared, "-M", "-N", HOST])
        try:
            until(control.exists, "the login")
            began = time.monotonic()
            words = [*shared, HOST, f"head -c {size // count} /dev/zero"]
            readers = [self.ground.popen(words, stdout=subprocess.DEVNULL) for _ in range(count)]
            if {reader.wait() for reader in readers} != {0}:
                raise BenchError(self.ground.failure(words, 255))
            return time.monotonic() - began
        finally:
            with contextlib.suppress(BenchError):
                self.ground.output([*shared, "-O", "exit", HOST])  # ssh sometimes misses a SIGTERM
            end(master)

    def round_trips(self, count: int) -> list[float]:
        """Return the milliseconds of `count` bytes through one channel and back, one after the other."""
        pipe = subprocess.PIPE
        return round_trips(self.ground.popen([*self.ssh, HOST, "cat"], stdin=pipe, stdout=pipe, bufsize=0), count)


class Server:
    """An sshd with a configuration, a host key and a user key of its own. Leave the context to end it.

    The ground would not find it, because sshd overwrites its environment with the title of its process.
    """

    def __init__(self, ground: Ground) -> None:
        """Start sshd, and wait until it listens. Raises BenchError if it does not."""
        self._ground, self._folder = ground, ground.name("sshd")
        folder = self._folder
        folder.mkdir(mode=0o700)
        self.port = sshd.free_port()
        try:
            words = sshd.prepare(folder, self.port)
        except sshd.SshdError as error:
            raise BenchError(str(error)) from error
        (folder / "known").write_text(f"far {(folder / 'host.pub').read_text()}")
        log = folder / "log"
        with log.open("wb") as said:
            self.process = ground.popen(words, stderr=said)
        until(lambda: self._listens() or self.process.poll() is not None, "sshd")
        if self.process.returncode is not None:
            raise BenchError(f"sshd: {log.read_text()}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        end(self.process)

    def _listens(self) -> bool:
        return f"Server listening on {HOST} port {self.port}." in (self._folder / "log").read_text()

    @contextlib.contextmanager
    def line(self, round_trip: float, rate: float | None = None) -> Iterator[Line]:
        """Run a relay to the server during the context. `round_trip`: milliseconds. `rate`: bytes per second."""
        words = [self._ground.python, "-I", RELAY, self.port, round_trip, *([] if rate is None else [rate])]
        relay = self._ground.popen(words, stdout=subprocess.PIPE)
        try:
            port = relay.stdout.readline().decode().strip()
            known = ["-o", f"UserKnownHostsFile={self._folder}/known", "-o", "HostKeyAlias=far"]
            checks = ["-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]
            key = ["-i", str(self._folder / "user")]
            yield Line(["ssh", "-F", "none", "-p", port, *key, *known, *checks], self._ground)
        finally:
            relay.terminate()
            end(relay)
            relay.stdout.close()

    @contextlib.contextmanager
    def cpu(self) -> Iterator[dict[str, float]]:
        """Measure CPU seconds at the far end during the context. All connections must end in it.

        The yielded dict gets two figures at the end. `all` is of sshd and all below it. `stages` is of Python
        alone.
        """
        found: dict[str, float] = {}
        times: dict[int, float] = {}
        before, over = self._reaped(), threading.Event()

        def watch() -> None:
            while not over.wait(INTERVAL):
                times.update(dict(stages(self.process.pid)))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield found
        finally:
            over.set()
            watching.join()
        until(lambda: not children(self.process.pid), "the end of all connections")
        found |= {"all": self._reaped() - before, "stages": sum(times.values())}

    def _reaped(self) -> float:
        """Return the CPU seconds of all ended connections."""
        fields = stat(self.process.pid)[1]
        return (int(fields[13]) + int(fields[14])) / TICKS


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of `process`, which was asked to end. Kill it if it takes too long."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stat(pid: int) -> tuple[str, list[str]]:
    """Return the name of process `pid` and the later fields of its /proc/PID/stat. Raises OSError if it ended."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    return name.partition("(")[2], rest.split()


def children(pid: int) -> list[int]:
    """Return the process ids of the children of process `pid`."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def stages(pid: int) -> Iterator[tuple[int, float]]:
    """Yield id and CPU seconds of each Python process below process `pid`."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            name, fields = stat(child)
            if name.startswith("python"):
                yield child, (int(fields[11]) + int(fields[12])) / TICKS
        yield from stages(child)
