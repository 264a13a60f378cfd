"""Background hydration: request all blocks that are still missing, at the rate that the throttle admits.

The order follows the reader. It goes from the latest demand read to the end of the device, then from the start.
Ahead of it, a survey asks the source for its holes. Blocks that are holes at both ends need no request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import trio

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, Geometry
from blockcopy.errors import BlockcopyError, SourceReadError
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.hydration.lanes import Lane
from blockcopy.replica.hydration.throttle import Throttle

logger = logging.getLogger(__name__)

_SURVEY_BYTES = 64 << 30
"""Bytes of the device whose holes are requested at once. This bounds the memory of an answer."""


class BackgroundHydration:
    """A run of background hydration over the whole device."""

    def __init__(
        self, hydrator: Hydrator, demand: Lane, bulk: Lane, throttle: Throttle, wanted: Sequence[range]
    ) -> None:
        """Prepare a run with `hydrator`, at the rate that `throttle` admits.

        `demand`: the lane of the readers, whose requests are followed.
        `bulk`: the lane of this run. It may be the same lane.
        `wanted`: ranges of block numbers, ascending.
        """
        self._hydrator = hydrator
        self._device = hydrator.device
        self._blockmap = hydrator.blockmap
        self._geometry = hydrator.blockmap.geometry
        self._demand = demand
        self._bulk = bulk
        self._throttle = throttle
        self._wanted = wanted
        self._in_flight: set[int] = set()
        self._error: BlockcopyError | None = None

    async def run(self) -> None:
        """Hydrate until no block is missing, except blocks that the source cannot read.

        Raises the first other BlockcopyError, after all requests in flight have ended.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._survey_holes)
            # Once, except if a failed sync cleared the block map.
            while any(next(self._blockmap.fetchable(blocks), None) is not None for blocks in self._wanted):
                await self._request_all()
                if self._error is not None:
                    break
            nursery.cancel_scope.cancel()
        if self._error is not None:
            raise self._error

    async def _request_all(self) -> None:
        """Request each wanted block once. Returns when all requests have ended, or one has failed."""
        start, followed = 0, self._demand.requested_at
        async with trio.open_nursery() as nursery:
            while True:
                await self._throttle.admit()
                if self._error is not None:
                    break
                if self._demand is not self._bulk and self._demand.requested_at != followed:
                    followed = self._demand.requested_at
                    start = min(self._demand.requested_end, self._geometry.block_count)
                span = self._next(range(start, self._geometry.block_count)) or self._next(range(start))
                if span is None:
                    break
                first, start = span.start, self._end_of_batch(span)
                # Blocks that are present already cost nothing: no limit counts them.
                count = sum(1 for _ in self._blockmap.fetchable(range(first, start)))
                self._throttle.take(count)
                self._in_flight.update(range(first, start))
                nursery.start_soon(self._request, range(first, start), count)

    def _next(self, blocks: range) -> range | None:
        """Return the wanted blocks from the first in the range `blocks` that is not requested yet, or None."""
        for wanted in self._wanted:
            span = range(max(blocks.start, wanted.start), min(blocks.stop, wanted.stop))
            for block in self._blockmap.fetchable(span):
                if block not in self._in_flight:
                    return range(block, wanted.stop)
        return None

    def _end_of_batch(self, span: range) -> int:
        """Return where a batch from the start of `span` on ends: a block number. An unreadable block ends it."""
        stop = min(span.start + self._throttle.batch_blocks, span.stop)
        return next(filter(self._blockmap.is_unreadable, range(span.start, stop)), stop)

    async def _request(self, blocks: range, count: int) -> None:
        try:
            await self._hydrator.ensure(blocks, self._bulk)
        except SourceReadError:
            pass  # the block map knows the unreadable blocks, and all others are present
        except BlockcopyError as error:
            self._error = self._error or error
        finally:
            self._in_flight.difference_update(blocks)
            self._throttle.give_back(count)

    async def _survey_holes(self) -> None:
        """Mark all blocks that are holes at both ends. If holes are unknown, their blocks are requested anyway."""
        if self._device.is_block_device:
            return  # a block device shows no holes
        for extent in self._surveyed():
            await self._throttle.admit()
            generation = self._blockmap.generation
            try:
                holes = await self._bulk.pool.holes(extent, self._geometry.block_size, trio.current_time())
                common = await trio.to_thread.run_sync(list, _common_holes(self._device, self._geometry, holes))
            except BlockcopyError as error:
                logger.debug("cannot find the holes of the source: %s", error)
                return
            for blocks in common:
                self._hydrator.mark_zeros(blocks, generation)

    def _surveyed(self) -> Iterator[Extent]:
        """Yield the byte ranges of the wanted blocks, in parts of at most `_SURVEY_BYTES`."""
        for blocks in self._wanted:
            first = blocks.start * self._geometry.block_size
            end = first + self._geometry.bytes_of(blocks)
            for start in range(first, end, _SURVEY_BYTES):
                yield Extent(start, min(_SURVEY_BYTES, end - start))


def _common_holes(device: Device, geometry: Geometry, holes: list[Extent]) -> Iterator[range]:
    """Yield ranges of blocks of `geometry` that lie wholly in one of `holes` and wholly in a hole of `device`.

    Some ranges may be empty.
    """
    for hole in holes:
        start = hole.offset
        for extent in device.data_extents(*hole):
            yield _whole_blocks(geometry, start, extent.offset)
            start = extent.end
        yield _whole_blocks(geometry, start, hole.end)


def _whole_blocks(geometry: Geometry, start: int, end: int) -> range:
    stop = geometry.block_count if end >= geometry.size else end // geometry.block_size
    return range(-(-start // geometry.block_size), stop)
