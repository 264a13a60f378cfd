"""Progress as lines: the original program's, or JSON. Percents are rounded down."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple

from blockcopy.progress.rate import RateMeter, eta, floored_percent
from blockcopy.progress.reporter import Counts, Progress

_LINE_SECONDS = 60
_LINE_PERCENT = 5

_ORIGINAL = ("checksum", "retrieve", "save")
"""Commands of the original program. It calls a GiB a GB, and scripts may read its lines."""


class LineProgress(Progress):
    """A reporter of the original's lines: one for each 5 percent, and after 60 seconds without a line."""

    silent = False

    def __init__(self, command: str, write: Callable[[str], None]) -> None:
        """Report nothing until the total is known, but the end in any case.

        `command`: name of the command, such as "checksum". `write`: called with each line.
        """
        self._what = command.capitalize()
        self._unit = "GB" if command in _ORIGINAL else "GiB"
        self._write = write
        self._started = self._reported_at = time.monotonic()
        self._reported_percent = 0.0

    def update(self, counts: Counts) -> None:
        """Write a line if one is due for the current `counts`."""
        if not counts.total:
            return
        percent = 100 * counts.done / counts.total
        now = time.monotonic()
        if now - self._reported_at >= _LINE_SECONDS or percent - self._reported_percent >= _LINE_PERCENT:
            self._reported_at, self._reported_percent = now, percent
            position = counts.done if counts.position is None else counts.position
            unit = self._unit
            self._write(
                f"{self._what} progress: {position / 2**30:7.2f} {unit} / {counts.total / 2**30:.2f} {unit} "
                f"({floored_percent(counts.done, counts.total):5.2f}%)"
            )

    def finish(self) -> None:
        """Write the last line, with the time that the command took."""
        self._write(f"{self._what} done in {time.monotonic() - self._started:.3f} seconds")


class Figures(NamedTuple):
    """The `counts` of a command, with the figures that follow from time."""

    counts: Counts
    rate: int
    """Bytes per second."""
    eta: int | None
    """Seconds to the end. None if unknown."""
    elapsed: float
    """Seconds since the start."""
    finished: bool


_EXIT_SECONDS = 2
"""Seconds to wait at the end for a terminal that accepts no more output."""


class TimedProgress(Progress):
    """A reporter with a thread of its own, which reports at a fixed interval and once at the end."""

    silent = False
    seconds = 1.0
    """The interval."""

    def __init__(self) -> None:
        self._counts = Counts(0)
        self._finished = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._started = time.monotonic()
        self._meter = RateMeter()
        self._sampled_at = -1.0

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(_EXIT_SECONDS)

    def update(self, counts: Counts) -> None:
        """Keep `counts` for the next report. Thread-safe."""
        self._counts = counts

    def finish(self) -> None:
        """Note that the work is complete: the last report has the average rate."""
        self._finished = True

    def _run(self) -> None:
        # OSError: the reader is gone. The command itself goes on.
        with contextlib.suppress(OSError), self._opened():
            while not self._ended.wait(self.seconds):
                self._report(self._figures())
            self._report(self._figures())

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Return a context manager that surrounds all reports, for subclasses that open something."""
        yield

    def _report(self, figures: Figures) -> None:
        """Write one report of `figures`."""
        raise NotImplementedError

    def _figures(self) -> Figures:
        counts, now = self._counts, time.monotonic()
        if now - self._sampled_at >= 1:
            self._meter.sample(counts.done - counts.skipped)
            self._sampled_at = now
        rate = self._meter.rate(counts.done - counts.skipped)
        elapsed = now - self._started
        if self._finished:
            unworked = counts.skipped + counts.parts.get("resumed", 0)
            rate = int((counts.done - unworked) / max(elapsed, 0.001))  # the average of all work
        return Figures(counts, rate, eta(counts.done, counts.total, rate), elapsed, self._finished)


class JsonProgress(TimedProgress):
    """A reporter of a line of JSON each second, for programs.

    `command`: its name, a field of each line. `write`: called with each line.
    """

    def __init__(self, command: str, write: Callable[[str], None]) -> None:
        super().__init__()
        self._command = command
        self._write = write
        self._parts: dict[str, int] = {}  # the latest ones: each line has them, whatever the command does

    def _report(self, figures: Figures) -> None:
        counts = figures.counts
        self._parts.update(counts.parts)
        fields = {
            "command": self._command,
            "state": counts.state,
            "finished": figures.finished,
            "done_bytes": counts.done,
            "total_bytes": counts.total,
            "percent": None if counts.total is None else floored_percent(counts.done, counts.total),
            **{f"{name}_bytes": count for name, count in self._parts.items()},
            "rate_bytes_per_s": figures.rate,
            "eta_seconds": figures.eta,
            "elapsed_seconds": round(figures.elapsed, 3),
        }
        self._write(json.dumps(fields))
