"""The window of a link: how many blocks may be outstanding, to fill the link without a queue in it.

Outstanding blocks were asked for and have not arrived. They cost hardly any memory, because answers are written as
they arrive. But they delay a pause, and everybody who shares the route.

So the window grows while a fetch takes about as long as the quickest recent one, the round trip. The window
shrinks when fetches take much longer: then they wait for one another. The idea is that of TCP Vegas (Brakmo,
O'Malley and Peterson, 1994). A route may become slower. So the quickest fetch is forgotten after BASE_SECONDS, as
BBR does (Cardwell et al., 2016).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

_GROW_BELOW, _SHRINK_ABOVE = 0.1, 0.3
"""Seconds that a fetch took beyond the quickest one. Below the first the window grows, above the second it
shrinks.
"""

BASE_SECONDS = 10
"""For so many seconds the quickest fetch is remembered."""


class Bounds(Protocol):
    """The bounds for the blocks in flight on one link or several."""

    @property
    def blocks(self) -> int:
        """The blocks that may be in flight."""

    @property
    def blocks_per_link(self) -> int:
        """The blocks that may be in flight on one link."""


class Window:
    """The number of blocks that may be outstanding on one link."""

    def __init__(self, initial_blocks: int, *, min_blocks: int, max_blocks: int) -> None:
        """Start with `initial_blocks`, and stay between `min_blocks` and `max_blocks`."""
        self.blocks = initial_blocks
        self._min = min_blocks
        self._max = max_blocks
        self._quickest: deque[tuple[float, float]] = deque()
        """(time, seconds) of recent fetches, both ascending. Each fetch is the quickest one since its time."""

    @property
    def blocks_per_link(self) -> int:
        """The same number. A pool of several links has more blocks in all than per link."""
        return self.blocks

    def record_fetch(self, blocks: int, seconds: float) -> None:
        """Adapt the window to a fetch of `blocks` blocks that took `seconds` seconds."""
        now = time.monotonic()
        while self._quickest and self._quickest[-1][1] >= seconds:
            self._quickest.pop()
        self._quickest.append((now, seconds))
        while self._quickest[0][0] < now - BASE_SECONDS:
            self._quickest.popleft()
        waited = seconds - self._quickest[0][1]  # beyond the quickest recent fetch
        if waited < _GROW_BELOW:
            self.blocks = min(self.blocks + blocks, self._max)
        elif waited > _SHRINK_ABOVE:
            self.blocks = max(self.blocks - blocks, self._min)


class Windows:
    """The bounds for the blocks in flight on several links together."""

    def __init__(self, windows: Callable[[], Sequence[Window]]) -> None:
        """Add up windows. `windows`: called without arguments, returns the present ones, at least one."""
        self._windows = windows

    @property
    def blocks(self) -> int:
        """The blocks that may be in flight on all links."""
        return sum(window.blocks for window in self._windows())

    @property
    def blocks_per_link(self) -> int:
        """The blocks that may be in flight on a link of average window."""
        windows = self._windows()
        return sum(window.blocks for window in windows) // len(windows)


def default_window() -> Window:
    """Return the Window of a link that nothing is known of: it begins with 32 blocks."""
    return Window(32, min_blocks=8, max_blocks=1024)
