"""The assembly of a replica, and its orderly end. `sync` uses it directly, and `mount` behind FUSE.

    open_replica ─ destination ─ state file ─ links ─ recovery ─ Replica … disconnect ─ sync ─ record

CONTRIBUTING.md has the failure table ("What can fail") and the crash table.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial

import trio

from blockcopy.block import user_writes
from blockcopy.block.claim import existing_destination, make_room, open_destination
from blockcopy.block.destination import Destination
from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import BLOCK_SIZE, Geometry
from blockcopy.block.identity import shows_writes
from blockcopy.errors import DestinationRefusedError, DeviceError, SourceError, StateError
from blockcopy.replica.hydration.lanes import bulk_window, demand_window
from blockcopy.replica.overwrite_guard import refuse_foreign_content
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.state import recovery
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import Record, StateFile
from blockcopy.transport.scaling import MAX_CONNECTIONS, Scaling

logger = logging.getLogger(__name__)

_MAX_SIZE = 1 << 50
"""Most bytes of a source. A block map of this size takes 1 GiB."""

_SPARE_CONNECTIONS = 2
"""Connections of a login that one lane leaves to the other."""

_BORROW_AFTER = 2
"""Failed attempts in a row after which background hydration shares the connections of the readers.

A server may allow one session only.
"""


@asynccontextmanager
async def open_replica(plan: Plan) -> AsyncIterator[Replica]:
    """Run the replica of `plan` while the `async with` block runs. Then sync, record and disconnect.

    Yields the running replica.
    Raises SourceError, DeviceError, DestinationRefusedError or StateError, in exception groups.
    """
    with ExitStack() as stack:
        existing = _claim_existing(plan, stack)
        state_file, record = _open_state_file(plan, existing, stack) if existing else (None, None)
        replica: Replica | None = None
        try:
            async with trio.open_nursery() as nursery:
                guess = record.binding.source["size"] if record else existing.size() if existing else 0
                connector = Connector(plan, size_guess=guess)
                demand, bulk = _pools(plan, connector, nursery)
                is_reached = await _connect(plan, demand, bulk, record, nursery)
                if record is not None and record.has_user_writes:
                    _hold_to_source_of(record, connector)
                source = connector.identity
                if source is None:  # impossible: `_connect` would have raised
                    raise SourceError(f"{plan.command.location} did not send its identity")
                geometry = _geometry(plan, source["size"])
                device = existing
                if existing and is_reached and not (plan.force or plan.overwrite):
                    await refuse_foreign_content(existing, demand, record)
                if device is None:
                    opened = open_destination(plan.destination, force=plan.force, create=True)
                    device = stack.enter_context(opened)
                    state_file, record = _open_state_file(plan, device, stack)
                make_room(device, geometry.size)
                blockmap = BlockMap(geometry)
                if state_file and record and recovery.matches_source(state_file, record, source):
                    reached = source if is_reached else None
                    blockmap = recovery.resume_blockmap(state_file, record, device, geometry, reached)
                replica = Replica(plan, device, blockmap, state_file, demand, bulk, nursery)
                await nursery.start(replica.run, source)
                try:
                    yield replica
                finally:
                    with trio.CancelScope(shield=True):
                        await replica.disconnect()
                    nursery.cancel_scope.cancel()
        finally:  # all fetches have ended by now
            if replica is not None:
                with trio.CancelScope(shield=True):
                    await replica.close()


def _pools(plan: Plan, connector: Connector, nursery: trio.Nursery) -> tuple[Pool, Pool]:
    """Return the pools over `connector` for readers and for background hydration: one for both if `plan` needs one.

    `nursery`: runs their connections.
    """
    most = MAX_CONNECTIONS - _SPARE_CONNECTIONS if plan.demand and plan.hydrate else MAX_CONNECTIONS
    bulk = Pool(
        connector,
        nursery,
        # Beside readers, background hydration waits for the source for ever.
        give_up_after=math.inf if plan.demand and plan.hydrate else plan.reconnect_timeout,
        scaling=_scaling(plan, most, is_fixed=plan.connections is not None and plan.hydrate),
        new_window=partial(bulk_window, has_readers=plan.demand, is_local=plan.command.location.host is None),
    )
    if not (plan.demand and plan.hydrate):
        return bulk, bulk
    demand = Pool(
        connector,
        nursery,
        give_up_after=plan.reconnect_timeout,
        scaling=_scaling(plan, most, is_fixed=False),
        new_window=demand_window,
    )
    demand.fallback = bulk  # a slow answer on a bulk connection is better than none
    bulk.fallback, bulk.fallback_after = demand, _BORROW_AFTER
    return demand, bulk


def _scaling(plan: Plan, most: int, *, is_fixed: bool) -> Scaling:
    """Return what decides how many connections a pool of `plan` has.

    `most`: the most connections, unless the user named a number. `is_fixed`: the pool opens all at once.

    A program at a location of this host has no channel whose window could bind. If each login may ask for a
    password, there is one.
    """
    shares_login = bool(plan.command.route.logout)
    count = plan.connections or (most if plan.command.location.host else 1)
    if plan.prompts and not shares_login:
        count = 1
    return Scaling(count, is_fixed=is_fixed, shares_login=shares_login)


def _geometry(plan: Plan, size: int) -> Geometry:
    """Return the geometry of the source of `plan`, which has `size` bytes.

    Raises SourceError if `size` exceeds _MAX_SIZE. Raises UsageError if `plan` wants ranges beyond it.
    """
    if size > _MAX_SIZE:
        raise SourceError(f"{plan.command.location} claims to have {size} bytes; the limit is {_MAX_SIZE}")
    geometry = Geometry(size)
    plan.blocks_to_copy(geometry)
    return geometry


def _open_state_file(plan: Plan, device: Device, stack: ExitStack) -> tuple[StateFile | None, Record | None]:
    """Open the state file that `plan` names for the destination `device`, and read its record.

    `stack` will close the file.
    Returns the file and the record, with None in place of a missing one. Raises StateError if the state file is
    one of the two ends. Raises UserWritesError if writes of a user would be overwritten.
    """
    if plan.state is not None:
        for path in (plan.destination, plan.command.location.path if plan.command.location.host is None else ""):
            if path and os.path.exists(plan.state) and os.path.exists(path) and os.path.samefile(plan.state, path):
                raise StateError(f"cannot keep the state in {plan.state}: that is {path} itself")
    note = user_writes.find(device)
    state_file = recovery.open_state_file(
        plan.state, device, keep=plan.keep_state, note=note, for_writes=plan.writable
    )
    if state_file is None:
        return None, None
    stack.callback(state_file.close)
    has_user_writes = note is not None or (state_file.record is not None and state_file.record.has_user_writes)
    if has_user_writes and (plan.recheck or not plan.writable):
        why = "would be checked anew" if plan.recheck else "would be overwritten"
        raise user_writes.error_for(plan.destination, f"holds writes of a user, which {why}")
    record = None if plan.recheck else recovery.usable_record(state_file, device, BLOCK_SIZE)
    if record is not None and plan.writable and not (has_user_writes or shows_writes(record.binding.source)):
        logger.info("the source may have been in use during an earlier copy; checking every block")
        record = None
    if record is None and note is not None:
        why = f"holds writes of a user, and the state file {state_file.path} is about something else"
        raise user_writes.error_for(plan.destination, why, note.source)
    return state_file, record


async def _connect(plan: Plan, demand: Pool, bulk: Pool, record: Record | None, nursery: trio.Nursery) -> bool:
    """Open the pools `demand` and `bulk`, and run them in `nursery`. Returns whether the source was reached.

    They open side by side, with two exceptions. If they share a login, the first one logs in. If each may ask for
    a password, they open one by one, before the terminal is gone.
    If the source is away, `plan` may allow an offline start. Its identity is then that of `record`. A user begins
    to write only after the source was reached: the copy may be an old one.
    A complete copy that the user has written to needs no source: nothing is opened.
    Raises SourceError if the source is away and there is no offline start.
    """
    connector = demand.connector
    if record is not None and record.has_user_writes and recovery.is_complete(record) and not plan.verify:
        connector.identity = record.binding.source
        return False
    pools = [demand] if demand is bulk else [demand, bulk]
    one_by_one = bool(plan.command.route.logout) or plan.prompts
    if not one_by_one and bulk is not demand:
        nursery.start_soon(bulk.run)
    try:
        await demand.open()
        if plan.prompts and not plan.command.route.logout and bulk is not demand:
            await bulk.open()
        return True
    except SourceError as error:
        if record is None or not plan.resume_offline or (plan.writable and not record.has_user_writes):
            raise
        logger.warning("%s; serving the blocks that are present, and reconnecting", error)
        is_reached = connector.identity is not None
        if not is_reached:
            connector.identity = record.binding.source
        return is_reached
    finally:
        for pool in pools if one_by_one else [demand]:
            nursery.start_soon(pool.run)


def _hold_to_source_of(record: Record, connector: Connector) -> None:
    """Take nothing over `connector` if the source is another than that of `record`, which has writes of a user.

    What is present, and what was written, is served all the same: nobody else has it.
    """
    connector.hold_to(record.binding.source)
    if connector.changed is not None:
        logger.error("%s. What is present or was written is served", connector.changed)


def _claim_existing(plan: Plan, stack: ExitStack) -> Destination | None:
    """Open and claim the destination of `plan`, before any connection is made. `stack` will close it.

    Returns the destination, or None if it must be created. Raises DestinationRefusedError if it is the source.
    """
    device = existing_destination(plan.destination, force=plan.force, with_user_writes=plan.writable)
    if device is None:
        return None
    stack.enter_context(device)
    if plan.command.location.host is None and _is_same(plan.command.location.path, device):
        raise DestinationRefusedError(f"{plan.destination} is the source itself")
    return device


def _is_same(path: str, device: Device) -> bool:
    try:
        with open_source(path) as other:
            return other.file_id == device.file_id
    except DeviceError:
        return False  # the file is missing, as the retrieve process will report, or only sudo can read it
