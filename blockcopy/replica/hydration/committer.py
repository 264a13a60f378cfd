"""Keeps the journal true: what is recorded is right on the destination, and durable there.

    blocks marked → destination synced → their chunks committed, each second and when asked

The order is the whole of it. What is marked after the chunks were taken waits for the next time. A
sync that fails makes everything forgotten, here and in the journal. A journal that cannot be written
costs the next run a check; the copy goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import trio

from blockcopy.block.device import Device
from blockcopy.block.identity import NO_TIMES, Identity, Times, destination_identity, settled_times, times_of
from blockcopy.block.records import invalidate_records, make_authoritative, make_default_authoritative
from blockcopy.errors import DeviceError, StateError, StateWriteError
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.recovery import is_at_default_path
from blockcopy.replica.state.statefile import Binding, StateFile, WriteTimes
from blockcopy.replica.tasks import abandonable

logger = logging.getLogger(__name__)

_SECONDS = 1
"""Between two commits, and two signs of life."""

_AHEAD_NS = 3_000_000_000
"""Nanoseconds for which a sign of life holds, beside what it takes to record it. Until then a file may be
written by ourselves. What somebody else writes in that time after a crash is not noticed."""

_ANSWER_SECONDS = 10
"""How long the state file may take, whose disk may be away; what it was told is told again later."""


class Committer:
    """See the module. Without a journal it only syncs. Start `run` and `beat` in a nursery."""

    def __init__(self, journal: StateFile | None, device: Device, blockmap: BlockMap, hydrator: Hydrator) -> None:
        self._journal = journal
        self._device = device
        self._blockmap = blockmap
        self._hydrator = hydrator
        self._one_commit = trio.Lock()
        self._one_thread = trio.CapacityLimiter(1)
        self._trouble: StateWriteError | None = None
        self._durable = NO_TIMES  # of the destination: no power loss takes it behind these
        self._until_ns = 0  # the last sign of life on record
        self._took_ns = 0  # to record the last one
        self._gave_up = False

    async def begin(self, source: Identity, block_size: int) -> None:
        """Before the destination is written: what is recorded is what the block map has, or nothing."""
        if self._journal is None:
            return
        journal = self._journal
        if self._blockmap.resumed_bytes and journal.record:
            clock = journal.record.clock
            self._durable = Times(clock.mtime_ns, clock.ctime_ns)
            await self._record(journal.write_times)
        else:
            binding = Binding(source, destination_identity(self._device), self._device.size(), block_size)
            if not await self._record(partial(self._begin, journal, binding)):
                self._journal = None
                await self._discard(journal)  # or else what is in it would be believed later
                invalidate_records(self._device)

    def _begin(self, journal: StateFile, binding: Binding, clock: WriteTimes) -> None:
        journal.begin_record(binding, clock)
        if is_at_default_path(journal, self._device):
            make_default_authoritative(self._device)
        else:
            make_authoritative(journal.token, self._device)

    async def run(self) -> None:
        """Commit each second. DeviceError where the destination cannot be synced."""
        while True:
            await trio.sleep(_SECONDS)
            await self.commit()

    async def beat(self) -> None:
        """While a file is written, say so, or else its new times would count against us after a crash."""
        while not self._device.is_block_device:
            await self._hydrator.unsynced.wait()
            if self._journal is None:
                return
            await self._record(self._journal.write_times)
            await trio.sleep(_SECONDS)

    async def commit(self) -> None:
        """Return when all that is marked by now is durable, and recorded. DeviceError."""
        async with self._one_commit:
            with trio.CancelScope(shield=True):  # what was taken is recorded, or is put back
                await self._commit()

    async def _commit(self) -> None:
        await self._announce()
        times = times_of(self._device)
        changes = self._blockmap.take_changes()
        try:
            if await self._hydrator.sync():
                self._durable = times
        except DeviceError:
            await self._forget()
            raise
        if self._journal is None or not changes:
            return
        if not await self._record(partial(self._journal.write_chunks, changes)):
            self._blockmap.restore_changes(changes)

    async def _announce(self) -> None:
        """Before a sync makes the times of our writes durable, they are within what is recorded."""
        if self._journal is None or self._device.is_block_device or not self._hydrator.unsynced.is_set():
            return
        if self._until_ns < time.time_ns() + _SECONDS * 1_000_000_000:
            await self._record(self._journal.write_times)

    async def forget(self) -> None:
        """Nothing is known any more, here or on record."""
        async with self._one_commit:
            self._hydrator.forget()
            await self._forget()

    async def _forget(self) -> None:
        """StateError where the record can neither be written nor removed."""
        if self._journal is not None and not await self._write(self._journal.clear):
            journal, self._journal = self._journal, None
            await self._discard(journal)

    async def _discard(self, journal: StateFile) -> None:
        """Remove the record. Raises StateError if the record cannot be removed."""
        try:
            await self._in_thread(journal.delete)
        except TimeoutError as error:
            journal.is_stuck = True
            raise StateError(
                f"the state in {journal.path} would not be true any more, and cannot be removed: "
                f"{error.strerror}; remove it before the next start"
            ) from error

    async def close(self) -> None:
        """Nothing is written any more: commit, and let the journal go. DeviceError."""
        try:
            await self.commit()
        finally:
            with trio.CancelScope(shield=True):
                await self._close_journal()

    async def _close_journal(self) -> None:
        """Raises DeviceError if the destination cannot be synced."""
        journal = self._journal
        if journal is None:
            return
        try:
            if self._trouble is None:
                times = await trio.to_thread.run_sync(self._last_times)
                await self._write(partial(journal.write_times, WriteTimes(*times, until_ns=None)))
        except DeviceError:
            await self._forget()
            raise
        finally:
            self._journal = None
            try:
                await self._in_thread(journal.close)
            except TimeoutError:
                journal.is_stuck = True  # a thread is in it still, and ends with the process

    def _last_times(self) -> Times:
        return NO_TIMES if self._device.is_block_device else settled_times(self._device, self._device.sync)

    async def _record(self, write: Callable[[WriteTimes], None]) -> bool:
        """Do as `_write`, with a sign of life that holds for some time after it is recorded."""
        began = time.time_ns()
        until = began + _AHEAD_NS + 2 * self._took_ns
        if not await self._write(partial(write, WriteTimes(*self._durable, until_ns=until))):
            return False
        self._until_ns, self._took_ns = until, time.time_ns() - began
        return True

    async def _write(self, write: Callable[[], None]) -> bool:
        """In a thread; False, and said once, where it cannot be, or gives no answer."""
        try:
            await self._in_thread(write)
        except TimeoutError as error:
            path = self._journal.path if self._journal else ""
            trouble = StateWriteError(f"cannot record in the state file {path}: {error.strerror}")
        except StateWriteError as error:
            trouble = error
        else:
            self._trouble = None
            return True
        if self._trouble is None:
            logger.warning("%s; after a crash, more will be checked again", trouble)
        self._trouble = trouble
        return False

    async def _in_thread(self, work: Callable[[], None]) -> None:
        """Call `work`, which touches the journal. Raises TimeoutError if the journal gives no answer."""
        is_stuck = self._gave_up and self._one_thread.borrowed_tokens
        try:
            await abandonable.run_within(work, 0 if is_stuck else _ANSWER_SECONDS, limiter=self._one_thread)
        except TimeoutError:
            self._gave_up = True
            raise
        self._gave_up = False
