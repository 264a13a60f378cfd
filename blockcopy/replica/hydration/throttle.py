"""How fast the full pass may go: not at all while paused, within a limit, and little beside readers."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.replica.source.window import Window

BATCH_BLOCKS = 256
"""Blocks asked for as one, at most: 32 MiB, so that what it costs to ask hardly counts."""

_YIELDING_BLOCKS = 4
"""Blocks in hand while readers wait: what they may have to wait behind, and what keeps the pass going."""

_YIELDING_SECONDS = 0.25
"""How long after a demand the next one is expected."""

_LIMITED_SECONDS = 0.25
"""With a limit, a batch is at most what that lets through in this time, so that it comes evenly."""


class Throttle:
    """See the module. `demanded_at` tells when a reader last had to wait, in trio's time."""

    def __init__(self, window: Window, demanded_at: Callable[[], float], limit: int | None = None) -> None:
        """`window`: blocks in hand, at most. `limit` in bytes a second, of all that the pass goes through."""
        self._window = window
        self._demanded_at = demanded_at
        self._limit = limit
        self._paused = False
        self._in_hand = 0  # blocks
        self._free_at = -math.inf  # when the limit lets the next batch through
        self._changed = trio.Event()

    @property
    def paused(self) -> bool:
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        self._wake()

    @property
    def limit(self) -> int | None:
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        self._free_at = -math.inf
        self._wake()

    @property
    def batch_blocks(self) -> int:
        """Blocks that the next batch should have."""
        most = _YIELDING_BLOCKS if self._yields else min(BATCH_BLOCKS, self._window.blocks // 4)
        if self._limit is not None:
            most = min(most, int(self._limit * _LIMITED_SECONDS / BLOCK_SIZE))
        return max(1, most)

    @property
    def _yields(self) -> bool:
        return trio.current_time() - self._demanded_at() < _YIELDING_SECONDS

    async def admit(self) -> None:
        """Return when a batch of `batch_blocks` may be asked for; then `take` it."""
        while self._paused or trio.current_time() < self._free_at or not self._has_room():
            with trio.move_on_at(self._look_again_at()):
                await self._changed.wait()

    def _has_room(self) -> bool:
        window = _YIELDING_BLOCKS if self._yields else self._window.blocks
        return self._in_hand + self.batch_blocks <= window or not self._in_hand

    def _look_again_at(self) -> float:
        """When time alone can have changed the answer."""
        if self._paused:
            return math.inf
        if self._free_at > trio.current_time():
            return self._free_at
        return self._demanded_at() + _YIELDING_SECONDS if self._yields else math.inf

    def take(self, blocks: int) -> None:
        """So many blocks are in hand from now on, until they are given back."""
        self._in_hand += blocks
        if self._limit is not None:
            self._free_at = max(self._free_at, trio.current_time()) + blocks * BLOCK_SIZE / self._limit

    def give_back(self, blocks: int) -> None:
        """They are present, or have failed."""
        self._in_hand -= blocks
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
