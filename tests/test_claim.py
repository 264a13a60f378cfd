"""Destinations that cannot hold a copy are refused with a reason, before any connection or new file."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import BLOCKCOPY, PYTHON, failed, noise, output, require_root, run, succeeded, written

from blockcopy.block.claim import existing_destination, open_destination
from blockcopy.block.device import open_source
from blockcopy.errors import DestinationRefusedError, DeviceError
from blockcopy.paths.places import absolute

MIB = 1024 * 1024


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", noise(MIB))


@pytest.fixture
def name() -> Iterator[str]:
    """Give the name of a file that no test may leave in /dev."""
    name = f"blockcopy-test-{uuid.uuid4().hex}"
    yield name
    left = [path for path in (Path("/dev", name), Path("/dev/shm", name)) if path.exists()]
    for path in left:
        path.unlink()
    assert Path("/dev", name) not in left


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, Path]:
    """Give an --rsh, and the path of a file that it creates when it runs. Makes a mountpoint beside the file."""
    (tmp_path / "point").mkdir()
    script, mark = tmp_path / "rsh", tmp_path / "asked"
    script.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    script.chmod(0o755)
    return str(script), mark


# Among devices


@pytest.mark.parametrize(
    "place", ["/dev/{}", "/dev/no-such/{}", "/dev/shm/../{}", "{tmp}/to-dev/{}", "{tmp}/link", "/dev/mqueue/{}"]
)
def test_no_file_is_created_among_devices(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "to-dev").symlink_to("/dev")
    (tmp_path / "link").symlink_to(f"/dev/{name}")
    path = place.format(name, tmp=tmp_path)
    for force in (False, True):
        with pytest.raises(DeviceError, match=r"cannot create .*: there is no such device.*lvchange"):
            open_destination(path, create=True, force=force)
        with pytest.raises(DeviceError, match=r"cannot create .*: there is no such device.*lvchange"):
            existing_destination(path, force=force)
    assert not os.path.exists(path)


def test_a_second_mount_of_dev_counts_as_dev(tmp_path: Path, name: str) -> None:
    require_root()
    point = tmp_path / "dev"
    point.mkdir()
    output("mount", "--bind", "/dev", point)
    try:
        with pytest.raises(DeviceError, match="there is no such device"):
            existing_destination(str(point / name), force=False)
    finally:
        output("umount", point)


def test_a_tmpfs_at_dev_counts_as_dev() -> None:
    """Containers have such a /dev."""
    require_root()
    asked = "from blockcopy.paths.places import obstacle; print(obstacle('/dev/x'), obstacle('/dev/new/x'))"
    script = f'mount -t tmpfs none /dev && mkdir /dev/new && exec {PYTHON} -c "{asked}"'
    assert output("unshare", "--mount", "sh", "-c", script).count("there is no such device") == 2


@pytest.mark.parametrize(
    "command",
    [
        ("sync", "{source}", "{path}"),
        ("sync", "-e", "{rsh}", "host:/source", "{path}"),
        ("mount", "{source}", "{path}", "{tmp}/point"),
        ("save", "{path}"),
        ("receive", "{path}"),
        ("verify", "{source}", "{path}"),
        ("sync", "--state", "{path}", "{source}", "{tmp}/copy"),
        ("sync", "--metrics", "{path}", "{source}", "{tmp}/copy"),
        ("sync", "--log-file", "{path}", "{source}", "{tmp}/copy"),
        ("mount", "--pid-file", "{path}", "{source}", "{tmp}/copy", "{tmp}/point"),
    ],
    ids=" ".join,
)
def test_no_command_creates_a_file_among_devices(
    tmp_path: Path, source: Path, name: str, command: tuple[str, ...], asked: tuple[str, Path]
) -> None:
    words = {"source": source, "path": f"/dev/{name}", "tmp": tmp_path, "rsh": asked[0]}
    done = run(*(each.format(**words) for each in command), input=b"")
    assert done.returncode == (2 if any(each.startswith("--") for each in command) else 1), done.stderr
    assert not Path("/dev", name).exists()
    assert not asked[1].exists()
    assert not (tmp_path / "copy").exists()


def test_a_separate_tmpfs_below_dev_may_hold_files(source: Path, name: str) -> None:
    assert run("sync", source, f"/dev/shm/{name}").returncode == 0
    assert Path("/dev/shm", name).read_bytes() == source.read_bytes()


def test_a_regular_file_among_devices_is_refused(source: Path, name: str) -> None:
    require_root()
    left = written(Path("/dev", name), b"left")
    try:
        for refused in (run("sync", source, left), run("sync", left, source), run("verify", source, left)):
            assert (refused.returncode, b"is a regular file in memory" in refused.stderr) in ((1, True), (3, True))
        for open_it in (open_source, open_destination):
            with pytest.raises(DeviceError, match="is a regular file in memory"):
                open_it(str(left))
        open_destination(str(left), force=True).close()
    finally:
        left.unlink()


# Read-only


@pytest.mark.parametrize(
    "command",
    [
        ("sync", "-e", "{rsh}", "host:/source", "{path}"),
        ("mount", "-e", "{rsh}", "host:/source", "{path}", "{tmp}/point"),
        ("save", "{path}"),
        ("receive", "{path}"),
    ],
    ids=lambda command: str(command[0]),
)
def test_a_read_only_device_is_refused_before_any_connection(
    tmp_path: Path, loop_device: Callable[..., str], command: tuple[str, ...], asked: tuple[str, Path]
) -> None:
    device = loop_device(written(tmp_path / "backing", bytes(MIB)), "--read-only")
    done = run(*(each.format(path=device, tmp=tmp_path, rsh=asked[0]) for each in command), input=b"")
    failed(done, 1, f"{device}: Operation not permitted: the device is read-only (blockdev", stdout=b"")
    assert not asked[1].exists()


@pytest.mark.parametrize(
    ("attribute", "told"), [("i", "it is immutable or append-only"), ("a", "it is immutable or append-only")]
)
def test_an_attribute_that_forbids_writes_is_named(tmp_path: Path, attribute: str, told: str) -> None:
    require_root()
    path = written(tmp_path / "file", b"old")
    output("chattr", f"+{attribute}", path)
    try:
        with pytest.raises(DestinationRefusedError, match=f"cannot open {path}.*: {told}"):
            open_destination(str(path))
    finally:
        output("chattr", f"-{attribute}", path)


def test_an_active_swap_file_is_refused(tmp_path: Path) -> None:
    require_root()
    path = written(tmp_path / "swap", bytes(MIB))
    path.chmod(0o600)
    output("mkswap", path)
    output("swapon", path)
    try:
        with pytest.raises(DestinationRefusedError, match="in use for swap"):
            open_destination(str(path), force=True)
    finally:
        output("swapoff", path)


def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    require_root()
    output("mount", "-t", "tmpfs", "tmpfs", tmp_path)
    try:
        written(tmp_path / "old", b"old")
        output("mount", "-o", "remount,ro", tmp_path)
        with pytest.raises(DestinationRefusedError, match=r"old: .*its file system is mounted read-only"):
            existing_destination(str(tmp_path / "old"), force=False)
        with pytest.raises(DeviceError, match=rf"cannot create .*file system of {tmp_path} is mounted read-only"):
            existing_destination(str(tmp_path / "new"), force=False)
    finally:
        output("umount", tmp_path)


def test_a_folder_of_the_kernel_is_named() -> None:
    for path in ("/proc/file", "/sys/file"):
        with pytest.raises(DeviceError, match="belongs to the kernel"):
            existing_destination(path, force=False)


# Locks


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINTR, errno.EIO])
def test_a_missing_lock_server_is_not_reported_as_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    path = str(written(tmp_path / "file", b""))
    with pytest.raises(DestinationRefusedError, match=f"cannot be locked: {os.strerror(reason)}"):
        open_destination(path)
    open_destination(path, force=True).close()


# Names of folders


@pytest.mark.parametrize("place", ["new/", "new/.", "new/..", "folder", "folder/", "folder/.", "file/"])
@pytest.mark.parametrize("command", ["sync", "receive", "save"])
def test_the_name_of_a_folder_creates_no_file(tmp_path: Path, source: Path, place: str, command: str) -> None:
    (tmp_path / "folder").mkdir()
    written(tmp_path / "file", b"old")
    for path in (place, f"{tmp_path}/{place}"):
        arguments = [source, path] if command == "sync" else [path]
        done = run(command, *arguments, input=b"", cwd=tmp_path)
        failed(done, 1, b"folder")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_name_of_a_folder_is_no_source(source: Path, tmp_path: Path) -> None:
    for command in ("sync", "verify"):
        done = run(command, f"{source}/", written(tmp_path / "copy", b""))
        failed(done, 3, b"Not a directory")


@pytest.mark.parametrize("option", ["--state", "--metrics", "--log-file"])
@pytest.mark.parametrize("place", ["new/", "", "."])
def test_an_output_file_is_not_named_like_a_folder(tmp_path: Path, source: Path, option: str, place: str) -> None:
    done = run("sync", f"{option}={place}", source, tmp_path / "copy", cwd=tmp_path)
    failed(done, 2, b"is no name of a file")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--state", "--metrics", "--pid-file"])
@pytest.mark.parametrize("kind", ["device", "pipe", "standard output"])
def test_an_output_file_replaces_only_a_file(tmp_path: Path, source: Path, option: str, kind: str) -> None:
    (tmp_path / "point").mkdir()
    path = tmp_path / "it"
    if kind == "device":
        path = Path("/dev/full")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/stdout")  # a link to a regular file, perhaps
    before = os.lstat(path)
    command = [*BLOCKCOPY, "mount", option, str(path), str(source), str(tmp_path / "copy"), str(tmp_path / "point")]
    with (tmp_path / "output").open("wb") as standard_output:
        done = subprocess.run(command, stdout=standard_output, stderr=subprocess.PIPE, check=False)
    failed(done, 2, b"would be replaced")
    assert os.lstat(path).st_ino == before.st_ino


def test_dot_dot_after_a_link_means_what_the_kernel_means(tmp_path: Path, source: Path) -> None:
    """`link/..` is the parent of the folder that the link leads to."""
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "inner")
    assert run("sync", source, "link/../copy", cwd=tmp_path).returncode == 0
    assert (tmp_path / "there" / "copy").read_bytes() == source.read_bytes()
    assert not (tmp_path / "copy").exists()
    assert run("verify", "source", "link/../copy", cwd=tmp_path).returncode == 0


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a//b/./c") == f"{tmp_path}/a/b/c"
    assert absolute("a/") == absolute("a/.") == f"{tmp_path}/a/"
    assert absolute("a/../b") == f"{tmp_path}/a/../b"
    assert absolute("/a") == "/a"
    assert absolute("/") == "/"


def test_a_missing_folder_is_reported_before_any_connection(tmp_path: Path, asked: tuple[str, Path]) -> None:
    missing = tmp_path / "no" / "file"
    done = run("sync", "-e", asked[0], "host:/source", missing)
    failed(done, 1, f"there is no folder {missing.parent} to write into")
    assert not asked[1].exists()


# Longer than the source


def test_a_longer_destination_keeps_its_tail_with_a_warning(tmp_path: Path, source: Path) -> None:
    copy = written(tmp_path / "copy", bytes(MIB) + b"tail")
    link = f"{PYTHON} {Path(__file__).parent.parent / 'tools/standins/link'}"
    for way in (("sync", source, copy), ("sync", "-e", link, "--python", PYTHON, source, f"host:{copy}")):
        done = run(*way)
        succeeded(done, f"{copy} is 4 bytes longer than the source: its bytes from {MIB} on")
        assert copy.read_bytes() == source.read_bytes() + b"tail"
    assert run("sync", "-q", source, copy).stderr == b""
