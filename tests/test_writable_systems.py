"""What users put on a writable replica: file systems, swap, QEMU. What becomes of it: its end, later commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    Mount,
    children,
    failed,
    noise,
    output,
    run,
    succeeded,
    until,
    written,
)

Mounter = Callable[..., Mount]

MIB = 1 << 20
DATA = noise(8 * MIB)
OLD = bytes(8 * MIB)


def source_with(folder: Path, make: str, size: int) -> Path:
    """Return a new file of `size` bytes with what the shell command `make` makes of it, named $1."""
    source = written(folder / "source", noise(MIB))
    os.truncate(source, size)
    output("sh", "-ec", make, "make", source)
    return source


FILE_SYSTEMS = {
    "ext4": ("mkfs.ext4 -q -F $1", "fsck.ext4 -fn {}", 48 * MIB),
    "xfs": ("mkfs.xfs -q -f -s size=512 $1", "xfs_repair -n {}", 320 * MIB),
}


@contextlib.contextmanager
def attached(file: Path, *options: str) -> Iterator[str]:
    """Attach `file` to a loop device inside the `with` block. Yields the path of the device."""
    support.require_root()
    device = output("losetup", "--find", "--show", *options, file).strip()
    try:
        yield device
    finally:
        output("losetup", "--detach", device)


@contextlib.contextmanager
def file_system_of(device: str, point: Path, *options: str) -> Iterator[None]:
    """Mount the file system on `device` at the folder `point` inside the `with` block."""
    output("mount", *options, device, point)
    try:
        yield
    finally:
        output("umount", point)


@pytest.mark.parametrize(("kind", "made"), [("ext4", "there"), ("xfs", "there"), ("ext4", "here")])
def test_a_file_system_is_written_while_it_hydrates(mount: Mounter, tmp_path: Path, kind: str, made: str) -> None:
    """Made at the source, or on the mount. Its sectors have 512 bytes: parts of pages are written."""
    make, check, size = FILE_SYSTEMS[kind]
    support.require(shutil.which(make.split()[0]) is not None, f"{make.split()[0]} is not installed")
    source = source_with(tmp_path, make if made == "there" else "true", size)
    before, destination, point = source.read_bytes(), tmp_path / "copy", tmp_path / "point"
    mounted = mount(source, destination, "--writable", "--limit", "10M")
    point.mkdir()
    with attached(mounted.file) as device:
        if made == "here":
            output("sh", "-ec", make, "make", device)
        with file_system_of(device, point):
            for number in range(30):
                written(point / str(number), noise(50_000 * number, seed=number))
            os.unlink(point / "29")
            output("sync", "-f", point)
        output("sh", "-ec", check.format(device))
        failed(run("umount", mounted.point), 4, "a loop device or a container still uses it")
        assert mounted.status()["written_bytes"] > 0
    run("limit", mounted.point, "none")
    mounted.wait()
    mounted.umount()
    output("sh", "-ec", check.format(destination))
    with attached(destination, "--read-only") as device, file_system_of(device, point, "-o", "ro"):
        for number in range(29):
            assert (point / str(number)).read_bytes() == noise(50_000 * number, seed=number)
    assert source.read_bytes() == before


def test_swap(mount: Mounter, tmp_path: Path) -> None:
    """The swap is switched on and off. What the kernel swaps out is `tools/vm run swap`'s."""
    source = source_with(tmp_path, "true", 16 * MIB)
    mounted = mount(source, tmp_path / "copy", "--writable", "--limit", "10M")
    with attached(mounted.file) as device:
        output("mkswap", "-q", device)
        output("swapon", device)
        try:
            assert device in Path("/proc/swaps").read_text()
        finally:
            output("swapoff", device)


def locked_memory(pid: int) -> int:
    """Return how many KiB of memory the process `pid` has locked."""
    found = re.search(r"^VmLck:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_a_writable_mount_locks_its_memory_if_it_may(mount: Mounter, source: Path, destination: Path) -> None:
    support.require_root()
    assert locked_memory(mount(source, destination).status()["pid"]) == 0
    second = mount(source, destination.with_name("second"), "--writable")
    assert locked_memory(second.status()["pid"]) > 10_000
    point, third = source.parent / "point", destination.with_name("third")
    point.mkdir()
    without = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *BLOCKCOPY]
    output(*without, "mount", "--writable", source, third, point)
    pid = json.loads((point / "status.json").read_text())["pid"]
    try:
        assert locked_memory(pid) == 0
    finally:
        output(*BLOCKCOPY, "umount", point)


CACHES = ["none", "writeback", "writethrough", "directsync", "unsafe"]


@pytest.mark.parametrize("cache", CACHES)
def test_qemu(mount: Mounter, source: Path, destination: Path, cache: str) -> None:
    support.require(shutil.which("qemu-io") is not None, "qemu-io is not installed")
    mounted = mount(source, destination, "--writable", "--limit", "20M")
    commands = [
        "write -P 0x11 0 64k", "write -P 0x22 1000k 300k", "aio_write -P 0x33 2M 1M", "aio_flush", "flush",
        "write -z 4M 256k", "discard 5M 128k", "write -P 0x44 512 512",
        "read -P 0x11 1k 63k", "read -P 0x22 1000k 300k", "read -P 0x33 2M 1M", "read -P 0 4M 256k",
        "read -P 0x44 512 512",
    ]  # fmt: skip
    words = [word for command in commands for word in ("-c", command)]
    told = output("qemu-io", "-f", "raw", "-t", cache, *words, mounted.file)
    assert "failed" not in told, told
    mounted.wait()
    expected = bytearray(DATA)
    for start, stop, byte in [
        (0, 64, 0x11),
        (1000, 1300, 0x22),
        (2048, 3072, 0x33),
        (4096, 4096 + 256, 0),
        (0.5, 1, 0x44),
    ]:
        expected[int(start * 1024) : int(stop * 1024)] = bytes([byte]) * int((stop - start) * 1024)
    assert mounted.file.read_bytes() == expected


def test_fio_verifies_what_four_jobs_wrote_while_the_link_is_cut(mount: Mounter, tmp_path: Path) -> None:
    support.require(shutil.which("fio") is not None, "fio is not installed")
    cut, source, destination = tmp_path / "cut", written(tmp_path / "source", noise(64 * MIB)), tmp_path / "copy"
    rsh = f"{PYTHON} {support.STANDINS / 'link'} --cut-while {cut}"
    mounted = mount(
        f"host:{source}", tmp_path / "copy", "--writable", "--limit", "4M", "-e", rsh, "--python", PYTHON
    )
    jobs = ["--numjobs=4", "--size=15m", "--offset_increment=16m", "--io_size=2m", "--bsrange=512-20k"]
    verify = ["--bs_unaligned=1", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--fsync=32"]
    command = ["fio", "--name=job", f"--filename={mounted.file}", "--rw=randwrite", *jobs, *verify]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as fio:  # it leaves files there
        until(lambda: mounted.status()["written_bytes"])
        cut.touch()
        until(lambda: mounted.status()["link"]["state"] == "reconnecting")
        cut.unlink()
        assert fio.wait(timeout=50) == 0
    run("limit", mounted.point, "none")
    mounted.wait()
    expected = mounted.file.read_bytes()
    mounted.umount()
    assert destination.read_bytes() == expected


# The end, and the next start


def test_the_source_is_let_go_and_the_mount_goes_on(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path
) -> None:
    mounted = mount(source, destination, "--writable", wait=True)
    until(lambda: not mounted.retrievers(), "the end of the source's processes")
    source.unlink()
    expected = bytearray(DATA)
    expected[5:8], expected[MIB : MIB + 4096] = b"new", b"x" * 4096
    with mounted.file.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"new", 5)
        os.pwrite(file.fileno(), b"x" * 4096, MIB)
        os.fsync(file.fileno())
    told = mounted.status()
    assert (told["state"], told["source_needed"], told["written_bytes"]) == ("complete", False, 2 * BLOCK_SIZE)
    succeeded(run("umount", mounted.point))
    assert destination.read_bytes() == expected
    again = mount(source, destination, "--writable")  # the source is not needed
    assert again.status()["state"] == "complete"
    assert not children(again.status()["pid"])
    assert again.file.read_bytes() == expected
    assert again.status()["written_bytes"] == 2 * BLOCK_SIZE
    again.umount()


REFUSED: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "sync": lambda source, destination, folder: ["sync", source, destination],
    "sync --force": lambda source, destination, folder: ["sync", "--force", source, destination],
    "sync --no-state": lambda source, destination, folder: ["sync", "--no-state", source, destination],
    "sync --recheck": lambda source, destination, folder: ["sync", "--recheck", source, destination],
    "sync --state": lambda source, destination, folder: ["sync", "--state", folder / "s", source, destination],
    "mount": lambda source, destination, folder: ["mount", source, destination, folder],
    "mount -o ro": lambda source, destination, folder: ["mount", "-o", "ro", source, destination, folder],
    "save": lambda source, destination, folder: ["save", destination],
    "save --force": lambda source, destination, folder: ["save", "--force", destination],
    "push": lambda source, destination, folder: [
        "sync", "-e", f"{PYTHON} {support.STANDINS / 'link'}", "--python", PYTHON, source, f"host:{destination}"
    ],
}  # fmt: skip


@pytest.mark.parametrize("complete", [False, True])
def test_every_other_command_refuses_until_the_writes_are_discarded(
    mount: Mounter, source: Path, destination: Path, tmp_path: Path, complete: bool
) -> None:
    mounted = mount(source, destination, "--writable", *(() if complete else ("--no-background",)), wait=complete)
    with mounted.file.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"w" * 4096, 3 * MIB)
    mounted.umount()
    before, times = destination.read_bytes(), os.stat(destination).st_mtime_ns
    assert before[3 * MIB : 3 * MIB + 4096] == b"w" * 4096
    point = tmp_path / "other"
    point.mkdir()
    for name, words in REFUSED.items() if not complete else [("sync --force", REFUSED["sync --force"])]:
        done = run(*words(source, destination, point), input=b"")
        assert done.returncode not in (0, 2), (name, done.stderr)
        for told in (b"mount --writable", b"discard-writes"):
            assert told in done.stderr, (name, done.stderr)
    assert (destination.read_bytes(), os.stat(destination).st_mtime_ns) == (before, times)
    succeeded(run("verify", source, destination), None) if complete else None
    done = run("discard-writes", destination)
    succeeded(done, stdout=f"threw away {BLOCK_SIZE} bytes of blocks that a user wrote to in {destination}; "
              "the next mount or sync checks every block\n")  # fmt: skip
    failed(run("discard-writes", destination), 1, "nothing to throw away")
    succeeded(run("sync", source, destination), None)
    assert destination.read_bytes() == DATA


def test_mount_can_discard_the_writes(mount: Mounter, source: Path, destination: Path) -> None:
    mounted = mount(source, destination, "--writable", "--no-background")
    with mounted.file.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"w" * 4096, 3 * MIB)
    mounted.umount()
    mounted = mount(source, destination, "--discard-writes", wait=True)
    assert mounted.file.read_bytes() == DATA
