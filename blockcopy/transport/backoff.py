"""How long to wait before the next attempt to connect: exponential back-off with jitter.

Half of each delay is chance, so that many that lost the same host do not come back to it all at once.
"""

from __future__ import annotations

import random
from typing import Callable

FIRST_SECONDS, MAX_SECONDS = 1.0, 30.0


class Backoff:
    """Delays of 1, 2, 4 … 30 seconds, each less by up to its half."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        """`chance`: returns a number from 0 to 1."""
        self._chance = chance
        self._seconds = FIRST_SECONDS

    def reset(self) -> None:
        """Begin anew, after an attempt that was of use."""
        self._seconds = FIRST_SECONDS

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        seconds, self._seconds = self._seconds, min(self._seconds * 2, MAX_SECONDS)
        return seconds * (1 + self._chance()) / 2
