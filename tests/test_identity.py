"""Identities of sources: every write after a greeting changes the identity, on each file system."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support

from blockcopy.block import syscalls
from blockcopy.block.device import open_source
from blockcopy.block.identity import (
    Identity,
    destination_identity,
    differences,
    sample_extents,
    shows_writes,
    source_identity,
)

SIZE = 1 << 20

FILE_SYSTEMS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext4 of whole seconds": ["mkfs.ext4", "-q", "-F", "-I", "128"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


@contextlib.contextmanager
def file_system(name: str, folder: Path) -> Iterator[Path]:
    """Create and mount a new file system. Skips the test if that is not possible here."""
    support.require_root()
    if shutil.which(FILE_SYSTEMS[name][0]) is None:
        pytest.skip(f"{FILE_SYSTEMS[name][0]} is not installed")
    image, point = folder / "image", folder / "point"
    image.touch()
    os.truncate(image, 320 << 20)
    support.output(*FILE_SYSTEMS[name], image)
    point.mkdir()
    support.output("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        support.output("umount", point)


@pytest.mark.parametrize("name", ["ext4", "xfs"])
@pytest.mark.parametrize("has_ioctl", [True, False])
def test_a_file_is_known_whatever_number_its_disk_has(
    name: str, has_ioctl: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as after a restart that found the disks in another order. Older kernels lack the general ioctl."""
    if not has_ioctl:
        monkeypatch.setattr(syscalls, "_UUID_QUERIES", syscalls._UUID_QUERIES[1:])
    with file_system(name, tmp_path) as point:
        support.written(point / "copy", bytes(SIZE))
        with open_source(str(point / "copy")) as device:
            known, number = destination_identity(device), device.status().st_dev
    other, again = support.written(tmp_path / "other", bytes(SIZE)), tmp_path / "again"
    again.mkdir()
    with contextlib.ExitStack() as held:
        for _ in range(20):  # other tests take and release numbers as well
            loop = support.output("losetup", "--find", "--show", other).strip()
            held.callback(support.output, "losetup", "--detach", loop)
            support.output("mount", "-o", "loop", tmp_path / "image", again)
            if (again / "copy").stat().st_dev != number:
                break
            support.output("umount", again)
        try:
            with open_source(str(again / "copy")) as device:
                assert device.status().st_dev != number
                assert destination_identity(device) == known
        finally:
            support.output("umount", again)


def identity(path: Path) -> Identity:
    with open_source(str(path)) as device:
        return source_identity(device)


@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_every_write_after_a_greeting_changes_the_identity(name: str, tmp_path: Path) -> None:
    """Such as a second write in the same tick, or a write through a mapping into a dirty page."""
    with file_system(name, tmp_path) as folder:
        source = support.written(folder / "source", bytes(SIZE))
        with source.open("r+b", buffering=0) as opened:
            opened.write(b"one")
            first = identity(source)
            opened.write(b"two")  # the same second
            second = identity(source)
            assert second["ctime_ns"] != first["ctime_ns"]
            if "seconds" in name:
                return  # each of these takes two of them
            with mmap.mmap(opened.fileno(), SIZE) as mapped:
                mapped[5000] = 1
                third = identity(source)
                mapped[5000] = 2
                fourth = identity(source)
            told = [each["ctime_ns"] for each in (second, third, fourth)]
            assert len(set(told)) == 3, told
        assert identity(source) == fourth  # of a source that stays as it is


def test_a_write_in_the_same_clock_tick_changes_the_identity(tmp_path: Path) -> None:
    """Before Linux 6.13, both times come from one coarse clock: the greeting waits until it has advanced."""
    source = support.written(tmp_path / "source", bytes(SIZE))
    found = identity(source)
    assert time.clock_gettime_ns(time.CLOCK_REALTIME) - found["ctime_ns"] >= 20_000_000


ONE = {"size": 0, "sample": [], "inode": 1, "mtime_ns": 2, "ctime_ns": 3}
OLDER = {"size": 0, "sample": [], "inode": 1, "mtime_ns": 2}
ORIGINAL = {"size": 0, "sample": []}
MOVED = {**ONE, "ctime_ns": 4}


@pytest.mark.parametrize(
    ("known", "found", "words"),
    [
        (ONE, ONE, []),
        (OLDER, OLDER, []),
        (ORIGINAL, ONE, []),
        (OLDER, ONE, ["ctime_ns was not reported before, is 3"]),
        (ONE, OLDER, ["ctime_ns is no longer reported"]),
        (
            ONE,
            MOVED,
            [
                "ctime_ns was 3, is 4",
                "its mtime was put back after a write, or its name, links, owner or mode changed",
            ],
        ),
        (ONE, {**MOVED, "mtime_ns": 5}, ["ctime_ns was 3, is 4", "mtime_ns was 2, is 5"]),
    ],
)
def test_differences_are_named(known: Identity, found: Identity, words: list[str]) -> None:
    assert differences(known, found) == words


def test_only_an_identity_with_a_ctime_shows_writes() -> None:
    assert [shows_writes(each) for each in (ONE, OLDER, ORIGINAL)] == [True, False, False]


@pytest.mark.parametrize("end", ["source", "destination"])
def test_without_a_ctime_of_its_own_a_write_is_found_by_comparing(end: str, tmp_path: Path) -> None:
    """On FAT and sshfs, a program that sets the mtime back also sets the ctime back."""
    support.require_fuse()
    data = support.noise(4 * SIZE)
    unsampled = sample_extents(len(data))[3].end
    ends = {name: support.written(tmp_path / name, data) for name in ("source", "destination")}
    point = tmp_path / "point"
    point.mkdir()
    command = [support.PYTHON, str(support.STANDINS / "faulty_disk"), "--no-ctime", str(ends[end]), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        arguments = [{**ends, end: point / "disk"}[name] for name in ("source", "destination")]
        assert support.run("sync", *arguments).returncode == 0
        times = ends[end].stat()
        with ends[end].open("r+b") as file:
            file.seek(unsampled)
            file.write(b"changed")
        os.utime(ends[end], ns=(times.st_atime_ns, times.st_mtime_ns))
        assert support.run("sync", *arguments).returncode == 0
        process.terminate()
    assert ends["destination"].read_bytes() == ends["source"].read_bytes()
