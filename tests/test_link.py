"""A link that breaks, freezes, or leads to another source than before: what readers and the copy have of it.

Through tools/standins/link in place of ssh, and tools/standins/faulty_retrieve; the back-off alone with a
clock that jumps.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
import trio
import trio.testing
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    QUEUEING,
    STANDINS,
    Mount,
    failed,
    noise,
    run,
    until,
    with_changes,
    written,
)

from blockcopy.block.geometry import Extent
from blockcopy.errors import SourceChangedError, SourceError
from blockcopy.replica.source.batches import Delta, Signatures, UnreadableBlock
from blockcopy.replica.source.connector import RoundTrip
from blockcopy.replica.source.pool import Pool

Mounter = Callable[..., Mount]

BLOCKS = 64
DATA = noise(BLOCKS * BLOCK_SIZE)
OLD = with_changes(DATA, list(range(BLOCKS)))
"""Differs from DATA in every block."""

OTHER = noise(BLOCKS * BLOCK_SIZE, seed=2)
"""Another source of the same size."""

OURS = shlex.join(BLOCKCOPY)


def at(block: int) -> int:
    return block * BLOCK_SIZE


class Route:
    """A link to a host. It is cut while the file `cut` exists, and frozen while `frozen` exists."""

    def __init__(self, folder: Path, *options: object) -> None:
        self.cut, self.frozen = folder / "cut", folder / "frozen"
        signs = ["--cut-while", self.cut, "--freeze-while", self.frozen]
        self.rsh = shlex.join(map(str, [PYTHON, STANDINS / "link", *signs, *options]))


@pytest.fixture
def way(tmp_path: Path) -> Route:
    return Route(tmp_path)


@pytest.fixture
def far(mount: Mounter, source: Path, destination: Path, way: Route) -> Callable[..., Mount]:
    """Mount the source from beyond the link: `far(*options, program=…)`."""
    return lambda *options, program=OURS: mount(
        f"host:{source}", destination, "-e", way.rsh, *options, program=program
    )


def faulty(*options: object) -> str:
    """--blockcopy-path of our program at the source, with these faults."""
    return shlex.join(map(str, [PYTHON, STANDINS / "faulty_retrieve", *options]))


READ = """
import os, random, sys
file, known, seed = sys.argv[1:]
with open(known, "rb") as stream:
    known = stream.read()
fd = os.open(file, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
offsets = list(range(0, len(known), 65536))
random.Random(int(seed)).shuffle(offsets)
print("begin", flush=True)
for offset in offsets:
    if os.pread(fd, 65536, offset) != known[offset : offset + 65536]:
        sys.exit(f"wrong at {offset}")
print("right")
"""
"""Reads all there is, in an order of its own. A failing read is a traceback."""


@contextlib.contextmanager
def reader(mounted: Mount, known: Path, seed: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that reads the mount at random. It prints `begin`, and `right` if all bytes were right."""
    command = [PYTHON, "-I", "-S", "-c", READ, mounted.file, known, str(seed)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begin\n"
            yield process
        finally:
            process.kill()


def read(mounted: Mount, block: int) -> bytes | None:
    """Return the first 4096 bytes of `block`. Returns None for EIO."""
    fd = os.open(mounted.file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, 4096, at(block))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
    finally:
        os.close(fd)


def right(block: int) -> bytes:
    return DATA[at(block) : at(block) + 4096]


def stored(destination: Path) -> set[int]:
    """Return the blocks of the destination that are the source's. Each other block must be the old one."""
    now, found = destination.read_bytes(), set()
    assert len(now) == len(DATA)
    for block in range(BLOCKS):
        span = slice(at(block), at(block + 1))
        assert now[span] in (OLD[span], DATA[span]), f"block {block} is neither old nor the source's"
        if now[span] == DATA[span]:
            found.add(block)
    return found


def in_mid_pass(mounted: Mount, bytes_here: int = 1) -> None:
    until(lambda: mounted.status()["hydrated_bytes"] >= bytes_here, "some of background hydration")
    assert mounted.status()["state"] == "hydrating"


def link_error(mounted: Mount) -> str:
    return str(mounted.status()["link"]["last_error"])


def complete(mounted: Mount, destination: Path) -> None:
    mounted.wait()
    status = mounted.status()
    assert (status["error"], status["link"]["state"]) == (None, "closed")
    assert run("umount", mounted.point).returncode == 0
    assert destination.read_bytes() == DATA


# Broken, and reconnected


@pytest.mark.long
def test_a_cut_in_mid_pass_is_seen_by_no_reader(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    way = Route(tmp_path, "--rate", "2M")  # slow for readers too, or they would bring it all at once
    mounted = mount(f"host:{source}", destination, "-e", way.rsh, program=OURS)
    with contextlib.ExitStack() as readers:
        in_mid_pass(mounted)
        processes = [readers.enter_context(reader(mounted, source, seed)) for seed in range(4)]
        way.cut.touch()
        until(lambda: mounted.status()["state"] == "reconnecting", "the end of the link")
        until(lambda: "No route to host" in link_error(mounted), "an attempt that is refused")
        status = mounted.status()
        assert (status["state"], status["link"]["state"]) == ("reconnecting", "reconnecting")
        told = run("status", mounted.point).stdout.decode()
        assert told.startswith("reconnecting: ")
        assert "connection lost, reconnecting: " in told
        assert all(process.poll() is None for process in processes)
        way.cut.unlink()
        said = [process.communicate(timeout=support.PATIENCE)[0] for process in processes]
    assert said == ["right\n"] * 4
    assert mounted.status()["link"]["reconnects"] >= 1
    complete(mounted, destination)


@pytest.mark.long
def test_a_link_that_is_frozen_for_too_long_is_made_again(
    far: Callable[..., Mount], source: Path, destination: Path, way: Route
) -> None:
    mounted = far("--limit", "4M", "--timeout", 2, "--connections", 1)
    in_mid_pass(mounted)
    before = mounted.retrievers()
    way.frozen.touch()
    with reader(mounted, source, 1) as process:
        until(lambda: re.search("(for|after) 2 seconds", link_error(mounted)), "the time limit")
        until(lambda: set(mounted.retrievers()).isdisjoint(before), "the end of both links")
        way.frozen.unlink()
        assert process.communicate(timeout=support.PATIENCE)[0] == "right\n"
    assert mounted.status()["link"]["reconnects"] >= 1
    complete(mounted, destination)


def test_a_link_behind_a_script_is_given_up_as_well(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    """Only the shell is killed. Its child is stopped, and keeps the pipes open."""
    script = written(tmp_path / "rsh", b'#!/bin/sh\nshift\nsh -c "$*"\nexit $?\n')
    script.chmod(0o700)
    mounted = mount(f"host:{source}", destination, "-e", script, "--no-background", "--timeout", 3, program=OURS)
    assert read(mounted, 5) == right(5)
    [shell] = mounted.retrievers()
    behind = descendants(shell)
    for pid in behind:
        os.kill(pid, signal.SIGSTOP)
    try:
        with reader(mounted, source, 1) as process:
            assert process.communicate(timeout=support.PATIENCE)[0] == "right\n"
    finally:
        for pid in behind:
            os.kill(pid, signal.SIGKILL)
    assert mounted.status()["link"]["reconnects"] == 1


def descendants(pid: int) -> list[int]:
    children = support.children(pid)
    return [*children, *(each for child in children for each in descendants(child))]


def test_a_link_that_is_frozen_for_a_moment_is_not_made_again(
    far: Callable[..., Mount], destination: Path, way: Route
) -> None:
    mounted = far("--limit", "4M")
    in_mid_pass(mounted)
    way.frozen.touch()
    sent = mounted.status()["sent_bytes"]
    until(lambda: mounted.status()["sent_bytes"] > sent, "a question")
    way.frozen.unlink()
    mounted.wait()
    assert mounted.status()["link"]["reconnects"] == 0
    complete(mounted, destination)


def test_a_silent_link_that_is_asked_nothing_stays(far: Callable[..., Mount], way: Route) -> None:
    """The link is silent for longer than --timeout."""
    mounted = far("--no-background", "--timeout", 2)
    assert read(mounted, 5) == right(5)
    before, end = mounted.retrievers(), time.monotonic() + 2.5
    while time.monotonic() < end:
        run("status", mounted.point)
        time.sleep(0.1)  # it is the time that must pass
    assert mounted.retrievers() == before
    assert read(mounted, 9) == right(9)
    link = mounted.status()["link"]
    assert (link["state"], link["reconnects"], link["last_error"]) == ("connected", 0, None)


def test_a_read_waits_for_so_long_and_the_next_one_tries_again(far: Callable[..., Mount], way: Route) -> None:
    mounted = far("--no-background", "--reconnect-timeout", 1)
    assert read(mounted, 5) == right(5)
    way.cut.touch()
    until(lambda: mounted.status()["link"]["state"] == "reconnecting", "the end of the link")
    start = time.monotonic()
    assert read(mounted, 20) is None
    assert 0.5 < time.monotonic() - start < 5  # the kernel may ask once more
    assert "after 1 seconds without an answer" in mounted.status()["error"]
    assert read(mounted, 5) == right(5)
    way.cut.unlink()
    until(lambda: read(mounted, 20) == right(20), "a read")
    assert mounted.status()["link"]["state"] == "connected"


def test_a_read_that_joined_the_pass_outlives_a_cut_of_it(
    far: Callable[..., Mount], source: Path, destination: Path, way: Route
) -> None:
    """The link breaks while requests of background hydration and of a reader are in flight."""
    mounted = far("--limit", "1M")
    in_mid_pass(mounted)
    way.frozen.touch()
    sent, here = mounted.status()["sent_bytes"], mounted.status()["hydrated_bytes"] // BLOCK_SIZE
    until(lambda: mounted.status()["sent_bytes"] > sent, "a batch in flight")
    with reader(mounted, source, 5) as process:
        way.cut.touch()
        until(lambda: mounted.status()["link"]["state"] == "reconnecting", "the end of the links")
        way.frozen.unlink()
        way.cut.unlink()
        assert read(mounted, here + 1) == right(here + 1)
        assert process.communicate(timeout=support.PATIENCE)[0] == "right\n"
    complete(mounted, destination)


def test_a_read_does_not_inherit_what_the_pass_fails_with(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    """The source fails once at block 40. Each answer takes 0.4 s, so reads meet background hydration."""
    slow, once = Route(tmp_path, "--delay", 200), tmp_path / "once"
    mounted = mount(
        f"host:{source}", destination, "-e", slow.rsh, program=faulty("--once", once, "--fail-for", at(40))
    )
    until(lambda: mounted.status()["sent_bytes"] > 1000, "the first batches")
    assert read(mounted, 2) == right(2)
    until(lambda: mounted.status()["state"] == "failed", "the end of background hydration")
    assert once.exists()
    for block in (0, 1, 3, BLOCKS - 1):
        assert read(mounted, block) == right(block)
    mounted.umount()
    stored(destination)


def test_a_signal_while_the_link_is_down_ends_a_sync(source: Path, destination: Path, way: Route) -> None:
    command = ["sync", "-e", way.rsh, "--blockcopy-path", OURS, "--limit", "1M", f"host:{source}", destination]
    with subprocess.Popen([*BLOCKCOPY, *map(str, command)], stderr=subprocess.PIPE) as process:
        until(lambda: stored(destination), "the first block")
        way.cut.touch()
        until(lambda: not support.children(process.pid), "the end of the link")
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=8)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGTERM
    assert b"Traceback" not in said
    assert stored(destination)


@pytest.mark.long
def test_a_mount_begins_without_its_source_where_a_state_is_kept(
    far: Callable[..., Mount], destination: Path, way: Route
) -> None:
    first = far("--no-background")
    assert read(first, 5) == right(5)
    first.umount()
    way.cut.touch()
    mounted = far("--timeout", 1)
    assert mounted.status()["state"] == "reconnecting"
    assert read(mounted, 5) == right(5)
    way.cut.unlink()
    complete(mounted, destination)


def test_without_a_state_a_source_that_is_away_is_told(
    far: Callable[..., Mount], destination: Path, way: Route
) -> None:
    way.cut.touch()
    with pytest.raises(AssertionError, match="No route to host"):
        far()
    assert destination.read_bytes() == OLD


# Another source than before


def replace(source: Path) -> None:
    """Replace the source: its name leads to another file from now on."""
    written(source.with_name("other"), OTHER).rename(source)


def break_for_a_moment(mounted: Mount, way: Route) -> None:
    way.cut.touch()
    until(lambda: mounted.status()["link"]["state"] == "reconnecting", "the end of the link")
    way.cut.unlink()


def test_a_mount_that_began_without_its_source_takes_no_other_one(
    far: Callable[..., Mount], source: Path, destination: Path, way: Route
) -> None:
    first = far("--no-background")
    assert read(first, 5) == right(5)
    first.umount()
    way.cut.touch()
    mounted = far()
    replace(source)
    way.cut.unlink()
    until(lambda: mounted.status()["state"] == "failed", "the end of background hydration")
    assert "source changed" in mounted.status()["error"]
    assert (read(mounted, 5), read(mounted, 6)) == (right(5), None)
    failed(run("umount", mounted.point), 75)
    assert stored(destination) == {5}


@pytest.mark.long
@pytest.mark.parametrize("program", [OURS, QUEUEING], ids=["ours", "original"])
def test_a_source_that_changed_is_not_mixed_in(
    far: Callable[..., Mount], source: Path, destination: Path, way: Route, program: str
) -> None:
    mounted = far("--limit", "1M", program=program)
    in_mid_pass(mounted)
    assert read(mounted, BLOCKS - 1) == right(BLOCKS - 1)
    replace(source)
    break_for_a_moment(mounted, way)
    until(lambda: mounted.status()["state"] == "failed", "the end of background hydration")
    status = mounted.status()
    assert "source changed" in status["error"]
    assert ("its bytes differ" if program == QUEUEING else "inode was ") in status["error"]
    assert status["source_needed"] is True
    told = run("status", mounted.point).stdout
    assert told.startswith(b"failed: ")
    assert b"source changed" in told
    here = stored(destination)
    assert {0, BLOCKS - 1} <= here < set(range(BLOCKS))
    for block in range(BLOCKS):
        assert read(mounted, block) == (right(block) if block in here else None)
    waiting = run("wait", mounted.point)
    failed(waiting, 75, b"source changed")
    failed(run("umount", mounted.point), 75)
    assert stored(destination) == here


def test_a_mount_without_a_pass_tells_of_a_changed_source(
    far: Callable[..., Mount], source: Path, destination: Path, way: Route
) -> None:
    mounted = far("--no-background")
    assert read(mounted, 5) == right(5)
    replace(source)
    break_for_a_moment(mounted, way)
    assert read(mounted, 6) is None
    status = mounted.status()
    assert "source changed" in status["error"]
    assert status["state"] == "failed"
    assert read(mounted, 5) == right(5)
    assert stored(destination) == {5}


def test_a_paused_mount_tells_of_a_changed_source(
    far: Callable[..., Mount], source: Path, destination: Path, way: Route
) -> None:
    mounted = far("--limit", "1M")
    in_mid_pass(mounted)
    assert run("pause", mounted.point).returncode == 0
    replace(source)
    break_for_a_moment(mounted, way)
    until(lambda: mounted.status()["state"] == "failed", "the news")
    assert "source changed" in mounted.status()["error"]
    mounted.umount()
    stored(destination)


@pytest.mark.long
def test_a_source_that_changes_while_it_is_verified(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    """Check that the mount goes on: present blocks are right, and stay readable."""
    written(destination, DATA)
    slow = Route(tmp_path, "--delay", 200)
    mounted = mount(f"host:{source}", destination, "-e", slow.rsh, "--verify", program=OURS)
    until(lambda: mounted.status()["state"] == "verifying", "the comparison")
    replace(source)
    break_for_a_moment(mounted, slow)
    failed(run("wait", mounted.point), 75)
    status = mounted.status()
    assert (status["state"], "source changed" in status["error"]) == ("failed", True)
    assert read(mounted, 3) == right(3)
    mounted.umount()
    assert destination.read_bytes() == DATA


@pytest.mark.long
def test_an_umount_while_it_is_verified_is_in_order(source: Path, tmp_path: Path) -> None:
    support.require_fuse()
    copy, point, slow = written(tmp_path / "copy", DATA), tmp_path / "point", Route(tmp_path, "--delay", 200)
    point.mkdir()
    command = ["mount", "-f", "--verify", "-e", slow.rsh, "--blockcopy-path", OURS, f"host:{source}", copy, point]
    with subprocess.Popen([*BLOCKCOPY, *map(str, command)], stderr=subprocess.PIPE) as process:
        try:
            until(lambda: b'"verifying"' in read_if_there(point / "status.json"), "the comparison")
            slow.frozen.touch()  # it has two round trips of 0.4 s to go, and does not end before the umount
            failed(run("umount", point), 75)
            _, said = process.communicate(timeout=support.PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, b"Traceback" in said) == (75, False), said  # it is not complete yet


def read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def test_the_log_says_in_what_a_source_changed(source: Path, destination: Path, way: Route) -> None:
    command = ["sync", "-e", way.rsh, "--blockcopy-path", OURS, "--limit", "1M", f"host:{source}", destination]
    with subprocess.Popen([*BLOCKCOPY, *map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        until(lambda: stored(destination), "the first block")
        inode = source.stat().st_ino
        replace(source)
        way.cut.touch()
        until(lambda: not support.children(process.pid), "the end of the link")
        way.cut.unlink()
        try:
            _, said = process.communicate(timeout=support.PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 3
    assert f"inode was {inode}, is {source.stat().st_ino}" in said
    assert "ERROR (sync): source changed" in said.splitlines()[-1]
    assert stored(destination) < set(range(BLOCKS))


# A source that errs


FAULTS = ("die", "stall", "garble", "misplace", "oversize", "short", "misfence")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_happens_once_is_survived(source: Path, destination: Path, tmp_path: Path, fault: str) -> None:
    once = tmp_path / "once"
    program = faulty("--once", once, f"--{fault}-at", 2 if fault == "misfence" else 20)
    limit = ["--timeout", 3] if fault == "stall" else []
    done = run("sync", *limit, "--blockcopy-path", program, source, destination)
    assert done.returncode == 0, done.stderr.decode()
    assert once.exists()
    assert "connection lost, reconnecting" in done.stderr.decode()
    assert destination.read_bytes() == DATA


def test_a_fault_under_a_read_is_survived(mount: Mounter, source: Path, destination: Path, tmp_path: Path) -> None:
    once = tmp_path / "once"
    mounted = mount(source, destination, "--no-background", program=faulty("--once", once, "--die-at", 2))
    assert [read(mounted, block) for block in (3, 30)] == [right(3), right(30)]
    assert once.exists()
    assert mounted.status()["link"]["reconnects"] == 1


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """Source and destination of one batch, which has to fail three times, 1 and 2 seconds apart."""
    size = 8 * BLOCK_SIZE
    return written(tmp_path / "small", DATA[:size]), written(tmp_path / "small copy", OLD[:size])


def test_a_source_that_always_garbles_ends_a_sync(small: tuple[Path, Path]) -> None:
    done = run("sync", "--blockcopy-path", faulty("--garble-at", 1), *small)
    failed(done, 3)
    assert "unexpected reply from" in done.stderr.decode().splitlines()[-1]
    assert small[1].read_bytes() == OLD[: 8 * BLOCK_SIZE]


@pytest.mark.long
def test_a_source_that_always_garbles_ends_the_pass_of_a_mount(mount: Mounter, small: tuple[Path, Path]) -> None:
    mounted = mount(*small, program=faulty("--garble-at", 1))
    waiting = run("wait", mounted.point)
    failed(waiting, 75, b"unexpected reply from")
    assert mounted.status()["state"] == "failed"
    failed(run("umount", mounted.point), 75)
    assert small[1].read_bytes() == OLD[: 8 * BLOCK_SIZE]


# The back-off, with a clock that jumps to whatever is waited for


NOTHING_DIFFERS = Delta([], [], [])
SINK: Any = object()  # to which nothing is given
QUESTION = Signatures(0, 1, 1, b"")


class FakeRetriever:
    """A connection that a test ends."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.failure: SourceError | None = None
        self.unanswered: Sequence[Signatures] | None = None
        self.answered_at: float | None = None
        self.sent_bytes = self.received_bytes = 0

    def end(self) -> None:
        self.failure = SourceError("it broke")
        self.ended.set()

    async def ask(self, questions: Sequence[Any], sink: object) -> Delta:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.answered_at = trio.current_time()
        return NOTHING_DIFFERS

    async def ping(self) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    async def close(self) -> None:
        self.end()


class FakeConnector:
    """`plan` tells what each attempt finds: a connection, or an error; after its end nobody is there."""

    command = SimpleNamespace(location="fake")

    def __init__(self, plan: Sequence[FakeRetriever | SourceError] = ()) -> None:
        self.plan = list(plan)
        self.changed: SourceChangedError | None = None
        self.waiting = trio.lowlevel.ParkingLot()
        self.fatal_blocks = 0
        self.is_original = False
        self.round_trip = RoundTrip()
        self.attempts: list[float] = []
        """When they were, in trio's time."""

    async def open(self, nursery: trio.Nursery, connections: int, token: str | None = None) -> FakeRetriever:
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        found = self.plan.pop(0) if self.plan else SourceError("nobody is there")
        if isinstance(found, SourceChangedError):
            self.changed = found
        if isinstance(found, SourceError):
            raise found
        return found

    def waits(self) -> list[float]:
        return [round(later - earlier, 3) for earlier, later in zip(self.attempts, self.attempts[1:], strict=False)]


def with_link(
    scenario: Callable[[Pool, FakeConnector], Any], plan: Sequence[Any] = (), patience: float = 60
) -> None:
    """Run it beside the link, whose clock jumps; the link is closed in the end."""

    async def main() -> None:
        connector = FakeConnector(plan)
        with trio.fail_after(10_000):
            async with trio.open_nursery() as nursery:
                link = Pool(connector, nursery, give_up_after=patience)  # type: ignore[arg-type]
                nursery.start_soon(link.run)
                await scenario(link, connector)
                await link.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def assert_delays(connector: FakeConnector, longest: list[float]) -> None:
    """Check that the first attempts were `longest` seconds apart each, or up to a half less."""
    waits = connector.waits()[: len(longest)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True)), waits


def test_attempts_are_further_and_further_apart() -> None:
    async def scenario(link: Pool, connector: FakeConnector) -> None:
        await trio.sleep(200)
        assert_delays(connector, [1, 2, 4, 8, 16, 30, 30, 30])
        assert (link.is_connected, link.reconnects) == (False, 0)
        assert str(link.last_error) == "nobody is there"

    with_link(scenario)


def test_after_an_answer_the_next_attempt_is_soon_again() -> None:
    first, second, third = FakeRetriever(), FakeRetriever(), FakeRetriever()
    away = SourceError("nobody is there")

    async def scenario(link: Pool, connector: FakeConnector) -> None:
        for retriever in (first, second, third):
            await link.ask([QUESTION], SINK, trio.current_time())
            retriever.end()
        await trio.sleep(5)
        assert_delays(connector, [1, 2, 4, 1, 1, 1, 2])
        assert link.reconnects == 2

    with_link(scenario, [away, away, away, first, second, third])


def test_a_connection_that_never_answered_does_not_count() -> None:
    """As one that ends at once, whatever the reason: it is not tried again each second for ever."""
    connections = [FakeRetriever() for _ in range(5)]
    for each in connections:
        each.end()

    async def scenario(link: Pool, connector: FakeConnector) -> None:
        await trio.sleep(40)
        assert_delays(connector, [1, 2, 4, 8, 16])

    with_link(scenario, connections)


def test_who_asks_waits_as_long_as_its_patience_and_others_longer() -> None:
    async def scenario(link: Pool, connector: FakeConnector) -> None:
        start = trio.current_time()
        with pytest.raises(SourceError, match="after 60 seconds without an answer: nobody is there"):
            await link.ask([QUESTION], SINK, start)
        assert trio.current_time() - start == pytest.approx(60)
        with pytest.raises(SourceError, match="60 seconds"):  # wanted for as long already
            await link.ask([QUESTION], SINK, start)
        assert trio.current_time() - start == pytest.approx(60)
        with pytest.raises(SourceError, match="60 seconds"):
            await link.ask([QUESTION], SINK, trio.current_time())
        assert trio.current_time() - start == pytest.approx(120)

    with_link(scenario)


def test_the_last_look_at_the_source_waits_for_a_connection_that_answers() -> None:
    """A copy is not called complete because nobody was there to say that the source is another."""
    silent, later = FakeRetriever(), FakeRetriever()

    async def scenario(link: Pool, connector: FakeConnector) -> None:
        async def check(retriever: FakeRetriever) -> None:
            if retriever is silent:
                raise SourceError("it gave no answer")

        connector.check = check  # type: ignore[attr-defined]
        await link.check()
        assert (silent.ended.is_set(), later.ended.is_set()) == (True, False)
        later.end()
        with pytest.raises(SourceChangedError, match="another one"):
            await link.check()

    away = SourceError("nobody is there")
    with_link(scenario, [away, silent, away, later, away, SourceChangedError("another one")])


def test_patience_is_counted_from_the_last_answer() -> None:
    first = FakeRetriever()

    async def scenario(link: Pool, connector: FakeConnector) -> None:
        await link.ask([QUESTION], SINK, 0)
        start = trio.current_time()
        first.end()
        with pytest.raises(SourceError, match="60 seconds"):
            await link.ask([QUESTION], SINK, start - 1000)
        assert trio.current_time() - start == pytest.approx(60)

    with_link(scenario, [first])


class TricklingRetriever(FakeRetriever):
    """A connection that is given up 20 seconds after it was asked."""

    async def ask(self, questions: Sequence[Any], sink: object) -> Delta:
        await trio.sleep(20)
        self.end()
        raise SourceError("it broke")


def test_connections_without_an_answer_do_not_prolong_a_patience() -> None:
    """One of the two links is always up."""

    async def scenario(link: Pool, connector: FakeConnector) -> None:
        async with trio.open_nursery() as nursery:
            link.fallback = Pool(connector, nursery, give_up_after=math.inf)  # type: ignore[arg-type]
            nursery.start_soon(link.fallback.run)
            start = trio.current_time()
            with pytest.raises(SourceError, match="60 seconds without an answer: it broke"):
                await link.ask([QUESTION], SINK, start)
            assert 60 <= trio.current_time() - start <= 60 + 2 * 20
            await link.fallback.close()

    with_link(scenario, [TricklingRetriever() for _ in range(100)])


def test_what_was_in_flight_is_asked_of_the_next_connection() -> None:
    broken, good = FakeRetriever(), FakeRetriever()
    broken.end()

    async def scenario(link: Pool, connector: FakeConnector) -> None:
        assert await link.ask([QUESTION, QUESTION], SINK, trio.current_time()) == NOTHING_DIFFERS
        assert good.answered_at is not None
        assert link.reconnects == 1

    with_link(scenario, [broken, good])


class MortalRetriever(FakeRetriever):
    """A connection that ends at a block whose position is odd, whatever else it is asked in one."""

    async def ask(self, questions: Sequence[Any], sink: object) -> Delta:
        await trio.lowlevel.checkpoint()
        if self.failure is None and any(extent.offset % 2 for each in questions for extent, _ in each.blocks()):
            self.unanswered = questions
            self.end()
        if self.failure is not None:
            raise self.failure
        return Delta([Extent(each.position, each.length) for each in questions], [], [])


def test_what_ends_connection_after_connection_is_found_out_block_by_block() -> None:
    async def scenario(link: Pool, connector: FakeConnector) -> None:
        answer = await link.ask([Signatures(0, 3, 1, b"abc")], SINK, 0)
        assert sorted(answer.data) == [Extent(0, 1), Extent(2, 1)]
        assert answer.unreadable == [UnreadableBlock(Extent(1, 1), "it broke")]
        assert len(connector.attempts) <= 6
        assert max(connector.waits()) <= 1  # an end that tells something is as good as an answer

    with_link(scenario, [MortalRetriever() for _ in range(20)])


@pytest.mark.long
def test_a_source_that_ends_at_everything_is_given_up() -> None:
    async def scenario(link: Pool, connector: FakeConnector) -> None:
        with pytest.raises(SourceError, match="ended at more than 64 blocks"):
            await link.ask([Signatures(0, 140, 1, bytes(140))], SINK, trio.current_time())

    with_link(scenario, [MortalRetriever() for _ in range(1000)], patience=10_000)


def test_another_source_is_the_end_of_the_link() -> None:
    async def scenario(link: Pool, connector: FakeConnector) -> None:
        with pytest.raises(SourceChangedError, match="source changed"):
            await link.ask([QUESTION], SINK, trio.current_time())
        await trio.sleep(100)
        assert len(connector.attempts) == 2
        with pytest.raises(SourceChangedError, match="source changed"):
            await link.ask([QUESTION], SINK, trio.current_time())

    with_link(scenario, [SourceError("nobody is there"), SourceChangedError("source changed: it is another")])


def test_a_link_that_is_closed_lets_everybody_go() -> None:
    async def scenario(link: Pool, connector: FakeConnector) -> None:
        async with trio.open_nursery() as nursery:

            async def wait_in_vain() -> None:
                with pytest.raises(SourceError, match="is closed"):
                    await link.ask([QUESTION], SINK, trio.current_time())

            nursery.start_soon(wait_in_vain)
            await trio.sleep(5)
            await link.close()
        before = len(connector.attempts)
        await link.close()
        await trio.sleep(100)
        assert len(connector.attempts) == before

    with_link(scenario)


@pytest.mark.parametrize("plan", [[], [FakeRetriever()]], ids=["down", "up"])
def test_a_link_whose_tasks_were_cancelled_can_be_closed(plan: list[Any]) -> None:
    """As it comes when a signal, or a fault elsewhere, ends the nursery that the link is in."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            link = Pool(FakeConnector(plan), nursery, give_up_after=60)  # type: ignore[arg-type]
            nursery.start_soon(link.run)
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        with trio.fail_after(10):
            await link.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
