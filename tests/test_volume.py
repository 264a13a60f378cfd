"""Writes of a user to a volume: which of them wait for the source, what they leave, and what a failed sync does."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
import trio
from support import BLOCK_SIZE, replica_of

from blockcopy.block.buffers import Buffer
from blockcopy.block.claim import open_destination
from blockcopy.block.destination import Destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import Geometry
from blockcopy.errors import DeviceError, ReadOnlyError, SourceError, StateWriteError
from blockcopy.replica.hydration import committer
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.hydration.writer import Writer
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from blockcopy.replica.source.window import Window
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import StateFile
from blockcopy.replica.volume import Volume
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

PAGE = 4096
DATA = support.noise(6 * BLOCK_SIZE + 3 * PAGE + 100)
OLD = support.noise(len(DATA), seed=2)
MINE = support.noise(BLOCK_SIZE, seed=3)
LAST = len(DATA) - 100
"""Where the short last page begins."""


class Source(Hydrator):
    """A hydrator that asks no process: it lands DATA, or waits for ever while the source `is_away`."""

    is_away = False

    def __init__(self, writer: Writer, nursery: trio.Nursery) -> None:
        super().__init__(writer, [], nursery)
        self.asked: list[range] = []

    async def ensure(self, blocks: range, lane: object) -> None:
        self.asked.append(blocks)
        if self.is_away:
            await trio.sleep_forever()
        for block in list(self.blockmap.missing(blocks)):
            extent = self.blockmap.geometry.extent(block)
            await trio.to_thread.run_sync(self.writer.data, extent.offset, DATA[extent.offset : extent.end])
            self.blockmap.mark(range(block, block + 1), "fetched")


Scenario = Callable[[Volume, Source], Awaitable[None]]


def with_volume(
    destination: Path, scenario: Scenario, before_write: Callable[[], Any] = trio.lowlevel.checkpoint
) -> bytes:
    """Run `scenario` with a volume of the destination, and return what the destination holds then."""

    async def main() -> None:
        with open_destination(str(destination)) as device:
            writer = Writer(device, BlockMap(Geometry(len(DATA))), sparse=True)
            async with trio.open_nursery() as nursery:
                source = Source(writer, nursery)
                lane: Any = SimpleNamespace(window=Window(8, min_blocks=8, max_blocks=8))
                volume = Volume(source, lane, nursery, give_up_after=lambda _: 0.2, before_write=before_write)
                with trio.fail_after(20):
                    await scenario(volume, source)
                nursery.cancel_scope.cancel()

    trio.run(main)
    return destination.read_bytes()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        pytest.param(BLOCK_SIZE + PAGE, PAGE, id="a page"),
        pytest.param(2 * BLOCK_SIZE - PAGE, 2 * PAGE, id="pages of two blocks"),
        pytest.param(3 * BLOCK_SIZE, BLOCK_SIZE, id="a block"),
        pytest.param(LAST, 100, id="the short last page"),
        pytest.param(LAST - PAGE, PAGE + 100, id="the last two pages"),
    ],
)
def test_whole_pages_do_not_wait_for_a_source_that_is_away(offset: int, length: int, destination: Path) -> None:
    async def scenario(volume: Volume, source: Source) -> None:
        source.is_away = True
        assert await volume.write(offset, MINE[:length]) == length
        assert bytes(await volume.read(offset, length)) == MINE[:length]
        assert source.asked == []
        assert volume.written_bytes == length

    left = with_volume(destination, scenario)
    assert left == OLD[:offset] + MINE[:length] + OLD[offset + length :]


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        pytest.param(BLOCK_SIZE + 512, 512, id="a sector"),
        pytest.param(2 * BLOCK_SIZE - 10, PAGE, id="parts of two blocks"),
        pytest.param(LAST, 99, id="a part of the last page"),
        pytest.param(BLOCK_SIZE, PAGE + 1, id="a page and a byte"),
    ],
)
def test_a_part_of_a_page_is_fetched_first(offset: int, length: int, destination: Path) -> None:
    async def scenario(volume: Volume, source: Source) -> None:
        assert await volume.write(offset, MINE[:length]) == length
        assert source.asked
        assert bytes(await volume.read(0, len(DATA))) == DATA[:offset] + MINE[:length] + DATA[offset + length :]

    with_volume(destination, scenario)


def test_a_part_of_a_page_of_the_users_needs_no_source(destination: Path) -> None:
    async def scenario(volume: Volume, source: Source) -> None:
        source.is_away = True
        await volume.write(BLOCK_SIZE, MINE[: 2 * PAGE])
        assert await volume.write(BLOCK_SIZE + 100, b"x" * PAGE) == PAGE
        assert source.asked == []
        with pytest.raises(SourceError, match="did not send"):
            await volume.write(BLOCK_SIZE + PAGE, MINE[: PAGE + 1])
        source.is_away = False
        assert bytes(await volume.read(BLOCK_SIZE, 3 * PAGE)) == (
            MINE[:100] + b"x" * PAGE + MINE[100 + PAGE : 2 * PAGE] + DATA[BLOCK_SIZE + 2 * PAGE :][:PAGE]
        )

    with_volume(destination, scenario)


@pytest.mark.parametrize("offset", [len(DATA), len(DATA) + 1, 1 << 62])
def test_there_is_no_space_behind_the_end(offset: int, destination: Path) -> None:
    async def scenario(volume: Volume, source: Source) -> None:
        with pytest.raises(DeviceError) as caught:
            await volume.write(offset, b"x")
        assert caught.value.errno == errno.ENOSPC
        assert await volume.write(offset, b"") == 0

    assert with_volume(destination, scenario) == OLD


def test_a_write_across_the_end_is_short(destination: Path) -> None:
    async def scenario(volume: Volume, source: Source) -> None:
        source.is_away = True
        assert await volume.write(LAST - PAGE, MINE[: 3 * PAGE]) == PAGE + 100

    assert with_volume(destination, scenario) == OLD[: LAST - PAGE] + MINE[: PAGE + 100]


def test_a_write_that_may_not_be_is_none(destination: Path) -> None:
    async def refuse() -> None:
        raise ReadOnlyError("it is mounted read-only")

    async def scenario(volume: Volume, source: Source) -> None:
        with pytest.raises(ReadOnlyError):
            await volume.write(0, MINE[:PAGE])
        assert volume.written_bytes == 0

    assert with_volume(destination, scenario, before_write=refuse) == OLD


def test_a_write_in_a_thread_is_as_one_in_the_event_loop(destination: Path) -> None:
    async def scenario(volume: Volume, source: Source) -> None:
        volume._wary_until = math.inf  # as after a slow write
        assert await volume.write(PAGE, MINE[:PAGE]) == PAGE
        assert bytes(await volume.read(PAGE, PAGE)) == MINE[:PAGE]

    assert with_volume(destination, scenario) == OLD[:PAGE] + MINE[:PAGE] + OLD[2 * PAGE :]


# With a real source


def plan_of(source: Path, destination: Path) -> Plan:
    command = stage_command(Location(None, str(source)))
    return Plan(command, str(destination), hydrate=False, writable=True)


def test_a_write_that_fails_beside_a_landing_leaves_the_sources_bytes(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The landing leaves out the page that is being written. It must not count as the source's then.

    The write outlasts the first fetch, which has marked what it may mark. Until then nothing is fetched again.
    """
    began, waits = threading.Event(), threading.Event()
    landings = 0
    real, real_wait = Destination.write, Writer.await_release
    block = 2 * BLOCK_SIZE

    def write(device: Destination, offset: int, data: Buffer) -> None:
        nonlocal landings
        if bytes(data) == MINE[:PAGE]:
            began.set()
            assert waits.wait(20), "the reader waits for the end of the write, and fetches nothing meanwhile"
            assert landings == 1
            raise DeviceError("the disk is on fire")
        real(device, offset, data)
        landings += offset == block

    async def await_release(writer: Writer, blocks: Sequence[int]) -> None:
        if landings and not waits.is_set() and set(blocks) & writer.claimed_blocks():
            waits.set()
        await real_wait(writer, blocks)

    async def fails(replica: Replica) -> None:
        with pytest.raises(DeviceError, match="on fire"):
            await replica.volume.write(block + PAGE, MINE[:PAGE])

    async def main() -> None:
        async with replica_of(plan_of(source, destination)) as replica, trio.open_nursery() as nursery:
            replica.volume._wary_until = math.inf  # in a thread, so that the event loop goes on
            nursery.start_soon(fails, replica)
            await trio.to_thread.run_sync(began.wait, 20)
            assert bytes(await replica.volume.read(block, BLOCK_SIZE)) == DATA[block : block + BLOCK_SIZE]
            assert replica.status().written_bytes == 0

    monkeypatch.setattr(Destination, "write", write)
    monkeypatch.setattr(Writer, "await_release", await_release)
    trio.run(main)
    assert landings > 1
    assert destination.read_bytes()[block : block + BLOCK_SIZE] == DATA[block : block + BLOCK_SIZE]


def test_a_failed_sync_loses_what_no_earlier_one_covered(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, unflushed, fetched = PAGE, BLOCK_SIZE + 2 * PAGE, 4 * BLOCK_SIZE

    def fail(device: Device, *, times: bool = True) -> None:
        raise DeviceError("the write-back failed")

    async def is_lost(replica: Replica) -> None:
        volume = replica.volume
        assert bytes(await volume.read(flushed, PAGE)) == MINE[:PAGE]
        assert bytes(await volume.read(BLOCK_SIZE, PAGE)) == DATA[BLOCK_SIZE:][:PAGE]
        assert bytes(await volume.read(fetched, PAGE)) == DATA[fetched:][:PAGE]
        for offset, length in ((unflushed, 1), (unflushed - PAGE, 2 * PAGE), (unflushed + PAGE - 1, 1)):
            with pytest.raises(DeviceError, match="are lost"):
                await volume.read(offset, length)
        assert replica.status().lost_bytes == PAGE

    async def first() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            volume = replica.volume
            await volume.write(flushed, MINE[:PAGE])
            await replica.flush()
            await volume.write(unflushed, MINE[:PAGE])
            await volume.read(fetched, 1)
            present = replica.status().hydrated_bytes
            with monkeypatch.context() as patch:
                patch.setattr(Device, "sync", fail)
                with pytest.raises(DeviceError, match="write-back"):
                    await replica.flush()
            assert replica.status().hydrated_bytes < present
            await is_lost(replica)
            with pytest.raises(DeviceError, match="write-back"):
                await replica.flush()
            for offset in (unflushed, 5 * BLOCK_SIZE):
                with pytest.raises(ReadOnlyError, match="no more writes"):
                    await volume.write(offset, MINE[:PAGE])
            assert replica.read_only.is_set()

    async def second() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await is_lost(replica)
            with pytest.raises(DeviceError, match="are lost"):
                await replica.volume.write(unflushed, MINE[:10])
            await replica.volume.write(unflushed, MINE[:PAGE])
            assert bytes(await replica.volume.read(unflushed, PAGE)) == MINE[:PAGE]
            await replica.flush()
            assert replica.status().lost_bytes == 0

    async def third() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            assert replica.status().lost_bytes == 0
            assert bytes(await replica.volume.read(unflushed, PAGE)) == MINE[:PAGE]

    monkeypatch.setattr(committer, "_SECONDS", 1000)  # no commit but those of the flushes, and the last
    for run in (first, second, third):
        trio.run(run)


def test_a_flush_fails_while_its_writes_are_not_on_record(
    source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the user wrote all of the device: the record would say after a crash that blocks are missing."""

    def fail(*_: object) -> None:
        raise StateWriteError("no space left for the state")

    async def main() -> None:
        async with replica_of(plan_of(source, destination)) as replica:
            await replica.volume.write(0, MINE[:PAGE])
            await replica.flush()
            with monkeypatch.context() as patch:
                patch.setattr(StateFile, "write_changes", fail)
                for offset in range(0, len(DATA), BLOCK_SIZE):
                    await replica.volume.write(offset, MINE)
                for _ in range(2):
                    with pytest.raises(StateWriteError, match="no space left"):
                        await replica.flush()
            await replica.flush()
            with monkeypatch.context() as patch:  # it says by now that all blocks are the destination's for good
                patch.setattr(StateFile, "write_changes", fail)
                await replica.volume.write(0, MINE[:PAGE])
                await replica.flush()

    monkeypatch.setattr(committer, "_SECONDS", 1000)
    monkeypatch.setattr(committer, "_IDLE_SECONDS", 1000)
    trio.run(main)
    assert destination.read_bytes() == (MINE * 7)[: len(DATA)]
