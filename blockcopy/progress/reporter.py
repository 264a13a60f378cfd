"""How far a command is, told while it runs: as the original's plain lines, as JSON, or not at all.

    with PROGRESS as progress:        command: progress.update(Counts(done, total)), from any thread, as often
        …                             as there is news; progress.finish() once all is done

The bar for terminals is one more of these (`bar`). Counted is completed work, and percents are floored.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Callable, NamedTuple

from blockcopy.progress.rate import RateMeter, eta, floored_percent


class Counts(NamedTuple):
    """`done` bytes of `total`, which is None where nobody knows it yet.

    `parts`: what became of the bytes that are done, by name: `same`, `fetched`, `zero` and so on. `position`:
    where on the device it is. `state`: a word for what goes on, where there is more than one thing. `skipped`: of
    the bytes done, those that nothing had to be done for (holes). They count for no rate.
    """

    done: int
    total: int | None = None
    parts: Mapping[str, int] = {}
    position: int | None = None
    state: str | None = None
    skipped: int = 0


class Progress:
    """Tells nobody anything; the others tell more."""

    silent = True
    """Nobody needs to tell it anything, either."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is told from now on."""

    def update(self, counts: Counts) -> None:
        """So far it is."""

    def finish(self) -> None:
        """All is done."""

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While something else is written to the terminal."""
        yield


_LINE_SECONDS = 60
_LINE_PERCENT = 5


class LineProgress(Progress):
    """The original's plain lines: one each 5 percent or 60 seconds, whichever comes first."""

    silent = False

    def __init__(self, command: str, write: Callable[[str], None]) -> None:
        """As long as nobody knows the total, nothing is told; the end is, in any case."""
        self._what = command.capitalize()
        self._write = write
        self._started = self._told_at = time.monotonic()
        self._told = 0.0

    def update(self, counts: Counts) -> None:
        if not counts.total:
            return
        percent = 100 * counts.done / counts.total
        now = time.monotonic()
        if now - self._told_at >= _LINE_SECONDS or percent - self._told >= _LINE_PERCENT:
            self._told_at, self._told = now, percent
            position = counts.done if counts.position is None else counts.position
            self._write(
                f"{self._what} progress: {position / 2**30:7.2f} GB / {counts.total / 2**30:.2f} GB "
                f"({floored_percent(counts.done, counts.total):5.2f}%)"
            )

    def finish(self) -> None:
        self._write(f"{self._what} done in {time.monotonic() - self._started:.3f} seconds")


class Figures(NamedTuple):
    """Counts, and what time makes of them: bytes a second, and seconds."""

    counts: Counts
    rate: int
    eta: int | None
    elapsed: float
    finished: bool


_FAREWELL_SECONDS = 2
"""How long the end waits for a terminal that takes nothing any more."""


class TimedProgress(Progress):
    """Tells each so many seconds, from a thread of its own, whether there is news or not; and once in the end."""

    silent = False
    seconds = 1.0

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
        self._thread.join(_FAREWELL_SECONDS)

    def update(self, counts: Counts) -> None:
        self._counts = counts

    def finish(self) -> None:
        self._finished = True

    def _run(self) -> None:
        # OSError: nobody reads it any more; what the command does goes on.
        with contextlib.suppress(OSError), self._opened():
            while not self._ended.wait(self.seconds):
                self._tell(self._figures())
            self._tell(self._figures())

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Around all that is told."""
        yield

    def _tell(self, figures: Figures) -> None:
        raise NotImplementedError

    def _figures(self) -> Figures:
        counts, now = self._counts, time.monotonic()
        if now - self._sampled_at >= 1:
            self._meter.sample(counts.done - counts.skipped)
            self._sampled_at = now
        rate = self._meter.rate(counts.done - counts.skipped)
        elapsed = now - self._started
        if self._finished:
            passed_over = counts.skipped + counts.parts.get("resumed", 0)
            rate = int((counts.done - passed_over) / max(elapsed, 0.001))  # of all of it
        return Figures(counts, rate, eta(counts.done, counts.total, rate), elapsed, self._finished)


class JsonProgress(TimedProgress):
    """A line of JSON each second, for programs."""

    def __init__(self, command: str, write: Callable[[str], None]) -> None:
        super().__init__()
        self._command = command
        self._write = write

    def _tell(self, figures: Figures) -> None:
        self._write(json.dumps({"command": self._command, **as_json(figures)}))


def as_json(figures: Figures) -> dict[str, Any]:
    """The fields of a line of `--progress=json`; those that are not known are null."""
    counts = figures.counts
    return {
        "state": counts.state,
        "finished": figures.finished,
        "done_bytes": counts.done,
        "total_bytes": counts.total,
        "percent": None if counts.total is None else floored_percent(counts.done, counts.total),
        **{f"{name}_bytes": count for name, count in counts.parts.items()},
        "rate_bytes_per_s": figures.rate,
        "eta_seconds": figures.eta,
        "elapsed_seconds": round(figures.elapsed, 3),
    }
