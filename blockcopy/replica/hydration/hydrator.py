"""The hydrator: make blocks present. Reads, read-ahead and background hydration all call `ensure`.

    ensure(blocks) → read own bytes → digest → ask the source → write what differs → mark

A fetch is one request for some blocks. All callers of `ensure` on a lane share the fetches of the lane.
A block in flight on another lane is awaited for `Lane.hedge_after` seconds, then requested on the own lane too.
So no reader waits for a slow bulk link, and background hydration does not wait for a stalled demand link.
The second of two equal answers is dropped. A fetch with no missing block left is cancelled.

Fetches run in the nursery of the replica, not in the task of a caller. A reader that goes away fails no other.
A failed fetch is forgotten, and the next `ensure` tries again. Its failure reaches the callers on its lane that
want all of its blocks. All other callers request their blocks again.
A block that the source cannot read is marked unreadable. It fails only the callers that want it (`source_faults`).

The `Writer` writes what differs, in the thread that receives it. A block is marked only after all its bytes were
written, or after the source said that they are equal. This holds if `_fetch` crashes or fails at any line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import trio

from blockcopy.block.geometry import Extent, block_runs
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import BlockcopyError, DestinationLostError, DeviceError, SourceError
from blockcopy.replica.hydration.lanes import Fetch, Lane
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.replica.hydration.source_faults import SourceFaults
from blockcopy.replica.hydration.writer import Run, Writer
from blockcopy.replica.source.batches import Delta
from blockcopy.replica.state.blockmap import Kind
from blockcopy.replica.tasks import one_at_a_time

logger = logging.getLogger(__name__)


class Hydrator:
    """The one that makes blocks of a destination present. Call from trio's thread only."""

    def __init__(self, writer: Writer, lanes: list[Lane], nursery: trio.Nursery) -> None:
        """Make a hydrator for the destination of `writer`.

        `writer`: writes what differs.
        `lanes`: all lanes that `ensure` is called with.
        `nursery`: runs the fetches.
        """
        self.device = writer.device
        """The destination."""
        self.blockmap = writer.blockmap
        """The blocks that are present, in the geometry of the source."""
        self._geometry = writer.blockmap.geometry
        self._lanes = lanes
        self._nursery = nursery
        self.writer = writer
        self._dropping_cache = False
        self.faults = SourceFaults()
        """The blocks that the source could not read lately. Replaced by `forget`."""
        self._rewritten = UnreadableRanges()
        """Ranges of the destination that cannot be read. Their blocks are fetched, and a write may repair them."""
        self.hole_bytes = 0
        """Present bytes that are holes at both ends. They cost no work."""
        self.last_error: BlockcopyError | None = None
        """The error of the latest failed fetch or sync, or None."""
        self.complete = trio.Event()
        """Set when no block is missing. Replaced if blocks are missing again."""
        if self.blockmap.complete:
            self.complete.set()

    async def ensure(self, blocks: range, lane: Lane) -> None:
        """Wait until all `blocks`, a range, are present, and request the missing ones on `lane`.

        Raises SourceReadError if the source cannot read some blocks; all others are present then.
        Raises SourceError or DeviceError if a block cannot be made present.
        """
        since = trio.current_time()
        may_wait = True
        while missing := list(self.blockmap.missing(blocks)):
            wanted = [block for block in missing if not self.faults.is_known(block, since)]
            if not wanted:
                raise copy(self.faults.error(missing[0]))
            own, others = self._fetches_of(wanted, lane, since, may_wait=may_wait)
            for fetch in own:
                await fetch.ended.wait()
                # Not if the other lane has brought the blocks meanwhile. A fetch of read-ahead may have failed
                # for a block that this caller does not want.
                if (
                    fetch.error is not None
                    and all(block in blocks for block in fetch.blocks)
                    and self.blockmap.any_missing(blocks)
                ):
                    raise copy(fetch.error)
            # A claimed block was not marked. Fetched again at once, it would not be marked again.
            await self.writer.await_release(missing)
            if others:
                with trio.move_on_after(lane.hedge_after) as waiting:
                    for fetch in others:
                        await fetch.ended.wait()
                may_wait = not waiting.cancelled_caught and all(fetch.error is None for fetch in others)

    def _fetches_of(
        self, blocks: list[int], lane: Lane, since: float, *, may_wait: bool
    ) -> tuple[set[Fetch], set[Fetch]]:
        """Find or start the fetches of missing `blocks`, first wanted at `since` in trio's time.

        Returns two sets: the fetches of `lane`, and the fetches of other lanes to wait for.
        `may_wait`: whether fetches of other lanes count. If not, `lane` requests their blocks too.
        """
        own, others, idle = set(), set(), []
        for block in blocks:
            if fetch := lane.in_flight.get(block):
                own.add(fetch)
            elif may_wait and (fetch := self._in_flight_elsewhere(block, lane)):
                others.add(fetch)
            else:
                idle.append(block)
        for start in range(0, len(idle), lane.batch_blocks):
            fetch = Fetch(idle[start : start + lane.batch_blocks], since)
            lane.add(fetch)
            self._nursery.start_soon(self._run, fetch, lane)
            own.add(fetch)
        return own, others

    def _in_flight_elsewhere(self, block: int, lane: Lane) -> Fetch | None:
        return next(
            (other.in_flight[block] for other in self._lanes if other is not lane and block in other.in_flight),
            None,
        )

    async def _run(self, fetch: Fetch, lane: Lane) -> None:
        blocks = fetch.blocks
        fetch.error = SourceError("the replica is being closed")  # if this task is cancelled
        try:
            with fetch.scope:
                async with lane.fetches:
                    await self._fetch(blocks, lane, fetch.since)
            fetch.error = None
        except BlockcopyError as error:
            fetch.error = self.last_error = error
        except Exception as error:
            # A bug: the callers get an error and not silence, and all other fetches go on.
            logger.exception("internal error: cannot fetch blocks %d to %d", blocks[0], blocks[-1])
            fetch.error = self.last_error = BlockcopyError(f"internal error: {error!r}")
        finally:
            lane.remove(fetch)
            fetch.ended.set()

    def _cancel_redundant(self, blocks: Sequence[int], lane: Lane) -> None:
        """Cancel fetches in other lanes whose blocks are all present now, and so wake their waiters.

        `blocks`: the blocks that `lane` has just brought.
        """
        for other in self._lanes:
            if other is lane or not other.in_flight:
                continue
            for fetch in {other.in_flight[block] for block in blocks if block in other.in_flight}:
                if not self.blockmap.any_missing(fetch.blocks):
                    fetch.scope.cancel()

    async def _fetch(self, blocks: Sequence[int], lane: Lane, since: float) -> None:
        digest = await lane.pool.digest(since)
        generation = self.blockmap.generation
        read = partial(
            read_signatures,
            self.device,
            self._geometry,
            blocks,
            digest,
            self._rewritten,
            drop_behind=lane.drop_behind,
        )
        signatures = await trio.to_thread.run_sync(read, limiter=lane.threads)
        answer = await lane.pool.ask(signatures, self.writer, since)
        if self.blockmap.generation != generation or self._dropping_cache:
            return  # a sync failed meanwhile: what was read or written may be lost again
        self._mark(blocks, answer)
        self._cancel_redundant(blocks, lane)

    def _mark(self, blocks: Sequence[int], answer: Delta) -> None:
        """Mark `blocks`, about which the source sent `answer`, as present.

        A block in which the user is just writing stays missing, and is fetched again. What landed there left out
        the bytes of a write that may yet fail.
        """
        claimed = self.writer.claimed_blocks()
        for extent in answer.data:
            self._mark_runs(self._geometry.span(*extent), "fetched", claimed)
        for extent in answer.zeros:
            self._mark_runs(self._geometry.span(*extent), "zero", claimed)
        unread = {block for each in answer.unreadable for block in self._geometry.span(*each.extent)}
        self._mark_runs([block for block in blocks if block not in unread], "same", claimed)
        for each in answer.unreadable:
            for block in self.blockmap.missing(self._geometry.span(*each.extent)):
                self.blockmap.mark_unreadable(range(block, block + 1))
                self.last_error = self.faults.add(block, each.reason)
        if self.blockmap.complete:
            self.complete.set()

    def _mark_runs(self, blocks: Sequence[int], kind: Kind, claimed: frozenset[int]) -> None:
        """Mark `blocks`, ascending numbers, as present by `kind`, except the `claimed` ones."""
        if isinstance(blocks, range) and not claimed:
            self.blockmap.mark(blocks, kind)
            return
        for run in block_runs(block for block in blocks if block not in claimed):
            self.blockmap.mark(run, kind)

    def note_write(self, extent: Extent) -> None:
        """Note in the block map that the user wrote `extent`. A block that is whole by that is present."""
        self.blockmap.note_write(extent)
        if self.blockmap.complete:
            self.complete.set()

    def mark_zeros(self, blocks: range, generation: int) -> None:
        """Mark `blocks`, which are holes at both ends, as present.

        `generation`: the generation of the block map when the holes were found. The call does nothing if a sync
        has failed since.
        """
        if self.blockmap.generation == generation and not self._dropping_cache:
            before = self.blockmap.present_bytes
            self._mark_runs(blocks, "zero", self.writer.claimed_blocks())
            self.hole_bytes += self.blockmap.present_bytes - before
            if self.blockmap.complete:
                self.complete.set()

    async def sync(self, run: Run = one_at_a_time.run, *, times: bool = True) -> bool:
        """Make all marked blocks durable. Returns False if they were durable before.

        `run`: an async function that calls its argument in a thread. `times`: make the times of a destination file
        durable too.
        Raises DeviceError if the sync fails. The kernel may then have dropped written bytes and return old ones.
        So what no earlier sync has covered is undone.
        """
        try:
            return await self.writer.sync(run, times=times)
        except DeviceError as error:
            await self.undo_unsynced(error)
            raise

    async def undo_unsynced(self, error: DeviceError) -> None:
        """Undo in memory what no sync has covered, because a sync has failed with `error`. Nothing is lost twice.

        Blocks that became present since the last sync are missing again. What the user wrote since is lost, and no
        more is accepted. If another program has changed the destination, all blocks are missing again. The user's
        blocks are not, nor is a complete copy that the user has written to. The page cache is dropped. It holds
        bytes that no disk has, and the next check would find them equal to the source.
        Raises DeviceError if the cache cannot be dropped.
        """
        self.last_error = error
        self.writer.refuse_writes(error)
        is_foreign = isinstance(error, DestinationLostError)
        if is_foreign and self.blockmap.user.written_bytes:
            # The bytes are durable: only what others did to them is unknown. A complete copy needs no source.
            if not self.blockmap.complete:
                self._forget(self.blockmap.keep_user_blocks)
            return
        undo = self.blockmap.clear if is_foreign else self.blockmap.roll_back
        # Undo before, so that no reader takes bytes for the source's while they are dropped.
        # Mark nothing meanwhile, and undo again: something may have been read before it was dropped.
        self._dropping_cache = True
        self._forget(undo)
        try:
            await trio.to_thread.run_sync(self.device.drop_cache)
        finally:
            self._forget(undo)
            self._dropping_cache = False

    def forget(self) -> None:
        """Mark all blocks as missing, so that each is checked again. Raises RuntimeError if the user wrote some."""
        self._forget(self.blockmap.clear)

    def _forget(self, undo: Callable[[], None]) -> None:
        undo()
        self.faults = SourceFaults()
        self.hole_bytes = min(self.hole_bytes, self.blockmap.zero_bytes)
        if self.complete.is_set() and not self.blockmap.complete:
            self.complete = trio.Event()
