"""A writable mount where something goes wrong: at its destination, at its state file, to itself.

What holds in every case: an acknowledged flush is not lost, and nothing of the source replaces what a user wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import (
    BLOCK_SIZE,
    PYTHON,
    STANDINS,
    Mount,
    errno_of,
    failed,
    killed,
    noise,
    output,
    run,
    until,
    with_changes,
    written,
)

Mounter = Callable[..., Mount]

BLOCKS = 24
DATA = noise(BLOCKS * BLOCK_SIZE)
OLD = with_changes(DATA, list(range(BLOCKS)))
"""Differs from DATA in every block."""

PAGE = 4096


@contextlib.contextmanager
def opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDWR)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):  # its mount is gone
            os.close(fd)


def at(block: int) -> int:
    return block * BLOCK_SIZE


DIRTY = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(fd, 0)
for offset in sys.argv[2:]:
    mapped[int(offset) : int(offset) + 5] = b"dirty"
print("dirty", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def dirtied(file: Path, *offsets: int) -> Iterator[None]:
    """Change 5 bytes at each of `offsets` of `file` through a mapping. It stays inside the `with` block."""
    command = [PYTHON, "-c", DIRTY, str(file), *map(str, offsets)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"dirty\n"
        try:
            yield
        finally:
            process.kill()


# A disk whose syncs fail


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Return the path of a destination with the bytes OLD, and a path: while that exists, each sync fails."""
    support.require_fuse()
    backing, fault, point = written(tmp_path / "backing", OLD), tmp_path / "fault", tmp_path / "faulty"
    point.mkdir()
    command = [sys.executable, STANDINS / "faulty_disk", "--eio-fsync-while", fault, backing, point]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield point / "disk", fault
        fault.unlink(missing_ok=True)
        process.terminate()


def test_what_a_failed_sync_lost_is_an_error_until_it_is_written_anew(
    mount: Mounter, source: Path, failing: tuple[Path, Path]
) -> None:
    """Also in the kernel's cache, and while a program has unwritten changes in mapped pages."""
    destination, fault = failing
    mounted = mount(source, destination, "--writable", "--no-background")
    with opened(mounted.file) as fd:
        os.pwrite(fd, b"s" * PAGE, at(1))
        os.fsync(fd)
        fault.touch()
        lost = noise(2 * PAGE, seed=4)
        os.pwrite(fd, lost, at(3) + PAGE)
        with dirtied(mounted.file, at(5), at(7)):
            assert errno_of(lambda: os.fsync(fd)) in (errno.EIO, errno.EROFS)  # EROFS: of the mapped pages
            for offset in (at(3) + PAGE, at(3) + 2 * PAGE):
                until(lambda offset=offset: errno_of(lambda: os.pread(fd, PAGE, offset)) == errno.EIO)  # type: ignore[misc]
            assert errno_of(lambda: os.pwrite(fd, b"w" * PAGE, at(9))) == errno.EROFS
            assert errno_of(lambda: os.fsync(fd)) == errno.EIO
            told = mounted.status()
            assert told["state"] == "failed"
            assert "sync" in told["error"]
            assert os.pread(fd, PAGE, at(1)) == b"s" * PAGE
            assert os.pread(fd, PAGE, at(3)) == DATA[at(3) :][:PAGE]
            assert os.pread(fd, BLOCK_SIZE, at(10)) == DATA[at(10) : at(11)]
    fault.unlink()
    mounted.umount()

    again = mount(source, destination, "--writable", "--no-background")
    assert again.status()["lost_bytes"] == told["lost_bytes"] >= 2 * PAGE
    with opened(again.file) as fd:
        assert errno_of(lambda: os.pread(fd, PAGE, at(3) + PAGE)) == errno.EIO
        assert errno_of(lambda: os.pwrite(fd, b"part", at(3) + PAGE)) == errno.EIO
        assert os.pwrite(fd, b"n" * PAGE, at(3) + PAGE) == PAGE
        os.fsync(fd)
        assert os.pread(fd, PAGE, at(3) + PAGE) == b"n" * PAGE
        assert errno_of(lambda: os.pread(fd, PAGE, at(3) + 2 * PAGE)) == errno.EIO
        assert os.pread(fd, PAGE, at(1)) == b"s" * PAGE
        for offset in (
            at(5),
            at(7),
        ):  # changed in memory only: the source's, an error, or the user's if it was written
            with contextlib.suppress(OSError):
                assert os.pread(fd, PAGE, offset)[5:] == DATA[offset + 5 : offset + PAGE]
    killed(again)

    last = mount(source, destination, "--writable", wait=True)
    assert last.status()["lost_bytes"] == told["lost_bytes"] - PAGE
    with opened(last.file) as fd:
        assert os.pread(fd, PAGE, at(3) + PAGE) == b"n" * PAGE
        assert errno_of(lambda: os.pread(fd, PAGE, at(3) + 2 * PAGE)) == errno.EIO
    last.umount()


def test_a_kill_ends_the_mount_while_lost_bytes_are_dropped(
    mount: Mounter, tmp_path: Path, failing: tuple[Path, Path]
) -> None:
    """The kernel drops its cache then, and waits for a read, which waits for the source."""
    destination, fault = failing
    source = written(tmp_path / "large", b"")
    os.truncate(source, 128 << 20)
    mounted = mount(source, destination, "--writable", "--no-background")
    pid, sources = mounted.status()["pid"], mounted.retrievers()
    with opened(mounted.file) as fd:
        os.pwrite(fd, b"s" * PAGE, 0)  # the first write is noted durably
        for each in sources:
            os.kill(each, signal.SIGSTOP)
        read = [PYTHON, "-c", "import os, sys; os.pread(os.open(sys.argv[1], 0), 100, 100 << 20)", mounted.file]
        try:
            with subprocess.Popen(read, stderr=subprocess.DEVNULL):
                until(lambda: mounted.status()["demand"]["waiting"])
                fault.touch()
                os.pwrite(fd, b"w" * PAGE, 0)
                until(lambda: mounted.status()["lost_bytes"])
                os.kill(pid, signal.SIGKILL)
                until(lambda: not support.alive(pid))
        finally:
            for each in sources:
                os.kill(each, signal.SIGKILL)


# Full disks


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the file system of `folder` inside the `with` block."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, PAGE, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    yield
    filler.unlink()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with an ext4 of 16 MiB."""
    support.require_root()
    image, point = written(tmp_path / "image", b""), tmp_path / "small"
    os.truncate(image, 16 << 20)
    device = output("losetup", "--find", "--show", image).strip()
    try:
        with support.mounted(device, point):
            yield point
    finally:
        output("losetup", "--detach", device)


def test_a_full_destination_is_no_space_and_costs_the_source_nothing(
    mount: Mounter, source: Path, small: Path
) -> None:
    destination = written(small / "copy", b"")
    os.truncate(destination, len(DATA))
    mounted = mount(source, destination, "--writable", "--no-background")
    expected = bytearray(DATA)
    with opened(mounted.file) as fd:
        assert os.pwrite(fd, b"a" * PAGE, 0) == PAGE
        expected[:PAGE] = b"a" * PAGE
        with full(small):
            assert errno_of(lambda: os.pwrite(fd, b"b" * BLOCK_SIZE, at(2))) == errno.ENOSPC
            assert errno_of(lambda: os.pwrite(fd, b"c" * PAGE, at(4) + PAGE)) == errno.ENOSPC
            assert os.pwrite(fd, b"d" * PAGE, 0) == PAGE
            expected[:PAGE] = b"d" * PAGE
            os.fsync(fd)
        assert os.pread(fd, BLOCK_SIZE, at(2)) == DATA[at(2) : at(3)]
        assert os.pread(fd, BLOCK_SIZE, at(4)) == DATA[at(4) : at(5)]
        assert os.pwrite(fd, b"e" * PAGE, at(4) + PAGE) == PAGE
        expected[at(4) + PAGE : at(4) + 2 * PAGE] = b"e" * PAGE
    mounted.umount()
    mounted = mount(source, destination, "--writable", wait=True)
    assert mounted.file.read_bytes() == expected
    mounted.umount()
    assert destination.read_bytes() == expected


def test_a_full_disk_of_the_state_file_fails_the_sync_and_loses_nothing(
    mount: Mounter, source: Path, destination: Path, small: Path
) -> None:
    state = small / "state"
    mounted = mount(source, destination, "--writable", "--no-background", "--state", state)
    expected = bytearray(DATA)

    def write_and_sync(block: int) -> int | None:
        expected[at(block) : at(block) + PAGE] = b"%04d" % block * (PAGE // 4)
        assert os.pwrite(fd, expected[at(block) : at(block) + PAGE], at(block)) == PAGE
        return errno_of(lambda: os.fsync(fd))

    with opened(mounted.file) as fd:
        assert write_and_sync(0) is None
        with full(small):
            results = [write_and_sync(block) for block in range(1, 8)]
            assert errno.EIO in results
            assert set(results[results.index(errno.EIO) :]) == {errno.EIO}
            assert all(os.pread(fd, PAGE, at(block)) == expected[at(block) :][:PAGE] for block in range(8))
            assert mounted.status()["state"] != "failed"
        os.fsync(fd)
    killed(mounted)
    mounted = mount(source, destination, "--writable", "--state", state, wait=True)
    assert mounted.file.read_bytes() == expected
    mounted.umount()


@pytest.mark.parametrize("option", [False, True])
def test_no_mount_without_a_place_for_its_state(
    source: Path, destination: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: bool
) -> None:
    """The folder is one in which others can create files. Or only the note of the writes would lie there."""
    folder = tmp_path / "of others"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("STATE_DIRECTORY", str(folder))
    options = ["--state", tmp_path / "state"] if option else []
    point = tmp_path / "point"
    point.mkdir()
    failed(run("mount", "--writable", *options, source, destination, point), 1, "cannot note in")
    assert destination.read_bytes() == OLD


# Kills and signals


def test_what_was_acknowledged_survives_kills(mount: Mounter, source: Path, destination: Path) -> None:
    """Two kills while a thread writes and syncs. What was not acknowledged is old or new, and stays so."""
    choice, old, maybe = random.Random(8), bytearray(DATA), dict[int, bytes]()
    flushes = 0

    def keep_writing(fd: int) -> None:
        nonlocal flushes
        with contextlib.suppress(OSError):
            while True:
                # Each page once: of two writes to a page, a kill may leave the first one.
                for page in choice.sample(range(len(DATA) // PAGE), choice.randrange(1, 6)):
                    maybe[page] = choice.randbytes(PAGE)
                    os.pwrite(fd, maybe[page], page * PAGE)
                os.fsync(fd)
                flushes += 1
                for page, new in maybe.items():
                    old[page * PAGE : (page + 1) * PAGE] = new
                maybe.clear()

    for _ in range(2):
        mounted = mount(source, destination, "--writable", "--limit", "2M")
        before = flushes
        with opened(mounted.file) as fd:
            thread = threading.Thread(target=keep_writing, args=(fd,))
            thread.start()
            until(lambda before=before: flushes > before + 2)  # type: ignore[misc]
            until(lambda mounted=mounted: mounted.status()["hydrated_bytes"] > 0)  # type: ignore[misc]
            pid = mounted.status()["pid"]
            os.kill(pid, signal.SIGKILL)
            thread.join()
        mounted.clear()
        mounted = mount(source, destination, "--writable", "--no-background")
        found = mounted.file.read_bytes()
        for page, new in maybe.items():
            span = slice(page * PAGE, (page + 1) * PAGE)
            assert found[span] in (old[span], new)
            old[span] = found[span]
        maybe.clear()
        assert found == old
        mounted.umount()
    mounted = mount(source, destination, "--writable", wait=True)
    assert mounted.file.read_bytes() == old
    mounted.umount()
    assert destination.read_bytes() == old


def test_a_signal_does_not_lose_what_programs_have_mapped(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--writable", "--no-background")
    pid = mounted.status()["pid"]
    with dirtied(mounted.file, at(2) + 10, at(20)):
        os.kill(pid, signal.SIGTERM)
        until(lambda: not support.alive(pid))
    assert destination.read_bytes()[at(2) + 10 :][:5] == destination.read_bytes()[at(20) :][:5] == b"dirty"
    mounted = mount(source, destination, "--writable", wait=True)
    expected = bytearray(DATA)
    expected[at(2) + 10 : at(2) + 15] = expected[at(20) : at(20) + 5] = b"dirty"
    assert mounted.file.read_bytes() == expected
    mounted.umount()
