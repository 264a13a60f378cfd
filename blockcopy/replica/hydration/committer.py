"""The committer: sync the destination, and record in the state file which blocks are present.

    blocks are marked → the destination is synced → the changed chunks of the block map are recorded

This order keeps the state file true: each recorded block is right on the destination, and durable there. A commit
takes place each second and on request. What changes after a commit has taken its changes waits for the next one.
If a sync fails, what earlier commits have recorded stays, because their syncs succeeded. All else is undone. If the
state file cannot be written, the copy goes on, and the next run checks more blocks.

The first write of a user is noted before it lands: in the state file, and outside of it (`user_writes`). From then
on a flush succeeds only if what the user wrote is durable and on record.

A lease is a time on record until which this run may write to a destination file. A later run ignores the record
if the file was written after the lease: another program wrote it. Block devices have no times, and need no lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from copy import copy
from functools import partial

import trio

from blockcopy.block import user_writes
from blockcopy.block.identity import NO_TIMES, Identity, Times, destination_identity, settled_times, times_of
from blockcopy.block.records import invalidate_records, make_authoritative, make_default_authoritative
from blockcopy.errors import DestinationLostError, DeviceError, StateError, StateRemovedError, StateWriteError
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.state.blockmap import Changes
from blockcopy.replica.state.recovery import is_at_default_path
from blockcopy.replica.state.statefile import Binding, StateFile, WriteTimes
from blockcopy.replica.tasks import one_at_a_time
from blockcopy.replica.tasks.one_at_a_time import OneAtATime

logger = logging.getLogger(__name__)

_SECONDS = 1
"""Seconds between two commits, and between two renewals of the lease."""

_IDLE_SECONDS = 10
"""Seconds between two commits if only the user's writes are left to commit. A flush does not wait for them."""

_LEASE_NS = 3_000_000_000
"""Nanoseconds that a lease lasts after it was recorded.

After a crash, a write of another program within the lease goes unnoticed.
"""

_ANSWER_SECONDS = 10
"""Seconds to wait for the state file, whose disk may be away. What was not recorded is recorded later."""


class Committer:
    """The one that syncs a destination and writes its state file. Call from trio's thread only.

    Start `run` and `renew_leases` in a nursery.
    """

    def __init__(self, state_file: StateFile | None, hydrator: Hydrator, *, source: str = "") -> None:
        """Make a committer for the destination of `hydrator`, which syncs, and undoes changes if that fails.

        `state_file`: None to sync only. `source`: the source, as the user named it.
        """
        self._state_file = state_file
        self._hydrator = hydrator
        self._device = hydrator.device
        self._blockmap = hydrator.blockmap
        self._source = source
        self._counter: user_writes.Counter | None = None
        self._has_user_writes = False
        self._is_recorded_whole = False  # all blocks are present on record, for good
        self._one_commit = trio.Lock()
        self._commits_begun = self._commits_ended = 0
        self._recording = OneAtATime(_ANSWER_SECONDS)
        self._trouble: StateWriteError | None = None
        self._durable = NO_TIMES  # times of the destination that survive a power loss
        self._lease_ns = 0  # end of the recorded lease
        self._recording_ns = 0  # how long it took to record that lease

    async def begin(self, source: Identity, *, for_writes: bool = False) -> None:
        """Make the record match the block map. Call before the destination is written.

        The old record is continued if blocks were resumed from it, or if the user has written. Otherwise a new
        record begins, which names `source`, the identity of the source. If the new record cannot be written, the
        old records are removed, and no state is kept.
        `for_writes`: a user is going to write. Raises StateWriteError then if the new record cannot be written.
        Raises StateError if an old record cannot be removed, or if a record of user's writes cannot be continued.
        Raises DeviceError if the destination, which a user has written, cannot be synced.
        """
        state_file = self._state_file
        if state_file is None:
            return
        record = state_file.record
        is_noted = (record is not None and record.has_user_writes) or user_writes.find(self._device) is not None
        if record and (self._blockmap.resumed_bytes or record.has_user_writes):
            self._durable = Times(record.times.mtime_ns, record.times.ctime_ns)
            self._is_recorded_whole = self._blockmap.complete
            if record.has_user_writes:
                await self._settle_earlier_run(was_killed=record.times.until_ns is not None)
            if not is_noted:
                await self._record(state_file.write_times)
        else:
            await self._begin_record(state_file, source, for_writes=for_writes)
        if is_noted:
            await self._note_user_writes()

    async def _begin_record(self, state_file: StateFile, source: Identity, *, for_writes: bool) -> None:
        """Begin a new record about `source` in `state_file`. Keeps no state if that fails, unless `for_writes`.

        Raises StateError if the old records cannot be removed then.
        """
        block_size = self._blockmap.geometry.block_size
        binding = Binding(source, destination_identity(self._device), self._device.size(), block_size)
        if not await self._record(partial(self._begin, state_file, binding)):
            if for_writes and self._trouble is not None:
                raise copy(self._trouble)
            self._state_file = None
            await self._delete(state_file)  # or else a later run would believe the old record
            invalidate_records(self._device)

    async def _settle_earlier_run(self, *, was_killed: bool) -> None:
        """Make durable what an earlier run left in the page cache: no page changes after it was read.

        `was_killed`: the earlier run may have met a failed sync. The cache may hold bytes then that no disk has.
        Raises DeviceError if the sync fails.
        """
        await self._hydrator.sync()
        if was_killed:
            await trio.to_thread.run_sync(self._device.drop_cache)

    def _begin(self, state_file: StateFile, binding: Binding, times: WriteTimes) -> None:
        state_file.begin_record(binding, times, (self._source, self._device.path))
        if is_at_default_path(state_file, self._device):
            make_default_authoritative(self._device)
        else:
            make_authoritative(state_file.token, self._device)

    @property
    def may_lack_user_writes(self) -> bool:
        """Whether the destination may have writes of a user that are not on record, because a run was killed."""
        record = self._state_file.record if self._state_file else None
        return record is not None and record.was_killed

    async def begin_user_writes(self) -> None:
        """Note durably that the destination holds writes of the user. Call before each write of the user.

        Raises StateWriteError if that is not possible.
        """
        if not self._has_user_writes:
            async with self._one_commit:
                if not self._has_user_writes:
                    await self._note_user_writes()

    async def _note_user_writes(self) -> None:
        """Note in both places that the destination holds writes of the user. Raises StateWriteError otherwise."""
        state_file = self._state_file
        if state_file is None:
            raise StateWriteError(f"{self._device.path} cannot be written: there is no state file")

        def note() -> None:
            state_file.note_user_writes(WriteTimes(*self._durable, until_ns=time.time_ns()))
            known = user_writes.Note(self._source, str(state_file.path), state_file.commits, state_file.token)
            self._counter = user_writes.make(self._device, known)

        try:
            await self._recording.run(note)
        except TimeoutError as error:
            raise StateWriteError(f"cannot record in {state_file.path}: {error.strerror}") from error
        self._has_user_writes, self._trouble = True, None

    async def run(self) -> None:
        """Commit each second, for ever. Raises DeviceError if the destination cannot be synced."""
        while True:
            await trio.sleep(_IDLE_SECONDS if self._blockmap.complete else _SECONDS)
            await self.commit()

    async def renew_leases(self) -> None:
        """Renew the lease each second while a destination file has unsynced writes, until the user writes.

        Without a lease, a crash would leave times that look like the writes of another program.
        """
        while not self._device.is_block_device and not self._has_user_writes:
            await self._hydrator.writer.unsynced.wait()
            if self._state_file is None:
                return
            await self._record(self._state_file.write_times)
            await trio.sleep(_SECONDS)

    async def commit(self) -> None:
        """Make all blocks durable that are marked now, and record them. Raises DeviceError if the sync fails."""
        async with self._one_commit:
            with trio.CancelScope(shield=True):  # changes that were taken are recorded or put back
                await self._commit()

    async def flush(self) -> None:
        """Make all that the user has written durable, and record it. Flushes that wait together share a commit.

        Raises DeviceError if the sync fails, now or earlier. Raises StateWriteError if it cannot be recorded.
        """
        wanted = self._commits_begun + 1
        async with self._one_commit:
            if self._commits_ended < wanted:
                with trio.CancelScope(shield=True):
                    await self._commit()
        if self._hydrator.writer.failure is not None:
            raise copy(self._hydrator.writer.failure)
        # Once the record is whole, it needs no more rows. But without it, a later command may copy the source anew.
        is_needed = not self._is_recorded_whole or isinstance(self._trouble, StateRemovedError)
        if self._has_user_writes and self._trouble is not None and is_needed:
            raise copy(self._trouble)

    async def _commit(self) -> None:
        self._commits_begun += 1
        number = self._commits_begun
        await self._extend_lease()
        times = times_of(self._device)
        changes, is_whole = self._blockmap.take_changes(), self._blockmap.complete

        async def sync_and_record(sync: Callable[[], None]) -> None:
            def sync_first() -> None:
                sync()
                self._durable = times

            await self._record_changes(changes, is_whole=is_whole, after=sync_first)

        try:
            was_dirty = await self._hydrator.sync(sync_and_record, times=not self._has_user_writes)
        except DeviceError as error:
            await self._record_failed_sync(error)
            raise
        self._blockmap.settle()
        if not was_dirty:
            await self._record_changes(changes, is_whole=is_whole)
        self._commits_ended = number

    async def _record_changes(
        self, changes: Changes, *, is_whole: bool = False, after: Callable[[], None] | None = None
    ) -> None:
        """Record `changes`, or put them back if that fails. Without changes, look whether the record is there.

        `is_whole`: all blocks are present with them. `after`: called before, in the same thread. Raises what
        `after` raises.
        """
        state_file = self._state_file
        if state_file is not None and any(changes):
            if not await self._record(partial(state_file.write_changes, changes), after=after):
                self._blockmap.restore_changes(changes)
            elif is_whole:
                self._is_recorded_whole = True
        elif state_file is not None and self._has_user_writes:
            await self._write(state_file.check_in_place, after=after)
        elif after is not None:
            await one_at_a_time.run(after)

    async def _record_failed_sync(self, error: DeviceError) -> None:
        """Record what is left after the sync that failed with `error`: which pages of the user are lost.

        A foreign change of the destination makes blocks missing on record too, as the hydrator does in memory.
        Raises StateError if such a record can be neither written nor removed.
        """
        if self._has_user_writes:
            await self._record_changes(self._blockmap.take_changes())
            self._blockmap.settle()
        elif isinstance(error, DestinationLostError):
            await self._clear_record()

    async def _extend_lease(self) -> None:
        """Renew a lease that may end before the next sync. A sync makes the times of our writes durable."""
        if self._state_file is None or self._device.is_block_device or self._has_user_writes:
            return
        if not self._hydrator.writer.unsynced.is_set():
            return
        if self._lease_ns < time.time_ns() + _SECONDS * 1_000_000_000:
            await self._record(self._state_file.write_times)

    async def forget(self) -> None:
        """Mark all blocks as missing, in memory and on record. Does nothing if the user has written.

        Raises StateError if the record can be neither written nor removed.
        """
        if self._has_user_writes:
            return
        async with self._one_commit:
            self._hydrator.forget()
            await self._clear_record()

    async def _clear_record(self) -> None:
        """Remove all chunks from the record, or else the record. Raises StateError if neither is possible."""
        if self._state_file is not None and not await self._write(self._state_file.clear):
            state_file, self._state_file = self._state_file, None
            await self._delete(state_file)

    async def _delete(self, state_file: StateFile) -> None:
        """Remove the record in `state_file`. Raises StateError if the record cannot be removed."""
        try:
            await self._recording.run(state_file.delete)
        except TimeoutError as error:
            state_file.is_stuck = True
            raise StateError(
                f"the state file {state_file.path} is out of date and cannot be removed: {error.strerror}. "
                "Remove it before the next start"
            ) from error

    async def close(self) -> None:
        """Commit, and close the state file. Nothing may be written to the destination afterwards.

        Raises DeviceError if a sync fails.
        """
        try:
            await self.commit()
        finally:
            with trio.CancelScope(shield=True):
                await self._close_state_file()

    async def _close_state_file(self) -> None:
        """Record the last times of the destination, and close. Raises DeviceError if a sync fails.

        These last syncs bypass the hydrator. So if one fails, this method itself undoes what they should cover.
        """
        state_file = self._state_file
        if state_file is None:
            return
        try:
            if self._trouble is None and self._hydrator.writer.failure is None:
                times = NO_TIMES
                if not self._device.is_block_device:
                    times = await trio.to_thread.run_sync(settled_times, self._device, self._device.sync)
                await self._write(partial(state_file.write_times, WriteTimes(*times, until_ns=None)))
        except DeviceError as error:
            try:
                await self._hydrator.undo_unsynced(error)
            finally:
                await self._record_failed_sync(error)
            raise
        finally:
            self._state_file = None
            if self._counter is not None:
                self._counter.close()
            try:
                await self._recording.run(state_file.close)
            except TimeoutError:
                state_file.is_stuck = True  # a thread still uses it, and ends with the process

    async def _record(
        self, write: Callable[[WriteTimes], None], *, after: Callable[[], None] | None = None
    ) -> bool:
        """Call `write` with the times to record and a new lease, as `_write` does. Returns False if that fails.

        `after`: called before, in the same thread. Raises what `after` raises.
        """
        began = lease = 0

        def write_with_lease() -> None:
            nonlocal began, lease
            began = time.time_ns()
            lease = began + _LEASE_NS + 2 * self._recording_ns
            write(WriteTimes(*self._durable, until_ns=lease))

        if not await self._write(write_with_lease, after=after):
            return False
        self._lease_ns, self._recording_ns = lease, time.time_ns() - began
        return True

    async def _write(self, write: Callable[[], None], *, after: Callable[[], None] | None = None) -> bool:
        """Call `write` in a thread. Returns False and warns once if the state file cannot be written, or hangs.

        `after`: called before, in the same thread. Raises what `after` raises.
        """

        def write_and_count() -> None:
            if self._state_file is None:
                return  # closed meanwhile, with newer times on record than a late lease has
            write()
            if self._counter is not None:
                self._counter.set(self._state_file.commits)

        try:
            await self._recording.run(write_and_count, after=after)
        except TimeoutError as error:
            path = self._state_file.path if self._state_file else ""
            trouble = StateWriteError(f"cannot record in the state file {path}: {error.strerror}")
        except StateWriteError as error:
            trouble = error
        else:
            self._trouble = None
            return True
        if self._trouble is None:
            logger.warning("%s; after a crash, more blocks will be checked again", trouble)
        self._trouble = trouble
        return False
