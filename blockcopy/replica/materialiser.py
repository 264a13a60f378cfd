"""Makes blocks present. The one way in for reads, read-ahead and the background pass, and the one
place that writes to the destination.

    ensure(blocks) → read own bytes → digest → ask the source → write what differs → mark

Single flight: a block on its way has one `_Flight`, and whoever else wants it waits for that. Only a
demand read that has waited DEMAND_PATIENCE for the pass asks as well, so that it never waits for bulk
that is slow or stands still; the pass does so after BULK_PATIENCE. The second to arrive, with the
same bytes, is dropped, and a flight that has nothing left to bring ends. Each flight runs in the
nursery given here, not in the task of who asked, so a reader that goes away strands nobody.
A failed flight is forgotten: the next `ensure` tries again. Who waited for a flight of the other lane
does not inherit its failure, but tries by its own means.

What holds after a crash or an error at any line of `_fetch`: a block is marked only after the
write of all its bytes returned, or after the source said that they are equal.
"""

from __future__ import annotations

import logging
import math
from copy import copy

import trio

from blockcopy.device import Device
from blockcopy.digests import digest
from blockcopy.errors import BlockcopyError, DeviceError, SourceError
from blockcopy.geometry import Geometry, runs
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.forms import Question
from blockcopy.replica.link import Link

logger = logging.getLogger(__name__)

BATCH_BLOCKS = 16
"""Blocks asked for, held and written as one: 2 MiB."""

DEMAND_PATIENCE = 0.05
"""Seconds: the pass brings a block sooner than that, or the link is slow."""

BULK_PATIENCE = 2
"""Seconds: a reader's block is here by then, or its link stands still, and the pass must not."""


class Lane:
    """One link, and how much may be in hand for it at a time. Demand and bulk have one each."""

    def __init__(self, link: Link, *, flights: int, threads: int, patience: float) -> None:
        """At most `flights` batches, so flights × BATCH_BLOCKS blocks of memory; `threads` of our own.

        `patience`: seconds to wait for a block that another lane is bringing, before asking as well.
        """
        self.link = link
        self.patience = patience
        self.flights = trio.CapacityLimiter(flights)
        self.threads = trio.CapacityLimiter(threads)
        self.claims: dict[int, _Flight] = {}
        """The blocks this lane is bringing."""
        self.active_at = -math.inf
        """When something set off here, or landed, in trio's time."""

    def claim(self, flight: _Flight) -> None:
        """Its blocks are on their way."""
        self.claims.update(dict.fromkeys(flight.blocks, flight))
        self.active_at = trio.current_time()

    def release(self, flight: _Flight) -> None:
        """They are no longer."""
        for block in flight.blocks:
            del self.claims[block]
        self.active_at = trio.current_time()


class _Flight:
    """Some blocks on their way, wanted since it was made."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.since = trio.current_time()
        self.scope = trio.CancelScope()
        self.landed = trio.Event()
        self.error: BlockcopyError | None = None


class Materialiser:
    """See the module. `complete` is set when no block is missing any more."""

    def __init__(
        self, device: Device, geometry: Geometry, blockmap: BlockMap, lanes: list[Lane], nursery: trio.Nursery
    ) -> None:
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._lanes = lanes
        self._nursery = nursery
        self.unsynced = trio.Event()
        """Something was written since the device was last synced: by an earlier run, for all we know.
        Replaced by each sync."""
        self.unsynced.set()
        self._storing = 0
        self.last_error: BlockcopyError | None = None
        self.complete = trio.Event()
        if blockmap.complete:
            self.complete.set()

    async def ensure(self, blocks: range, lane: Lane) -> None:
        """Return when all of `blocks` are present. SourceError or DeviceError where one cannot be."""
        patient = True
        while missing := list(self._blockmap.missing(blocks)):
            own, others, unclaimed = set(), set(), []
            for block in missing:
                if flight := lane.claims.get(block):
                    own.add(flight)
                elif patient and (flight := self._claim_elsewhere(block, lane)):
                    others.add(flight)
                else:
                    unclaimed.append(block)
            for start in range(0, len(unclaimed), BATCH_BLOCKS):
                own.add(self._launch(unclaimed[start : start + BATCH_BLOCKS], lane))
            for flight in own:
                await flight.landed.wait()
                if flight.error is not None and self._blockmap.any_missing(blocks):
                    raise copy(flight.error)  # unless the other lane has brought them meanwhile
            with trio.move_on_after(lane.patience) as waiting:
                for flight in others:
                    await flight.landed.wait()
            patient = not waiting.cancelled_caught and all(flight.error is None for flight in others)

    def _claim_elsewhere(self, block: int, lane: Lane) -> _Flight | None:
        return next(
            (other.claims[block] for other in self._lanes if other is not lane and block in other.claims), None
        )

    def _launch(self, blocks: list[int], lane: Lane) -> _Flight:
        flight = _Flight(blocks)
        lane.claim(flight)
        self._nursery.start_soon(self._fly, flight, lane)
        return flight

    async def _fly(self, flight: _Flight, lane: Lane) -> None:
        blocks = flight.blocks
        flight.error = SourceError("the replica is being closed")  # if this task is cancelled
        try:
            with flight.scope:
                async with lane.flights:
                    await self._fetch(blocks, lane, flight.since)
            flight.error = None
        except BlockcopyError as error:
            flight.error = self.last_error = error
        except Exception as error:
            # A fault of ours: whoever waits gets an error, not silence, and the others go on.
            logger.exception("blocks %d to %d cannot be fetched", blocks[0], blocks[-1])
            flight.error = self.last_error = BlockcopyError(f"internal error: {error!r}")
        finally:
            lane.release(flight)
            flight.landed.set()

    def _overtake(self, blocks: list[int], lane: Lane) -> None:
        """Flights of other lanes that have nothing left to bring need not go on, nor who waits for them."""
        for other in self._lanes:
            flights = (
                {other.claims[block] for block in blocks if block in other.claims} if other is not lane else ()
            )
            for flight in flights:
                if not self._blockmap.any_missing(flight.blocks):
                    flight.scope.cancel()

    async def _fetch(self, blocks: list[int], lane: Lane, since: float) -> None:
        generation = self._blockmap.generation
        asked = await trio.to_thread.run_sync(questions, self._device, self._geometry, blocks, limiter=lane.threads)
        answers = await lane.link.ask(asked, since)
        differing = [
            (question.position, answer)
            for block, question, answer in zip(blocks, asked, answers, strict=True)
            if answer is not None and self._blockmap.any_missing([block])
        ]
        if differing:
            self.unsynced.set()
            self._storing += 1
            try:
                await trio.to_thread.run_sync(self._store, differing, limiter=lane.threads)
            finally:
                self._storing -= 1
        if self._blockmap.generation != generation:
            return  # a sync failed meanwhile: what was read, or written, may be gone again
        for block, answer in zip(blocks, answers, strict=True):
            self._blockmap.mark(block, fetched=answer is not None)
        self._overtake(blocks, lane)
        if self._blockmap.complete:
            self.complete.set()

    def _store(self, differing: list[tuple[int, bytes]]) -> None:
        for position, data in differing:
            self._device.write(position, data)

    async def sync(self) -> None:
        """Return when all that is marked is durable.

        DeviceError where the device cannot say so. Then the kernel may have dropped what was
        written, and reads may give the old bytes: nothing is known any more, all is checked again.
        """
        if not self.unsynced.is_set():
            return
        self.unsynced = trio.Event()
        if self._storing:  # a sync need not have what is written while it runs
            self.unsynced.set()
        try:
            await trio.to_thread.run_sync(self._device.sync)
        except DeviceError as error:
            self.unsynced.set()
            self.last_error = error
            try:  # what the cache has is not what the disk has, and would be found equal
                await trio.to_thread.run_sync(self._device.drop_cache)
            finally:  # after that: what was read before it counts for nothing
                self.forget()
            raise

    def forget(self) -> None:
        """Nothing is known any more: every block has to be checked again."""
        self._blockmap.forget_all()
        if self.complete.is_set():
            self.complete = trio.Event()


def questions(device: Device, geometry: Geometry, blocks: list[int]) -> list[Question]:
    """What to ask about ascending `blocks`: reads and hashes them, neighbours in one read."""
    asked = []
    for run in runs(blocks):
        first, last = geometry.extent(run[0]), geometry.extent(run[-1])
        data = memoryview(device.read(first.offset, last.end - first.offset))
        for block in run:
            offset, length = geometry.extent(block)
            own = data[offset - first.offset :][:length]
            asked.append(Question(offset, length, digest(own)))
    return asked
