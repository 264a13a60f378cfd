"""A running replica: its parts, its state, and how it ends. `engine` puts it together.

Replica ─┬─ Volume      serves reads (demand lane)
         ├─ _hydrate    runs background hydration (bulk lane)
         ├─ Committer   syncs and records
         └─ _finish     checks the source, verifies, disconnects
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import trio

from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent
from blockcopy.block.identity import Identity
from blockcopy.errors import BlockcopyError, DeviceError, MismatchError, ReadOnlyError, SourceReadError
from blockcopy.progress.rate import RateMeter, eta, floored_percent
from blockcopy.progress.reporter import Counts
from blockcopy.replica.device_map import device_map
from blockcopy.replica.hydration.background import BackgroundHydration
from blockcopy.replica.hydration.committer import Committer
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.hydration.lanes import bulk_lane, demand_lane
from blockcopy.replica.hydration.throttle import Throttle
from blockcopy.replica.hydration.wanted import WantedBlocks
from blockcopy.replica.hydration.writer import Writer
from blockcopy.replica.link_status import LinkMonitor
from blockcopy.replica.monitor.status import MapCell, State, Status
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import StateFile
from blockcopy.replica.verify import compare
from blockcopy.replica.volume import Volume

logger = logging.getLogger(__name__)

_PREFETCH_BLOCKS = 512
"""Blocks that a prefetch requests at once."""

_WATCH_SECONDS = 1
"""Seconds between two checks of the destination's path."""


class Replica:
    """A destination that is read and hydrated. Call from trio's thread only. `engine.open_replica` makes it."""

    def __init__(
        self,
        plan: Plan,
        device: Destination,
        blockmap: BlockMap,
        state_file: StateFile | None,
        demand: Pool,
        bulk: Pool,
        nursery: trio.Nursery,
    ) -> None:
        """Make the replica of `plan`, which does not run yet.

        `demand`, `bulk`: the connections for readers and for background hydration. They may be the same pool.
        `device`: the destination. `blockmap`: the blocks that are present, in the geometry of the source.
        `state_file`: None to record nothing.
        `nursery`: runs the fetches.
        """
        self._plan = plan
        self._device = device
        self._blockmap = blockmap
        self._geometry = blockmap.geometry
        self._wanted = WantedBlocks(blockmap, plan.blocks_to_copy(self._geometry))
        self._pools = (demand,) if demand is bulk else (demand, bulk)
        lane = self._demand = demand_lane(demand)
        self._bulk = bulk_lane(bulk, drop_behind=device.exceeds_cache())
        writer = Writer(device, blockmap, sparse=plan.sparse)
        self._hydrator = Hydrator(writer, [lane, self._bulk], nursery)
        self._committer = Committer(state_file, self._hydrator, source=str(plan.command.location))
        self._state_file = str(state_file.path) if state_file else None
        self.throttle = Throttle(
            self._bulk.window, lambda: lane.active_at, plan.limit, link_holds=lambda: bulk.link_holds
        )
        if plan.hydrate:
            bulk.remaining = self._wanted.bytes_to_come
        self._monitor = LinkMonitor(self._pools, bulk, self.throttle)
        self.volume = Volume(
            self._hydrator, lane, nursery, give_up_after=plan.max_wait, before_write=self._begin_write
        )
        self.hydrates = plan.hydrate
        """Whether there is background hydration, paused or not."""
        self._meter = RateMeter()
        self.read_only = trio.Event()
        """Set when a sync has failed, so that nothing more can be written."""
        self.settled = trio.Event()
        """Set when the copy is complete, or has failed."""
        self._started_at = trio.current_time()
        self._ranges_present = trio.Event()  # of `plan.extents`
        self._complete = False
        self._closing = False
        self._verifying = False
        self._verified = 0
        self._failure: BlockcopyError | None = None
        self._background = trio.CancelScope()

    async def run(self, source: Identity, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run all tasks of the replica until it is cancelled. They hydrate, commit, watch and complete the copy.

        `source`: the identity of the source, for the state file.
        `task_status`: reports the start once the state file matches the block map. Only then may blocks be written.
        """
        await self._committer.begin(source, for_writes=self._plan.writable)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            nursery.start_soon(self._guard, self._committer.run)
            nursery.start_soon(self._guard, self._committer.renew_leases)
            nursery.start_soon(self._guard, self._watch)
            if self.hydrates:
                nursery.start_soon(self._guard, self._hydrate)
            await self._await_complete()
            await self._guard(self._finish)
            if self._plan.writable:
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        if self._complete:
            await self._guard(self._watch)

    async def _guard(self, part: Callable[[], Any]) -> None:
        """Await `part`, an async function without arguments.

        If `part` raises, the copy fails, and reads of present blocks go on.
        """
        try:
            await part()
        except BlockcopyError as error:
            if not self._closing:
                self._fail(error)
        except Exception as error:
            logger.error("internal error in a part of the copy", exc_info=error)
            self._fail(BlockcopyError(f"internal error: {error!r}"))

    async def _hydrate(self) -> None:
        with self._background:
            while not self._wanted.complete:
                await self._hydrate_once()
            self._ranges_present.set()

    async def _hydrate_once(self) -> None:
        """Run background hydration once. Raises SourceReadError if the source cannot read some blocks."""
        lanes = (self._demand, self._bulk)
        await BackgroundHydration(self._hydrator, *lanes, self.throttle, self._wanted.ranges).run()
        if not self._wanted.complete:
            await self._check_source()  # it may have been truncated, say
        if found := self._blockmap.unreadable_ranges(str(self._hydrator.faults.last)):
            raise SourceReadError(
                f"{self._plan.command.location} cannot read {found}. All else was copied. "
                "Each read of these blocks tries again, and so does the next mount or sync"
            )

    async def _await_complete(self) -> None:
        while True:
            await (self._ranges_present if self._plan.extents else self._hydrator.complete).wait()
            await self._guard(self._committer.commit)
            if self._wanted.complete:  # else the sync failed, and all blocks are checked again
                return
            self._ranges_present = trio.Event()

    async def _finish(self) -> None:
        # A copy that was complete before needs no source. The source may be gone for good.
        if self._blockmap.resumed_bytes < self._geometry.size or any(pool.is_connected for pool in self._pools):
            await self._check_source()
        if self._plan.verify:
            await self._verify()
            await self._check_source()  # all blocks were compared with one source
        await trio.to_thread.run_sync(self._device.check_in_place, abandon_on_cancel=True)
        await (self._committer.commit() if self._plan.writable else self._committer.close())
        await self.disconnect()
        self._complete = self._blockmap.complete
        self.settled.set()
        if self._complete:
            logger.info("%s is a complete copy of %s", self._plan.destination, self._plan.command.location)

    async def _check_source(self) -> None:
        """Check the identity of the source, over the first connection that is up.

        Raises SourceChangedError if the source has changed.
        """
        await self._bulk.pool.check(self._demand.pool)

    async def _watch(self) -> None:
        """Watch for changes by others. Raises DestinationLostError if others moved or changed the destination.

        The path of a complete copy may change.
        """
        while True:
            await trio.sleep(_WATCH_SECONDS)
            check = self._device.check if self._complete else self._device.check_in_place
            # A path may lie on a file system that never answers: the thread can be left behind.
            await trio.to_thread.run_sync(check, abandon_on_cancel=True)

    async def _verify(self) -> None:
        """Compare every block on the disk with the source once more, except the user's.

        A write that no flush has covered is not on record. If a run was killed, it may have reached the disk all
        the same. So a block that differs then counts as the user's.
        Raises MismatchError if blocks differ, DeviceError or SourceReadError if blocks were not compared.
        """
        first: Extent | None = None
        count = 0
        may_be_users = self._committer.may_lack_user_writes

        def report(extent: Extent) -> None:
            nonlocal first, count
            first, count = first or extent, count + 1
            if may_be_users:
                self._blockmap.user.add(extent)

        self._verified, self._verifying = 0, True  # stays True until the copy is complete or has failed
        await trio.to_thread.run_sync(self._device.drop_cache)
        ends = (self._device, self._geometry, self._bulk.pool)
        blocks = (self._blockmap.user, self._wanted.ranges)
        verdict = await compare(*ends, report, self._note_verified, *blocks)
        if first is not None and may_be_users:
            words = "%d bytes of %s differ, and count as the user's: a mount was killed before it recorded all"
            logger.warning(words, verdict.differing_bytes, self._plan.destination)
        elif first is not None:
            await self._committer.forget()
            raise MismatchError(
                f"{self._plan.destination} is not a copy of {self._plan.command.location}: "
                f"{verdict.differing_bytes} bytes in {count} ranges differ, the first at {first.offset}"
            )
        if verdict.local_unreadable:
            raise DeviceError(f"of {self._plan.destination}, cannot read {verdict.local_unreadable}")
        if verdict.remote_unreadable:
            raise SourceReadError(f"{self._plan.command.location} can no longer read {verdict.remote_unreadable}")

    def _note_verified(self, count: int) -> None:
        self._verified = count

    async def _begin_write(self) -> None:
        """Prepare for a write of the user. Raises ReadOnlyError if there may be none."""
        if not self._plan.writable:
            raise ReadOnlyError(f"{self._plan.destination} is mounted read-only")
        await self._committer.begin_user_writes()

    def _fail(self, error: BlockcopyError) -> None:
        """Fail the copy with `error`, and end background hydration.

        If each sync fails, background hydration would fetch all blocks again and again.
        """
        self._background.cancel()
        # `sync` ends with its first failure, which is then the error of the command.
        level = logging.ERROR if self._plan.demand or self._failure else logging.DEBUG
        logger.log(level, "the copy cannot be completed: %s", error)
        self._failure = self._failure or error
        self.settled.set()
        if self._hydrator.writer.failure is not None:
            self.read_only.set()

    async def wait_complete(self) -> None:
        """Wait until all that the plan wants is copied. Raises the BlockcopyError that failed the copy."""
        await self.settled.wait()
        if not self._complete and self._failure is not None:
            raise copy(self._failure)

    async def commit(self) -> None:
        """Sync the destination, and record the blocks that are present. Raises DeviceError if the sync fails."""
        await self._committer.commit()

    async def flush(self) -> None:
        """Make all that the user has written durable, and record it.

        Raises DeviceError if the sync fails, now or earlier. Raises StateWriteError if it cannot be recorded.
        """
        try:
            await self._committer.flush()
        except DeviceError as error:
            if not self.read_only.is_set():
                self._fail(error)
            raise

    async def prefetch(self, extents: Sequence[Extent]) -> None:
        """Make the blocks of `extents`, byte ranges, present. Requests go to the bulk lane.

        Bytes beyond the end of the source are ignored.

        Raises BlockcopyError if a block cannot be made present.
        """
        for extent in extents:
            blocks = self._geometry.span(*extent)
            for start in range(blocks.start, blocks.stop, _PREFETCH_BLOCKS):
                await self._hydrator.ensure(blocks[start - blocks.start :][:_PREFETCH_BLOCKS], self._bulk)

    async def disconnect(self) -> None:
        """Close the connections to the source for good. Reads that wait for the source fail now."""
        self._closing = True
        async with trio.open_nursery() as nursery:
            for pool in self._pools:
                nursery.start_soon(pool.close)

    async def close(self) -> None:
        """Sync, record, and close the state file. Call after `disconnect`. Raises DeviceError if a sync fails."""
        await self._committer.close()

    async def _measure(self) -> None:
        while True:
            done, skipped = self._progress
            self._meter.sample(done - skipped)
            self._monitor.sample()
            await trio.sleep(1)

    @property
    def _progress(self) -> tuple[int, int]:
        """Bytes done in the current phase, and how many of them cost no work. The rate leaves the latter out."""
        return (self._verified, 0) if self._verifying else (self._blockmap.present_bytes, self._hydrator.hole_bytes)

    @property
    def _is_copy(self) -> bool:
        """Whether the copy was completed, and is not known to have been damaged since."""
        # Nothing is written to a complete copy that is read-only: a failed sync came before, and was made good.
        is_damaged = self._plan.writable and self._hydrator.writer.failure is not None
        return self._complete and not self._device.lost and not is_damaged

    @property
    def state(self) -> State:
        """The state of the copy. Call from trio's thread only."""
        if self._is_copy:
            return State.COMPLETE
        if self._device.lost or self._failure or self._demand.pool.changed:
            return State.FAILED
        if self._verifying:
            return State.VERIFYING
        if self.throttle.paused:
            return State.PAUSED
        if not self._bulk.pool.is_connected:
            return State.RECONNECTING if self._monitor.last_error else State.STARTING
        return State.HYDRATING if self._plan.hydrate else State.PAUSED

    @property
    def counts(self) -> Counts:
        """The Counts for a progress bar: those of the status, or of the ranges that the plan wants."""
        counts = self.status().counts
        if not self._plan.extents:
            return counts
        done = self._verified if self._verifying else self._wanted.present_bytes
        return counts._replace(done=done, total=self._wanted.bytes, skipped=0)

    @property
    def succeeded(self) -> bool:
        """Whether all that the plan wants was copied."""
        return self.settled.is_set() and self._failure is None and (self._is_copy or bool(self._plan.extents))

    def status(self) -> Status:
        """Return the status of this moment. Call from trio's thread only."""
        size, hydrated, state = self._geometry.size, self._blockmap.present_bytes, self.state
        progress, skipped = self._progress
        rate = self._meter.rate(progress - skipped) if state in (State.HYDRATING, State.VERIFYING) else 0
        error = self._device.lost or self._demand.pool.changed or self._failure or self._hydrator.last_error
        unreadable = self._blockmap.unreadable_ranges()
        return Status(
            state=state,
            source=str(self._plan.command.location),
            destination=self._plan.destination,
            pid=os.getpid(),
            size=size,
            hydrated_bytes=hydrated,
            hydrated_percent=floored_percent(hydrated, size),
            resumed_bytes=self._blockmap.resumed_bytes,
            same_bytes=self._blockmap.same_bytes,
            fetched_bytes=self._blockmap.fetched_bytes,
            zero_bytes=self._blockmap.zero_bytes,
            hole_bytes=self._hydrator.hole_bytes,
            unreadable_bytes=unreadable.bytes,
            unreadable_ranges=tuple(unreadable.ranges),
            verified_bytes=self._verified,
            verified_percent=floored_percent(self._verified, size) if self._plan.verify else None,
            sent_bytes=sum(pool.sent_bytes for pool in self._pools),
            received_bytes=sum(pool.received_bytes for pool in self._pools),
            rate_bytes_per_s=rate,
            limit_bytes_per_s=self.throttle.limit,
            eta_seconds=eta(progress, size, rate),
            elapsed_seconds=round(trio.current_time() - self._started_at, 1),
            written_bytes=self._blockmap.user.written_bytes,
            lost_bytes=self._blockmap.user.lost_bytes,
            source_needed=not self._is_copy,
            demand=self.volume.read_stats.status(),
            link=self._monitor.status(rate, is_closing=self._closing, is_copying=state is State.HYDRATING),
            state_file=self._state_file,
            on_demand=not self.hydrates,
            writable=self._plan.writable,
            error=str(error) if error and not self._is_copy else None,
        )

    def map(self, max_cells: int) -> list[MapCell]:
        """Return the device in at most `max_cells` cells, in device order. Call from trio's thread only."""
        return device_map(self._blockmap, self._bulk.in_flight, self._demand.in_flight, max_cells)
