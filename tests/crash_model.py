"""The watch of a run, and the model of what a crash can leave of it. `test_crash_order` tells how they are used.

Recorder    notes the events of real runs: writes, syncs, commits, and what the user was told
Disk        goes through the events: what the disk and the record may hold if the power went now
Promises    goes through them too: what the user may find on each page in any later run
Inode       goes through them too: the times of the destination
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from blockcopy.block import user_writes
from blockcopy.block.destination import Destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.block.identity import NO_TIMES, Times
from blockcopy.errors import DeviceError
from blockcopy.replica.hydration.writer import Writer
from blockcopy.replica.state import bits, blockmap, recovery, statefile
from blockcopy.replica.state.blockmap import Changes
from blockcopy.replica.state.statefile import Binding, StateFile, WriteTimes

PIECE = 4096
"""Bytes of a page: what the disk writes as a whole, and what the user's writes are tracked in."""

PIECES = BLOCK_SIZE // PIECE
CHUNK_BLOCKS = 16
ROW_PAGES = 128

LOST = b"lost"
"""In place of the digest of a page whose read is an error."""


def shrink_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the rows of a state file so small that a small device has several."""
    monkeypatch.setattr(blockmap, "CHUNK_BLOCKS", CHUNK_BLOCKS)
    monkeypatch.setattr(statefile, "CHUNK_BLOCKS", CHUNK_BLOCKS)
    monkeypatch.setattr(blockmap, "_CHUNK_BYTES", CHUNK_BLOCKS // 8)
    monkeypatch.setattr(bits, "ROW_BYTES", ROW_PAGES // 8)
    monkeypatch.setattr(statefile, "ROW_BYTES", ROW_PAGES // 8)
    monkeypatch.setattr(bits, "_ROW_BITS", ROW_PAGES)


def digest(piece: bytes) -> bytes:
    return hashlib.blake2b(piece, digest_size=16).digest()


def pieces_of(data: bytes | memoryview) -> list[bytes]:
    return [bytes(data[start : start + PIECE]) for start in range(0, len(data), PIECE)]


def touched(offset: int, length: int) -> range:
    return range(offset // PIECE, -(-(offset + length) // PIECE))


# What is on record


@dataclass(frozen=True)
class Recorded:
    """A record, as sets of bits: present blocks, pages of the user, lost pages."""

    present: int = 0
    pages: int = 0
    lost: int = 0
    has_user_writes: bool = False

    def with_changes(self, changes: Changes) -> Recorded:
        return replace(
            self,
            present=_with_rows(self.present, changes.chunks, CHUNK_BLOCKS),
            pages=_with_rows(self.pages, changes.pages, ROW_PAGES),
            lost=_with_rows(self.lost, changes.lost, ROW_PAGES),
        )

    def as_changes(self, blocks: int, pages: int) -> Changes:
        """Return all rows of a device with so many `blocks` and `pages`."""
        return Changes(
            _rows(self.present, CHUNK_BLOCKS, -(-blocks // 8) * 8),
            _rows(self.pages, ROW_PAGES, -(-pages // ROW_PAGES) * ROW_PAGES),
            _rows(self.lost, ROW_PAGES, -(-pages // ROW_PAGES) * ROW_PAGES),
        )

    def blocks(self) -> set[int]:
        return set(numbers_of(self.present))


def _with_rows(known: int, rows: dict[int, bytes], row_bits: int) -> int:
    for number, row in rows.items():
        mask = (1 << row_bits) - 1 << number * row_bits
        known = known & ~mask | int.from_bytes(row, "little") << number * row_bits
    return known


def _rows(known: int, row_bits: int, end: int) -> dict[int, bytes]:
    found = {}
    for number in range(-(-end // row_bits)):
        length = min(row_bits, end - number * row_bits) // 8
        row = (known >> number * row_bits & (1 << length * 8) - 1).to_bytes(length, "little")
        if any(row):
            found[number] = row
    return found


def numbers_of(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


@dataclass(frozen=True)
class Event:
    kind: str
    key: int = 0
    """Of the write, the sync or the flush."""
    first_piece: int = 0
    digests: tuple[bytes, ...] = ()
    by_user: bool = False
    change: Callable[[Recorded], Recorded] = lambda recorded: recorded
    clock: WriteTimes | None = None
    """Of a commit."""
    times: Times = NO_TIMES
    """Of the destination, in the page cache."""

    @property
    def pieces(self) -> range:
        return range(self.first_piece, self.first_piece + len(self.digests))


# What happens in a run


class Recorder:
    """Watches one destination and all state files; holds some writes and syncs up, so that they overlap.

    `data`: of the source. `old`: of the destination at first.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, destination: Path, chance: random.Random, data: bytes, old: bytes
    ) -> None:
        self.events: list[Event] = []
        self.known = {digest(each): each for each in (*pieces_of(data), *pieces_of(old))}
        self.binding: Binding | None = None
        self.failing_syncs = 0
        self.data, self._old = data, old
        self._cache = bytearray(old)
        self._destination = str(destination)
        self._device: Device | None = None
        self._chance = chance
        self._changed = threading.Condition()
        self._counts = {"write": 0, "written": 0, "sync": 0, "committed": 0, "write of the user": 0}
        for name in ("write", "sync", "drop_cache"):
            monkeypatch.setattr(Device, name, self._watching(getattr(Device, name), getattr(self, f"_{name}")))
        for name in ("begin_record", "write_changes", "clear", "write_times"):
            monkeypatch.setattr(StateFile, name, self._recording(getattr(StateFile, name), name))
        self._thread = threading.local()  # whether it writes for the user: bytes may equal the source's by chance
        write_at_once = Writer.write_at_once

        def write_for_user(*args: Any) -> None:
            self._thread.writes_for_user = True
            try:
                write_at_once(*args)
            finally:
                self._thread.writes_for_user = False

        monkeypatch.setattr(Writer, "write_at_once", write_for_user)
        make = user_writes.make

        def make_note(*args: Any) -> user_writes.Counter:
            counter = make(*args)
            self.tell("noted")
            return counter

        monkeypatch.setattr(user_writes, "make", make_note)

    def _watching(self, real: Callable[..., Any], ours: Callable[..., None]) -> Callable[..., None]:
        def method(device: Device, *args: Any, **options: Any) -> None:
            if device.path == self._destination:
                self._device = device
                ours(lambda: real(device, *args, **options), *args)
            else:
                real(device, *args, **options)

        return method

    def tell(self, kind: str, key: int | None = None, **more: Any) -> int:
        with self._changed:
            if key is None:
                key = self._counts[kind] = self._counts.get(kind, 0) + 1
            status = os.stat(self._destination)
            self.events.append(Event(kind, key, times=Times(status.st_mtime_ns, status.st_ctime_ns), **more))
            if kind == "written":
                self._counts["written"] += 1
            if kind == "write" and more["by_user"]:
                self._counts["write of the user"] += 1
            self._changed.notify_all()
            return key

    def hold_up(self, until: str, one_in: int = 1, timeout: float = 0.02) -> None:
        """Until the next one of these, but not for long."""
        with self._changed:
            if self._chance.randrange(one_in) == 0:
                seen = self._counts[until]
                self._changed.wait_for(lambda: self._counts[until] > seen, timeout)

    def tell_pieces(self, kind: str, offset: int, content: bytes, *, by_user: bool) -> int:
        """Tell of whole pieces. `content`: of all that they have."""
        pieces = pieces_of(content)
        self.known.update((digest(each), each) for each in pieces)
        return self.tell(kind, first_piece=offset // PIECE, digests=tuple(map(digest, pieces)), by_user=by_user)

    def _write(self, real: Callable[[], None], offset: int, data: Any) -> None:
        data = bytes(data)
        by_user = getattr(self._thread, "writes_for_user", False)
        with self._changed:
            self._cache[offset : offset + len(data)] = data
            pages = touched(offset, len(data))
            start = pages.start * PIECE
            key = self.tell_pieces(
                "write",
                start,
                bytes(self._cache[start : pages.stop * PIECE]),
                by_user=by_user,
            )
        for _ in range(self._chance.choice([0, 1, 3]) if by_user else 1):
            self.hold_up(self._chance.choice(["sync", "committed" if by_user else "write of the user"]), one_in=3)
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
        disk = Disk(self._old, self.data)
        with self._changed, self._not_as_another_program() as file:
            for event in self.events:
                disk.go_on(event)
            for piece, written in disk.volatile.items():
                if written and all(each.dropped for each in written):
                    found = self._chance.choice(disk.may_hold(piece))
                    os.pwrite(file.fileno(), self.known[found], piece * PIECE)
                    self._cache[piece * PIECE :][:PIECE] = self.known[found]
                    self.events.append(Event("found", 0, piece, (found,)))

    @contextlib.contextmanager
    def _not_as_another_program(self) -> Iterator[io.FileIO]:
        """Open the destination, so that its guard takes what is written for our own."""
        device = self._device
        assert isinstance(device, Destination)
        with device._checking, open(self._destination, "r+b", buffering=0) as file:
            yield file
            device._mtime_ns = device.status().st_mtime_ns

    def _recording(self, real: Callable[..., None], name: str) -> Callable[..., None]:
        def method(kept: StateFile, *args: Any) -> None:
            if name == "begin_record":
                self.binding = args[0]
            has_user_writes = name != "begin_record" and kept._facts.get("user_writes", False)

            def change(recorded: Recorded) -> Recorded:
                if name in ("begin_record", "clear"):
                    recorded = Recorded()
                elif name == "write_changes":
                    recorded = recorded.with_changes(args[0])
                return replace(recorded, has_user_writes=has_user_writes)

            clock = next((each for each in args if isinstance(each, WriteTimes)), None)
            self.tell("commit", change=change, clock=clock)
            real(kept, *args)
            self.tell("committed")

        return method

    def put_back(self, content: list[bytes]) -> None:
        """Begin a new run, on a destination with the `content` of these digests."""
        data = b"".join(self.known[each] for each in content)
        with open(self._destination, "r+b") as file:
            file.write(data)
        self._cache[:] = data


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
    """The disk and the record after some events: what each may hold if the power goes now."""

    def __init__(self, content: bytes, data: bytes) -> None:
        self._right = [digest(each) for each in pieces_of(data)]
        self.durable = [digest(each) for each in pieces_of(content)]
        self.volatile: dict[int, list[Written]] = {}
        self.recorded = Recorded()
        self.recording: Recorded | None = None
        """What will be recorded when the commit that is in progress is through."""
        self.is_noted = False
        """Whether the note outside of the state file says that there are writes of a user."""
        self.changed: set[int] = set()
        """Pieces whose view may have changed. Whoever looks at them clears it."""
        self.users: set[int] = set()
        """Pieces that the user wrote in this run, or that were on record when it began."""
        self._of_write: dict[int, list[Written]] = {}

    def may_hold(self, piece: int) -> list[bytes]:
        return [self.durable[piece], *(each.digest for each in self.volatile.get(piece, ()))]

    def views(self, piece: int) -> set[bytes]:
        """Return all that the next run may show of `piece`, with the disk and the record of now."""
        found: set[bytes] = set()
        for record in {self.recorded, self.recording or self.recorded}:
            if record.lost >> piece & 1:
                found.add(LOST)
            elif record.present >> piece // PIECES & 1 or record.pages >> piece & 1:
                found.update(self.may_hold(piece))
            else:
                found.add(self._right[piece])
        return found

    def view(self, piece: int, content: list[bytes]) -> bytes:
        """Return what a run shows of `piece` that begins with this `content`."""
        is_ours = self.recorded.present >> piece // PIECES & 1 or self.recorded.pages >> piece & 1
        return content[piece] if is_ours else self._right[piece]

    def go_on(self, event: Event) -> None:
        if handler := getattr(self, f"_on_{event.kind.replace(' ', '_')}", None):
            handler(event)

    def _on_noted(self, event: Event) -> None:
        self.is_noted = True

    def _on_write(self, event: Event) -> None:
        for piece, new in zip(event.pieces, event.digests, strict=True):
            for other in self.volatile.get(piece, ()):
                assert other.returned or other.digest == new, f"two writes of piece {piece} at once"
        if event.by_user:
            assert self.is_noted, "a write of the user without a note"
            assert self.recorded.has_user_writes, "a write of the user that is not on record"
            self.users.update(event.pieces)
        elif over := self.users.intersection(event.pieces):
            raise AssertionError(f"the source's bytes land on pieces of the user: {sorted(over)}")
        made = [Written(piece, each) for piece, each in zip(event.pieces, event.digests, strict=True)]
        self._of_write[event.key] = made
        for each in made:
            self.volatile.setdefault(each.piece, []).append(each)
        self.changed.update(event.pieces)

    def _on_written(self, event: Event) -> None:
        for each in self._of_write.get(event.key, ()):
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
                self.changed.add(each.piece)

    def _on_sync_failed(self, event: Event) -> None:
        for each in self._all_volatile():
            each.dropped = each.returned

    def _on_found(self, event: Event) -> None:
        """What was dropped has been read from the disk, and this is what is there."""
        self.volatile.pop(event.first_piece, None)
        self.durable[event.first_piece] = event.digests[0]
        self.changed.add(event.first_piece)

    def _on_commit(self, event: Event) -> None:
        self.recording = event.change(self.recorded)
        blocks = self.recording.present ^ self.recorded.present
        pages = self.recording.pages ^ self.recorded.pages | self.recording.lost ^ self.recorded.lost
        self.changed.update(numbers_of(pages))
        for block in numbers_of(blocks):
            self.changed.update(range(block * PIECES, min(len(self._right), (block + 1) * PIECES)))

    def _on_committed(self, event: Event) -> None:
        assert self.recording is not None
        self.recorded, self.recording = self.recording, None

    def _all_volatile(self) -> list[Written]:
        return [each for written in self.volatile.values() for each in written]

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
        self.users = set(numbers_of(self.recorded.pages))
        self.changed.update(range(len(self._right)))
        return content


class Promises:
    """What the user may find in each piece after some events, in every later run. `data`: of the source."""

    def __init__(self, data: bytes) -> None:
        self._flushed = [digest(each) for each in pieces_of(data)]
        self._later: dict[int, list[tuple[bytes, int]]] = {}  # digest, key of the write
        self._returned: dict[int, int] = {}  # key of a write → the number of writes that returned before
        self._flushes: dict[int, int] = {}  # key of a flush → the number of writes that had returned
        self._written: set[int] = set()  # pieces that may have been written since the last flush
        self._has_failed = False
        self._may_be_lost: set[int] = set()
        self.changed: set[int] = set()

    def go_on(self, event: Event) -> None:
        if event.kind == "user writes":
            for piece, new in zip(event.pieces, event.digests, strict=True):
                self._later.setdefault(piece, []).append((new, event.key))
        elif event.kind == "user wrote":
            self._returned[event.key] = len(self._returned)
        elif event.kind == "flush":
            self._flushes[event.key] = len(self._returned)
        elif event.kind == "flushed":
            self._flush(self._flushes.pop(event.key))
        elif event.kind == "sync failed":
            self._has_failed = True
            self._may_be_lost.update(self._written)
        elif event.kind == "write" and event.by_user:
            self._written.update(event.pieces)
            if self._has_failed:
                self._may_be_lost.update(event.pieces)

    def _flush(self, returned: int) -> None:
        for piece, versions in list(self._later.items()):
            covered = [at for at, (_, key) in enumerate(versions) if self._returned.get(key, returned) < returned]
            if covered:
                self._flushed[piece] = versions[covered[-1]][0]
                self._may_be_lost.discard(piece)
                self._later[piece] = versions[covered[-1] + 1 :]
                if not self._later[piece]:
                    del self._later[piece]
                    self._written.discard(piece)
                self.changed.add(piece)

    def may_be(self, piece: int) -> set[bytes]:
        lost = {LOST} if piece in self._may_be_lost else set()
        return {self._flushed[piece], *(each for each, _ in self._later.get(piece, ()))} | lost

    def open(self, disk: Disk) -> None:
        """Note that a later run is open: from now on, each piece stays what it is. Raises AssertionError if not."""
        for piece in self._later.keys() | self._may_be_lost:
            found = disk.views(piece)
            assert len(found) == 1, f"piece {piece} may change after it was read"
            [self._flushed[piece]] = found
        self._later.clear()
        self._flushes.clear()
        self._may_be_lost.clear()
        self._written.clear()


def check_every_cut(disk: Disk, promises: Promises, events: list[Event]) -> None:
    """Fail if a cut behind any of the `events` could break a promise."""
    for index, event in enumerate(events):
        try:
            disk.go_on(event)
            promises.go_on(event)
            changed = disk.changed | promises.changed
            broken = {piece for piece in changed if not disk.views(piece) <= promises.may_be(piece)}
            assert not broken, f"pieces {sorted(broken)} may be wrong in the next run"
            if event.kind == "opened":
                promises.open(disk)
        except AssertionError as error:
            before = [f"{each.kind} {each.key}" for each in events[max(0, index - 20) : index + 1]]
            pytest.fail(f"{error}, after {before}")
        disk.changed.clear()
        promises.changed.clear()


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
