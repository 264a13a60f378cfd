"""Puts a replica together, and takes it down. `sync` is this; `mount` is this behind FUSE.

    open_replica ─ destination ─ journal ─ links ─ what is known ─ Replica … let go ─ synced ─ recorded

Failure table: what can go wrong, what a read of a missing block gets, what becomes of the replica.

    the source cannot be reached at first   –                     open_replica raises; with a state and
                                                                  `resume_offline` it begins, reconnecting
    the destination is refused, too small   –                     open_replica raises, nothing written
    a link breaks, stalls, garbles          waits, then           started again, for ever; what was in
                                            SourceError           flight is asked again
    the source is another than it was       SourceError           state failed, nothing of it is taken
    the source cannot read a block          SourceReadError       all else is copied, then state failed
    the destination cannot read a block     served                fetched and written anew
    the destination fails or is full        DeviceError           state failed once the pass meets it
    the destination is cut, or written by   DeviceError           state failed, nothing counts as present
        another program
    the destination is removed, replaced    served                state failed
    a sync fails                            checked again         state failed, nothing counts as present
    the state cannot be written             served                goes on; a restart checks more
    whoever holds the replica leaves        SourceError           synced, recorded, processes gone
    killed, or the power is lost            –                     the next run takes up what is recorded
    the destination is cut off, or its      –                     killed by SIGBUS: likewise
        disk fails, as it is looked at
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio

from blockcopy.block.claim import existing_destination, make_room, open_destination
from blockcopy.block.destination import Destination
from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import BLOCK_SIZE, Geometry
from blockcopy.errors import DestinationRefusedError, DeviceError, SourceError, StateError
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.link import Link
from blockcopy.replica.state import recovery
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import Record, StateFile

logger = logging.getLogger(__name__)

_LARGEST = 1 << 50
"""Bytes that a source may have: the map of them takes 1 GiB."""


@asynccontextmanager
async def open_replica(plan: Plan) -> AsyncIterator[Replica]:
    """A replica that is hydrated for as long as the block lasts; then it is synced and let go.

    Raises SourceError, DeviceError, DestinationRefusedError or StateError, in an exception group as
    nurseries do.
    """
    with ExitStack() as stack:
        existing = _open_existing(plan, stack)
        journal, record = _recall(plan, existing, stack) if existing else (None, None)
        replica: Replica | None = None
        try:
            async with trio.open_nursery() as nursery:
                guess = record.binding.source["size"] if record else existing.size() if existing else 0
                connector = Connector(
                    plan.command,
                    guess=guess,
                    timeout=plan.timeout,
                    prompts=plan.prompts,
                    compression=plan.compression,
                    started=plan.started,
                )
                links = [
                    Link(connector, nursery, give_up_after=patience)
                    for patience, wanted in (
                        (plan.reconnect_timeout, plan.demand or not plan.hydrate),
                        (math.inf if plan.demand else plan.reconnect_timeout, plan.hydrate),
                    )
                    if wanted
                ]
                if len(links) > 1:
                    links[0].fallback = links[1]  # a reader is better behind bulk than without an answer
                is_there = await _connect(plan, links, connector, record, nursery)
                source = connector.identity
                if source is None:  # cannot be: `_connect` would have raised
                    raise SourceError(f"{plan.command.location} does not say what it is")
                geometry = _geometry(plan, source["size"])
                device = existing or stack.enter_context(
                    open_destination(plan.destination, force=plan.force, create=True)
                )
                if existing is None:
                    journal, record = _recall(plan, device, stack)
                make_room(device, geometry.size)
                blockmap = BlockMap(geometry)
                if journal and record and recovery.matches_source(journal, record, source):
                    blockmap = recovery.resume_blockmap(
                        journal, record, device, geometry, source if is_there else None
                    )
                replica = Replica(plan, device, geometry, blockmap, journal, links, nursery)
                await nursery.start(replica.run, source)
                try:
                    yield replica
                finally:
                    with trio.CancelScope(shield=True):
                        await replica.disconnect()
                    nursery.cancel_scope.cancel()
        finally:  # whatever was in flight has landed or was given up by now
            if replica is not None:
                with trio.CancelScope(shield=True):
                    await replica.close()


def _geometry(plan: Plan, size: int) -> Geometry:
    """Raises SourceError if a map of so many bytes cannot be had here."""
    if size > _LARGEST:
        raise SourceError(f"{plan.command.location} claims to have {size} bytes; {_LARGEST} are the most")
    return Geometry(size)


def _recall(plan: Plan, device: Device, stack: ExitStack) -> tuple[StateFile | None, Record | None]:
    """The destination's journal, and what is in it of this destination."""
    if plan.state is not None:
        for path in (plan.destination, plan.command.location.path if plan.command.location.host is None else ""):
            if path and os.path.exists(plan.state) and os.path.exists(path) and os.path.samefile(plan.state, path):
                raise StateError(f"cannot keep the state in {plan.state}: that is {path} itself")
    journal = recovery.open_state_file(plan.state, device, keep=plan.keep_state)
    if journal is None:
        return None, None
    stack.callback(journal.close)
    return journal, None if plan.recheck else recovery.usable_record(journal, device, BLOCK_SIZE)


async def _connect(
    plan: Plan, links: list[Link], connector: Connector, record: Record | None, nursery: trio.Nursery
) -> bool:
    """Start the links; whether the source was reached. SourceError where it was not, and has to be.

    Side by side, but where the others go through the login of the first. Where each may ask for a password:
    one after the other, and all of them before there is no terminal any more.
    """
    first, *others = links
    shares = bool(plan.command.way.end_login)
    if not (plan.prompts or shares):
        for link in others:
            nursery.start_soon(link.run)
    try:
        await first.open()
        if plan.prompts and not shares:
            for link in others:
                await link.open()
        return True
    except SourceError as error:
        if record is None or not plan.resume_offline:
            raise
        logger.warning("%s; what is here is served, and the rest when it is back", error)
        is_there = connector.identity is not None
        if not is_there:
            connector.identity = record.binding.source
        return is_there
    finally:
        for link in links if plan.prompts or shares else [first]:
            nursery.start_soon(link.run)


def _open_existing(plan: Plan, devices: ExitStack) -> Destination | None:
    """Claim the destination before anything is asked of anybody; None where it has to be created."""
    device = existing_destination(plan.destination, force=plan.force)
    if device is None:
        return None
    devices.enter_context(device)
    if plan.command.location.host is None and _is_same(plan.command.location.path, device):
        raise DestinationRefusedError(f"{plan.destination} is the source itself")
    return device


def _is_same(path: str, device: Device) -> bool:
    try:
        with open_source(path) as other:
            return other.file_id == device.file_id
    except DeviceError:
        return False  # missing, which the retrieve process tells, or only sudo can read it
