"""Blocks that one of the ends cannot read: all else is copied, what is missing is told, and asked for again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
import trio
from support import BLOCK_SIZE, FAULTY, PYTHON, QUEUEING, STANDINS, Mount, failed, noise, run, written

from blockcopy.block.device import open_source
from blockcopy.block.geometry import Extent, Geometry, join_extents
from blockcopy.block.identity import differences, sample_extents, source_identity
from blockcopy.block.unreadable_ranges import MAX_RANGES, UnreadableRanges
from blockcopy.errors import SourceReadError
from blockcopy.replica.engine import open_replica
from blockcopy.replica.plan import Plan
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.transport import backoff
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location

LINK = f"{PYTHON} {STANDINS / 'link'}"
"""In place of ssh."""

BLOCKS = 40
DATA = noise(BLOCKS * BLOCK_SIZE)
BAD = (7, 21)
"""Blocks with a bad sector; not in the first page of the block, which is looked at by itself."""
RANGES = ", ".join(f"{block * BLOCK_SIZE}:{BLOCK_SIZE}" for block in BAD)
COPY = b"".join(
    bytes(BLOCK_SIZE) if block in BAD else DATA[block * BLOCK_SIZE :][:BLOCK_SIZE] for block in range(BLOCKS)
)
"""What a destination of zeros becomes."""


@pytest.fixture
def bad_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a source with bad sectors."""
    with disk_of(tmp_path, *(block * BLOCK_SIZE + 50_000 for block in BAD)) as disk:
        yield disk


@contextlib.contextmanager
def disk_of(tmp_path: Path, *bad: int) -> Iterator[Path]:
    """DATA, with bad sectors at these positions."""
    support.require_fuse()
    backing, point = written(tmp_path / "backing", DATA), tmp_path / "point"
    point.mkdir()
    offsets = [word for position in bad for word in ("--eio-at", str(position))]
    command = [PYTHON, str(STANDINS / "faulty_disk"), *offsets, str(backing), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield point / "disk"
        finally:
            process.terminate()


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    path = written(tmp_path / "destination", b"")
    os.truncate(path, len(DATA))
    return path


def told(done: subprocess.CompletedProcess[bytes], status: int) -> str:
    """Check status and last line, which names the ranges. Returns the standard error."""
    words = done.stderr.decode()
    failed(done, status)
    last = words.splitlines()[-1]
    assert f"cannot read {len(BAD) * BLOCK_SIZE} bytes ({RANGES})" in last
    return words


def test_a_sync_copies_all_else_and_asks_only_for_these_the_next_time(bad_disk: Path, destination: Path) -> None:
    told(run("sync", bad_disk, destination), 3)
    assert destination.read_bytes() == COPY
    again = run("sync", "--progress=json", bad_disk, destination)
    told(again, 3)
    lines = [json.loads(line) for line in again.stderr.splitlines() if line.startswith(b"{")]
    assert lines[-1]["resumed_bytes"] == len(DATA) - len(BAD) * BLOCK_SIZE
    assert (lines[-1]["state"], lines[-1]["fetched_bytes"], lines[-1]["same_bytes"]) == ("failed", 0, 0)


def test_a_guard_that_cannot_compare_says_why(tmp_path: Path) -> None:
    support.require(shutil.which("mkfs.ext4") is not None, "mkfs.ext4 is not installed")
    destination = written(tmp_path / "destination", bytes(len(DATA)))
    support.output("mkfs.ext4", "-q", "-F", destination)
    with disk_of(tmp_path, 50_000) as disk:
        failed(run("sync", disk, destination), 1, b"as far as it can be read: its beginning cannot")


@pytest.mark.long
@pytest.mark.parametrize(
    "program", [QUEUEING, f"{FAULTY} --exit-for {BAD[0] * BLOCK_SIZE}"], ids=["original", "ours"]
)
def test_a_program_that_ends_at_a_bad_block_is_started_again_for_all_else(
    program: str, bad_disk: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the original does, and older ones of ours did."""
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    source, bad = (bad_disk, BAD) if program == QUEUEING else (written(tmp_path / "source", DATA), BAD[:1])

    async def main() -> None:
        plan = Plan(stage_command(Location(None, str(source)), program=program), str(destination), demand=False)
        with trio.fail_after(30):
            async with open_replica(plan) as replica:
                with pytest.raises(SourceReadError, match=r"ended with exit status 1|cannot read"):
                    await replica.wait_complete()
                ranges = replica.status().unreadable_ranges
                assert ranges == tuple(Extent(block * BLOCK_SIZE, BLOCK_SIZE) for block in bad)

    trio.run(main)
    for block in range(BLOCKS):
        here = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        assert destination.read_bytes()[here] == (bytes(BLOCK_SIZE) if block in bad else DATA[here])


@pytest.mark.long
def test_the_original_may_end_at_the_sample(
    destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    position = sample_extents(len(DATA))[11].offset
    block = position // BLOCK_SIZE

    async def main(source: Path) -> None:
        plan = Plan(stage_command(Location(None, str(source)), program=QUEUEING), str(destination), demand=False)
        with trio.fail_after(30):
            async with open_replica(plan) as replica:
                with pytest.raises(SourceReadError):
                    await replica.wait_complete()
                assert replica.status().unreadable_ranges == (Extent(block * BLOCK_SIZE, BLOCK_SIZE),)

    with disk_of(tmp_path, position) as disk:
        trio.run(main, disk)
    assert len(DATA) - destination.read_bytes().count(b"\0") > (BLOCKS - 2) * BLOCK_SIZE * 0.99


@pytest.mark.long
@pytest.mark.parametrize("block", [0, BLOCKS - 1], ids=["first", "last"])
@pytest.mark.parametrize("is_size_known", [True, False])
def test_the_original_may_end_at_the_search_for_the_size(
    block: int, is_size_known: bool, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    if not is_size_known:
        destination.unlink()

    async def main(source: Path) -> None:
        plan = Plan(stage_command(Location(None, str(source)), program=QUEUEING), str(destination), demand=False)
        with trio.fail_after(50):
            async with open_replica(plan) as replica:
                with pytest.raises(SourceReadError, match="ended with exit status 1"):
                    await replica.wait_complete()
                assert replica.status().unreadable_ranges == (Extent(block * BLOCK_SIZE, BLOCK_SIZE),)

    with disk_of(tmp_path, block and len(DATA) - 1) as disk:
        trio.run(main, disk)
    copy = bytearray(DATA)
    copy[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = bytes(BLOCK_SIZE)
    assert destination.read_bytes() == copy


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("options", [[], ["--digest", "sha256"]], ids=["original", "extended"])
def test_the_stages_copy_all_else(options: list[str], empty: bool, bad_disk: Path, destination: Path) -> None:
    """Nobody takes it for the whole: the stream has no `done`."""
    if empty:
        os.truncate(destination, 0)
    asked = run("checksum", *options, destination)
    answers = run("retrieve", bad_disk, input=asked.stdout)
    words = answers.stderr.decode()
    failed(answers, 1)
    assert len(words.splitlines()) == 1
    assert f"{len(BAD) * BLOCK_SIZE} bytes ({RANGES}): cannot read" in words
    saved = run("save", destination, input=answers.stdout)
    failed(saved, 1, b"without `done`")
    assert destination.read_bytes() == COPY


def test_a_push_copies_all_else(bad_disk: Path, destination: Path) -> None:
    told(run("sync", "-e", LINK, bad_disk, f"host:{destination}"), 3)
    assert destination.read_bytes() == COPY


@pytest.mark.parametrize("host", ["", "host:"])
def test_the_last_block_is_told_as_long_as_it_is(host: str, tmp_path: Path) -> None:
    size = len(DATA) - 1000
    with disk_of(tmp_path, size - 1) as disk:
        os.truncate(tmp_path / "backing", size)
        done = run("sync", "-e", LINK, "--python", PYTHON, disk, f"{host}{tmp_path / 'destination'}")
    tail = BLOCK_SIZE - 1000
    failed(done, 3, f"{tail} bytes ({size - tail}:{tail})")


def test_verify_compares_all_else(bad_disk: Path, tmp_path: Path) -> None:
    copy = written(tmp_path / "copy", DATA)
    assert "All else is equal" in told(run("verify", bad_disk, copy), 3)
    assert "All else is equal" in told(run("verify", copy, bad_disk), 1)
    written(copy, support.with_changes(DATA, [3, 7]))
    done = run("verify", bad_disk, copy)
    told(done, 5)
    assert done.stdout.decode() == f"{3 * BLOCK_SIZE}:{BLOCK_SIZE}\n"


def read(mounted: Mount, block: int) -> bytes | None:
    """Return the first 4096 bytes of `block`. Returns None for EIO."""
    fd = os.open(mounted.file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, 4096, block * BLOCK_SIZE)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
    finally:
        os.close(fd)


def test_a_mount_serves_all_else(mount: Callable[..., Mount], bad_disk: Path, destination: Path) -> None:
    mounted = mount(bad_disk, destination)
    for block in (*BAD, *range(BLOCKS)):
        assert read(mounted, block) == (None if block in BAD else DATA[block * BLOCK_SIZE :][:4096])
    failed(run("wait", mounted.point), 75)
    status = mounted.status()
    assert (status["state"], status["unreadable_bytes"]) == ("failed", len(BAD) * BLOCK_SIZE)
    assert status["unreadable_ranges"] == [[block * BLOCK_SIZE, BLOCK_SIZE] for block in BAD]
    assert RANGES in status["error"]
    assert status["link"]["reconnects"] == 0
    failed(run("umount", mounted.point), 75)
    assert destination.read_bytes() == COPY


def test_a_disk_that_is_bad_all_over_ends_soon_and_with_few_words(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    """Return a loop device whose backing file was truncated."""
    backing = written(tmp_path / "backing", DATA)
    device = loop_device(backing, "--direct-io=on")
    os.truncate(backing, 0)
    done = run("sync", device, tmp_path / "destination")
    failed(done, 3)
    assert f"cannot read {len(DATA)} bytes (0:{len(DATA)})" in done.stderr.decode().splitlines()[-1]
    assert len(done.stderr.splitlines()) < 25


def test_a_source_that_is_always_shorter_than_it_says_is_given_up(tmp_path: Path) -> None:
    """As files of sysfs are: of 4096 bytes, it says."""
    source = Path("/sys/kernel/uevent_seqnum")
    assert source.stat().st_size > len(source.read_bytes())
    done = run("sync", source, tmp_path / "destination")
    failed(done, 3, b"it is shorter than it was")


# What is known of them


def test_ranges_are_bounded_and_joined() -> None:
    found = UnreadableRanges()
    for offset in (40, 0, 20, 10, 10):
        found.add(Extent(offset, 10), f"at {offset}")
    assert (found.bytes, found.ranges) == (40, [Extent(0, 30), Extent(40, 10)])
    assert str(found) == "40 bytes (0:30, 40:10): at 40"
    for offset in range(100, 10_000, 20):
        found.add(Extent(offset, 10), "")
    assert (len(found.ranges), found.more, found.bytes) == (MAX_RANGES, True, 40 + 495 * 10)
    assert " and more): at 40" in str(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_pass_wants_what_is_missing_and_was_not_set_aside(seed: int) -> None:
    chance = random.Random(seed)
    geometry = Geometry(chance.randint(1, 300) * 4096 - 5, 4096)
    blockmap, every = BlockMap(geometry), range(geometry.block_count)
    present, aside = set[int](), set[int]()
    for _ in range(60):
        start = chance.choice(every)
        blocks = range(start, min(start + chance.choice([1, 1, 1, 20]), geometry.block_count))
        if chance.random() < 0.5:
            blockmap.mark(blocks, "fetched")
            present |= set(blocks)
        else:
            blockmap.mark_unreadable(blocks)
            aside |= set(blocks)
        assert list(blockmap.fetchable(every)) == sorted(set(every) - present - aside)
        left = [geometry.extent(block) for block in sorted(aside - present)]
        found = blockmap.unreadable_ranges("bad")
        assert found.bytes == sum(extent.length for extent in left)
        assert (found.ranges, found.more) == (join_extents(left)[:MAX_RANGES], len(join_extents(left)) > MAX_RANGES)
    blockmap.clear()
    assert (list(blockmap.fetchable(every)), blockmap.unreadable_ranges().bytes) == (list(every), 0)


def test_a_bad_sector_of_the_sample_that_comes_or_goes_is_no_change(tmp_path: Path) -> None:
    with open_source(str(written(tmp_path / "source", DATA))) as device:
        found = source_identity(device)
    known = {**found, "sample": ["unreadable", *found["sample"][1:]]}
    assert differences(known, found) == differences(found, known) == []
    changed = {**known, "sample": [*known["sample"][:-1], "0" * 64]}
    assert differences(known, changed) == ["its bytes differ"]
