"""Makes blocks present. The one way in for reads, read-ahead and the background pass, and the one
place that writes to the destination.

    ensure(blocks) → read own bytes → digest → ask the source → write what differs → mark

Single flight: a block on its way has one `_Flight`, and whoever else wants it waits for that. Each
flight runs in the nursery given here, not in the task of who asked, so a reader that goes away
strands nobody. A failed flight is forgotten: the next `ensure` tries again. Who joined a flight of
the other lane does not inherit its failure, but tries by its own means.

What holds after a crash or an error at any line of `_fetch`: a block is marked only after the
write of all its bytes returned, or after the source said that they are equal.
"""

from __future__ import annotations

import logging
from copy import copy

import trio

from blockcopy.device import Device
from blockcopy.digests import digest
from blockcopy.errors import BlockcopyError, DeviceError, SourceError
from blockcopy.geometry import Geometry, runs
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.retriever import Question, Retriever

logger = logging.getLogger(__name__)

BATCH_BLOCKS = 16
"""Blocks asked for, held and written as one: 2 MiB."""


class Lane:
    """One retriever, and how much may be in hand for it at a time. Demand and bulk have one each."""

    def __init__(self, retriever: Retriever, *, flights: int, threads: int) -> None:
        """At most `flights` batches, so flights × BATCH_BLOCKS blocks of memory; `threads` of our own."""
        self.retriever = retriever
        self.flights = trio.CapacityLimiter(flights)
        self.threads = trio.CapacityLimiter(threads)


class _Flight:
    """Some blocks on their way."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.landed = trio.Event()
        self.error: BlockcopyError | None = None


class Materialiser:
    """See the module. `complete` is set when no block is missing any more."""

    def __init__(self, device: Device, geometry: Geometry, blockmap: BlockMap, nursery: trio.Nursery) -> None:
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._nursery = nursery
        self._flights: dict[int, _Flight] = {}
        self.unsynced = False
        """Something was written since the device was last synced."""
        self.last_error: BlockcopyError | None = None
        self.complete = trio.Event()
        if blockmap.complete:
            self.complete.set()

    async def ensure(self, blocks: range, lane: Lane) -> None:
        """Return when all of `blocks` are present. SourceError or DeviceError where one cannot be."""
        while missing := list(self._blockmap.missing(blocks)):
            flights = {self._flights[block] for block in missing if block in self._flights}
            unclaimed = [block for block in missing if block not in self._flights]
            for start in range(0, len(unclaimed), BATCH_BLOCKS):
                flights.add(self._launch(unclaimed[start : start + BATCH_BLOCKS], lane))
            for flight in flights:
                await flight.landed.wait()
            for flight in flights:
                if flight.error is not None and flight.lane is lane:
                    raise copy(flight.error)

    def _launch(self, blocks: list[int], lane: Lane) -> _Flight:
        flight = _Flight(lane)
        self._flights.update(dict.fromkeys(blocks, flight))
        self._nursery.start_soon(self._fly, flight, blocks)
        return flight

    async def _fly(self, flight: _Flight, blocks: list[int]) -> None:
        flight.error = SourceError("the replica is being closed")  # if this task is cancelled
        try:
            async with flight.lane.flights:
                await self._fetch(blocks, flight.lane)
            flight.error = None
        except BlockcopyError as error:
            flight.error = self.last_error = error
        except Exception as error:
            # A fault of ours: whoever waits gets an error, not silence, and the others go on.
            logger.exception("blocks %d to %d cannot be fetched", blocks[0], blocks[-1])
            flight.error = self.last_error = BlockcopyError(f"internal error: {error!r}")
        finally:
            for block in blocks:
                del self._flights[block]
            flight.landed.set()

    async def _fetch(self, blocks: list[int], lane: Lane) -> None:
        questions = await trio.to_thread.run_sync(self._questions, blocks, limiter=lane.threads)
        answers = await lane.retriever.ask(questions)
        differing = [
            (asked.position, answer) for asked, answer in zip(questions, answers, strict=True) if answer is not None
        ]
        if differing:
            self.unsynced = True
            await trio.to_thread.run_sync(self._store, differing, limiter=lane.threads)
        for block, answer in zip(blocks, answers, strict=True):
            self._blockmap.mark(block, fetched=answer is not None)
        if self._blockmap.complete:
            self.complete.set()

    def _questions(self, blocks: list[int]) -> list[Question]:
        questions = []
        for run in runs(blocks):
            first, last = self._geometry.extent(run[0]), self._geometry.extent(run[-1])
            data = memoryview(self._device.read(first.offset, last.end - first.offset))
            for block in run:
                offset, length = self._geometry.extent(block)
                own = data[offset - first.offset :][:length]
                questions.append(Question(offset, length, digest(own)))
        return questions

    def _store(self, differing: list[tuple[int, bytes]]) -> None:
        for position, data in differing:
            self._device.write(position, data)

    async def sync(self) -> None:
        """Return when all that is marked is durable.

        DeviceError where the device cannot say so. Then the kernel may have dropped what was
        written, and reads may give the old bytes: nothing is known any more, all is checked again.
        """
        if not self.unsynced:
            return
        self.unsynced = False
        try:
            await trio.to_thread.run_sync(self._device.sync)
        except DeviceError as error:
            self.unsynced = True
            self.last_error = error
            self._blockmap.forget_all()
            self.complete = trio.Event()
            raise
