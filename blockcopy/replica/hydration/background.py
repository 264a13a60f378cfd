"""The full pass: brings everything that is still missing, at the pace it is given.

It follows the reader: on from behind the latest demand to the end, then what is left from the start.
What neither end has, holes in both, is found by asking for holes, ahead of the sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import trio

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, Geometry
from blockcopy.errors import BlockcopyError, SourceReadError
from blockcopy.replica.hydration.hydrator import Hydrator, Lane
from blockcopy.replica.hydration.throttle import Throttle
from blockcopy.replica.state.blockmap import BlockMap

logger = logging.getLogger(__name__)

_SURVEYED = 64 << 30
"""Bytes of which holes are asked for at once: a bound for what the answer can take."""


class BackgroundHydration:
    """One full pass. `read_stats` is the readers' lane, `lane` the pass's own; they may be the same."""

    def __init__(
        self,
        hydrator: Hydrator,
        device: Device,
        geometry: Geometry,
        blockmap: BlockMap,
        demand: Lane,
        lane: Lane,
        throttle: Throttle,
    ) -> None:
        self._hydrator = hydrator
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._demand = demand
        self._lane = lane
        self._throttle = throttle
        self._in_hand: set[int] = set()
        self._error: BlockcopyError | None = None

    async def run(self) -> None:
        """Return when nothing is missing but what the source cannot read.

        Raises the first other error; what is in flight then still lands.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._survey)
            # Once, unless a failed sync made it forget what it had.
            while next(self._blockmap.fetchable(range(self._geometry.block_count)), None) is not None:
                await self._sweep()
                if self._error is not None:
                    nursery.cancel_scope.cancel()
                    break
            nursery.cancel_scope.cancel()
        if self._error is not None:
            raise self._error

    async def _sweep(self) -> None:
        start, followed = 0, self._demand.wanted_at
        async with trio.open_nursery() as nursery:
            while True:
                await self._throttle.admit()
                if self._error is not None:
                    break
                if self._demand is not self._lane and self._demand.wanted_at != followed:
                    followed = self._demand.wanted_at
                    start = min(self._demand.wanted_up_to, self._geometry.block_count)
                first = self._next(range(start, self._geometry.block_count))
                if first is None:
                    first = self._next(range(start))
                if first is None:
                    break
                start = self._end_of_batch(first)
                # Blocks that are here already cost nothing: they count for no limit.
                count = sum(1 for _ in self._blockmap.fetchable(range(first, start)))
                self._throttle.take(count)
                self._in_hand.update(range(first, start))
                nursery.start_soon(self._bring, range(first, start), count)

    def _next(self, blocks: range) -> int | None:
        """The first that is missing and can be had, as far as is known, and that nobody here is bringing."""
        return next((block for block in self._blockmap.fetchable(blocks) if block not in self._in_hand), None)

    def _end_of_batch(self, first: int) -> int:
        """Return where a batch from `first` on ends: at a block that was set aside, at the latest."""
        stop = min(first + self._throttle.batch_blocks, self._geometry.block_count)
        return next(filter(self._blockmap.is_unreadable, range(first, stop)), stop)

    async def _bring(self, blocks: range, count: int) -> None:
        try:
            await self._hydrator.ensure(blocks, self._lane)
        except SourceReadError:
            pass  # all others of them are here; what is not, the block map knows
        except BlockcopyError as error:
            self._error = self._error or error
        finally:
            self._in_hand.difference_update(blocks)
            self._throttle.give_back(count)

    async def _survey(self) -> None:
        """Mark what is a hole at both ends. Where that cannot be learnt, the sweep comes by all the same."""
        if self._device.is_block_device:
            return  # those have no holes that show
        for start in range(0, self._geometry.size, _SURVEYED):
            await self._throttle.admit()
            extent = Extent(start, min(_SURVEYED, self._geometry.size - start))
            generation = self._blockmap.generation
            try:
                holes = await self._lane.link.holes(extent, self._geometry.block_size, trio.current_time())
                both = await trio.to_thread.run_sync(list, _common_holes(self._device, self._geometry, holes))
            except BlockcopyError as error:
                logger.debug("holes of the source are not known: %s", error)
                return
            for blocks in both:
                self._hydrator.mark_zero(blocks, generation)


def _common_holes(device: Device, geometry: Geometry, holes: list[Extent]) -> Iterator[range]:
    """The blocks that lie wholly in `holes` and in holes of `device`."""
    for hole in holes:
        start = hole.offset
        for extent in device.data_extents(*hole):
            yield _whole_blocks(geometry, start, extent.offset)
            start = extent.end
        yield _whole_blocks(geometry, start, hole.end)


def _whole_blocks(geometry: Geometry, start: int, end: int) -> range:
    stop = geometry.block_count if end >= geometry.size else end // geometry.block_size
    return range(-(-start // geometry.block_size), stop)
