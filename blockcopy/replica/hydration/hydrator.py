"""Makes blocks present. The one way in for reads, read-ahead and the background pass, and the one
place that writes to the destination.

    ensure(blocks) → read own bytes → digest → ask the source → write what differs → mark

Single flight: a block on its way has one `_Fetch`, and whoever else wants it waits for that. Only a
demand read that has waited DEMAND_PATIENCE for the pass asks as well, so that it never waits for bulk
that is slow or stands still; the pass does so after BULK_PATIENCE. The second to arrive, with the
same bytes, is dropped, and a flight that has nothing left to bring ends. Each flight runs in the
nursery given here, not in the task of who asked, so a reader that goes away strands nobody.
A failed flight is forgotten: the next `ensure` tries again. Who waited for a flight of the other lane, or
for one of more blocks than it wants, does not inherit its failure, but tries by its own means.
A block that the source cannot read is set aside, and fails nobody but those who want it (`source_faults`).

What differs is written by the `_Writer`, in the thread that receives it. What holds after a crash or an
error at any line of `_fetch`: a block is marked only after the write of all its bytes returned, or
after the source said that they are equal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import copy
from functools import partial

import trio

from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Geometry, block_runs
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import BlockcopyError, DeviceError, SourceError, SourceReadError
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.replica.hydration.source_faults import SourceFaults
from blockcopy.replica.hydration.writer import Writer
from blockcopy.replica.source.dialects import Answer
from blockcopy.replica.source.link import Link
from blockcopy.replica.source.window import Window
from blockcopy.replica.state.blockmap import BlockMap

logger = logging.getLogger(__name__)

DEMAND_PATIENCE = 0.05
"""Seconds: the pass brings a block sooner than that, or the link is slow."""

BULK_PATIENCE = 2
"""Seconds: a reader's block is here by then, or its link stands still, and the pass must not."""


class Lane:
    """One link, and how much may be in hand for it at a time. ReadStats and bulk have one each."""

    def __init__(
        self, link: Link, window: Window, *, batch_blocks: int, fetches: int, threads: int, patience: float
    ) -> None:
        """At most `fetches` batches of `batch_blocks` at once; `threads` of our own that hash.

        `window`: how much of what nobody waits for yet should be on its way. `patience`: seconds to wait
        for a block that another lane is bringing, before asking as well.
        """
        self.link = link
        self.window = window
        self.batch_blocks = batch_blocks
        self.patience = patience
        self.drop_behind = False
        """It goes through a device that is larger than the page cache: what it has seen need not stay there."""
        self.fetches = trio.CapacityLimiter(fetches)
        self.threads = trio.CapacityLimiter(threads)
        self.claims: dict[int, _Fetch] = {}
        """The blocks this lane is bringing."""
        self.active_at = -math.inf
        """When something set off here, or landed, in trio's time."""
        self.wanted_at = -math.inf
        """When something set off."""
        self.wanted_up_to = 0
        """And the block behind it."""

    def claim(self, flight: _Fetch) -> None:
        """Its blocks are on their way."""
        self.claims.update(dict.fromkeys(flight.blocks, flight))
        self.active_at = self.wanted_at = trio.current_time()
        self.wanted_up_to = flight.blocks[-1] + 1

    def release(self, flight: _Fetch) -> None:
        """They are no longer."""
        for block in flight.blocks:
            del self.claims[block]
        self.active_at = trio.current_time()


class _Fetch:
    """Some blocks on their way, wanted since a time of trio's."""

    def __init__(self, blocks: Sequence[int], since: float) -> None:
        self.blocks = blocks
        self.since = since
        self.scope = trio.CancelScope()
        self.landed = trio.Event()
        self.error: BlockcopyError | None = None


class Hydrator:
    """See the module. `complete` is set when no block is missing any more."""

    def __init__(
        self,
        device: Destination,
        geometry: Geometry,
        blockmap: BlockMap,
        lanes: list[Lane],
        nursery: trio.Nursery,
        *,
        sparse: bool = True,
    ) -> None:
        """`sparse`: zeros are written as holes where that can be."""
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._lanes = lanes
        self._nursery = nursery
        self._writer = Writer(device, geometry, blockmap, sparse=sparse)
        self._dropping = False
        self._faults = SourceFaults()
        self._rewritten = UnreadableRanges()
        """Blocks of the destination that cannot be read: they are fetched, and a write may mend them."""
        self.hole_bytes = 0
        """Present bytes that are holes at both ends: nothing had to be done for them."""
        self.last_error: BlockcopyError | None = None
        self.complete = trio.Event()
        if blockmap.complete:
            self.complete.set()

    @property
    def unsynced(self) -> trio.Event:
        """Something was written since the device was last synced. Replaced by each sync."""
        return self._writer.unsynced

    @property
    def last_fault(self) -> SourceReadError | None:
        """Return why the source could not read a block, of the last one that it could not."""
        return self._faults.last

    async def ensure(self, blocks: range, lane: Lane) -> None:
        """Return when all of `blocks` are present. SourceError or DeviceError where one cannot be.

        Raises SourceReadError if the source cannot read some of them, and all others are present.
        """
        since = trio.current_time()
        patient = True
        while missing := list(self._blockmap.missing(blocks)):
            own, others, unclaimed = set(), set(), []
            wanted = [block for block in missing if not self._faults.is_known(block, since)]
            if not wanted:
                raise copy(self._faults.error(missing[0]))
            for block in wanted:
                if flight := lane.claims.get(block):
                    own.add(flight)
                elif patient and (flight := self._claim_elsewhere(block, lane)):
                    others.add(flight)
                else:
                    unclaimed.append(block)
            for start in range(0, len(unclaimed), lane.batch_blocks):
                own.add(self._launch(unclaimed[start : start + lane.batch_blocks], lane, since))
            for flight in own:
                await flight.landed.wait()
                # Not where the other lane has brought them meanwhile; and what was read ahead for somebody may
                # have failed of a block that is not wanted here.
                if (
                    flight.error is not None
                    and all(block in blocks for block in flight.blocks)
                    and self._blockmap.any_missing(blocks)
                ):
                    raise copy(flight.error)
            if others:
                with trio.move_on_after(lane.patience) as waiting:
                    for flight in others:
                        await flight.landed.wait()
                patient = not waiting.cancelled_caught and all(flight.error is None for flight in others)

    def _claim_elsewhere(self, block: int, lane: Lane) -> _Fetch | None:
        return next(
            (other.claims[block] for other in self._lanes if other is not lane and block in other.claims), None
        )

    def _launch(self, blocks: Sequence[int], lane: Lane, since: float) -> _Fetch:
        flight = _Fetch(blocks, since)
        lane.claim(flight)
        self._nursery.start_soon(self._fly, flight, lane)
        return flight

    async def _fly(self, flight: _Fetch, lane: Lane) -> None:
        blocks = flight.blocks
        flight.error = SourceError("the replica is being closed")  # if this task is cancelled
        try:
            with flight.scope:
                async with lane.fetches:
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

    def _overtake(self, blocks: Sequence[int], lane: Lane) -> None:
        """Flights of other lanes that have nothing left to bring need not go on, nor who waits for them."""
        for other in self._lanes:
            if other is lane or not other.claims:
                continue
            for flight in {other.claims[block] for block in blocks if block in other.claims}:
                if not self._blockmap.any_missing(flight.blocks):
                    flight.scope.cancel()

    async def _fetch(self, blocks: Sequence[int], lane: Lane, since: float) -> None:
        digest = await lane.link.digest(since)
        generation = self._blockmap.generation
        read = partial(
            read_signatures,
            self._device,
            self._geometry,
            blocks,
            digest,
            self._rewritten,
            drop_behind=lane.drop_behind,
        )
        asked = await trio.to_thread.run_sync(read, limiter=lane.threads)
        asked_at = trio.current_time()
        answer = await lane.link.ask(asked, self._writer, since)
        lane.window.record_fetch(len(blocks), trio.current_time() - asked_at)
        if self._blockmap.generation != generation or self._dropping:
            return  # a sync failed meanwhile: what was read, or written, may be gone again
        self._mark(blocks, answer)
        self._overtake(blocks, lane)

    def _mark(self, blocks: Sequence[int], answer: Answer) -> None:
        for extent in answer.data:
            self._blockmap.mark(self._geometry.span(*extent), "fetched")
        for extent in answer.zeros:
            self._blockmap.mark(self._geometry.span(*extent), "zero")
        unread = {block for each in answer.unreadable for block in self._geometry.span(*each.extent)}
        for run in block_runs(block for block in blocks if block not in unread):
            self._blockmap.mark(run, "same")
        for each in answer.unreadable:
            for block in self._blockmap.missing(self._geometry.span(*each.extent)):
                self._blockmap.mark_unreadable(range(block, block + 1))
                self.last_error = self._faults.add(block, each.reason)
        if self._blockmap.complete:
            self.complete.set()

    def mark_zero(self, blocks: range, generation: int) -> None:
        """The `blocks` are zeros at both ends, as was found while the block map had that `generation`."""
        if self._blockmap.generation == generation and not self._dropping:
            before = self._blockmap.present_bytes
            self._blockmap.mark(blocks, "zero")
            self.hole_bytes += self._blockmap.present_bytes - before
            if self._blockmap.complete:
                self.complete.set()

    async def sync(self) -> bool:
        """Return when all that is marked is durable. Returns False if it was before.

        DeviceError where the device cannot say so. Then the kernel may have dropped what was
        written, and reads may give the old bytes: nothing is known any more, all is checked again.
        """
        try:
            return await self._writer.sync()
        except DeviceError as error:
            self.last_error = error
            await self._forget_cached()
            raise

    async def _forget_cached(self) -> None:
        """What the cache has is not what the disk has, and would be found equal: drop it.

        Forgotten before, so that no reader takes what is dropped from under it for the source's bytes; and
        nothing is marked meanwhile, of what may have been read before it was dropped.
        """
        self._dropping = True
        self.forget()
        try:
            await trio.to_thread.run_sync(self._device.drop_cache)
        finally:
            self.forget()
            self._dropping = False

    def forget(self) -> None:
        """Nothing is known any more: every block has to be checked again."""
        self._blockmap.clear()
        self._faults = SourceFaults()
        self.hole_bytes = 0
        if self.complete.is_set():
            self.complete = trio.Event()
