"""Figures of something that goes on: its rate, how much of it is done, and how people read both.

They count completed work, and percents are floored.
"""

from __future__ import annotations

import time
from collections import deque

_RATE_SECONDS = 10

_ENOUGH = 2


class RateMeter:
    """Bytes a second over the last ten seconds, of a counter that is sampled each second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SECONDS)

    def sample(self, count: int) -> None:
        if self._samples and count < self._samples[-1][1]:
            self._samples.clear()  # it counts something else from now on
        self._samples.append((time.monotonic(), count))

    def rate(self, count: int) -> int:
        """Of the counter that stands at `count` now; 0 as long as nothing can be said."""
        points = [*self._samples, (time.monotonic(), count)]
        steps = sorted((after[1] - before[1], after[0] - before[0]) for before, after in zip(points, points[1:]))
        if len(steps) > _ENOUGH:
            steps.pop()  # the largest: a hole that was found, say, which tells nothing of what is to come
        return max(0, int(sum(count for count, _ in steps) / max(sum(time for _, time in steps), 0.001)))


def eta(done: int, total: int | None, rate: int) -> int | None:
    """Seconds to go, rounded up; None where nobody can say."""
    return None if total is None or not rate else -(-max(0, total - done) // rate)


def floored_percent(part: int, whole: int) -> float:
    """With two digits, and 100 only for the whole."""
    return 100.0 if part >= whole else part * 10000 // whole / 100


def human_size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_time(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
