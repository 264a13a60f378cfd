from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
import trio
import trio.testing

from blockcopy.block.destination import Destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE, Extent, Geometry
from blockcopy.block.identity import Times
from blockcopy.errors import (
    BlockcopyError,
    DestinationRefusedError,
    DeviceError,
    ProtocolViolationError,
    SourceError,
)
from blockcopy.progress.rate import floored_percent
from blockcopy.replica.hydration import committer, source_faults
from blockcopy.replica.hydration.background import BackgroundHydration
from blockcopy.replica.monitor import typed_json
from blockcopy.replica.monitor.status import LinkState, State, Status
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from blockcopy.replica.source import link
from blockcopy.replica.source.dialects import FENCES
from blockcopy.replica.source.window import Window
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.volume import Volume
from blockcopy.transport import backoff
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

QUICKLY, NEVER = 0.05, 1000
"""Seconds until a lost connection is replaced."""

BLOCKS = 40
DATA = support.noise(BLOCKS * BLOCK_SIZE - 1000)
OLD = support.with_changes(DATA, list(range(0, BLOCKS, 3)))
"""A destination in which each third block differs."""

QUESTION = 80
"""Bytes of one `Hash`."""


@pytest.fixture(autouse=True)
def delay(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the seconds until a lost connection is replaced: `delay(seconds)`, or else QUICKLY."""

    def set_delay(seconds: float) -> None:
        monkeypatch.setattr(backoff, "FIRST_SECONDS", seconds)
        monkeypatch.setattr(link, "_MAX_DELAY_IF_WANTED", seconds)

    set_delay(QUICKLY)
    return set_delay


@pytest.fixture(params=["ours", "stand-in"])
def program(request: pytest.FixtureRequest) -> str | None:
    return support.QUEUEING if request.param == "stand-in" else None


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 1 MiB."""
    support.require_root()
    folder = tmp_path / "small"
    folder.mkdir()
    support.output("mount", "-t", "tmpfs", "-o", "size=1m", "none", folder)
    yield folder
    support.output("umount", "--lazy", folder)


def file_of(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def plan_of(
    source: object, destination: object, program: str | None = None, *, hydrate: bool = True, **more: Any
) -> Plan:
    command = stage_command(Location(None, str(source)), program=program)
    return Plan(command, str(destination), hydrate=hydrate, **more)


SLOW = BLOCK_SIZE // 10
"""A limit at which background hydration fetches one block, and the next after ten seconds."""


async def measured(replica: Replica) -> None:
    """Wait until each connection has measured its round trip: from then on, nothing is sent but requests."""
    for pool in replica._pools:
        await pool._first.measured.wait()


async def both_processes(replica: Replica) -> list[int]:
    """Return the process ids of both lanes once both are connected. With SLOW, one block is present then."""
    while not present(replica) or not all(each.is_connected for each in replica._pools):
        await trio.testing.wait_all_tasks_blocked(0.01)
    await measured(replica)
    return [each._first._client._process._popen.pid for each in replica._pools]


def present(replica: Replica) -> set[int]:
    blocks = replica._geometry.block_count
    return set(range(blocks)) - set(replica._blockmap.missing(range(blocks)))


def assert_destination_is_sound(replica: Replica, destination: Path, source: bytes, old: bytes) -> None:
    """Present blocks are the source's; each of the others is the source's or as it was."""
    now, marked = destination.read_bytes(), present(replica)
    old = old.ljust(len(now), b"\0")
    geometry = Geometry(len(source))
    for block in range(geometry.block_count):
        offset, length = geometry.extent(block)
        part = slice(offset, offset + length)
        assert now[part] == source[part] or (block not in marked and now[part] == old[part]), block
    assert now[len(source) :] == old[len(source) :]


def retrieve_processes() -> list[int]:
    return [pid for pid in support.children(os.getpid()) if not support.is_shared(pid)]


async def read_block(replica: Replica, block: int, *, of: bytes = DATA) -> bool:
    """True for the source's bytes, False for an error; nothing else may come."""
    offset, length = Geometry(len(of)).extent(block)
    try:
        data = await replica.volume.read(offset, length)
    except BlockcopyError:
        return False
    assert data == of[offset : offset + length], f"block {block} has bytes that are not the source's"
    return True


async def read_at_random(replica: Replica, source: bytes, seed: int, count: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        offset = chance.randint(0, len(source) + 10)
        length = chance.choice([0, 1, 4096, BLOCK_SIZE, chance.randint(0, 9 * BLOCK_SIZE)])
        assert await replica.volume.read(offset, length) == source[offset : offset + length]


# The bytes that are read


ENDS = {
    "nearly equal": (DATA, OLD),
    "equal": (DATA, DATA),
    "empty": (DATA, b""),
    "absent": (DATA, None),
    "shorter": (DATA, OLD[: 5 * BLOCK_SIZE + 77]),
    "longer": (DATA[: 5 * BLOCK_SIZE + 77], OLD),
    "longer by whole blocks": (DATA[: 8 * BLOCK_SIZE], OLD),
    "source empty": (b"", OLD),
    "source empty, destination absent": (b"", None),
    "one byte": (b"x", b"y"),
    "last block of one byte": (DATA[: BLOCK_SIZE + 1], OLD[: BLOCK_SIZE + 1]),
}
"""Source and destination."""


@pytest.mark.parametrize(
    ("ends", "program", "hydrate"),
    [
        *((ends, None, True) for ends in ENDS),
        *zip(ENDS, cycle([None, support.QUEUEING]), cycle([False, True]), strict=False),
    ],
)
def test_reads_are_the_source_before_during_and_after(
    ends: str, program: str | None, hydrate: bool, tmp_path: Path
) -> None:
    source, old = ENDS[ends]
    destination = tmp_path / "destination"
    if old is not None:
        destination.write_bytes(old)

    async def main() -> None:
        path = file_of(tmp_path, "source", source)
        async with support.replica_of(plan_of(path, destination, program, hydrate=hydrate)) as replica:
            assert replica.volume.size == len(source)
            assert replica.status().hydrated_bytes == 0
            await read_at_random(replica, source, seed=0, count=1)
            async with trio.open_nursery() as nursery:
                for seed in range(4):
                    nursery.start_soon(read_at_random, replica, source, seed, 10)
            assert await replica.volume.read(0, len(source) + 1) == source
            await replica.wait_complete()
            await read_at_random(replica, source, seed=9, count=10)
            assert replica.status().state == "complete"

    trio.run(main)
    assert destination.read_bytes() == source + (old or b"")[len(source) :]
    assert path_is_private(destination) or old is not None


def path_is_private(path: Path) -> bool:
    return path.stat().st_mode & 0o077 == 0


def test_only_what_differs_is_fetched(tmp_path: Path, program: str | None) -> None:
    differing = len(range(0, BLOCKS, 3)) * BLOCK_SIZE - 1000  # the short last block is one of them

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program)) as replica:
            await replica.wait_complete()
            status = replica.status()
            assert status.fetched_bytes == differing
            assert status.same_bytes == len(DATA) - differing
            # One a connection, and one at the end.
            samples = 0 if program is None else 3 * support.sample_answers(len(DATA)) * 4200
            assert differing < status.received_bytes < differing + samples + 50_000

    trio.run(main)


def test_one_byte_that_is_equal_is_not_fetched(tmp_path: Path, program: str | None) -> None:
    async def main() -> None:
        data = DATA[: BLOCK_SIZE + 1]
        source, destination = file_of(tmp_path, "source", data), file_of(tmp_path, "destination", data)
        async with support.replica_of(plan_of(source, destination, program)) as replica:
            await replica.wait_complete()
            assert replica.status().fetched_bytes == 0

    trio.run(main)


# What becomes of the destination at the start


def test_a_device_that_is_too_small_is_refused_and_untouched(
    tmp_path: Path, loop_device: Callable[[Path], str], program: str | None
) -> None:
    source = file_of(tmp_path, "source", DATA[: BLOCK_SIZE + 512])
    backing = file_of(tmp_path, "backing", OLD[:BLOCK_SIZE])

    async def main() -> None:
        with pytest.raises(DestinationRefusedError, match=f"too small.*{BLOCK_SIZE} bytes.*{BLOCK_SIZE + 512}"):
            async with support.replica_of(plan_of(source, loop_device(backing), program)):
                raise AssertionError("it was opened")

    trio.run(main)
    assert backing.read_bytes() == OLD[:BLOCK_SIZE]


@pytest.mark.long
def test_a_loop_device_becomes_the_copy_and_keeps_its_tail(
    tmp_path: Path, loop_device: Callable[[Path], str], program: str | None
) -> None:
    data = DATA[: 5 * BLOCK_SIZE + 512]
    source = file_of(tmp_path, "source", data)
    backing = file_of(tmp_path, "backing", OLD[: 8 * BLOCK_SIZE])
    device = loop_device(backing)

    async def main() -> None:
        async with support.replica_of(plan_of(loop_device(source), device, program)) as replica:
            await replica.wait_complete()

    trio.run(main)
    assert Path(device).read_bytes() == data + OLD[len(data) : 8 * BLOCK_SIZE]


@pytest.mark.parametrize("way", ["same name", "symlink", "hard link", "other spelling"])
def test_the_source_itself_is_refused(way: str, tmp_path: Path) -> None:
    source = file_of(tmp_path, "source", DATA)
    destination = tmp_path / "destination"
    if way == "symlink":
        destination.symlink_to(source)
    elif way == "hard link":
        destination.hardlink_to(source)
    else:
        destination = source if way == "same name" else tmp_path / ".." / tmp_path.name / "source"

    async def main() -> None:
        with pytest.raises(DestinationRefusedError, match="is the source itself"):
            async with support.replica_of(plan_of(source, destination)):
                raise AssertionError("it was opened")

    trio.run(main)
    assert source.read_bytes() == DATA


def test_a_source_that_is_the_device_under_another_name_is_refused(
    tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    device = loop_device(file_of(tmp_path, "backing", DATA[:BLOCK_SIZE]))
    (tmp_path / "name").symlink_to(device)

    async def main() -> None:
        with pytest.raises(DestinationRefusedError, match="is the source itself"):
            async with support.replica_of(plan_of(device, tmp_path / "name")):
                raise AssertionError("it was opened")

    trio.run(main)


@pytest.mark.parametrize("program", ["false", "/no/such/program", f"{support.QUEUEING} --die-at 1"])
def test_without_a_source_no_destination_is_made(program: str, tmp_path: Path) -> None:
    source = file_of(tmp_path, "source", DATA)

    async def main() -> None:
        with pytest.raises(SourceError):
            async with support.replica_of(plan_of(source, tmp_path / "destination", program)):
                raise AssertionError("it was opened")

    trio.run(main)
    assert not (tmp_path / "destination").exists()


# Who asks for what, and how often


def cost_of(questions: int, program: str | None) -> int:
    """Return the bytes that are sent for one batch of neighbouring blocks.

    The negotiated form has a head, digests of 32 bytes, and a fence. The original has each digest by itself,
    a proof and FENCES.
    """
    return 24 + questions * 32 + 12 if program is None else (questions + 1 + FENCES) * QUESTION


def test_many_readers_of_a_block_cause_one_fetch(tmp_path: Path, program: str | None) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", b"")
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            await measured(replica)
            before = replica.status()
            async with trio.open_nursery() as nursery:
                for _ in range(30):
                    nursery.start_soon(read_block, replica, 20)
            after = replica.status()
            assert after.fetched_bytes == BLOCK_SIZE
            assert after.sent_bytes - before.sent_bytes == cost_of(1, program)
            assert BLOCK_SIZE < after.received_bytes - before.received_bytes < BLOCK_SIZE + 1000

    trio.run(main)


def test_one_request_of_nine_blocks_is_one_batch(tmp_path: Path, program: str | None) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            await measured(replica)
            before = replica.status().sent_bytes
            offset = 10 * BLOCK_SIZE + 4096
            assert await replica.volume.read(offset, 2**20) == DATA[offset : offset + 2**20]
            assert replica.status().sent_bytes - before == cost_of(9, program)
            assert present(replica) == set(range(10, 19))

    trio.run(main)


def test_a_reader_in_order_is_read_ahead_for(tmp_path: Path, program: str | None) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            for block in range(8):
                assert await read_block(replica, block)
            with trio.move_on_after(10):
                while not present(replica) >= set(range(12)):
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assert present(replica) >= set(range(12))

    trio.run(main)


def test_background_hydration_goes_on_behind_the_latest_read(tmp_path: Path, program: str | None) -> None:
    """It comes back for the rest."""

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, limit=SLOW)) as replica:
            await both_processes(replica)
            before = present(replica)
            assert await read_block(replica, 20)
            replica.throttle.limit = 2 * BLOCK_SIZE
            while len(present(replica)) < len(before) + 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert present(replica) == before | {20, 21}
            replica.throttle.limit = None
            await replica.wait_complete()
        assert destination.read_bytes() == DATA

    trio.run(main)


def test_without_background_hydration_only_what_is_read_is_copied(tmp_path: Path, program: str | None) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            for block in (30, 3, 21, 12):
                assert await read_block(replica, block)
            assert present(replica) == {3, 12, 21, 30}
            assert replica.status().state == "paused"
        assert_destination_is_sound(replica, destination, DATA, OLD)
        assert destination.read_bytes()[: 3 * BLOCK_SIZE] == OLD[: 3 * BLOCK_SIZE]

    trio.run(main)


def test_without_background_hydration_it_is_complete_once_everything_was_read(
    tmp_path: Path, program: str | None
) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            for block in random.Random(3).sample(range(BLOCKS), BLOCKS):
                assert await read_block(replica, block)
            await replica.wait_complete()
            assert replica.status().state == "complete"
            assert not retrieve_processes()
        assert destination.read_bytes() == DATA

    trio.run(main)


def test_a_reader_that_goes_away_strands_nobody(tmp_path: Path, program: str | None) -> None:
    got: list[bool] = []

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            (process,) = retrieve_processes()
            os.kill(process, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                first = await nursery.start(read_cancellably, replica)
                nursery.start_soon(note_read, replica)
                await trio.testing.wait_all_tasks_blocked(0.05)
                first.cancel()
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not got
                os.kill(process, signal.SIGCONT)
            assert got == [True]
            assert replica.status().fetched_bytes == BLOCK_SIZE

    async def read_cancellably(
        replica: Replica, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await replica.volume.read(0, 10)
            raise AssertionError("the read was answered by a process that is stopped")

    async def note_read(replica: Replica) -> None:
        got.append(await read_block(replica, 0))

    trio.run(main)


def test_a_fetch_that_all_readers_left_is_still_stored(tmp_path: Path) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, hydrate=False)) as replica:
            with trio.CancelScope() as scope:
                scope.cancel()
                await replica.volume.read(0, 10)
            assert scope.cancelled_caught
            while not present(replica):
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert_destination_is_sound(replica, destination, DATA, OLD)

    trio.run(main)


# One of the two processes fails


Delay = Callable[[float], None]


def test_a_read_that_joined_a_fetch_of_background_hydration_does_not_wait_for_its_link(
    tmp_path: Path, program: str | None, delay: Delay
) -> None:
    delay(NEVER)

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, limit=SLOW)) as replica:
            _, bulk = await both_processes(replica)
            os.kill(bulk, signal.SIGSTOP)
            replica.throttle.limit = None
            await trio.testing.wait_all_tasks_blocked(0.1)
            asked = replica.status().sent_bytes
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_after_joining, replica, bulk, asked)
                assert await read_block(replica, 1)
            for block in range(BLOCKS):
                assert await read_block(replica, block)
            await replica.wait_complete()  # the readers have brought it all
            assert replica.status().link.reconnects == 0
        assert destination.read_bytes() == DATA

    async def fail_after_joining(replica: Replica, bulk: int, asked: int) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)  # before the reader requests the block itself
        assert replica.status().sent_bytes == asked
        os.kill(bulk, signal.SIGKILL)

    trio.run(main)


def test_background_hydration_brings_what_a_dead_demand_process_was_asked(
    tmp_path: Path, program: str | None, delay: Delay
) -> None:
    """Neither background hydration nor a reader waits for it, as long as the other process is there."""
    delay(NEVER)

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        plan = plan_of(source, destination, program, reconnect_timeout=0, limit=SLOW)
        async with support.replica_of(plan) as replica:
            demand, _ = await both_processes(replica)
            os.kill(demand, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(begin_and_kill, replica, demand)
                assert await read_block(replica, 20)  # asked for before background hydration begins
            await replica.wait_complete()
        assert destination.read_bytes() == DATA

    async def begin_and_kill(replica: Replica, demand: int) -> None:
        await trio.testing.wait_all_tasks_blocked(0.1)  # sooner than the throttle looks again
        replica.throttle.limit = None
        await trio.testing.wait_all_tasks_blocked(0.1)
        os.kill(demand, signal.SIGKILL)

    trio.run(main)


def test_a_reader_does_not_wait_for_a_stalled_demand_process(tmp_path: Path, program: str | None) -> None:
    """Background hydration does not wait for it either, and fetches the block."""

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, limit=SLOW)) as replica:
            demand, _ = await both_processes(replica)
            os.kill(demand, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_on, replica)
                assert await read_block(replica, 20)
            await replica.wait_complete()
        assert destination.read_bytes() == DATA

    async def go_on(replica: Replica) -> None:
        await trio.testing.wait_all_tasks_blocked(0.1)
        replica.throttle.limit = None

    trio.run(main)


def test_killed_processes_are_started_again_and_what_they_were_asked_is_asked_again(
    tmp_path: Path, program: str | None
) -> None:
    """Readers and background hydration wait, and do not notice."""
    answered: list[bool] = []

    async def read(replica: Replica, block: int) -> None:
        answered.append(await read_block(replica, block))

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, limit=SLOW)) as replica:
            for pid in await both_processes(replica):
                os.kill(pid, signal.SIGSTOP)
            replica.throttle.limit = None
            async with trio.open_nursery() as nursery:
                for block in range(1, BLOCKS, 5):
                    nursery.start_soon(read, replica, block)
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert not answered
                for pid in retrieve_processes():
                    os.kill(pid, signal.SIGKILL)
            await replica.wait_complete()
            status = replica.status()
            # One of them serves both until the other is there again, which may be after the end.
            assert (status.link.reconnects > 0, status.error) == (True, None)
            assert "SIGKILL" in status.link.last_error
        assert destination.read_bytes() == DATA

    trio.run(main)
    assert answered == [True] * len(range(1, BLOCKS, 5))


def test_a_read_of_a_source_that_trickles_ends(tmp_path: Path) -> None:
    source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
    program = f"{support.FAULTY} --trickle-at 1"
    plan = plan_of(source, destination, program, timeout=2, reconnect_timeout=1)

    async def main() -> None:
        async with support.replica_of(plan) as replica:
            with trio.fail_after(15):
                assert not await read_block(replica, 0)

    trio.run(main)


def test_a_read_ends_whatever_goes_on_meanwhile() -> None:
    """An example is a source that answers others meanwhile."""

    class Waiting:
        device = writer = None
        blockmap = BlockMap(Geometry(4 * BLOCK_SIZE))

        async def ensure(self, blocks: range, lane: object) -> None:
            await trio.sleep_forever()

    async def main() -> None:
        plan = plan_of("source", "destination", timeout=30, reconnect_timeout=60)
        lane: Any = SimpleNamespace(window=Window(8, min_blocks=8, max_blocks=8))
        hydrator: Any = Waiting()
        async with trio.open_nursery() as nursery:
            volume = Volume(
                hydrator, lane, nursery, give_up_after=plan.max_wait, before_write=trio.lowlevel.checkpoint
            )
            for length, seconds in ((1, 90), (2 * BLOCK_SIZE, 120)):
                before = trio.current_time()
                with pytest.raises(SourceError, match=f"within {seconds} s"):
                    await volume.read(0, length)
                assert trio.current_time() - before == pytest.approx(seconds)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_present_blocks_are_read_without_any_process(tmp_path: Path, program: str | None, delay: Delay) -> None:
    delay(NEVER)

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        plan = plan_of(source, destination, program, hydrate=False, reconnect_timeout=0)
        async with support.replica_of(plan) as replica:
            assert await read_block(replica, 6)
            for pid in retrieve_processes():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(SourceError, match="SIGKILL"):
                await replica.volume.read(30 * BLOCK_SIZE, 1)
            assert await read_block(replica, 6)
            status = replica.status()
            assert (status.state, status.source_needed) == ("reconnecting", True)
            assert "SIGKILL" in status.error

    trio.run(main)


def test_leaving_in_the_middle_gives_waiting_readers_an_error(tmp_path: Path) -> None:
    errors: list[str] = []

    async def read(replica: Replica) -> None:
        with pytest.raises(SourceError) as caught:
            await replica.volume.read(0, 10)
        errors.append(str(caught.value))

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        plan = plan_of(source, destination, f"{support.FAULTY} --stall-at 1")
        async with trio.open_nursery() as nursery, support.replica_of(plan) as replica:
            nursery.start_soon(read, replica)
            await trio.testing.wait_all_tasks_blocked(0.1)
        assert not retrieve_processes()
        assert_destination_is_sound(replica, destination, DATA, OLD)

    trio.run(main)
    assert len(errors) == 1


# SourceFaults of the source


FAULTS = ["die", "garble", "misplace", "oversize", "short"]


@pytest.mark.parametrize(("fault", "answer", "hydrate"), support.pairwise(FAULTS, [1, 5], [False, True]))
def test_a_fault_is_made_good_by_another_connection(fault: str, answer: int, hydrate: bool, tmp_path: Path) -> None:
    source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
    program = f"{support.FAULTY} --{fault}-at {answer} --once {tmp_path}/it-happened"

    async def main() -> None:
        async with support.replica_of(plan_of(source, destination, program, hydrate=hydrate)) as replica:
            for block in range(BLOCKS):
                assert await read_block(replica, block)
            await replica.wait_complete()
            status = replica.status()
            assert status.error is None
            # If the readers have fetched all that was left, the bulk link is not connected again.
            assert status.link.reconnects == 1 or hydrate

    trio.run(main)
    assert (tmp_path / "it-happened").exists()
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize(("fault", "answer", "hydrate"), support.pairwise(FAULTS, [1, 3, 36, 38], [False, True]))
def test_a_fault_gives_errors_and_never_wrong_bytes(fault: str, answer: int, hydrate: bool, tmp_path: Path) -> None:
    """Use the original dialect, a fault at the same answer of each connection, and readers that do not wait.

    The first connection has given 35 answers when it is asked for a block, others 33.
    """
    data, old = DATA[: 20 * BLOCK_SIZE - 9], OLD[: 20 * BLOCK_SIZE - 9]
    opening = support.sample_answers(len(data))
    assert opening == 33
    source, destination = file_of(tmp_path, "source", data), file_of(tmp_path, "destination", old)
    program = f"{support.QUEUEING} --{fault}-at {answer}"
    replicas = []
    results = set()

    async def read(replica: Replica, block: int) -> None:
        results.add(await read_block(replica, block, of=data))

    async def main() -> None:
        plan = plan_of(source, destination, program, hydrate=hydrate, reconnect_timeout=0)
        async with support.replica_of(plan) as replica:
            replicas.append(replica)
            assert replica.volume.size == len(data)
            async with trio.open_nursery() as nursery:
                for block in range(0, 20, 2):
                    nursery.start_soon(read, replica, block)
            for block in range(20):
                await read(replica, block)

    with contextlib.suppress(SourceError):
        trio.run(main)
    assert replicas or answer <= opening
    for replica in replicas:
        assert_destination_is_sound(replica, destination, data, old)
        if not hydrate and fault != "short":  # background hydration has a process of its own
            assert False in results
    if not replicas:
        assert destination.read_bytes() == old


@pytest.mark.long
def test_garbled_answers_on_three_connections_are_the_sources_fault(tmp_path: Path) -> None:
    """Errors of the reader who gets them, and of background hydration."""

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        for hydrate in (False, True):
            plan = plan_of(source, destination, f"{support.FAULTY} --garble-at 1", hydrate=hydrate)
            async with support.replica_of(plan) as replica:
                with pytest.raises(ProtocolViolationError, match="Last login"):
                    await (replica.wait_complete() if hydrate else replica.volume.read(0, 1))
                status = replica.status()
                assert status.state == "failed" if hydrate else status.link.reconnects == 2
                assert "Last login" in status.error
        assert destination.read_bytes() == OLD

    trio.run(main)


def test_a_block_that_the_source_cannot_read_is_no_matter_of_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        program = f"{support.FAULTY} --fail-at 1 --once {tmp_path}/it-happened"
        async with support.replica_of(plan_of(source, destination, program, hydrate=False)) as replica:
            assert await read_block(replica, 3) is False
            assert "cannot be read, on request" in replica.status().error
            assert replica.status().unreadable_ranges == (Extent(3 * BLOCK_SIZE, BLOCK_SIZE),)
            assert await read_block(replica, 3) is False  # not asked again at once
            monkeypatch.setattr(source_faults, "RETRY_SECONDS", 0)
            assert await read_block(replica, 3) is True
            assert replica.status().link.reconnects == 0
            assert replica.status().unreadable_bytes == 0

    trio.run(main)


@pytest.mark.parametrize("size", [0, 7 * BLOCK_SIZE, 7 * BLOCK_SIZE + 5])
def test_a_source_that_is_truncated_gives_errors_and_never_wrong_bytes(
    size: int, tmp_path: Path, program: str | None
) -> None:
    source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)

    async def main() -> None:
        async with support.replica_of(plan_of(source, destination, program, limit=SLOW)) as replica:
            await both_processes(replica)
            os.truncate(source, size)
            for block in reversed(range(BLOCKS)):
                assert await read_block(replica, block) is (block == 0 or block < size // BLOCK_SIZE)
            replica.throttle.limit = None
            with pytest.raises(SourceError, match=r"shorter|source changed.*size was"):
                await replica.wait_complete()
        assert_destination_is_sound(replica, destination, DATA, OLD)

    trio.run(main)


# SourceFaults of the destination


def test_a_sync_that_fails_in_the_middle_makes_it_check_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file system here fails one sync and no other, so the device's is made to."""
    sync, failures = Device.sync, ["once"]

    def fail_once(device: Device, *, times: bool = True) -> None:
        if failures:
            failures.pop()
            raise DeviceError("the write-back failed")
        sync(device, times=times)

    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, limit=SLOW)) as replica:
            await both_processes(replica)
            for block in range(0, BLOCKS, 3):
                assert await read_block(replica, block)
            with pytest.raises(DeviceError, match="write-back"):
                await replica.commit()
            assert replica.status().hydrated_bytes == 0
            replica.throttle.limit = None
            await replica.wait_complete()
            assert replica.status().state == "complete"
        assert destination.read_bytes() == DATA

    monkeypatch.setattr(Device, "sync", fail_once)
    monkeypatch.setattr(committer, "_SECONDS", NEVER)  # no sync but the one here, and the last
    trio.run(main)


def test_background_hydration_ends_where_the_disk_fails_at_each_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began anew after each, for ever."""
    real = BackgroundHydration.run

    def fail(device: Device, *, times: bool = True) -> None:
        raise DeviceError("the write-back failed")

    async def main() -> None:
        ended, served = trio.Event(), False

        async def run(hydration: BackgroundHydration) -> None:
            try:
                await real(hydration)
            finally:
                ended.set()

        monkeypatch.setattr(BackgroundHydration, "run", run)
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        with contextlib.suppress(DeviceError):  # the last sync fails as well
            async with support.replica_of(plan_of(source, destination, limit=SLOW)) as replica:
                monkeypatch.setattr(Device, "sync", fail)
                with pytest.raises(DeviceError, match="write-back"):
                    await replica.wait_complete()
                with trio.move_on_after(5):
                    await ended.wait()
                    served = await read_block(replica, 3)
        assert served

    trio.run(main)


def test_no_read_gets_what_the_disk_has_while_the_cache_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a sync that failed. The drop is made to take its time, and to bring the old bytes back."""
    dropped, go_on = threading.Event(), threading.Event()
    source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)

    def fail(device: Device, *, times: bool = True) -> None:
        raise DeviceError("the write-back failed")

    def drop(device: Device) -> None:
        device.write(0, OLD[:BLOCK_SIZE])
        dropped.set()
        go_on.wait(10)

    async def main() -> None:
        async with support.replica_of(plan_of(source, destination, hydrate=False)) as replica:
            assert await read_block(replica, 0)
            with monkeypatch.context() as patch:
                patch.setattr(Device, "sync", fail)
                patch.setattr(Device, "drop_cache", drop)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(failing_commit, replica)
                    await trio.to_thread.run_sync(dropped.wait, 10)
                    with trio.move_on_after(0.3):
                        assert await read_block(replica, 0)
                    go_on.set()
            assert await read_block(replica, 0)

    async def failing_commit(replica: Replica) -> None:
        with pytest.raises(DeviceError, match="write-back"):
            await replica.commit()

    monkeypatch.setattr(committer, "_SECONDS", NEVER)
    trio.run(main)


def test_a_full_destination_fails_background_hydration_and_not_the_reads_of_what_is_there(
    small_tmpfs: Path, tmp_path: Path
) -> None:
    old = DATA[: 4 * BLOCK_SIZE]
    source, destination = file_of(tmp_path, "source", DATA), file_of(small_tmpfs, "destination", old)

    async def main() -> None:
        async with support.replica_of(plan_of(source, destination)) as replica:
            assert all([await read_block(replica, block) for block in (3, 1)])
            with pytest.raises(DeviceError, match="No space left on device"):
                await replica.wait_complete()
            status = replica.status()
            assert (status.state, status.source_needed) == ("failed", True)
            assert "No space left on device" in status.error
            results = {block: await read_block(replica, block) for block in range(BLOCKS)}
            assert all(results[block] for block in range(4))
            assert not all(results.values())
            for block in present(replica):
                assert await read_block(replica, block)
        assert_destination_is_sound(replica, destination, DATA, old)

    trio.run(main)


def test_a_read_does_not_fail_of_what_was_read_ahead(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    """Block 12 cannot be read, and is in the batch that is brought ahead of block 6."""
    backing, destination = file_of(tmp_path, "backing", DATA[: 16 * BLOCK_SIZE]), tmp_path / "destination"
    device = loop_device(backing, "--read-only")

    async def main() -> None:
        async with support.replica_of(plan_of(device, destination, hydrate=False)) as replica:
            os.truncate(backing, 12 * BLOCK_SIZE)
            assert [block for block in range(16) if await read_block(replica, block)] == list(range(12))

    trio.run(main)


def test_a_destination_that_fills_up_while_it_is_read(small_tmpfs: Path, tmp_path: Path) -> None:
    source, destination = file_of(tmp_path, "source", DATA), small_tmpfs / "destination"

    async def main() -> None:
        async with support.replica_of(plan_of(source, destination, hydrate=False)) as replica:
            order = random.Random(5).sample(range(BLOCKS), BLOCKS)
            good = [block for block in order if await read_block(replica, block)]
            assert 4 <= len(good) <= 8
            assert present(replica) >= set(good)
            assert all([await read_block(replica, block) for block in good])
            assert "No space left" in replica.status().error
        assert_destination_is_sound(replica, destination, DATA, b"")

    trio.run(main)


@pytest.mark.parametrize("hydrate", [True, False])
def test_what_cannot_be_read_of_a_destination_is_fetched(
    hydrate: bool, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    data, old = DATA[: 32 * BLOCK_SIZE], OLD[: 32 * BLOCK_SIZE]
    changed = set(range(0, 32, 3))
    source, backing = file_of(tmp_path, "source", data), file_of(tmp_path, "backing", old)
    device = loop_device(backing)
    os.truncate(backing, 8 * BLOCK_SIZE)
    support.output("blockdev", "--flushbufs", device)

    async def main() -> None:
        async with support.replica_of(plan_of(source, device, hydrate=hydrate)) as replica:
            if hydrate:
                await replica.wait_complete()
            for block in random.Random(6).sample(range(32), 32):
                assert await read_block(replica, block, of=data)
            assert replica.status().fetched_bytes == len(changed | set(range(8, 32))) * BLOCK_SIZE

    trio.run(main)
    assert backing.read_bytes() == data  # written anew, it can be read


def test_a_final_sync_that_fails_completes_nothing(
    small_tmpfs: Path, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    """The device takes every write, and finds no room for them when it is synced."""
    backing = small_tmpfs / "backing"
    backing.touch()
    os.truncate(backing, 4 * 2**20)
    data = DATA[: 4 * 2**20]
    source, device = file_of(tmp_path, "source", data), loop_device(backing)

    async def main() -> None:
        with contextlib.suppress(DeviceError):  # the last sync fails as well
            async with support.replica_of(plan_of(source, device)) as replica:
                with pytest.raises(DeviceError, match="cannot sync"):
                    await replica.wait_complete()
                status = replica.status()
                assert (status.state, status.source_needed) == ("failed", True)
                assert "cannot sync" in status.error
                assert status.hydrated_bytes == 0
                assert len(retrieve_processes()) == 2
                for block in range(32):
                    assert await read_block(replica, block, of=data)

    trio.run(main)


def test_a_last_sync_that_fails_keeps_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last times are recorded after a sync of their own. Nothing was written since the commit."""
    source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
    plan = plan_of(source, destination, state=str(tmp_path / "state"))
    dropped: list[bool] = []

    def fail(device: Device, write_back: Callable[[], object]) -> Times:
        raise DeviceError("the last write-back failed")

    async def fails() -> None:
        async with support.replica_of(plan) as replica:
            with pytest.raises(DeviceError, match="last write-back"):
                await replica.wait_complete()
            status = replica.status()
            assert (status.state, status.hydrated_bytes) == ("failed", len(DATA))
            assert await read_block(replica, 0)

    async def again() -> None:
        async with support.replica_of(plan) as replica:
            assert replica.status().resumed_bytes == len(DATA)
            await replica.wait_complete()

    with monkeypatch.context() as patch:
        patch.setattr(committer, "settled_times", fail)
        patch.setattr(Device, "drop_cache", lambda device: dropped.append(True))
        trio.run(fails)
    assert dropped
    trio.run(again)
    assert destination.read_bytes() == DATA


# Who writes


def test_only_the_writer_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, read-ahead, background hydration, prefetch, verification, a sync that fails: no other writes."""
    writers: set[str] = set()

    def watch(name: str) -> None:
        real = getattr(Destination, name)

        def method(device: Destination, *args: Any, **options: Any) -> None:
            writers.add(sys._getframe(1).f_globals["__name__"])
            real(device, *args, **options)

        monkeypatch.setattr(Destination, name, method)

    async def main() -> None:
        source = file_of(tmp_path, "source", DATA[: 20 * BLOCK_SIZE] + bytes(20 * BLOCK_SIZE))
        destination = file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, limit=SLOW, verify=True)) as replica:
            for block in (3, 4, 5, 30):
                assert await read_block(replica, block, of=source.read_bytes())
            await replica.prefetch([Extent(10 * BLOCK_SIZE, 1)])
            with monkeypatch.context() as patch:
                patch.setattr(Device, "sync", failing_sync)
                with pytest.raises(DeviceError):
                    await replica.commit()
            replica.throttle.limit = None
            await replica.wait_complete()
        assert destination.read_bytes() == source.read_bytes()

    def failing_sync(device: Device, *, times: bool = True) -> None:
        raise DeviceError("the write-back failed")

    monkeypatch.setattr(committer, "_SECONDS", NEVER)
    watch("write")
    watch("write_zeros")
    trio.run(main)
    assert writers - {"blockcopy.block.device"} == {"blockcopy.replica.hydration.writer"}


# What is told


def test_the_cache_is_not_dropped_in_the_thread_of_the_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process waits for a disk."""
    threads = []
    drop_cache = Device.drop_cache

    def noted(device: Device) -> None:
        threads.append(threading.current_thread())
        drop_cache(device)

    monkeypatch.setattr(Device, "drop_cache", noted)
    source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)

    async def main() -> None:
        async with support.replica_of(plan_of(source, destination, verify=True)) as replica:
            await replica.wait_complete()

    trio.run(main)
    assert threads
    assert threading.main_thread() not in threads


def test_the_status_tells_the_truth_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, demand=False)) as replica:
            before = replica.status()
            await replica.wait_complete()
            after = replica.status()
        for status in (before, after):
            assert typed_json.parse(Status, json.loads(status.as_json())) == status  # each field has its type
            assert status.size == len(DATA)
            assert (status.source, status.destination) == (str(source), str(destination))
            assert status.pid == os.getpid()
            assert status.error is None
        assert (before.state, before.hydrated_percent, before.source_needed) == (State.HYDRATING, 0.0, True)
        assert (after.state, after.hydrated_percent, after.source_needed) == (State.COMPLETE, 100.0, False)
        assert after.same_bytes + after.fetched_bytes == after.hydrated_bytes == len(DATA)
        assert (before.link.state, before.link.connections, before.link.digest) == (
            LinkState.CONNECTED,
            1,
            "blake3",
        )
        assert (after.link.state, after.link.connections, after.link.last_error) == (LinkState.CLOSED, 0, None)

    trio.run(main)


def test_hydrated_percent_is_floored(tmp_path: Path) -> None:
    async def main() -> None:
        data = DATA[: 3 * BLOCK_SIZE]
        source, destination = file_of(tmp_path, "source", data), file_of(tmp_path, "destination", data)
        async with support.replica_of(plan_of(source, destination, hydrate=False)) as replica:
            percents = []
            for block in (2, 0, 1):
                await replica.volume.read(block * BLOCK_SIZE, 1)
                percents.append(replica.status().hydrated_percent)
            assert percents == [33.33, 66.66, 100.0]

    trio.run(main)


@pytest.mark.parametrize(
    ("part", "whole", "percent"),
    [(0, 0, 100.0), (0, 7, 0.0), (7, 7, 100.0), (2**60 - 1, 2**60, 99.99), (99_995, 100_000, 99.99), (1, 3, 33.33)],
)
def test_only_the_whole_is_a_hundred_percent(part: int, whole: int, percent: float) -> None:
    assert floored_percent(part, whole) == percent


def test_once_complete_the_source_is_disconnected(tmp_path: Path, program: str | None) -> None:
    async def main() -> None:
        source, destination = file_of(tmp_path, "source", DATA), file_of(tmp_path, "destination", OLD)
        async with support.replica_of(plan_of(source, destination, program, limit=SLOW)) as replica:
            await both_processes(replica)
            replica.throttle.limit = None
            await replica.wait_complete()
            assert not retrieve_processes()
            source.unlink()
            await read_at_random(replica, DATA, seed=4, count=30)

    trio.run(main)


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    """Return the peak memory of the largest process of a sync, in bytes."""
    for name in ("source", "destination"):
        file_of(tmp_path, name, b"")
        os.truncate(tmp_path / name, 2**28)
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *support.BLOCKCOPY, "sync", tmp_path / "source", tmp_path / "destination"],
        stdout=subprocess.PIPE,
        check=True,
        timeout=50,
    )
    assert int(done.stdout) * 1024 < 80 * 2**20
    assert (tmp_path / "destination").stat().st_blocks == 0
