"""Signatures of the destination, and writes of what the source sends, without a source."""

from __future__ import annotations

import ast
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from support import BLOCK_SIZE, noise

from blockcopy.block.claim import open_destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, Geometry, block_runs
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import DeviceError, ReadOnlyError
from blockcopy.protocol import digests
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.replica.hydration.writer import Writer
from blockcopy.replica.state.blockmap import BlockMap

CHECKOUT = Path(__file__).resolve().parent.parent
SIZE = 20 * BLOCK_SIZE + 1000
DIGEST = digests.named("sha256")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Data, a hole, zeros that are written, data."""
    made = tmp_path / "destination"
    made.write_bytes(noise(SIZE))
    with made.open("r+b") as file:
        file.seek(12 * BLOCK_SIZE)
        file.write(bytes(3 * BLOCK_SIZE))
    with open_destination(str(made)) as device:
        device.write_zeros(4 * BLOCK_SIZE + 5, 4 * BLOCK_SIZE, sparse=True)
    return made


@pytest.mark.parametrize("blocks", [range(21), [0, 3, 4, 5, 6, 7, 9], [20], [5, 6], range(3, 10)])
def test_signatures_are_the_digests_of_what_is_there(path: Path, blocks: list[int]) -> None:
    data, geometry = path.read_bytes(), Geometry(SIZE)
    with open_destination(str(path)) as device:
        asked = read_signatures(device, geometry, blocks, DIGEST, UnreadableRanges())
    assert [(each.position, each.end) for each in asked] == [
        (geometry.extent(run[0]).offset, geometry.extent(run[-1]).end) for run in block_runs(blocks)
    ]
    found = [extent_and_digest for each in asked for extent_and_digest in each.blocks()]
    extents = [geometry.extent(block) for block in blocks]
    assert found == [(extent, DIGEST(data[extent.offset : extent.end])) for extent in extents]


def test_holes_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Extent] = []
    read_into = Device.read_into

    def noted(device: Device, offset: int, buffer: memoryview) -> int:
        read.append(Extent(offset, len(buffer)))
        return read_into(device, offset, buffer)

    monkeypatch.setattr(Device, "read_into", noted)
    with open_destination(str(path)) as device:
        read_signatures(device, Geometry(SIZE), range(21), DIGEST, UnreadableRanges())
    for extent in read:  # 4 and 8 have data beside the hole
        assert extent.end <= 5 * BLOCK_SIZE or extent.offset >= 8 * BLOCK_SIZE


def test_a_destination_that_became_shorter(path: Path) -> None:
    with open_destination(str(path)) as device:
        os.truncate(path, BLOCK_SIZE)
        with pytest.raises(DeviceError, match="shorter than it was"):
            read_signatures(device, Geometry(SIZE), [0, 1], DIGEST, UnreadableRanges())


# Writing


class Watched:
    """A device that notes what is done to it."""

    path = "device"

    def __init__(self) -> None:
        self.done: list[tuple[object, ...]] = []
        self.during_sync: Callable[[], None] = lambda: None
        self.fails = False
        self.is_large = False

    def write(self, offset: int, data: bytes) -> None:
        self.done.append(("write", offset, len(data)))

    def write_zeros(self, offset: int, length: int, *, sparse: bool) -> None:
        self.done.append(("zeros", offset, length, sparse))

    def start_writeback(self, offset: int, length: int) -> None:
        self.done.append(("write back", offset, length))

    def drop_behind(self, offset: int, length: int) -> None:
        self.done.append(("drop", offset, length))

    def exceeds_cache(self) -> bool:
        return self.is_large

    def check_without_blocking(self) -> None:
        """Nobody else writes."""

    def sync(self, *, times: bool = True) -> None:
        self.during_sync()
        if self.fails:
            raise DeviceError("the disk is on fire")
        self.done.append(("sync",))


def with_writer(scenario: Callable[[Writer, Watched, BlockMap], object], *, is_large: bool = False) -> None:
    async def main() -> None:
        device = Watched()
        device.is_large = is_large
        blockmap = BlockMap(Geometry(1000 * BLOCK_SIZE))
        writer = Writer(device, blockmap, sparse=True)  # type: ignore[arg-type]
        await scenario(writer, device, blockmap)  # type: ignore[misc]

    trio.run(main)


def test_what_is_present_is_not_written_again() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        blockmap.mark(range(2), "fetched")
        writer.data(0, bytes(BLOCK_SIZE))
        writer.zeros(BLOCK_SIZE, BLOCK_SIZE)
        assert device.done == []
        writer.data(BLOCK_SIZE, bytes(2 * BLOCK_SIZE))
        writer.zeros(3 * BLOCK_SIZE, BLOCK_SIZE)
        assert device.done == [
            ("write", 2 * BLOCK_SIZE, BLOCK_SIZE),  # without the present block before
            ("zeros", 3 * BLOCK_SIZE, BLOCK_SIZE, True),
        ]

    with_writer(scenario)


def test_what_lies_close_together_is_written_back_as_one() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        mib = 8 * BLOCK_SIZE
        for at in (0, 3, 1, 30, 100, 101, 102, 103):
            writer.data(at * mib, bytes(mib))
        assert [each for each in device.done if each[0] == "write back"] == [
            ("write back", 0, 31 * mib),
            ("write back", 100 * mib, 4 * mib),
        ]

    with_writer(scenario)


def test_of_a_large_device_what_was_written_back_does_not_stay_in_the_cache() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        mib = 8 * BLOCK_SIZE
        for at in range(24):
            writer.data(at * mib, bytes(mib))
        assert [each for each in device.done if each[0] == "drop"] == [
            ("drop", 0, 8 * mib),
            ("drop", 8 * mib, 8 * mib),
        ]

    with_writer(scenario, is_large=True)


def test_what_bulk_has_read_of_a_large_device_does_not_stay_in_the_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(Device, "drop_behind", lambda _, offset, length: dropped.append((offset, length)))
    with open_destination(str(path)) as device:
        read_signatures(device, Geometry(SIZE), [3, 4, 9], DIGEST, UnreadableRanges())
        assert dropped == []
        read_signatures(device, Geometry(SIZE), [3, 4, 9], DIGEST, UnreadableRanges(), drop_behind=True)
    assert dropped == [(3 * BLOCK_SIZE, 2 * BLOCK_SIZE), (9 * BLOCK_SIZE, BLOCK_SIZE)]


def test_no_other_module_of_the_replica_calls_what_writes() -> None:
    """In any module that has a device at all. `test_only_the_writer_writes` watches a whole run."""
    found = set()
    for path in (CHECKOUT / "blockcopy" / "replica").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                device = ast.unparse(node.func.value).rpartition(".")[2].strip("_")
                if node.func.attr == "write_zeros" or (
                    node.func.attr in ("write", "grow")
                    and device in ("device", "destination", "existing", "opened")
                ):
                    found.add(path.name)
    assert found == {"writer.py"}


def test_nothing_is_synced_twice() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        await writer.sync()  # an earlier run may have written
        await writer.sync()
        assert device.done == [("sync",)]
        assert not writer.unsynced.is_set()
        writer.data(0, b"x")
        await writer.unsynced.wait()
        await writer.sync()
        assert device.done.count(("sync",)) == 2

    with_writer(scenario)


def test_what_is_written_while_it_syncs_is_not_synced_yet() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        device.during_sync = lambda: writer.data(0, b"x")
        await writer.sync()
        device.during_sync = lambda: None
        await writer.unsynced.wait()
        await writer.sync()
        assert device.done.count(("sync",)) == 2

    with_writer(scenario)


def test_a_sync_that_failed_is_tried_again() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        device.fails = True
        with pytest.raises(DeviceError):
            await writer.sync()
        assert writer.unsynced.is_set()
        device.fails = False
        await writer.sync()
        assert device.done == [("sync",)]

    with_writer(scenario)


# A user writes as well


PAGE = 4096


def page(number: int, count: int = 1) -> Extent:
    return Extent(number * PAGE, count * PAGE)


def writes(device: Watched) -> list[tuple[object, ...]]:
    return [each[:3] for each in device.done if each[0] in ("write", "zeros")]


def test_nothing_lands_on_pages_of_the_user() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        blockmap.note_write(page(3, 2))
        blockmap.note_write(page(40))
        for land in (lambda: writer.data(0, bytes(2 * BLOCK_SIZE)), lambda: writer.zeros(0, 2 * BLOCK_SIZE)):
            device.done.clear()
            land()
            kind = device.done[0][0]
            assert writes(device) == [
                (kind, 0, 3 * PAGE),
                (kind, 5 * PAGE, BLOCK_SIZE - 5 * PAGE),
                (kind, BLOCK_SIZE, 8 * PAGE),
                (kind, 41 * PAGE, 2 * BLOCK_SIZE - 41 * PAGE),
            ] or writes(device) == [
                (kind, 0, 3 * PAGE),
                (kind, 5 * PAGE, 35 * PAGE),
                (kind, 41 * PAGE, 2 * BLOCK_SIZE - 41 * PAGE),
            ]

    with_writer(scenario)


def test_nothing_lands_on_a_claim() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        assert writer.claim(page(3))
        assert writer.claim(page(31, 2))
        assert writer.claimed_blocks() == {0, 1}
        writer.data(0, bytes(BLOCK_SIZE))
        assert writes(device) == [("write", 0, 3 * PAGE), ("write", 4 * PAGE, 27 * PAGE)]
        writer.release(page(3))
        writer.release(page(31, 2))
        assert writer.claimed_blocks() == set()
        device.done.clear()
        writer.data(0, bytes(BLOCK_SIZE))  # as of a write that failed
        assert writes(device) == [("write", 0, BLOCK_SIZE)]

    with_writer(scenario)


def test_a_second_landing_on_a_block_that_the_user_wrote_meanwhile_does_nothing() -> None:
    """As of a fetch that was hedged: the first answer was marked, and the user has written there since."""

    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        writer.data(0, bytes(BLOCK_SIZE))
        blockmap.mark(range(1), "fetched")
        writer.claim(page(7))
        writer.write(page(7), bytes(PAGE))
        blockmap.note_write(page(7))
        writer.release(page(7))
        device.done.clear()
        writer.data(0, bytes(BLOCK_SIZE))
        writer.zeros(0, BLOCK_SIZE)
        assert device.done == []

    with_writer(scenario)


@pytest.mark.parametrize("kind", ["data", "zeros"])
def test_a_write_waits_for_a_landing_in_its_range_alone(kind: str) -> None:
    landing, go_on = threading.Event(), threading.Event()

    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        def wait(*args: object, **options: object) -> None:
            landing.set()
            assert go_on.wait(20)
            device.done.append(("landed",))

        def land() -> None:
            writer.data(0, bytes(BLOCK_SIZE)) if kind == "data" else writer.zeros(0, BLOCK_SIZE)

        real, ended = device.write, trio.Event()
        setattr(device, "write" if kind == "data" else "write_zeros", wait)

        async def user_writes() -> None:
            await trio.to_thread.run_sync(writer.write, page(7), bytes(PAGE))
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, land)
            await trio.to_thread.run_sync(landing.wait, 20)
            device.write = real  # type: ignore[method-assign]
            assert writer.claim(page(32))  # of the next block
            writer.write(page(32), bytes(PAGE))
            assert not writer.claim(page(7))
            nursery.start_soon(user_writes)
            with trio.move_on_after(0.1):
                await ended.wait()
            assert writes(device) == [("write", BLOCK_SIZE, PAGE)]
            go_on.set()
            await ended.wait()
        done = [each for each in device.done if each[0] in ("landed", "write")]
        assert done == [("write", BLOCK_SIZE, PAGE), ("landed",), ("write", 7 * PAGE, PAGE)]

    with_writer(scenario)


def test_a_claim_is_not_synced_by_a_sync_that_began_before_its_write_ended() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        writer.claim(page(0))
        await writer.sync()
        writer.release(page(0))
        assert await writer.sync()
        assert not await writer.sync()

    with_writer(scenario)


def test_who_waits_for_a_release_waits_for_the_claims_of_that_moment_in_these_blocks() -> None:
    """Later ones do not count: else an eager writer would keep a reader waiting for ever."""

    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        first, second, other = Extent(0, PAGE), Extent(PAGE, PAGE), Extent(2 * BLOCK_SIZE, PAGE)
        released: list[str] = []

        async def wait(name: str, *blocks: int) -> None:
            await writer.await_release(blocks)
            released.append(name)

        await wait("no claim", 0)
        for claim in (first, second, other):
            writer.claim(claim)
        await wait("another block", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "one", 0)
            nursery.start_soon(wait, "two", 0, 1)
            await trio.testing.wait_all_tasks_blocked()
            writer.claim(Extent(0, PAGE))
            writer.release(second)
            await trio.testing.wait_all_tasks_blocked()
            assert released == ["no claim", "another block"]
            writer.release(first)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(released[2:]) == ["one", "two"]

    with_writer(scenario)


def test_writes_are_refused_after_a_sync_that_failed() -> None:
    async def scenario(writer: Writer, device: Watched, blockmap: BlockMap) -> None:
        writer.check_accepts()
        for words in ("the first", "the second"):
            writer.refuse_writes(DeviceError(words))
        with pytest.raises(ReadOnlyError, match=r"no more writes.*the first"):
            writer.check_accepts()

    with_writer(scenario)
