"""Puts a replica together, runs it, and takes it down. `sync` is this; `mount` is this behind FUSE.

    open_replica ─ connects ─ finds the size ─ prepares the destination ─┬─ Volume   (demand lane)
                                                                         ├─ hydrate  (bulk lane)
                                                                         └─ _finish  (sync, let go)

Failure table: what can go wrong, what a read of a missing block gets, what becomes of the replica.

    the source cannot be started, has no size     –               open_replica raises, nothing written
    the destination is refused or too small       –               open_replica raises, nothing written
    the demand process dies, garbles, lies        SourceError     the pass goes on
    the bulk process dies, garbles, lies          served          state failed
    the destination fails or is full              DeviceError     state failed once the pass meets it
    the final sync fails                          checked again   state failed, nothing counts as present
    whoever holds the replica leaves              SourceError     synced, both processes gone
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from blockcopy.device import Device, open_destination, open_source
from blockcopy.errors import BlockcopyError, DestinationRefusedError, DeviceError
from blockcopy.geometry import Geometry
from blockcopy.remote import Command
from blockcopy.replica import background
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.link import connect
from blockcopy.replica.materialiser import DEMAND_PATIENCE, Lane, Materialiser
from blockcopy.replica.retriever import Retriever
from blockcopy.replica.status import RateMeter, floored_percent
from blockcopy.replica.volume import Volume

logger = logging.getLogger(__name__)

_DEMAND_FLIGHTS = 8
_DEMAND_THREADS = 4


@dataclass(frozen=True)
class Plan:
    """What is to be made: `demand` where it will be read meanwhile, `hydrate` for the full pass."""

    command: Command
    destination: str
    demand: bool = True
    hydrate: bool = True
    force: bool = False


class Replica:
    """A running replica; made by `open_replica`."""

    def __init__(
        self,
        plan: Plan,
        device: Device,
        geometry: Geometry,
        retrievers: list[Retriever],
        nursery: trio.Nursery,
    ) -> None:
        """The first of `retrievers` serves demand, the last one the pass; they may be the same."""
        self._plan = plan
        self._geometry = geometry
        self._retrievers = retrievers
        self._blockmap = BlockMap(geometry)
        demand = Lane(retrievers[0], flights=_DEMAND_FLIGHTS, threads=_DEMAND_THREADS, patience=DEMAND_PATIENCE)
        self._bulk = Lane(
            retrievers[-1],
            flights=background.WINDOW,
            threads=len(os.sched_getaffinity(0)),
            patience=math.inf,
        )
        lanes = [demand, self._bulk]
        self._materialiser = Materialiser(device, geometry, self._blockmap, lanes, nursery)
        self.volume = Volume(device, geometry, self._blockmap, self._materialiser, demand, nursery)
        self._meter = RateMeter()
        self.settled = trio.Event()
        """The copy is complete, or the pass ended without completing it."""
        self._complete = False
        self._closing = False
        self._failure: BlockcopyError | None = None

    @property
    def hydrated_bytes(self) -> int:
        return self._blockmap.present_bytes

    async def run(self) -> None:
        """Pass, completion and measuring; started in the replica's nursery, cancelled with it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            if self._plan.hydrate:
                nursery.start_soon(self._hydrate)
            await self._materialiser.complete.wait()
            await self._finish()
            nursery.cancel_scope.cancel()

    async def wait_complete(self) -> None:
        """Return when the destination is the copy. Raises what the pass ended with."""
        await self.settled.wait()
        if not self._complete and self._failure is not None:
            raise copy(self._failure)

    async def let_go(self) -> None:
        """End the retrieve processes, for good; who waits for the source gets an error now."""
        self._closing = True
        async with trio.open_nursery() as nursery:
            for retriever in self._retrievers:
                nursery.start_soon(retriever.close)

    async def _hydrate(self) -> None:
        try:
            await background.hydrate(self._materialiser, self._blockmap, self._geometry, self._bulk)
        except BlockcopyError as error:
            if not self._closing:
                self._fail(error)

    async def sync(self) -> None:
        """All that is marked is durable. Raises DeviceError."""
        await self._materialiser.sync()

    async def _finish(self) -> None:
        try:
            await self.sync()
        except DeviceError as error:
            self._fail(error)
            return
        await self.let_go()
        self._complete = True
        self.settled.set()
        logger.info("%s is a complete copy of %s", self._plan.destination, self._plan.command.source)

    def _fail(self, error: BlockcopyError) -> None:
        logger.error("the copy cannot be completed: %s", error)
        self._failure = error
        self.settled.set()

    async def _measure(self) -> None:
        while True:
            self._meter.sample(self.hydrated_bytes)
            await trio.sleep(1)

    @property
    def state(self) -> str:
        if self._complete:
            return "complete"
        if self._failure is not None:
            return "failed"
        if self._plan.hydrate:
            return "hydrating"
        return "failed" if self._lost_source else "paused"

    @property
    def _lost_source(self) -> BlockcopyError | None:
        return next((retriever.failure for retriever in self._retrievers if retriever.failure), None)

    def snapshot(self) -> dict[str, Any]:
        """What `status --json` says. All sizes in bytes."""
        size, hydrated = self._geometry.size, self.hydrated_bytes
        rate = self._meter.rate(hydrated) if self.state == "hydrating" else 0
        error = self._failure or self._lost_source or self._materialiser.last_error
        return {
            "state": self.state,
            "source": str(self._plan.command.source),
            "destination": self._plan.destination,
            "pid": os.getpid(),
            "size": size,
            "hydrated_bytes": hydrated,
            "hydrated_percent": floored_percent(hydrated, size),
            "same_bytes": self._blockmap.same_bytes,
            "fetched_bytes": self._blockmap.fetched_bytes,
            "sent_bytes": sum(retriever.sent_bytes for retriever in self._retrievers),
            "received_bytes": sum(retriever.received_bytes for retriever in self._retrievers),
            "rate_bytes_per_s": rate,
            "eta_seconds": -(-(size - hydrated) // rate) if rate else None,
            "source_needed": not self._complete,
            "error": str(error) if error and not self._complete else None,
        }


@asynccontextmanager
async def open_replica(plan: Plan) -> AsyncIterator[Replica]:
    """A replica that is hydrated for as long as the block lasts; then it is synced and let go.

    Raises SourceError, DeviceError or DestinationRefusedError, in an exception group as nurseries do.
    """
    with ExitStack() as devices:
        existing = _open_existing(plan, devices)
        replica: Replica | None = None
        try:
            async with trio.open_nursery() as nursery:
                retrievers, size = await connect(
                    plan.command,
                    nursery,
                    connections=(plan.demand + plan.hydrate) or 1,
                    guess=existing.size() if existing else 0,
                )
                device = existing or devices.enter_context(
                    open_destination(plan.destination, force=plan.force, create=True)
                )
                _make_room(device, size)
                replica = Replica(plan, device, Geometry(size), retrievers, nursery)
                nursery.start_soon(replica.run)
                try:
                    yield replica
                finally:
                    with trio.CancelScope(shield=True):
                        await replica.let_go()
                    nursery.cancel_scope.cancel()
        finally:  # whatever was in flight has landed or was given up by now
            if replica is not None:
                with trio.CancelScope(shield=True):
                    await replica.sync()


def _open_existing(plan: Plan, devices: ExitStack) -> Device | None:
    """Claim the destination before anything is asked of anybody; None where it has to be created."""
    path = Path(plan.destination)
    if not path.exists():
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise DeviceError(f"cannot create {path}: there is no folder {path.parent} to write into")
        return None
    device = devices.enter_context(open_destination(plan.destination, force=plan.force))
    if plan.command.source.host is None and _is_same(plan.command.source.path, device):
        raise DestinationRefusedError(f"{plan.destination} is the source itself")
    return device


def _is_same(path: str, device: Device) -> bool:
    try:
        with open_source(path) as other:
            return other.identity == device.identity
    except DeviceError:
        return False  # missing, which the retrieve process tells, or only sudo can read it


def _make_room(device: Device, size: int) -> None:
    """The destination holds at least `size` bytes; a longer one keeps its tail."""
    own = device.size()
    if own >= size:
        return
    if device.is_block_device:
        raise DestinationRefusedError(
            f"{device.path} is too small: it has {own} bytes, and the source {size}. Nothing was written"
        )
    device.grow(size)
