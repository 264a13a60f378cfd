"""Exponential back-off with jitter: how long to wait before the next attempt to connect.

Half of each delay is random. So many clients that lost the same host do not return to it at the same time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

FIRST_SECONDS, MAX_SECONDS = 1.0, 30.0


def delays() -> Iterator[float]:
    """Yield the seconds to wait before each attempt: 1, 2, 4 … 30, each shortened by up to a half.

    Begin anew after an attempt that was successful.
    """
    seconds = FIRST_SECONDS
    while True:
        yield seconds * (1 + random.random()) / 2
        seconds = min(seconds * 2, MAX_SECONDS)
