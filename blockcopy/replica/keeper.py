"""Keeps the journal true: what is recorded is right on the destination, and durable there.

    blocks marked → destination synced → their chunks committed, each second and when asked

The order is the whole of it. What is marked after the chunks were taken waits for the next time. A
sync that fails makes everything forgotten, here and in the journal. A journal that cannot be written
costs the next run a check; the copy goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from blockcopy.device import Device
from blockcopy.errors import DeviceError, StateNotKeptError
from blockcopy.geometry import Extent, Geometry
from blockcopy.identity import (
    Identity,
    differences,
    of_destination,
    sample_extents,
    tells_of_writes,
    unchanged_sample,
)
from blockcopy.replica.blockmap import BlockMap
from blockcopy.replica.journal import Binding, Journal, Record
from blockcopy.replica.materialiser import Materialiser
from blockcopy.statefile import default_path, retire

logger = logging.getLogger(__name__)

_SECONDS = 1
"""Between two commits, and two signs of life."""

_SLACK_NS = 3_000_000_000
"""How long after our last sign of life a file may have been written by ourselves: a beat that was
late, and what came after it. What somebody else writes in that time after a crash is not noticed."""


def open_journal(path: str | None, device: Device, *, keep: bool) -> Journal | None:
    """The journal of a destination, at `path` or where it belongs; None without `keep`, and, with a
    warning, where none can be kept. There is no other record of it then.

    StateError where the file is in use, or is none, or cannot be removed and would be believed later.
    """
    default = default_path(device)
    wanted = Path(path) if path else default
    if not (keep and _is_same(wanted, default)):
        retire(default)
    if not keep:
        return None
    try:
        return Journal(wanted)
    except StateNotKeptError as error:
        retire(wanted)
        logger.warning("%s; after a restart, every block will be checked again", error)
        return None


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def recall(journal: Journal, device: Device, block_size: int) -> Record | None:
    """What is recorded of this destination, untouched since; the log says why it is nothing."""
    record = journal.record
    if record is None:
        return None
    binding = record.binding
    differing = differences(
        {**binding.destination, "size": binding.destination_size, "block size": binding.block_size},
        {**of_destination(device), "size": device.size(), "block size": block_size},
    )
    if differing:
        _refuse(journal, f"it is of another destination: {'; '.join(differing)}")
        return None
    if not device.is_block_device and _was_written(record, device.status().st_mtime_ns):
        _refuse(journal, f"{device.path} was written by another program since")
        return None
    return record


def _was_written(record: Record, mtime_ns: int) -> bool:
    clock = record.clock
    latest = clock.mtime_ns if clock.closed else clock.alive_ns + _SLACK_NS
    return not (clock.mtime_ns <= mtime_ns <= latest or mtime_ns == clock.mtime_ns)


def is_of(journal: Journal, record: Record, source: Identity) -> bool:
    """Whether the record is of this source; the log says why not."""
    if differing := differences(record.binding.source, source):
        _refuse(journal, f"it is of another source, or that was changed: {'; '.join(differing)}")
    return not differing


def resume(
    journal: Journal, record: Record, device: Device, geometry: Geometry, found: Identity | None
) -> BlockMap:
    """The block map to start from: what is recorded, where it can be believed.

    `found` is the source as it is, where it can be asked. Then a copy that is complete is checked once
    more, unless both ends would tell if they had been written since.
    """
    blockmap = BlockMap(geometry)
    try:
        blockmap.resume(record.chunks)
    except ValueError as error:
        _refuse(journal, f"it is damaged: {error}")
        return BlockMap(geometry)
    source = record.binding.source
    tell = not device.is_block_device and tells_of_writes(source) and tells_of_writes(found or source)
    if blockmap.complete and found is not None and not tell:
        logger.warning("the copy was complete; every block is checked for what has changed since")
        return BlockMap(geometry)

    def is_present(extent: Extent) -> bool:
        return not blockmap.any_missing(geometry.span(*extent))

    if not unchanged_sample(device, source, filter(is_present, sample_extents(geometry.size))):
        _refuse(journal, f"{device.path} was written by another program since")
        return BlockMap(geometry)
    return blockmap


def _refuse(journal: Journal, why: str) -> None:
    logger.warning("the state in %s is not taken up: %s. Every block is checked again", journal.path, why)


class Keeper:
    """See the module. Without a journal it only syncs. Start `run` and `beat` in a nursery."""

    def __init__(
        self, journal: Journal | None, device: Device, blockmap: BlockMap, materialiser: Materialiser
    ) -> None:
        self._journal = journal
        self._device = device
        self._blockmap = blockmap
        self._materialiser = materialiser
        self._one_commit = trio.Lock()
        self._one_thread = trio.CapacityLimiter(1)
        self._trouble: StateNotKeptError | None = None

    async def begin(self, source: Identity, block_size: int) -> None:
        """Before the destination is written: what is recorded is what the block map has, or nothing."""
        if self._journal is None:
            return
        journal, mtime_ns = self._journal, self._mtime_ns()
        if self._blockmap.resumed_bytes:
            await self._write(partial(journal.tell_alive, mtime_ns))
        else:
            binding = Binding(source, of_destination(self._device), self._device.size(), block_size)
            if not await self._write(partial(journal.begin, binding, mtime_ns)):
                self._journal = None
                journal.discard()  # or else what is in it would be believed later

    async def run(self) -> None:
        """Commit each second. DeviceError where the destination cannot be synced."""
        while True:
            await trio.sleep(_SECONDS)
            await self.commit()

    async def beat(self) -> None:
        """While a file is written, say so, or else its new time would count against us after a crash."""
        while not self._device.is_block_device:
            await self._materialiser.unsynced.wait()
            if self._journal is None:
                return
            await self._write(partial(self._journal.tell_alive, self._mtime_ns()))
            await trio.sleep(_SECONDS)

    async def commit(self) -> None:
        """Return when all that is marked by now is durable, and recorded. DeviceError."""
        async with self._one_commit:
            with trio.CancelScope(shield=True):  # what was taken is recorded, or is put back
                await self._commit()

    async def _commit(self) -> None:
        mtime_ns = self._mtime_ns()
        changes = self._blockmap.take_changes()
        try:
            await self._materialiser.sync()
        except DeviceError:
            await self._forget()
            raise
        if self._journal is None or not changes:
            return
        if not await self._write(partial(self._journal.add, changes, mtime_ns)):
            self._blockmap.put_back(changes)

    async def forget(self) -> None:
        """Nothing is known any more, here or on record."""
        async with self._one_commit:
            self._materialiser.forget()
            await self._forget()

    async def _forget(self) -> None:
        """StateError where the record can neither be written nor removed."""
        if self._journal is not None and not await self._write(self._journal.forget):
            journal, self._journal = self._journal, None
            journal.discard()

    async def close(self) -> None:
        """Nothing is written any more: commit, and let the journal go. DeviceError."""
        try:
            await self.commit()
        finally:
            with trio.CancelScope(shield=True):
                await self._close_journal()

    async def _close_journal(self) -> None:
        journal, mtime_ns = self._journal, self._mtime_ns()
        if journal is None:
            return
        self._journal = None
        if self._trouble is None:
            await self._write(partial(journal.tell_closed, mtime_ns))
        journal.close()

    def _mtime_ns(self) -> int:
        return 0 if self._device.is_block_device else self._device.status().st_mtime_ns

    async def _write(self, write: Callable[[], None]) -> bool:
        """In a thread; False, and said once, where it cannot be."""
        try:
            await trio.to_thread.run_sync(write, limiter=self._one_thread)
        except StateNotKeptError as error:
            if self._trouble is None:
                logger.warning("%s; after a crash, more will be checked again", error)
            self._trouble = error
            return False
        self._trouble = None
        return True
