"""A running replica: the full pass, the reads, the record, and how it ends. `engine` puts it together.

Replica ─┬─ Volume    reads          (demand lane)
         ├─ hydrate   the full pass  (bulk lane)
         ├─ Committer    syncs and records
         └─ _finish   asks whether the source is still the same, verifies, lets it go
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import trio

from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.identity import Identity
from blockcopy.errors import BlockcopyError, DeviceError, MismatchError, SourceError, SourceReadError
from blockcopy.progress.rate import RateMeter, eta, floored_percent
from blockcopy.replica.hydration.background import BackgroundHydration
from blockcopy.replica.hydration.committer import Committer
from blockcopy.replica.hydration.hydrator import BULK_PATIENCE, DEMAND_PATIENCE, Hydrator, Lane
from blockcopy.replica.hydration.throttle import BATCH_BLOCKS, Throttle
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.link import Link
from blockcopy.replica.source.window import Window
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import StateFile
from blockcopy.replica.verify import compare
from blockcopy.replica.volume import Volume
from blockcopy.stage.pipeline import WORKERS

logger = logging.getLogger(__name__)

_DEMAND_BATCH_BLOCKS = 16
"""2 MiB: whoever waits for one of them waits for all."""
_DEMAND_FLIGHTS = 64
_DEMAND_THREADS = 4
_DEMAND_WINDOW: dict[str, Any] = {"initial_blocks": 32, "min_blocks": 8, "max_blocks": 512}

_BULK_FLIGHTS = 64
_BULK_WINDOW: dict[str, Any] = {"initial_blocks": 32, "min_blocks": 8, "max_blocks": 1024}
"""In blocks: up to 128 MiB on their way, which fills 1 GB/s over a round trip of 100 ms."""
_BULK_WINDOW_ALONE = {**_BULK_WINDOW, "initial_blocks": _BULK_WINDOW["max_blocks"]}
"""Without a link and without readers there is nobody in whose way much could be."""

_PREFETCHED = 512
"""Blocks that a prefetch asks for at once."""


_WATCH_SECONDS = 1
"""Between two looks at the destination's path."""


class Replica:
    """See the module. Made by `engine.open_replica`."""

    def __init__(
        self,
        plan: Plan,
        device: Destination,
        geometry: Geometry,
        blockmap: BlockMap,
        journal: StateFile | None,
        links: list[Link],
        nursery: trio.Nursery,
    ) -> None:
        """The first of `links` serves demand, the last one the pass; they may be the same."""
        self._plan = plan
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._links = links
        demand = self._demand = Lane(
            links[0],
            Window(**_DEMAND_WINDOW),
            batch_blocks=_DEMAND_BATCH_BLOCKS,
            fetches=_DEMAND_FLIGHTS,
            threads=_DEMAND_THREADS,
            patience=DEMAND_PATIENCE,
        )
        self._bulk = Lane(
            links[-1],
            Window(**(_BULK_WINDOW if plan.demand or plan.command.location.host else _BULK_WINDOW_ALONE)),
            batch_blocks=BATCH_BLOCKS,
            fetches=_BULK_FLIGHTS,
            threads=WORKERS,
            patience=BULK_PATIENCE,
        )
        self._bulk.drop_behind = device.exceeds_cache()
        self._hydrator = Hydrator(device, geometry, blockmap, [demand, self._bulk], nursery, sparse=plan.sparse)
        self._committer = Committer(journal, device, blockmap, self._hydrator)
        self._state_file = str(journal.path) if journal else None
        self.throttle = Throttle(self._bulk.window, lambda: demand.active_at, plan.limit)
        self.volume = Volume(
            device, geometry, blockmap, self._hydrator, demand, nursery, give_up_after=plan.max_wait
        )
        self._meter = RateMeter()
        self.settled = trio.Event()
        """The copy is complete, or the pass ended without completing it."""
        self._started_at = trio.current_time()
        self._complete = False
        self._closing = False
        self._verifying = False
        self._verified = 0
        self._failure: BlockcopyError | None = None
        self._pass = trio.CancelScope()

    @property
    def hydrates(self) -> bool:
        """There is a pass, be it paused."""
        return self._plan.hydrate

    @property
    def hydrated_bytes(self) -> int:
        return self._blockmap.present_bytes

    async def run(self, source: Identity, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pass, completion and measuring; in the replica's nursery, cancelled with it.

        Reports `started` when what is known is on record, and blocks may be stored.
        """
        await self._committer.begin(source, self._geometry.block_size)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            nursery.start_soon(self._guard, self._committer.run)
            nursery.start_soon(self._guard, self._committer.beat)
            nursery.start_soon(self._guard, self._watch)
            if self._plan.hydrate:
                nursery.start_soon(self._guard, self._hydrate)
            await self._await_complete()
            await self._guard(self._finish)
            nursery.cancel_scope.cancel()
        if self._complete:
            await self._guard(self._watch_copy)

    async def _guard(self, part: Callable[[], Any]) -> None:
        """What ends a part of the replica ends the copy, and not the reads of what is here."""
        try:
            await part()
        except BlockcopyError as error:
            if not self._closing:
                self._fail(error)
        except Exception as error:
            logger.error("a part of the copy met a fault of blockcopy's", exc_info=error)
            self._fail(BlockcopyError(f"internal error: {error!r}"))

    async def _hydrate(self) -> None:
        with self._pass:
            while not self._blockmap.complete:
                await self._sweep_all()

    async def _sweep_all(self) -> None:
        """Run a full pass. Raises SourceReadError if the source cannot read some blocks."""
        await BackgroundHydration(
            self._hydrator, self._device, self._geometry, self._blockmap, self._demand, self._bulk, self.throttle
        ).run()
        if not self._blockmap.complete:
            await self._check_source()  # one that was cut, say, is another
        if found := self._blockmap.unreadable_ranges(str(self._hydrator.last_fault)):
            raise SourceReadError(
                f"{self._plan.command.location} cannot read {found}. All else was copied. "
                "These are asked for again by each read, and by the next mount or sync"
            )

    async def _await_complete(self) -> None:
        while True:
            await self._hydrator.complete.wait()
            await self._guard(self._committer.commit)
            if self._blockmap.complete:  # else the sync failed, and all is to be checked again
                return

    async def _finish(self) -> None:
        # A copy that was complete before needs nothing of the source, which may be gone for good.
        if self._blockmap.resumed_bytes < self._geometry.size or any(link.is_connected for link in self._links):
            await self._check_source()
        if self._plan.verify:
            await self._verify()
            await self._check_source()  # what was compared was one source
        await self._check_in_place()
        await self._committer.close()
        await self.disconnect()
        self._complete = True
        self.settled.set()
        logger.info("%s is a complete copy of %s", self._plan.destination, self._plan.command.location)

    async def _check_source(self) -> None:
        """Raise SourceChangedError if the source is another than it was. Takes the link that is there first."""
        await self._links[-1].check(*self._links[:-1])

    async def _watch(self) -> None:
        while True:
            await trio.sleep(_WATCH_SECONDS)
            await self._check_in_place()

    async def _watch_copy(self) -> None:
        """Raise DestinationLostError once others change the copy. It may be moved by now."""
        while True:
            await trio.sleep(_WATCH_SECONDS)
            await trio.to_thread.run_sync(self._device.check, abandon_on_cancel=True)

    async def _check_in_place(self) -> None:
        """Raise DestinationLostError if the destination is not where and what it was."""
        # The path may lie on a file system that never answers.
        await trio.to_thread.run_sync(self._device.check_in_place, abandon_on_cancel=True)

    async def _verify(self) -> None:
        """Ask about every block once more, of what is on the disk. MismatchError."""
        first: Extent | None = None
        count = 0

        def note(extent: Extent) -> None:
            nonlocal first, count
            first, count = first or extent, count + 1

        self._verified, self._verifying = 0, True  # until it is complete, or failed
        await trio.to_thread.run_sync(self._device.drop_cache)
        verdict = await compare(self._device, self._geometry, self._links[-1], note, self._note_verified)
        if first is not None:
            await self._committer.forget()
            raise MismatchError(
                f"{self._plan.destination} is not a copy of {self._plan.command.location} after all: "
                f"{verdict.differing} bytes in {count} ranges differ, the first at {first.offset}"
            )
        if verdict.here:
            raise DeviceError(f"cannot read, of {self._plan.destination}, {verdict.here}")
        if verdict.there:
            raise SourceReadError(f"{self._plan.command.location} cannot read any more {verdict.there}")

    def _note_verified(self, count: int) -> None:
        self._verified = count

    def _fail(self, error: BlockcopyError) -> None:
        """End the pass. It would bring all again and again, if the disk fails at each sync."""
        self._pass.cancel()
        logger.error("the copy cannot be completed: %s", error)
        self._failure = self._failure or error
        self.settled.set()

    async def wait_complete(self) -> None:
        """Return when the destination is the copy. Raises what the pass ended with."""
        await self.settled.wait()
        if not self._complete and self._failure is not None:
            raise copy(self._failure)

    async def commit(self) -> None:
        """All that is marked is durable, and recorded. Raises DeviceError."""
        await self._committer.commit()

    async def prefetch(self, extents: Sequence[Extent]) -> None:
        """Bring these byte ranges, as far as the source has them. Raises BlockcopyError."""
        for extent in extents:
            blocks = self._geometry.span(*extent)
            for start in range(blocks.start, blocks.stop, _PREFETCHED):
                await self._hydrator.ensure(blocks[start - blocks.start :][:_PREFETCHED], self._bulk)

    async def disconnect(self) -> None:
        """End the links, for good; who waits for the source gets an error now."""
        self._closing = True
        async with trio.open_nursery() as nursery:
            for link in self._links:
                nursery.start_soon(link.close)

    async def close(self) -> None:
        """What is here is durable, and recorded. Raises DeviceError."""
        await self._committer.close()

    async def _measure(self) -> None:
        while True:
            done, skipped = self._progress
            self._meter.sample(done - skipped)
            await trio.sleep(1)

    @property
    def _progress(self) -> tuple[int, int]:
        """Return bytes done of what goes on now, and of these, those that cost nothing: they count for no rate."""
        return (self._verified, 0) if self._verifying else (self.hydrated_bytes, self._hydrator.hole_bytes)

    @property
    def _is_copy(self) -> bool:
        """It was complete, and nobody else has changed the destination since, as far as it shows."""
        return self._complete and not self._device.lost

    @property
    def state(self) -> str:
        if self._is_copy:
            return "complete"
        if self._device.lost or self._failure or self._links[0].changed:
            return "failed"
        if self._verifying:
            return "verifying"
        if self.throttle.paused:
            return "paused"
        if not self._links[-1].is_connected:
            return "reconnecting" if self._link_error else "starting"
        return "hydrating" if self._plan.hydrate else "paused"

    def snapshot(self) -> dict[str, Any]:
        """What `status --json` says. All sizes in bytes."""
        size, hydrated = self._geometry.size, self.hydrated_bytes
        progress, skipped = self._progress
        rate = self._meter.rate(progress - skipped) if self.state in ("hydrating", "verifying") else 0
        error = self._device.lost or self._links[0].changed or self._failure or self._hydrator.last_error
        unreadable = self._blockmap.unreadable_ranges()
        return {
            "state": self.state,
            "source": str(self._plan.command.location),
            "destination": self._plan.destination,
            "pid": os.getpid(),
            "size": size,
            "hydrated_bytes": hydrated,
            "hydrated_percent": floored_percent(hydrated, size),
            "resumed_bytes": self._blockmap.resumed_bytes,
            "same_bytes": self._blockmap.same_bytes,
            "fetched_bytes": self._blockmap.fetched_bytes,
            "zero_bytes": self._blockmap.zero_bytes,
            "hole_bytes": self._hydrator.hole_bytes,
            "unreadable_bytes": unreadable.bytes,
            "unreadable_ranges": [list(extent) for extent in unreadable.ranges],
            "verified_bytes": self._verified,
            "verified_percent": floored_percent(self._verified, size) if self._plan.verify else None,
            "sent_bytes": sum(link.sent_bytes for link in self._links),
            "received_bytes": sum(link.received_bytes for link in self._links),
            "rate_bytes_per_s": rate,
            "limit_bytes_per_s": self.throttle.limit,
            "eta_seconds": eta(progress, size, rate),
            "elapsed_seconds": round(trio.current_time() - self._started_at, 1),
            "source_needed": not self._is_copy,
            "demand": self.volume.demand.as_json(),
            "link": self._link_status(),
            "state_file": self._state_file,
            "error": str(error) if error and not self._is_copy else None,
        }

    def map(self, cells: int) -> list[dict[str, int]]:
        """The device in at most `cells` ranges of equal length, in order, the last perhaps shorter: how many blocks
        each has, and how many of them are present; of these, zeros the source did not send (of what a run of ours
        has found); on their way for the pass; and for somebody who reads them now."""
        size = max(1, -(-self._geometry.block_count // max(1, cells)))
        found = []
        for start in range(0, self._geometry.block_count, size):
            blocks = range(start, min(start + size, self._geometry.block_count))
            present, zero = self._blockmap.count(blocks)
            found.append({"blocks": len(blocks), "present": present, "zero": zero, "in_flight": 0, "reading": 0})
        for lane, name in ((self._bulk, "in_flight"), (self._demand, "reading")):
            for block in lane.claims:
                found[block // size][name] += 1
        return found

    @property
    def _link_error(self) -> SourceError | None:
        """Why the source could not be reached of late, on whichever link; None if that has not happened."""
        return next((link.last_error for link in self._links if link.last_error), None)

    def _link_status(self) -> dict[str, Any]:
        last_error = self._link_error
        if self._closing:
            state = "closed"
        elif all(link.is_connected for link in self._links):
            state = "connected"
        else:  # one that was up and is not has an error
            state = "reconnecting" if last_error else "connecting"
        return {
            "state": state,
            "reconnects": sum(link.reconnects for link in self._links),
            "last_error": str(last_error) if last_error else None,
        }
