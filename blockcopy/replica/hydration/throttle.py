"""The throttle of background hydration: pause, rate limit, and room for readers."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.replica.source.window import Bounds

BATCH_BLOCKS = 256
"""Most blocks of one batch: 32 MiB, so that the cost of a request hardly counts."""

_YIELDING_BLOCKS = 4
"""Most blocks in flight while readers wait, unless a longer link holds more without a queue.

A reader may have to wait behind these blocks. They also keep background hydration going.
"""

_LONG_LINK_BLOCKS = 2
"""A link that holds so many blocks is kept full while readers wait: by small batches, one after another."""

_YIELDING_SECONDS = 0.25
"""Seconds after a demand read within which the next demand read is expected."""

_LIMITED_SECONDS = 0.25
"""Seconds of the rate limit that one batch may use up. Small batches make an even flow."""


class Throttle:
    """An admission control for batches of blocks. Call from trio's thread only.

    A caller awaits `admit`, calls `take` for the batch, and `give_back` when the batch has ended.
    """

    def __init__(
        self,
        window: Bounds,
        demanded_at: Callable[[], float],
        limit: int | None = None,
        *,
        link_holds: Callable[[], float] = lambda: 0,
    ) -> None:
        """Make a throttle that is not paused.

        `window`: bounds the blocks in flight.
        `demanded_at`: called without arguments, returns when a reader last had to wait, in trio's time.
        `limit`: bytes per second, of all blocks that background hydration looks at. None: no limit.
        `link_holds`: called without arguments, returns how many bytes fill the link without a queue.
        """
        self._window = window
        self._demanded_at = demanded_at
        self._limit = limit
        self._link_holds = link_holds
        self._paused = False
        self._in_flight = 0  # blocks
        self._free_at = -math.inf  # when the limit admits the next batch
        self._waiting = trio.lowlevel.ParkingLot()  # in `admit`

    @property
    def paused(self) -> bool:
        """Whether no batch is admitted. Assign True to pause, False to resume."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        self._waiting.unpark_all()

    @property
    def limit(self) -> int | None:
        """The rate limit in bytes per second, or None. A new limit holds at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        self._free_at = -math.inf
        self._waiting.unpark_all()

    @property
    def batch_blocks(self) -> int:
        """The most blocks that the next batch may have, at least 1."""
        return self._batch_blocks(yields=self.yields)

    def _batch_blocks(self, *, yields: bool) -> int:
        blocks = self._yielding[1] if yields else min(BATCH_BLOCKS, self._window.blocks_per_link // 4)
        if self._limit is not None:
            blocks = min(blocks, int(self._limit * _LIMITED_SECONDS / BLOCK_SIZE))
        return max(1, blocks)

    @property
    def is_limited(self) -> bool:
        """Whether the rate limit keeps the next batch back."""
        return trio.current_time() < self._free_at

    @property
    def yields(self) -> bool:
        """Whether readers wait, or did a moment ago. Then little is admitted."""
        return trio.current_time() < self._yields_until

    @property
    def _yields_until(self) -> float:
        return self._demanded_at() + _YIELDING_SECONDS

    @property
    def _yielding(self) -> tuple[int, int]:
        """The most blocks in flight and in a batch while readers wait."""
        held = math.ceil(self._link_holds() / BLOCK_SIZE)
        blocks = max(_YIELDING_BLOCKS, held)
        return blocks, max(1, blocks // 8) if held >= _LONG_LINK_BLOCKS else blocks

    async def admit(self) -> None:
        """Wait until a batch may be requested, of as many blocks as the attribute `batch_blocks` says.

        The caller calls `take` next.
        """
        while (until := self._kept_back_until()) is not None:
            with trio.move_on_at(until):
                await self._waiting.park()

    def _kept_back_until(self) -> float | None:
        """Return None if a batch may be requested now, or else when time alone can change that, in trio's time.

        The clock is read once. Between two looks the readers' time may end, and no answer would be right.
        """
        if self._paused:
            return math.inf
        now, yields_until = trio.current_time(), self._yields_until
        if now < self._free_at:
            return self._free_at
        yields = now < yields_until
        max_blocks = self._yielding[0] if yields else self._window.blocks
        if self._in_flight + self._batch_blocks(yields=yields) <= max_blocks:
            return None
        return yields_until if yields else math.inf

    def take(self, blocks: int) -> None:
        """Count a number of `blocks` as in flight, until `give_back`. The rate limit counts them too."""
        self._in_flight += blocks
        if self._limit is not None:
            self._free_at = max(self._free_at, trio.current_time()) + blocks * BLOCK_SIZE / self._limit

    def give_back(self, blocks: int) -> None:
        """Count a number of `blocks` as no longer in flight: they are present, or have failed."""
        self._in_flight -= blocks
        self._waiting.unpark_all()
