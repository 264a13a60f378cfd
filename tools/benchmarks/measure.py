"""The cost of a pipeline of commands: seconds, CPU, memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ground import BenchError, Ground

TIME_LIMIT = 1800
"""Time limit in seconds of a copy, so that a copy that hangs fails."""

INTERVAL = 0.02
"""Seconds between two looks at the memory of processes."""


@dataclass(frozen=True)
class Cost:
    """The cost of a pipeline."""

    seconds: float
    """Seconds until the last command ended."""
    durable: float
    """Seconds until a fdatasync of the destination, after the last command, returned."""
    cpu: float
    """CPU seconds of all processes that were waited for."""
    peak: float
    """MiB of the largest process, at its peak."""
    peak_all: float
    """MiB: the sum of the peaks of all processes."""


def round_trips(process: Any, count: int) -> list[float]:
    """Return the milliseconds of `count` bytes to `process` and back, one after the other. Ends the process.

    `process`: an echo with unbuffered pipes, just started.
    """
    times = []
    for _ in range(count + 1):
        began = time.perf_counter()
        process.stdin.write(b"x")
        process.stdout.read(1)
        times.append((time.perf_counter() - began) * 1000)
    process.stdin.close()
    process.stdout.close()
    process.wait()
    return times[1:]  # the first includes the start


class Memory:
    """A thread that watches the peak memory of processes and all their descendants.

    ru_maxrss would not do: it begins with the memory of the process that forked, which is this one.
    """

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        """The peak of each process, in KiB, by process id."""
        self._roots: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def follow(self, pid: int) -> None:
        """Watch a process. It must have executed its own program already."""
        self._roots.append(pid)

    def _watch(self) -> None:
        while not self._over.is_set():
            for pid in list(self._roots):
                self._look(pid)
            self._over.wait(INTERVAL)

    def _look(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            if peak := high_water(pid):
                self.peaks[pid] = max(self.peaks.get(pid, 0), peak)
            for task in Path(f"/proc/{pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    self._look(int(child))


def high_water(pid: int) -> int:
    """Return the peak memory of a process in KiB, or 0 if it is a zombie.

    Raises OSError if there is no such process.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def run(ground: Ground, pipeline: list[list[Any]], destination: str) -> Cost:
    """Run commands connected by pipes to their end, then sync the destination. Raises BenchError if one fails."""
    processes: list[subprocess.Popen[bytes]] = []
    with Memory() as memory:
        began = time.monotonic()
        before: Any = subprocess.DEVNULL
        for number, words in enumerate(pipeline, 1):
            output = {"stdout": subprocess.PIPE} if number < len(pipeline) else {}
            process = ground.popen(words, stdin=before, **output)
            memory.follow(process.pid)
            if before is not subprocess.DEVNULL:
                before.close()  # the next process has it
            before = process.stdout
            processes.append(process)
        watchdog = threading.Timer(
            TIME_LIMIT, lambda: [os.kill(process.pid, signal.SIGKILL) for process in processes]
        )
        watchdog.start()
        cpu = sum(wait(process) for process in processes)
        watchdog.cancel()
        seconds = time.monotonic() - began
        sync(destination)
        durable = time.monotonic() - began
    for words, process in zip(pipeline, processes, strict=True):
        if process.returncode:
            raise BenchError(ground.failure(words, process.returncode))
    peaks = [peak / 1024 for peak in memory.peaks.values()] or [0.0]
    return Cost(seconds, durable, cpu, max(peaks), sum(peaks))


def wait(process: subprocess.Popen[bytes]) -> float:
    """Wait for the end of `process`. Returns the CPU seconds of the process and the children that it waited for."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def sync(path: str) -> None:
    """Write the data of a file or device to its disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
