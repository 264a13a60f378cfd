"""Crash order: whatever is lost, and at whatever moment, no block on record differs from the source.

Real runs are watched: when each write to the destination began and returned, with its bytes, each sync,
and each commit to the journal. `Disk` then goes through these events and knows, between any two of
them, all that each 4 KiB of the disk may hold if the power went now. A write counts as durable when it
had returned before a sync began that has returned; of all others any part may be there or not, in any
order. What a commit in progress records may be there or not as well. As the pieces are independent,
looking at all that each may hold covers every combination.

At some of the cuts a second run is started, from a disk on which a random part is lost, or from the
page cache that a killed process leaves: it may not be mistaken either.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import support
import trio

from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import BLOCK_SIZE, Extent, Geometry
from blockcopy.block.identity import NO_TIMES, Times
from blockcopy.block.records import make_authoritative
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.replica.engine import Plan, Replica, open_replica
from blockcopy.replica.state import blockmap, recovery, statefile
from blockcopy.replica.state.statefile import Binding, StateFile, WriteTimes
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

PIECE = 4096
PIECES = BLOCK_SIZE // PIECE
BLOCKS = 40
CHUNK_BLOCKS = 16

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


def digest(piece: bytes) -> bytes:
    return hashlib.blake2b(piece, digest_size=16).digest()


def pieces_of(data: bytes | memoryview) -> list[bytes]:
    return [bytes(data[start : start + PIECE]) for start in range(0, len(data), PIECE)]


RIGHT = [digest(each) for each in pieces_of(DATA)]

Recorded = dict[int, bytes]
"""What a journal has: chunk number → bits."""


@dataclass(frozen=True)
class Event:
    kind: str
    key: int = 0
    """Of the write or the sync."""
    first_piece: int = 0
    digests: tuple[bytes, ...] = ()
    change: Callable[[Recorded], Recorded] = dict
    clock: WriteTimes | None = None
    """Of a commit."""
    times: Times = NO_TIMES
    """Of the destination, in the page cache."""


# What happens in a run


class Recorder:
    """Watches one destination and all journals; holds some writes and syncs up, so that they overlap."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, destination: Path, chance: random.Random) -> None:
        self.events: list[Event] = []
        self.known = {digest(each): each for each in (*pieces_of(DATA), *pieces_of(OLD))}
        self.binding: Binding | None = None
        self.failing_syncs = 0
        self._destination = str(destination)
        self._chance = chance
        self._changed = threading.Condition()
        self._counts = {"write": 0, "written": 0, "sync": 0}
        for name in ("write", "sync", "drop_cache"):
            monkeypatch.setattr(Device, name, self._watching(getattr(Device, name), getattr(self, f"_{name}")))
        for name in ("begin_record", "write_chunks", "clear", "write_times"):
            monkeypatch.setattr(StateFile, name, self._recording(getattr(StateFile, name), name))

    def _watching(self, real: Callable[..., Any], ours: Callable[..., None]) -> Callable[..., None]:
        def method(device: Device, *args: Any) -> None:
            if device.path == self._destination:
                ours(lambda: real(device, *args), *args)
            else:
                real(device, *args)

        return method

    def tell(self, kind: str, key: int | None = None, **more: Any) -> int:
        with self._changed:
            if key is None:
                key = self._counts[kind] = self._counts.get(kind, 0) + 1
            status = os.stat(self._destination)
            self.events.append(Event(kind, key, times=Times(status.st_mtime_ns, status.st_ctime_ns), **more))
            if kind == "written":
                self._counts["written"] += 1
            self._changed.notify_all()
            return key

    def hold_up(self, until: str, one_in: int = 1, timeout: float = 0.02) -> None:
        """Until the next one of these, but not for long."""
        with self._changed:
            if self._chance.randrange(one_in) == 0:
                seen = self._counts[until]
                self._changed.wait_for(lambda: self._counts[until] > seen, timeout)

    def _write(self, real: Callable[[], None], offset: int, data: bytes) -> None:
        assert offset % BLOCK_SIZE == 0
        pieces = pieces_of(memoryview(data))
        key = self.tell("write", first_piece=offset // PIECE, digests=tuple(map(digest, pieces)))
        self.hold_up("sync", one_in=3)
        real()
        self.tell("written", key)

    def _sync(self, real: Callable[[], None]) -> None:
        key = self.tell("sync")
        self.hold_up("written", one_in=2)
        if self.failing_syncs:
            self.failing_syncs -= 1
            self.tell("sync failed", key)
            raise DeviceError("the write-back failed")
        real()
        self.tell("synced", key)

    def _drop_cache(self, real: Callable[[], None]) -> None:
        """What a failed sync has dropped is read as the disk has it, which is what chance says."""
        real()
        disk = Disk(OLD)
        with self._changed, open(self._destination, "r+b", buffering=0) as file:
            for event in self.events:
                disk.go_on(event)
            for piece, written in disk.volatile.items():
                if written and all(each.dropped for each in written):
                    found = self._chance.choice(disk.may_hold(piece))
                    os.pwrite(file.fileno(), self.known[found], piece * PIECE)
                    self.events.append(Event("found", 0, piece, (found,)))

    def _recording(self, real: Callable[..., None], name: str) -> Callable[..., None]:
        changes: dict[str, Callable[..., Callable[[Recorded], Recorded]]] = {
            "begin_record": lambda *_: lambda recorded: {},
            "clear": lambda *_: lambda recorded: {},
            "write_chunks": lambda chunks, _: lambda recorded: {**recorded, **chunks},
            "write_times": lambda *_: dict,
        }

        def method(kept: StateFile, *args: Any) -> None:
            if name == "begin_record":
                self.binding = args[0]
            change = changes[name](*args)
            clock = next((each for each in args if isinstance(each, WriteTimes)), None)
            self.tell("commit", change=change, clock=clock)
            real(kept, *args)
            self.tell("committed")

        return method


# What a crash leaves


@dataclass
class Written:
    """Pieces that were written, and are not known to be on the disk."""

    piece: int
    digest: bytes
    returned: bool = False
    covered_by: set[int] = field(default_factory=set)
    """The syncs that began after it returned."""
    dropped: bool = False
    """Drop a dirty page, as the kernel does after an error: the page is clean, and no sync writes it."""


class Disk:
    """The disk and the journal after some events: what each may hold if the power goes now."""

    def __init__(self, content: bytes) -> None:
        self.durable = [digest(each) for each in pieces_of(content)]
        self.volatile: dict[int, list[Written]] = {}
        self.recorded: Recorded = {}
        self.recording: Recorded | None = None
        """What will be recorded when the commit that is in progress is through."""
        self._of_write: dict[int, list[Written]] = {}
        self._wrong: dict[int, set[int]] = {}
        self._look_at_all()

    def may_hold(self, piece: int) -> list[bytes]:
        return [self.durable[piece], *(each.digest for each in self.volatile.get(piece, ()))]

    def go_on(self, event: Event) -> None:
        getattr(self, f"_on_{event.kind.replace(' ', '_')}")(event)

    def _on_write(self, event: Event) -> None:
        made = [Written(event.first_piece + index, each) for index, each in enumerate(event.digests)]
        self._of_write[event.key] = made
        for each in made:
            self.volatile.setdefault(each.piece, []).append(each)
            self._look_at(each.piece)

    def _on_written(self, event: Event) -> None:
        for each in self._of_write[event.key]:
            each.returned = True

    def _on_sync(self, event: Event) -> None:
        for each in self._all_volatile():
            if each.returned and not each.dropped:
                each.covered_by.add(event.key)

    def _on_synced(self, event: Event) -> None:
        for each in self._all_volatile():
            if event.key in each.covered_by and not each.dropped:
                self.durable[each.piece] = each.digest
                self.volatile[each.piece].remove(each)
                self._look_at(each.piece)

    def _on_sync_failed(self, event: Event) -> None:
        for each in self._all_volatile():
            each.dropped = each.returned

    def _on_found(self, event: Event) -> None:
        """What was dropped has been read from the disk, and this is what is there."""
        self.volatile.pop(event.first_piece, None)
        self.durable[event.first_piece] = event.digests[0]
        self._look_at(event.first_piece)

    def _on_commit(self, event: Event) -> None:
        self.recording = event.change(self.recorded)

    def _on_committed(self, event: Event) -> None:
        assert self.recording is not None
        self.recorded, self.recording = self.recording, None

    def _all_volatile(self) -> list[Written]:
        return [each for written in self.volatile.values() for each in written]

    def _look_at(self, piece: int) -> None:
        wrong = self._wrong.setdefault(piece // PIECES, set())
        if set(self.may_hold(piece)) == {RIGHT[piece]}:
            wrong.discard(piece)
        else:
            wrong.add(piece)

    def mistakes(self) -> set[int]:
        """Blocks that may be on record while the disk may hold something else."""
        return {
            block
            for record in (self.recorded, self.recording or {})
            for block in blocks_of(record)
            if self._wrong.get(block, ())
        }

    def _look_at_all(self) -> None:
        for piece in range(len(RIGHT)):
            self._look_at(piece)

    # a restart from here

    def crash(self, chance: random.Random, *, keep: float) -> list[bytes]:
        """The power goes; of what is volatile a part of `keep` is there. The digests on the disk."""
        for piece, written in self.volatile.items():
            for each in written:
                if chance.random() < keep:
                    self.durable[piece] = each.digest
        self.volatile.clear()
        return self._restart(chance, list(self.durable))

    def kill(self, chance: random.Random) -> list[bytes]:
        """The process ends, and the machine does not: the page cache stays. The digests in it."""
        content = list(self.durable)
        for piece, written in self.volatile.items():
            for each in list(written):
                if each.returned or chance.random() < 0.5:
                    content[piece], each.returned = each.digest, True
                else:
                    written.remove(each)  # it has not come so far
        return self._restart(chance, content)

    def _restart(self, chance: random.Random, content: list[bytes]) -> list[bytes]:
        if self.recording is not None and chance.random() < 0.5:
            self.recorded = self.recording
        self.recording = None
        self._of_write.clear()
        self._look_at_all()
        return content


class Inode:
    """The destination's times on the disk: those at the start of the last sync that returned, or later ones."""

    def __init__(self) -> None:
        self._may_be: list[Times] = []
        self._syncs: dict[int, int] = {}
        self._clocks: list[WriteTimes] = []

    def go_on(self, event: Event) -> None:
        self._may_be.append(event.times)
        if event.kind == "sync":
            self._syncs[event.key] = len(self._may_be) - 1
        elif event.kind == "synced":
            start = self._syncs.pop(event.key)
            self._may_be = self._may_be[start:]
            self._syncs = {key: max(0, index - start) for key, index in self._syncs.items()}
        elif event.kind == "commit" and event.clock:
            self._clocks.append(event.clock)
        elif event.kind == "committed":
            self._clocks = self._clocks[-1:]

    def mistaken(self) -> list[tuple[WriteTimes, Times]]:
        """What is on record, or may be, and takes our own times for those of somebody else."""
        return [
            (clock, times)
            for clock in self._clocks
            for times in set(self._may_be)
            if recovery.was_written_by_others(clock, times)
        ]


def blocks_of(recorded: Recorded) -> Iterator[int]:
    for number, bits in recorded.items():
        for index in range(len(bits) * 8):
            block = number * CHUNK_BLOCKS + index
            if bits[index >> 3] >> (index & 7) & 1 and block < BLOCKS:
                yield block


def check_every_cut(disk: Disk, events: list[Event]) -> None:
    for index, event in enumerate(events):
        disk.go_on(event)
        if mistakes := disk.mistakes():
            before = [f"{each.kind} {each.key}" for each in events[max(0, index - 20) : index + 1]]
            pytest.fail(f"blocks {sorted(mistakes)} are on record, and may be wrong on the disk, after {before}")


# The runs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small device has several."""
    monkeypatch.setattr(blockmap, "CHUNK_BLOCKS", CHUNK_BLOCKS)
    monkeypatch.setattr(blockmap, "_CHUNK_BYTES", CHUNK_BLOCKS // 8)
    monkeypatch.setattr(statefile, "_FULL", b"\xff" * (CHUNK_BLOCKS // 8))


@contextlib.asynccontextmanager
async def replica_of(source: Path, destination: Path, *, hydrate: bool = True) -> AsyncIterator[Replica]:
    command = stage_command(Location(None, str(source)))
    plan = Plan(command, str(destination), hydrate=hydrate, state=str(destination.with_name("state")))
    with trio.fail_after(30):
        async with open_replica(plan) as replica:
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
    recorder = Recorder(monkeypatch, destination, chance)
    run_once(source, destination, chance)
    check_every_cut(Disk(OLD), recorder.events)
    assert {"written", "synced", "committed"} <= {each.kind for each in recorder.events}
    inode = Inode()
    for event in recorder.events:
        inode.go_on(event)
        assert inode.mistaken() == []


def test_a_commit_that_is_cancelled_at_any_step_is_made_up_for(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, destination, random.Random(8))

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
    disk = Disk(OLD)
    check_every_cut(disk, recorder.events)
    assert set(blocks_of(disk.recorded)) >= {*DIFFERING[:24:3], *EQUAL[:8]}


@pytest.mark.parametrize("way", ["killed", "all lost", "all kept", "some lost"])
def test_a_second_run_from_any_cut_is_not_mistaken_either(
    way: str, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(way)
    resumed = 0
    recorder = Recorder(monkeypatch, destination, chance)
    run_once(source, destination, chance)
    first_events = recorder.events
    for earliest in ("written", "recorded", "recorded"):  # there are many cuts, and few runs
        disk = Disk(OLD)
        check_every_cut(disk, first_events[: chance.randint(first(earliest, first_events), len(first_events))])
        if way == "killed":
            content = disk.kill(chance)
        else:
            content = disk.crash(chance, keep={"all lost": 0, "all kept": 1, "some lost": 0.5}[way])
        recorder.events = []
        put_back(recorder, disk.recorded, content, destination)
        resumed += run_once(source, destination, chance)
        check_every_cut(disk, recorder.events)
    assert resumed


def test_what_a_killed_run_left_in_the_page_cache_is_synced_before_it_is_recorded(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run finds every block equal, and has nothing to write."""
    chance = random.Random(7)
    recorder = Recorder(monkeypatch, destination, chance)

    async def main() -> None:
        async with replica_of(source, destination) as replica:
            await replica.wait_complete()

    trio.run(main)
    disk, last = Disk(OLD), max(index for index, each in enumerate(recorder.events) if each.kind == "written")
    check_every_cut(disk, recorder.events[: last + 1])
    put_back(recorder, disk.recorded, disk.kill(chance), destination)
    trio.run(main)
    check_every_cut(disk, recorder.events)
    assert set(blocks_of(disk.recorded)) == set(range(BLOCKS))
    assert "write" not in {each.kind for each in recorder.events}


def first(what: str, events: list[Event]) -> int:
    """Behind which event something is written, or on record."""
    disk = Disk(OLD)
    for index, event in enumerate(events):
        disk.go_on(event)
        if event.kind == what or (what == "recorded" and any(disk.recorded.values())):
            return index + 1
    raise AssertionError(f"nothing was {what}")


def put_back(recorder: Recorder, recorded: Recorded, content: list[bytes], destination: Path) -> None:
    """Make destination and state file what they are at a cut; in place, so that it is the same file."""
    with destination.open("r+b") as file:
        file.write(b"".join(recorder.known[each] for each in content))
    state = destination.with_name("state")
    state.unlink()
    kept, status = StateFile(state), destination.stat()
    clock = WriteTimes(status.st_mtime_ns, status.st_ctime_ns, None)
    assert recorder.binding is not None
    kept.begin_record(recorder.binding, clock)
    kept.write_chunks(recorded, clock)
    with open_source(str(destination)) as device:
        make_authoritative(kept.token, device)
    kept.close()
    recorder.events.clear()


# A sync that fails


@pytest.mark.parametrize("seed", range(3))
def test_what_a_failed_sync_has_dropped_is_not_believed_for_its_page_cache(
    seed: int, source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux keeps the new bytes, clean: they are read, no later sync writes them, and the disk has the old ones."""
    chance = random.Random(seed)
    recorder = Recorder(monkeypatch, destination, chance)

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
    check_every_cut(Disk(OLD), recorder.events)
    assert "found" in {each.kind for each in recorder.events}
    assert destination.read_bytes() == DATA
