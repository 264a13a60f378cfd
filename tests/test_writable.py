"""`blockcopy mount --writable`: the file, the status, writes of every kind, also while the source does not answer.

What users put on it is in test_writable_systems, and what goes wrong in test_writable_faults.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import re
import signal
import stat
import subprocess
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
    succeeded,
    until,
    with_changes,
    written,
)

Mounter = Callable[..., Mount]
LoopDevice = Callable[..., str]

BLOCKS = 40
SIZE = BLOCKS * BLOCK_SIZE
DATA = noise(SIZE)
OLD = with_changes(DATA, list(range(BLOCKS)))
"""Differs from DATA in every block."""

PAGE = 4096
NOBODY = 65534
MIB = 1 << 20


@contextlib.contextmanager
def opened(file: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(file, os.O_RDWR | flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def frozen(mounted: Mount) -> Iterator[None]:
    """Stop the source's processes inside the `with` block."""
    stopped = mounted.retrievers()
    assert stopped
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# The file


@pytest.mark.parametrize("options", [["--writable"], ["-o", "rw"]])
@pytest.mark.parametrize("size", [SIZE, 12345])
def test_the_file_is_the_owners_and_as_large_as_the_source(
    mount: Mounter, tmp_path: Path, options: list[str], size: int
) -> None:
    """Also if the destination is longer."""
    source, destination = written(tmp_path / "source", DATA[:size]), written(tmp_path / "copy", OLD + b"tail")
    mounted = mount(source, destination, *options)
    file = mounted.file
    assert mounted.status()["writable"]
    assert (file.stat().st_mode, file.stat().st_size) == (stat.S_IFREG | 0o600, size)
    with opened(file) as fd:
        assert os.pwrite(fd, b"new", 5) == 3
        assert os.lseek(fd, 0, os.SEEK_END) == size
    assert file.stat().st_size == size
    assert file.read_bytes() == DATA[:5] + b"new" + DATA[8:size]
    assert source.read_bytes() == DATA[:size]


def test_a_file_as_mountpoint(mount: Mounter, source: Path, destination: Path, tmp_path: Path) -> None:
    point = written(tmp_path / "disk", b"")
    done = run("mount", "--writable", source, destination, point)
    succeeded(done)
    try:
        with opened(point) as fd:
            assert os.pwrite(fd, b"new", SIZE - 2) == 2
            os.fsync(fd)
        assert point.stat().st_size == SIZE
        assert point.read_bytes() == DATA[:-2] + b"ne"
    finally:
        assert run("umount", point).returncode in (0, 75)
    assert destination.read_bytes()[-2:] == b"ne"


def test_other_users_may_read_and_not_write(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    support.require_root()
    mounted = mount(source, destination, "--writable", "-o", "allow_other")
    assert stat.S_IMODE(mounted.file.stat().st_mode) == 0o644
    tmp_path.chmod(0o755)
    script = 'cat "$0" >/dev/null && exec 3<>"$0"'
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*nobody, "sh", "-c", script, str(mounted.file.relative_to(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=20, check=False)
    failed(done, 2, "Permission denied")


@pytest.mark.parametrize("options", [["-o", "ro"], ["--no-state"]])
def test_options_that_contradict_writes(
    source: Path, destination: Path, tmp_path: Path, options: list[str]
) -> None:
    failed(run("mount", "--writable", *options, source, destination, tmp_path), 2, "writable")


def test_every_status_says_what_was_written(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics"
    mounted = mount(source, destination, "--writable", "--no-background", "--metrics", metrics)
    with opened(mounted.file) as fd:
        os.pwrite(fd, bytes(PAGE), 3 * BLOCK_SIZE)
        os.pwrite(fd, bytes(2 * BLOCK_SIZE), 7 * BLOCK_SIZE)
    told = 3 * BLOCK_SIZE
    shown = json.loads(run("status", "--json", mounted.point).stdout)
    assert (shown["written_bytes"], shown["lost_bytes"], shown["source_needed"]) == (told, 0, True)
    assert shown["hydrated_bytes"] == 2 * BLOCK_SIZE
    assert b"384.0 KiB written by the user; the source is still needed" in run("status", mounted.point).stdout
    screen = output("script", "-qec", f"{PYTHON} -P -m blockcopy status {mounted.point}", "/dev/null")
    assert "written" in screen
    mounted.umount()  # writes the metrics once more
    assert re.search(rf"blockcopy_written_bytes{{.*}} {told}\n", metrics.read_text())


# Writes


@pytest.mark.parametrize("size", [SIZE, SIZE + 1000, SIZE + 5 * 512, 100])
def test_writes_of_any_offset_and_length_while_it_hydrates(mount: Mounter, tmp_path: Path, size: int) -> None:
    data, choice = noise(size), random.Random(size)
    source, destination = written(tmp_path / "source", data), written(tmp_path / "copy", bytes(size))
    mounted = mount(source, destination, "--writable", "--limit", "20M")
    expected = bytearray(data)
    with opened(mounted.file) as fd:
        for number in range(150):
            offset = choice.randrange(size)
            length = choice.choice([1, 512, PAGE, choice.randrange(1, 3 * BLOCK_SIZE)])
            if number % 3 == 0:  # whole pages
                offset -= offset % PAGE
            new = choice.randbytes(length)[: size - offset]
            assert os.pwrite(fd, new, offset) == len(new)
            expected[offset : offset + len(new)] = new
            at = choice.randrange(size)
            assert os.pread(fd, 10_000, at) == expected[at : at + 10_000]
            if number % 20 == 0:
                os.fsync(fd)
    mounted.wait()
    assert mounted.file.read_bytes() == expected
    mounted.umount()
    assert destination.read_bytes() == expected
    assert source.read_bytes() == data


@pytest.mark.parametrize("kind", ["O_SYNC", "O_DSYNC", "O_DIRECT", "fsync", "fdatasync", "msync"])
def test_what_is_acknowledged_as_durable_is_there_after_a_kill(
    mount: Mounter, source: Path, destination: Path, kind: str
) -> None:
    mounted = mount(source, destination, "--writable", "--no-background")
    buffer = mmap.mmap(-1, 2 * PAGE)  # aligned, as O_DIRECT wants it
    buffer.write(noise(2 * PAGE, seed=2))
    with opened(mounted.file, getattr(os, kind) if kind.startswith("O_") else 0) as fd:
        if kind == "msync":
            with mmap.mmap(fd, 0) as mapped:
                mapped[PAGE : 3 * PAGE] = buffer[:]
                mapped.flush()
        else:
            assert os.pwrite(fd, buffer, PAGE) == 2 * PAGE
            if kind in ("fsync", "fdatasync"):
                getattr(os, kind)(fd)
            elif kind == "O_DIRECT":
                os.fsync(fd)
    killed(mounted)
    mounted = mount(source, destination, "--writable", wait=True)
    assert mounted.file.read_bytes() == DATA[:PAGE] + buffer[:] + DATA[3 * PAGE :]


WRITER = """
import mmap, os, random, sys
file, number, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fd = os.open(file, os.O_RDWR)
mapped = mmap.mmap(fd, 0) if how == "mapped" else None
offsets = list(range(number * 1000, os.fstat(fd).st_size - 1000, 4000))
random.Random(number).shuffle(offsets)
for offset in offsets[:400]:
    data = b"%d" % number * 1000
    if mapped:
        mapped[offset : offset + 1000] = data
    else:
        assert os.pwrite(fd, data, offset) == 1000
    if offset % 64 == 0:
        os.fsync(fd)
    assert os.pread(fd, 1000, offset) == data
"""


@pytest.mark.parametrize("how", ["written", "mapped"])
def test_several_writers_whose_pages_overlap(mount: Mounter, source: Path, destination: Path, how: str) -> None:
    """Each writes 1000 of every 4000 bytes, so four of them share nearly each page."""
    mounted = mount(source, destination, "--writable", "--limit", "20M")
    writers = [subprocess.Popen([PYTHON, "-c", WRITER, mounted.file, str(each), how]) for each in range(4)]
    assert [writer.wait(timeout=50) for writer in writers] == [0, 0, 0, 0]
    expected = bytearray(DATA)
    for number in range(4):
        offsets = list(range(number * 1000, SIZE - 1000, 4000))
        random.Random(number).shuffle(offsets)
        for offset in offsets[:400]:
            expected[offset : offset + 1000] = b"%d" % number * 1000
    mounted.wait()
    assert mounted.file.read_bytes() == expected
    mounted.umount()
    assert destination.read_bytes() == expected


def test_the_size_is_fixed(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--writable")
    file = mounted.file
    with opened(file) as fd:
        assert os.pwrite(fd, b"12345", SIZE - 3) == 3
        actions: dict[str, tuple[Callable[[], object], int | None]] = {
            "write at the end": (lambda: os.pwrite(fd, b"1", SIZE), errno.ENOSPC),
            "write beyond the end": (lambda: os.pwrite(fd, b"1", SIZE + 1_000_000), errno.ENOSPC),
            "append": (lambda: appended(file), errno.ENOSPC),
            "ftruncate": (lambda: os.ftruncate(fd, SIZE - 1), errno.EINVAL),
            "truncate": (lambda: os.truncate(file, SIZE + 1), errno.EINVAL),
            "truncate to the same": (lambda: os.truncate(file, SIZE), None),
            "O_TRUNC": (lambda: os.close(os.open(file, os.O_WRONLY | os.O_TRUNC)), None),
            "touch": (lambda: os.utime(file), None),
            "touch with times": (lambda: os.utime(file, (1, 2)), None),
            "chmod": (lambda: file.chmod(0o644), errno.EPERM),
            "chown": (lambda: os.chown(file, NOBODY, -1), errno.EPERM),
            "fallocate": (lambda: os.posix_fallocate(fd, 0, SIZE + 1), errno.ENOSPC),
            "create": (lambda: os.open(mounted.point / "new", os.O_CREAT | os.O_WRONLY), errno.EPERM),
            "unlink": (lambda: file.unlink(), errno.EPERM),
            "mkdir": (lambda: (mounted.point / "new").mkdir(), errno.EPERM),
            "rmdir": (lambda: file.rmdir(), errno.ENOTDIR),
            "mkfifo": (lambda: os.mkfifo(mounted.point / "new"), errno.EPERM),
            "symlink": (lambda: (mounted.point / "new").symlink_to("disk"), errno.EPERM),
            "link": (lambda: (mounted.point / "new").hardlink_to(file), errno.EPERM),
            "rename": (lambda: file.rename(mounted.point / "new"), errno.EPERM),
            "write status": (lambda: os.open(mounted.point / "status.json", os.O_WRONLY), errno.EROFS),
        }
        assert {what: errno_of(action) for what, (action, _) in actions.items()} == {
            what: expected for what, (_, expected) in actions.items()
        }
        assert os.fstat(fd).st_size == file.stat().st_size == SIZE
    assert file.read_bytes() == DATA[:-3] + b"123"


def appended(file: Path) -> None:
    with opened(file, os.O_APPEND) as fd:
        os.write(fd, b"more")


# While the source does not answer


def test_whole_pages_never_wait_for_the_source(mount: Mounter, source: Path, destination: Path) -> None:
    """Nor their sync, nor reads of them. A part of a page waits, and is written once the source answers."""
    mounted = mount(source, destination, "--writable", "--no-background")
    new, start = noise(BLOCK_SIZE + 3 * PAGE, seed=3), 2 * BLOCK_SIZE - PAGE
    part = [PYTHON, "-c", "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'part', 5)", mounted.file]
    with opened(mounted.file, os.O_DIRECT) as direct, opened(mounted.file) as fd:
        with frozen(mounted):
            assert os.pwrite(fd, new, start) == len(new)
            assert os.pwrite(fd, new[:PAGE], 20 * BLOCK_SIZE) == PAGE
            assert os.pwrite(fd, b"within", 20 * BLOCK_SIZE + 100) == 6  # of a page that is the user's
            os.fsync(fd)
            buffer = mmap.mmap(-1, len(new))
            assert os.preadv(direct, [buffer], start) == len(new)
            assert buffer[:] == new
            waiting = subprocess.Popen(part)
            until(lambda: mounted.status()["demand"]["waiting"] == 1)
            assert waiting.poll() is None
            assert mounted.status()["hydrated_bytes"] == BLOCK_SIZE
            assert mounted.status()["written_bytes"] == 4 * BLOCK_SIZE
        assert waiting.wait(timeout=20) == 0
    expected = bytearray(DATA)
    for offset, data in [
        (start, new),
        (20 * BLOCK_SIZE, new[:PAGE]),
        (20 * BLOCK_SIZE + 100, b"within"),
        (5, b"part"),
    ]:
        expected[offset : offset + len(data)] = data
    assert mounted.file.read_bytes() == expected


def test_a_part_of_a_page_fails_if_the_source_stays_away(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    rsh = f"{PYTHON} {STANDINS / 'link'} --cut-while {cut}"
    options = ["-e", rsh, "--python", PYTHON, "--reconnect-timeout", "1", "--no-background"]
    mounted = mount(f"host:{source}", destination, "--writable", *options)
    cut.touch()
    until(lambda: mounted.status()["link"]["state"] == "reconnecting")
    with opened(mounted.file) as fd:
        assert errno_of(lambda: os.pwrite(fd, b"part", PAGE + 5)) == errno.EIO
        assert os.pwrite(fd, b"w" * PAGE, PAGE) == PAGE
        os.fsync(fd)
        assert os.pwrite(fd, b"part", PAGE + 5) == 4
        cut.unlink()
        until(lambda: mounted.status()["link"]["state"] == "connected")
        expected = DATA[:PAGE] + b"wwwwwpart" + b"w" * (PAGE - 9) + DATA[2 * PAGE :]
        assert mounted.file.read_bytes() == expected


def test_the_first_start_needs_the_source(mount: Mounter, source: Path, destination: Path, tmp_path: Path) -> None:
    """A copy may be older than the source, which only the source can tell. The user's own writes need nobody."""
    cut = tmp_path / "cut"
    rsh = f"{PYTHON} {STANDINS / 'link'} --cut-while {cut}"
    words = ("-e", rsh, "--python", PYTHON, f"host:{source}", destination)
    succeeded(run("sync", *words))
    cut.touch()
    (tmp_path / "mnt").mkdir(exist_ok=True)
    failed(run("mount", "--writable", *words, tmp_path / "mnt"), 3)
    cut.unlink()
    mounted = mount(f"host:{source}", destination, "--writable", "-e", rsh, "--python", PYTHON)
    with opened(mounted.file) as fd:
        os.pwrite(fd, b"w" * PAGE, PAGE)
    mounted.umount()
    cut.touch()
    again = mount(f"host:{source}", destination, "--writable", "-e", rsh, "--python", PYTHON)
    assert again.file.read_bytes()[PAGE : 2 * PAGE] == b"w" * PAGE
