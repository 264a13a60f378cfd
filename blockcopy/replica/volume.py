"""The file as its reader sees it: the source's size and the source's bytes, or an error."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.device import Device
from blockcopy.block.geometry import Geometry
from blockcopy.errors import BlockcopyError, SourceError
from blockcopy.replica.hydration.hydrator import Hydrator, Lane
from blockcopy.replica.read_stats import ReadStats
from blockcopy.replica.readahead import ReadAhead
from blockcopy.replica.state.blockmap import BlockMap

logger = logging.getLogger(__name__)

_READ_THREADS = 8


class Volume:
    """`read` may be called by any number of tasks at once."""

    def __init__(
        self,
        device: Device,
        geometry: Geometry,
        blockmap: BlockMap,
        hydrator: Hydrator,
        lane: Lane,
        nursery: trio.Nursery,
        give_up_after: Callable[[int], float],
    ) -> None:
        """`give_up_after`: the most seconds that a read of so many blocks may wait for them, whatever happens."""
        self.size = geometry.size
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._hydrator = hydrator
        self._lane = lane
        self._nursery = nursery
        self._give_up_after = give_up_after
        self._threads = trio.CapacityLimiter(_READ_THREADS)
        self._ahead = ReadAhead(geometry.block_count, lane.window)
        self.demand = ReadStats()

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes from `offset` on: `length` of them, or up to the end. Raises BlockcopyError.

        They are good until the caller's task waits for anything: the buffer is used again.
        """
        length = max(0, min(length, self.size - offset))
        self.demand.reads += 1
        self.demand.bytes += length
        while True:
            generation = self._blockmap.generation
            if not self._blockmap.complete and length:
                await self._bring_all(self._geometry.span(offset, length))
            data = self._device.read_cached(offset, length)
            if data is not None and self._blockmap.generation == generation:
                return data
            read = await trio.to_thread.run_sync(self._device.read, offset, length, limiter=self._threads)
            if self._blockmap.generation == generation:  # else a sync failed, and it was of what was written
                return read

    async def _bring_all(self, blocks: range) -> None:
        missing = self._blockmap.any_missing(blocks)
        for ahead in self._ahead.touch(blocks, waits=missing):
            if self._blockmap.any_missing(ahead):
                self._nursery.start_soon(self._bring, ahead)
        if missing:
            with self.demand.wait():
                await self._ensure(blocks)

    async def _ensure(self, blocks: range) -> None:
        seconds = self._give_up_after(len(blocks))
        with trio.move_on_after(seconds):
            await self._hydrator.ensure(blocks, self._lane)
            return
        raise SourceError(f"the source gave blocks {blocks.start} to {blocks.stop - 1} not in {seconds:g} s")

    async def _bring(self, blocks: range) -> None:
        try:
            await self._hydrator.ensure(blocks, self._lane)
        except BlockcopyError as error:
            logger.debug("read-ahead of blocks %d to %d: %s", blocks.start, blocks.stop - 1, error)
