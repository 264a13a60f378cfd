"""How much may be in flight over a link: enough to fill it, and not so much that things queue in it.

What is in flight costs hardly any memory here, since answers go to the destination as they arrive. But
it delays a pause, and whoever shares the way. So the window grows while a flight lands about as soon as
the quickest of late did, which is what the round trip takes, and shrinks when fetches land much later: then
they wait for one another. The idea is that of TCP Vegas (Brakmo, O'Malley and Peterson, 1994).

A route may become slower: what the quickest took is forgotten after BASE_SECONDS, as BBR does (Cardwell et al.,
2016).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_PROMPT, _LATE = 0.1, 0.3
"""Seconds beyond the quickest flight: below the first there is room for more, above the second too much."""

BASE_SECONDS = 10
"""For which the quickest flight is remembered."""


class Window:
    """In blocks, from `least` to `most`."""

    def __init__(self, first: int, *, least: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: returns seconds."""
        self.blocks = first
        self._least = least
        self._most = most
        self._clock = clock
        self._quick: deque[tuple[float, float]] = deque()
        """When fetches landed and the seconds they took, both ascending: each is the quickest since it landed."""

    def landed(self, blocks: int, seconds: float) -> None:
        """A flight of so many blocks has landed, so many seconds after it was asked for."""
        waited = seconds - self._least_of_late(seconds)
        if waited < _PROMPT:
            self.blocks = min(self.blocks + blocks, self._most)
        elif waited > _LATE:
            self.blocks = max(self.blocks - blocks, self._least)

    def _least_of_late(self, seconds: float) -> float:
        now = self._clock()
        while self._quick and self._quick[-1][1] >= seconds:
            self._quick.pop()
        self._quick.append((now, seconds))
        while self._quick[0][0] < now - BASE_SECONDS:
            self._quick.popleft()
        return self._quick[0][1]
