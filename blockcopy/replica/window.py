"""How much may be in flight over a link: enough to fill it, and not so much that things queue in it.

What is in flight costs hardly any memory here, since answers go to the destination as they arrive. But
it delays a pause, and whoever shares the way. So the window grows while a flight lands about as soon as
the quickest did, which is what the round trip takes, and shrinks when flights land much later: then
they wait for one another. The idea is that of TCP Vegas (Brakmo, O'Malley and Peterson, 1994).
"""

from __future__ import annotations

import math

_PROMPT, _LATE = 0.1, 0.3
"""Seconds beyond the quickest flight: below the first there is room for more, above the second too much."""


class Window:
    """In blocks, from `least` to `most`."""

    def __init__(self, first: int, *, least: int, most: int) -> None:
        self.blocks = first
        self._least = least
        self._most = most
        self._quickest = math.inf

    def landed(self, blocks: int, seconds: float) -> None:
        """A flight of so many blocks has landed, so many seconds after it was asked for."""
        self._quickest = min(self._quickest, seconds)
        waited = seconds - self._quickest
        if waited < _PROMPT:
            self.blocks = min(self.blocks + blocks, self._most)
        elif waited > _LATE:
            self.blocks = max(self.blocks - blocks, self._least)
