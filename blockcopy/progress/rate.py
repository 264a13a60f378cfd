"""Rates, percents, sizes and times of a running command, as numbers and as text for people.

Counts are of completed work, and percents are rounded down.
"""

from __future__ import annotations

import time
from collections import deque

_RATE_SECONDS = 10

_MIN_STEPS = 2


class RateMeter:
    """The rate of a byte counter over the last ten seconds. Not thread-safe."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SECONDS)

    def sample(self, count: int) -> None:
        """Note the current value of the counter, `count` bytes. Call once a second.

        A value below the previous one restarts the measurement.
        """
        if self._samples and count < self._samples[-1][1]:
            self._samples.clear()  # the counter counts something else now
        self._samples.append((time.monotonic(), count))

    def rate(self, count: int) -> int:
        """Return the rate in bytes per second. `count`: the current value of the counter, in bytes.

        Returns 0 before the first sample.
        """
        points = [*self._samples, (time.monotonic(), count)]
        steps = sorted((after[1] - before[1], after[0] - before[0]) for before, after in zip(points, points[1:]))
        if len(steps) > _MIN_STEPS:
            steps.pop()  # the largest: perhaps a hole, which predicts nothing
        return max(0, int(sum(count for count, _ in steps) / max(sum(time for _, time in steps), 0.001)))


def eta(done: int, total: int | None, rate: int) -> int | None:
    """Return the seconds until `done` bytes become `total`, at `rate` bytes per second, rounded up.

    Returns None if `total` is None or `rate` is 0.
    """
    return None if total is None or not rate else -(-max(0, total - done) // rate)


def floored_percent(part: int, whole: int) -> float:
    """Return `part` as a percentage of `whole`, a float rounded down to two decimals. Only the whole is 100."""
    return 100.0 if part >= whole else part * 10000 // whole / 100


def human_size(count: float) -> str:
    """Return `count` bytes as text in binary units, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_time(seconds: int) -> str:
    """Return `seconds` as M:SS, or as H:MM:SS from one hour on."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
