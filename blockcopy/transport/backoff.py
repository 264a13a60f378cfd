"""Exponential back-off with jitter: how long to wait before the next attempt to connect.

Half of each delay is random. So many clients that lost the same host do not return to it at the same time.
"""

from __future__ import annotations

import random
from typing import Callable

FIRST_SECONDS, MAX_SECONDS = 1.0, 30.0


class Backoff:
    """Delays of 1, 2, 4 … 30 seconds, each shortened at random by up to a half."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        """Start with the shortest delay. `chance`: called without arguments, returns a number from 0 to 1."""
        self._chance = chance
        self._seconds = FIRST_SECONDS

    def reset(self) -> None:
        """Return to the shortest delay, after an attempt that was successful."""
        self._seconds = FIRST_SECONDS

    def next(self) -> float:
        """Return the seconds to wait before the next attempt, and double the delay after that one."""
        seconds, self._seconds = self._seconds, min(self._seconds * 2, MAX_SECONDS)
        return seconds * (1 + self._chance()) / 2
