"""The file as its reader sees it: the source's size and the source's bytes, or an error.

Reads that follow one another are read ahead for: from the second on, twice as far each time, up to
_READ_AHEAD blocks, so that a reader in order finds the next blocks present. Several readers at once
have a stream each; the ones not heard of longest are forgotten.
"""

from __future__ import annotations

import logging

import trio

from blockcopy.device import Device
from blockcopy.errors import BlockcopyError, SourceError
from blockcopy.geometry import Geometry
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.materialiser import Lane, Materialiser

logger = logging.getLogger(__name__)

_READ_AHEAD = 32
_STREAMS = 16
_READ_THREADS = 8


class _Stream:
    """A reader in order: the block it is expected at next, and how far ahead was asked for."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.window = 1
        self.ahead = expected


class Volume:
    """`read` may be called by any number of tasks at once."""

    def __init__(
        self,
        device: Device,
        geometry: Geometry,
        blockmap: BlockMap,
        materialiser: Materialiser,
        lane: Lane,
        nursery: trio.Nursery,
        patience: float,
    ) -> None:
        """`patience`: the most seconds that a read may take to have its blocks, whatever happens."""
        self.size = geometry.size
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._materialiser = materialiser
        self._lane = lane
        self._nursery = nursery
        self._patience = patience
        self._threads = trio.CapacityLimiter(_READ_THREADS)
        self._streams: list[_Stream] = []  # the one read last is last

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on: `length` of them, or up to the end. Raises BlockcopyError."""
        length = max(0, min(length, self.size - offset))
        blocks = self._geometry.span(offset, length)
        if not blocks:
            return b""
        if not self._blockmap.complete:
            self._read_ahead(blocks)
            if self._blockmap.any_missing(blocks):
                await self._ensure(blocks)
        data = self._device.read_cached(offset, length)
        if data is None:
            data = await trio.to_thread.run_sync(self._device.read, offset, length, limiter=self._threads)
        return data

    async def _ensure(self, blocks: range) -> None:
        with trio.move_on_after(self._patience):
            await self._materialiser.ensure(blocks, self._lane)
            return
        raise SourceError(f"the source gave blocks {blocks.start} to {blocks.stop - 1} not in {self._patience:g} s")

    def _read_ahead(self, blocks: range) -> None:
        """Note that `blocks` are read; start bringing what this reader is likely to read next."""
        stream = self._stream_at(blocks)
        if stream is None:
            self._streams = [*self._streams[1 - _STREAMS :], _Stream(blocks.stop)]
            return
        self._streams.remove(stream)
        self._streams.append(stream)
        if blocks.stop <= stream.expected:
            return  # the rest of a block it is in already
        stream.expected = blocks.stop
        stream.window = min(stream.window * 2, _READ_AHEAD)
        ahead = range(max(stream.ahead, blocks.stop), min(blocks.stop + stream.window, self._geometry.blocks))
        # In pieces of half a window, so that asking ahead is as much in bulk as it may be.
        if len(ahead) >= stream.window // 2 and self._blockmap.any_missing(ahead):
            stream.ahead = ahead.stop
            self._nursery.start_soon(self._bring, ahead)

    def _stream_at(self, blocks: range) -> _Stream | None:
        for stream in reversed(self._streams):
            # The kernel sends the requests of one reader a little out of order.
            if stream.expected - 2 <= blocks.start <= stream.expected + 2:
                return stream
        return None

    async def _bring(self, blocks: range) -> None:
        try:
            await self._materialiser.ensure(blocks, self._lane)
        except BlockcopyError as error:
            logger.debug("read-ahead of blocks %d to %d: %s", blocks.start, blocks.stop - 1, error)
