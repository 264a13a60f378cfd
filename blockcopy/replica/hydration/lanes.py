"""The lanes of a replica: a pool of connections each, and the bounds for what is in flight.

The demand lane serves readers: small batches, which land soon. The bulk lane serves background hydration: large
batches, which cost little per block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from blockcopy.errors import BlockcopyError
from blockcopy.replica.hydration.throttle import BATCH_BLOCKS
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.source.window import Window, Windows
from blockcopy.stage.pipeline import WORKERS

_DEMAND_BATCH_BLOCKS = 16
"""Most blocks of a demand fetch: 2 MiB. A reader of one of them waits for all."""

_INITIAL_WINDOW, _MIN_WINDOW = 32, 8
"""Blocks that a link has in flight at first, and at least."""

_INITIAL_SYNC_WINDOW = 256
"""Blocks that a link has in flight at first if there are no readers. Equal blocks cross a long link soon then."""

_LOCAL_WINDOW = 1024
"""Blocks that a link without a network has in flight at first if there are no readers: 128 MiB."""

_MAX_DEMAND_WINDOW, _MAX_BULK_WINDOW = 512, 4096
"""Most blocks in flight on a link. 4096 equal blocks fill 5 GB/s over a round trip of 100 ms."""

_MAX_FETCHES = 64
"""Most fetches of a lane at once."""

_DEMAND_THREADS = 4
"""Most threads that digest blocks for readers."""

_DEMAND_HEDGE_SECONDS = 0.05
"""Seconds until a reader requests a block that is in flight on the bulk lane. A fast link needs less."""

_BULK_HEDGE_SECONDS = 2
"""Seconds until background hydration requests a block that is in flight on the demand lane."""


@dataclass(eq=False)
class Fetch:
    """A request for some blocks, and how it ended."""

    blocks: Sequence[int]
    """Block numbers."""
    since: float
    """When the blocks were first wanted, in trio's time."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancelled if all blocks are present already."""
    ended: trio.Event = field(default_factory=trio.Event)
    error: BlockcopyError | None = None
    """The error of a fetch that failed. None if it has succeeded."""


@dataclass(eq=False)
class Lane:
    """A pool of connections, and the bounds for what is in flight.

    A replica has two lanes: demand for readers, bulk for background hydration.
    """

    pool: Pool
    batch_blocks: int
    """Most blocks of a fetch."""
    threads: trio.CapacityLimiter
    """A limiter of the threads that read and digest the destination."""
    hedge_after: float
    """Seconds to wait for a block in flight on another lane, before this lane requests it too."""
    drop_behind: bool = False
    """Drop bytes of the destination from the page cache once they are digested."""
    fetches: trio.CapacityLimiter = field(default_factory=partial(trio.CapacityLimiter, _MAX_FETCHES))
    """A limiter of the fetches."""
    in_flight: dict[int, Fetch] = field(default_factory=dict)
    """The fetch of each block in flight on this lane, by block number."""
    active_at: float = -math.inf
    """When a fetch last began or ended, in trio's time."""
    requested_at: float = -math.inf
    """When a fetch last began, in trio's time."""
    requested_end: int = 0
    """The block number after the last block of the latest fetch."""

    @property
    def window(self) -> Windows:
        """The bounds for the blocks in flight that nobody waits for."""
        return self.pool.window

    def add(self, fetch: Fetch) -> None:
        """Put the blocks of `fetch` in flight."""
        self.in_flight.update(dict.fromkeys(fetch.blocks, fetch))
        self.active_at = self.requested_at = trio.current_time()
        self.requested_end = fetch.blocks[-1] + 1

    def remove(self, fetch: Fetch) -> None:
        """Remove the blocks of `fetch` from those in flight."""
        for block in fetch.blocks:
            del self.in_flight[block]
        self.active_at = trio.current_time()


def demand_window() -> Window:
    """Return the Window of a new link for readers."""
    return Window(_INITIAL_WINDOW, min_blocks=_MIN_WINDOW, max_blocks=_MAX_DEMAND_WINDOW)


def bulk_window(*, has_readers: bool, is_local: bool) -> Window:
    """Return the Window of a new link for background hydration.

    `has_readers`: whether readers share the source. `is_local`: whether there is no network. Without both, the
    window is full from the start.
    """
    initial = _INITIAL_WINDOW if has_readers else _LOCAL_WINDOW if is_local else _INITIAL_SYNC_WINDOW
    return Window(initial, min_blocks=_MIN_WINDOW, max_blocks=_MAX_BULK_WINDOW)


def demand_lane(pool: Pool) -> Lane:
    """Return a new lane for readers over `pool`."""
    return Lane(
        pool,
        batch_blocks=_DEMAND_BATCH_BLOCKS,
        threads=trio.CapacityLimiter(_DEMAND_THREADS),
        hedge_after=_DEMAND_HEDGE_SECONDS,
    )


def bulk_lane(pool: Pool, *, drop_behind: bool) -> Lane:
    """Return a new lane for background hydration over `pool`.

    `drop_behind`: drop bytes of the destination from the page cache once they are digested.
    """
    return Lane(
        pool,
        batch_blocks=BATCH_BLOCKS,
        threads=trio.CapacityLimiter(WORKERS),
        hedge_after=_BULK_HEDGE_SECONDS,
        drop_behind=drop_behind,
    )
