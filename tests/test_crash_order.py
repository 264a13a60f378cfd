"""Crash order: whatever is lost, and at whatever moment, no later run is mistaken, and none breaks a promise.

Real runs are watched: when each write to the destination began and returned, with its bytes, each sync, each commit
of the state file, each write of a user, and each flush with its acknowledgement. `Disk` then goes through these
events and knows, between any two of them, all that each 4 KiB of the disk may hold if the power went now. A write
counts as durable when it had returned before a sync began that has returned; of all others any part may be there or
not, in any order. What a commit in progress records may be there or not as well. As the pieces are independent,
looking at all that each may hold covers every combination.

`Promises` goes through the same events and knows what the next run may show of each piece: the source's bytes where
no user wrote; of what a user wrote, exactly the version of the last acknowledged flush, or a later one.

At some of the cuts a second run is started, from a disk on which a random part is lost, or from the
page cache that a killed process leaves: it may not be mistaken either.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
import trio
from crash_model import (
    PIECE,
    Disk,
    Event,
    Inode,
    Promises,
    Recorder,
    check_every_cut,
    shrink_rows,
    touched,
)

from blockcopy.block import user_writes
from blockcopy.block.device import open_source
from blockcopy.block.geometry import BLOCK_SIZE, Extent, Geometry
from blockcopy.block.identity import sample_extents
from blockcopy.block.records import make_authoritative
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.replica.engine import Plan, Replica
from blockcopy.replica.hydration.committer import Committer
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.hydration.writer import Writer
from blockcopy.replica.source.batches import Delta
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import StateFile, WriteTimes
from blockcopy.replica.state.user_pages import UserPages
from blockcopy.replica.volume import Volume
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

BLOCKS = 40

DATA = support.noise(BLOCKS * BLOCK_SIZE - 5000)
OTHER = support.noise(len(DATA), seed=2)
GEOMETRY = Geometry(len(DATA))


EQUAL = [block for block in range(BLOCKS) if block % 3 == 0]
DIFFERING = [block for block in range(BLOCKS) if block % 3]


def old_content() -> bytes:
    """A third of the blocks is equal. A third differs in its last piece. A third differs throughout."""
    old = bytearray(DATA)
    for block in range(BLOCKS):
        offset, length = GEOMETRY.extent(block)
        if block in DIFFERING:
            start = offset if block % 3 == 1 else offset + (length - 1) // PIECE * PIECE
            old[start : offset + length] = OTHER[start : offset + length]
    return bytes(old)


OLD = old_content()

WAYS = ["killed", "some lost", *(pytest.param(way, marks=pytest.mark.long) for way in ("all lost", "all kept"))]
"""The ends of a first run, of which a second run goes on."""


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_rows(monkeypatch)


# Runs without writes of a user


@contextlib.asynccontextmanager
async def replica_of(
    source: Path, destination: Path, *, hydrate: bool = True, writable: bool = False, verify: bool = False
) -> AsyncIterator[Replica]:
    command = stage_command(Location(None, str(source)))
    state = str(destination.with_name("state"))
    plan = Plan(command, str(destination), hydrate=hydrate, state=state, writable=writable, verify=verify)
    async with support.replica_of(plan) as replica:
        yield replica


async def use(replica: Replica, chance: random.Random, reads: int) -> None:
    """ReadStats reads, with commits all the while, some of which are cancelled; then leave, wherever it stands."""

    async def commit() -> None:
        while True:
            async with trio.open_nursery() as committing:
                committing.start_soon(replica.commit)
                if chance.random() < 0.3:
                    for _ in range(chance.randrange(6)):
                        await trio.lowlevel.checkpoint()
                    committing.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()

    async def read() -> None:
        for _ in range(reads):
            offset, length = GEOMETRY.extent(chance.randrange(BLOCKS))
            with contextlib.suppress(DeviceError):
                assert await replica.volume.read(offset, length) == DATA[offset : offset + length]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        async with trio.open_nursery() as readers:
            for _ in range(3):
                readers.start_soon(read)
        nursery.cancel_scope.cancel()


def run_once(source: Path, destination: Path, chance: random.Random) -> int:
    """Return the resumed bytes of the second run."""
    resumed = 0

    async def main() -> None:
        nonlocal resumed
        async with replica_of(source, destination) as replica:
            resumed = replica.status().resumed_bytes
            await use(replica, chance, reads=chance.choice([1, 4, 12]))
            if chance.random() < 0.5:
                with contextlib.suppress(BlockcopyError):
                    await replica.wait_complete()

    trio.run(main)
    return resumed


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_on_record_that_a_crash_can_take_and_no_crash_takes_the_record(
    seed: int, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    run_once(source, destination, chance)
    check_every_cut(Disk(OLD, DATA), Promises(DATA), recorder.events)
    assert {"written", "synced", "committed"} <= {each.kind for each in recorder.events}
    inode = Inode()
    for event in recorder.events:
        inode.go_on(event)
        assert inode.mistaken() == []


def test_a_commit_that_is_cancelled_at_any_step_is_made_up_for(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, destination, random.Random(8), DATA, OLD)

    async def main() -> None:
        async with replica_of(source, destination, hydrate=False) as replica:
            for steps in range(8):
                await replica.volume.read(DIFFERING[3 * steps] * BLOCK_SIZE, 1)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(replica.commit)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
                await replica.volume.read(EQUAL[steps] * BLOCK_SIZE, 1)  # is equal, and marks its chunk
                await replica.commit()

    trio.run(main)
    disk = Disk(OLD, DATA)
    check_every_cut(disk, Promises(DATA), recorder.events)
    assert disk.recorded.blocks() >= {*DIFFERING[:24:3], *EQUAL[:8]}


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_from_any_cut_is_not_mistaken_either(
    way: str, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(way)
    resumed = 0
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    run_once(source, destination, chance)
    first_events = recorder.events
    for earliest in ("written", "recorded", "recorded"):  # there are many cuts, and few runs
        disk = Disk(OLD, DATA)
        cut = chance.randint(first(earliest, first_events), len(first_events))
        check_every_cut(disk, Promises(DATA), first_events[:cut])
        if way == "killed":
            content = disk.kill(chance)
        else:
            content = disk.crash(chance, keep={"all lost": 0, "all kept": 1, "some lost": 0.5}[way])
        recorder.events = []
        put_back(recorder, disk, content, destination)
        resumed += run_once(source, destination, chance)
        check_every_cut(disk, Promises(DATA), recorder.events)
    assert resumed


def test_what_a_killed_run_left_in_the_page_cache_is_synced_before_it_is_recorded(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run finds every block equal, and has nothing to write."""
    chance = random.Random(7)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)

    async def main() -> None:
        async with replica_of(source, destination) as replica:
            await replica.wait_complete()

    trio.run(main)
    disk, last = Disk(OLD, DATA), max(index for index, each in enumerate(recorder.events) if each.kind == "written")
    check_every_cut(disk, Promises(DATA), recorder.events[: last + 1])
    put_back(recorder, disk, disk.kill(chance), destination)
    trio.run(main)
    check_every_cut(disk, Promises(DATA), recorder.events)
    assert disk.recorded.blocks() == set(range(BLOCKS))
    assert "write" not in {each.kind for each in recorder.events}


def first(what: str, events: list[Event]) -> int:
    """Behind which event something is written, or on record."""
    disk = Disk(OLD, DATA)
    for index, event in enumerate(events):
        disk.go_on(event)
        if event.kind == what or (what == "recorded" and disk.recorded.present):
            return index + 1
    raise AssertionError(f"nothing was {what}")


def put_back(recorder: Recorder, disk: Disk, content: list[bytes], destination: Path) -> None:
    """Make destination and state file what they are at a cut; in place, so that it is the same file."""
    recorder.put_back(content)
    state = destination.with_name("state")
    state.unlink()
    kept, status, recorded = StateFile(state), destination.stat(), disk.recorded
    until = time.time_ns() if recorded.has_user_writes else None
    clock = WriteTimes(status.st_mtime_ns, status.st_ctime_ns, until)
    assert recorder.binding is not None
    kept.begin_record(recorder.binding, clock)
    kept.write_changes(recorded.as_changes(BLOCKS, len(DATA) // PIECE + 1), clock)
    if recorded.has_user_writes:
        kept.note_user_writes(clock)
    with open_source(str(destination)) as device:
        make_authoritative(kept.token, device)
        if disk.is_noted:
            user_writes.make(device, user_writes.Note(state=str(state), commits=kept.commits)).close()
        else:
            user_writes.remove(device)
    kept.close()
    recorder.events.clear()


# A sync that fails


@pytest.mark.parametrize("seed", range(3))
def test_what_a_failed_sync_has_dropped_is_not_believed_for_its_page_cache(
    seed: int, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux keeps the new bytes, clean: they are read, no later sync writes them, and the disk has the old ones."""
    chance = random.Random(seed)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)

    async def main() -> None:
        async with replica_of(source, destination, hydrate=False) as replica:
            await replica.volume.read(5 * BLOCK_SIZE, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bring_all, replica)
                await trio.to_thread.run_sync(recorder.hold_up, "written", 1, 5)  # a batch is being stored
                recorder.failing_syncs = 1
                with pytest.raises(DeviceError):
                    await replica.commit()
            await use(replica, chance, reads=4)
            await bring_all(replica)
            await replica.commit()
            assert replica.status().hydrated_bytes == len(DATA)

    async def bring_all(replica: Replica) -> None:
        with contextlib.suppress(DeviceError):
            await replica.prefetch([Extent(0, len(DATA))])

    trio.run(main)
    check_every_cut(Disk(OLD, DATA), Promises(DATA), recorder.events)
    assert "found" in {each.kind for each in recorder.events}
    assert destination.read_bytes() == DATA


# Writes of a user


class User:
    """A user who writes, reads back and flushes, in several tasks at once, and tells the recorder."""

    def __init__(self, recorder: Recorder, chance: random.Random, content: bytes) -> None:
        self._recorder, self._chance = recorder, chance
        self.content = bytearray(content)
        """The bytes that a read must return now."""
        self._busy: set[int] = set()  # pieces that are being written
        self._versions = [0] * (len(content) // PIECE + 1)
        self.refused = 0
        self._wrote = trio.Event()

    async def wait_until_written(self, times: int) -> None:
        """Wait for so many writes, but not for long: a write may wait for the caller."""
        with trio.move_on_after(0.03):
            for _ in range(times):
                await self._wrote.wait()

    def _extent(self) -> Extent:
        offset = self._chance.randrange(len(DATA))
        way = self._chance.random()
        if way < 0.3:
            length = self._chance.choice([1, 512, 3000, 5000, 10_000])
        elif way < 0.8:
            offset, length = offset // PIECE * PIECE, PIECE * self._chance.choice([1, 1, 2, 5])
        else:
            offset, length = offset // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE * self._chance.choice([1, 2])
        return Extent(offset, min(length, len(DATA) - offset))

    async def write(self, replica: Replica, times: int) -> None:
        for _ in range(times):
            extent = self._extent()
            if self._busy.isdisjoint(touched(*extent)):
                await self.write_at(replica, extent)
            await trio.lowlevel.checkpoint()

    async def write_at(self, replica: Replica, extent: Extent) -> None:
        pages = touched(*extent)
        self._busy.update(pages)
        data = self._chance.randbytes(extent.length)
        start = pages.start * PIECE
        content = self.content[start : pages.stop * PIECE]
        content[extent.offset - start : extent.end - start] = data
        key = self._recorder.tell_pieces("user writes", start, bytes(content), by_user=True)
        try:
            assert await replica.volume.write(extent.offset, data) == extent.length
        except DeviceError:
            self.refused += 1
            return  # its pieces stay busy: nobody knows what they are
        self.content[extent.offset : extent.end] = data
        for page in pages:
            self._versions[page] += 1
        self._recorder.tell("user wrote", key)
        self._wrote.set()
        self._wrote = trio.Event()
        self._busy.difference_update(pages)

    async def read(self, replica: Replica, times: int) -> None:
        for _ in range(times):
            extent = self._extent()
            pages = touched(*extent)
            before = self._versions[pages.start : pages.stop]
            if self._busy.isdisjoint(pages):
                try:
                    data = bytes(await replica.volume.read(*extent))
                except DeviceError:
                    assert self.refused
                    continue
                if self._busy.isdisjoint(pages) and before == self._versions[pages.start : pages.stop]:
                    assert data == self.content[extent.offset : extent.end]
            await trio.lowlevel.checkpoint()

    async def flush(self, replica: Replica) -> None:
        key = self._recorder.tell("flush")
        await replica.flush()
        self._recorder.tell("flushed", key)

    async def flush_now_and_then(self, replica: Replica) -> None:
        while True:
            with contextlib.suppress(DeviceError):
                await self.flush(replica)
            for _ in range(self._chance.randrange(20)):
                await trio.lowlevel.checkpoint()


async def work(replica: Replica, user: User, chance: random.Random, times: int) -> None:
    """Write, read and flush, with commits all the while; then leave, wherever it stands."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(user.flush_now_and_then, replica)
        async with trio.open_nursery() as workers:
            for _ in range(2):
                workers.start_soon(user.write, replica, times)
                workers.start_soon(user.read, replica, times // 5)
            workers.start_soon(partial(use, replica, chance, reads=0))
        nursery.cancel_scope.cancel()


def write_once(source: Path, destination: Path, chance: random.Random, recorder: Recorder, user: User) -> None:
    """Run a writable replica. The source answers while the user writes."""
    ask = Pool.ask

    async def ask_late(link: Pool, *args: Any) -> Delta:
        await user.wait_until_written(chance.randrange(6))
        return await ask(link, *args)

    async def main() -> None:
        hydrate = chance.random() < 0.7
        async with replica_of(source, destination, hydrate=hydrate, writable=True) as replica:
            recorder.tell("opened")
            await work(replica, user, chance, times=chance.choice([5, 20, 40]))
            if hydrate and chance.random() < 0.3:
                await replica.wait_complete()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "ask", ask_late)
        trio.run(main)


@pytest.mark.parametrize("seed", range(8))
def test_no_flush_is_lost_and_nothing_of_the_source_lands_on_a_page_of_the_user(
    seed: int, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    user = User(recorder, chance, DATA)
    write_once(source, destination, chance, recorder, user)
    check_every_cut(Disk(OLD, DATA), Promises(DATA), recorder.events)
    assert {"user wrote", "flushed", "synced", "committed"} <= {each.kind for each in recorder.events}


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_keeps_what_the_user_wrote(
    way: str, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment that the second run is open, no page may change again, whatever happens."""
    chance = random.Random(way)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    disk, promises = Disk(OLD, DATA), Promises(DATA)
    write_once(source, destination, chance, recorder, User(recorder, chance, DATA))
    for _ in range(4):
        cut = chance.randint(first("user wrote", recorder.events), len(recorder.events))
        check_every_cut(disk, promises, recorder.events[:cut])
        if way == "killed":
            content = disk.kill(chance)
        else:
            content = disk.crash(chance, keep={"all lost": 0, "all kept": 1, "some lost": 0.5}[way])
        put_back(recorder, disk, content, destination)
        shown = b"".join(recorder.known[disk.view(piece, content)] for piece in range(len(content)))
        write_once(source, destination, chance, recorder, User(recorder, chance, shown))
    check_every_cut(disk, promises, recorder.events)


@pytest.mark.parametrize("seed", range(4))
def test_a_failed_sync_loses_no_earlier_flush(
    seed: int, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    user = User(recorder, chance, DATA)

    async def main() -> None:
        async with replica_of(source, destination, writable=True) as replica:
            await work(replica, user, chance, times=10)
            recorder.failing_syncs = 1
            await work(replica, user, chance, times=10)
            assert user.refused
            with pytest.raises(DeviceError):
                await replica.flush()

    trio.run(main)
    disk = Disk(OLD, DATA)
    check_every_cut(disk, Promises(DATA), recorder.events)
    assert "sync failed" in {each.kind for each in recorder.events}
    assert disk.recorded.lost


def record_before_sync(patch: pytest.MonkeyPatch) -> None:
    async def commit(committer: Committer) -> None:
        committer._commits_begun += 1
        number = committer._commits_begun
        changes = committer._blockmap.take_changes()
        await committer._record_changes(changes)
        await committer._hydrator.sync()
        committer._blockmap.settle()
        committer._commits_ended = number

    patch.setattr(Committer, "_commit", commit)


def take_changes_after_sync(patch: pytest.MonkeyPatch) -> None:
    async def commit(committer: Committer) -> None:
        committer._commits_begun += 1
        number = committer._commits_begun
        await committer._hydrator.sync()
        changes = committer._blockmap.take_changes()
        committer._blockmap.settle()
        await committer._record_changes(changes)
        committer._commits_ended = number

    patch.setattr(Committer, "_commit", commit)


def land_on_pages_of_the_user(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UserPages, "others", lambda pages, extent: iter([extent]))


def note_before_the_write(patch: pytest.MonkeyPatch) -> None:
    write, note = Volume._write, BlockMap.note_write

    async def note_and_write(volume: Volume, extent: Extent, data: memoryview, *, may_wait: bool) -> None:
        note(volume._blockmap, extent)
        await write(volume, extent, data, may_wait=True)

    patch.setattr(Volume, "_write", note_and_write)
    patch.setattr(BlockMap, "note_write", lambda *_: None)


def answer_a_flush_at_once(patch: pytest.MonkeyPatch) -> None:
    async def flush(committer: Committer) -> None:
        pass

    patch.setattr(Committer, "flush", flush)


def share_a_commit_that_has_begun(patch: pytest.MonkeyPatch) -> None:
    async def flush(committer: Committer) -> None:
        wanted = max(1, committer._commits_begun)
        async with committer._one_commit:
            if committer._commits_ended < wanted:
                await committer._commit()

    patch.setattr(Committer, "flush", flush)


def write_without_a_note(patch: pytest.MonkeyPatch) -> None:
    async def begin(committer: Committer) -> None:
        pass

    patch.setattr(Committer, "begin_user_writes", begin)


BREAKS = [
    record_before_sync,
    take_changes_after_sync,
    land_on_pages_of_the_user,
    note_before_the_write,
    answer_a_flush_at_once,
    share_a_commit_that_has_begun,
    write_without_a_note,
]


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_core_that_is_broken_is_seen(
    break_it: Callable[[pytest.MonkeyPatch], None], source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            chance = random.Random(seed)
            destination.write_bytes(OLD)
            destination.with_name("state").unlink(missing_ok=True)
            recorder = Recorder(patch, destination, chance, DATA, OLD)
            try:
                write_once(source, destination, chance, recorder, User(recorder, chance, DATA))
                check_every_cut(Disk(OLD, DATA), Promises(DATA), recorder.events)
            except (pytest.fail.Exception, AssertionError, BaseExceptionGroup) as error:
                print(f"seed {seed}: {error!r}")
                return
            with open_source(str(destination)) as device:
                user_writes.remove(device)
    pytest.fail("nothing was seen")


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_block_is_not_on_record_while_the_user_writes_into_it(
    is_broken: bool, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lands there leaves out the page of the user, which still has the old bytes."""
    recorder = Recorder(monkeypatch, destination, random.Random(1), DATA, OLD)
    user, go_on, block = User(recorder, random.Random(1), DATA), threading.Event(), DIFFERING[0]
    write = Writer.write

    def wait_and_write(writer: Writer, extent: Extent, data: memoryview) -> None:
        assert go_on.wait(support.PATIENCE)
        write(writer, extent, data)

    marked = trio.Event()
    mark = Hydrator._mark

    def mark_and_tell(*args: Any) -> None:
        mark(*args)
        marked.set()

    monkeypatch.setattr(Writer, "write", wait_and_write)
    monkeypatch.setattr(Hydrator, "_mark", mark_and_tell)
    if is_broken:
        monkeypatch.setattr(Writer, "claimed_blocks", lambda writer: frozenset())

    async def main() -> None:
        async with (
            replica_of(source, destination, hydrate=False, writable=True) as replica,
            trio.open_nursery() as both,
        ):
            replica.volume._wary_until = math.inf  # so that threads write
            page = Extent(block * BLOCK_SIZE, PIECE)
            both.start_soon(user.write_at, replica, page)
            while not replica._hydrator.writer._claims:
                await trio.lowlevel.checkpoint()
            both.start_soon(replica.volume.read, page.end, 1)
            await marked.wait()
            await replica.commit()
            go_on.set()

    trio.run(main)
    with pytest.raises(pytest.fail.Exception) if is_broken else contextlib.nullcontext():
        check_every_cut(Disk(OLD, DATA), Promises(DATA), recorder.events)


def test_a_verification_takes_what_a_killed_run_has_left_for_the_users(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The block is on record as present. The write into it is not, and has reached the disk all the same."""
    chance = random.Random(1)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    user, disk = User(recorder, chance, DATA), Disk(OLD, DATA)

    async def write() -> None:
        async with replica_of(source, destination, writable=True) as replica:
            await user.write_at(replica, Extent(7 * BLOCK_SIZE, PIECE))
            await replica.wait_complete()
            await user.flush(replica)
            await user.write_at(replica, Extent(11 * BLOCK_SIZE, PIECE))

    async def verify() -> None:
        async with replica_of(source, destination, writable=True, verify=True) as replica:
            await replica.wait_complete()
            assert replica.status().written_bytes == 2 * BLOCK_SIZE
            assert await replica.volume.read(0, len(DATA)) == user.content

    trio.run(write)
    last = max(index for index, each in enumerate(recorder.events) if each.kind == "user wrote")
    check_every_cut(disk, Promises(DATA), recorder.events[: last + 1])
    put_back(recorder, disk, disk.kill(chance), destination)
    for is_first in (True, False):  # then they are on record as the user's
        caplog.clear()
        trio.run(verify)
        assert ("count as the user's" in caplog.text) == is_first


def test_what_a_killed_run_has_left_is_not_taken_for_the_write_of_another_program(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run compares a sample with the source's. It may lie in a write that was not flushed."""
    chance = random.Random(1)
    recorder = Recorder(monkeypatch, destination, chance, DATA, OLD)
    user, disk, sample = User(recorder, chance, DATA), Disk(OLD, DATA), sample_extents(len(DATA))[0]

    async def write() -> None:
        async with replica_of(source, destination, hydrate=False, writable=True) as replica:
            await replica.volume.read(*sample)
            await user.write_at(replica, Extent(20 * BLOCK_SIZE, PIECE))
            await user.flush(replica)
            await user.write_at(replica, sample)

    async def read() -> None:
        async with replica_of(source, destination, hydrate=False, writable=True) as replica:
            assert await replica.volume.read(*sample) == user.content[sample.offset : sample.end]

    trio.run(write)
    last = max(index for index, each in enumerate(recorder.events) if each.kind == "user wrote")
    check_every_cut(disk, Promises(DATA), recorder.events[: last + 1])
    put_back(recorder, disk, disk.kill(chance), destination)
    for _ in range(3):
        trio.run(read)
