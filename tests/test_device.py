from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import support
from support import PATIENCE, PYTHON, held_by_another_process, mounted, needs_views, noise, output, until

from blockcopy.block import syscalls
from blockcopy.block.claim import open_destination
from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import Extent
from blockcopy.errors import DestinationRefusedError, DeviceError

MIB = 1024 * 1024


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(noise(MIB + 100))
    return path


@pytest.fixture
def device(tmp_path: Path, loop_device: Callable[[Path], str]) -> str:
    backing = tmp_path / "backing"
    backing.write_bytes(noise(4 * MIB))
    return loop_device(backing)


# Reading and writing


def test_a_file_has_its_size_and_bytes(file: Path) -> None:
    with open_source(str(file)) as opened:
        assert not opened.is_block_device
        assert opened.size() == MIB + 100
        assert opened.read(MIB - 5, 105) == file.read_bytes()[-105:]
        assert opened.read(0, MIB + 100) == file.read_bytes()


def test_a_block_device_has_its_size_and_bytes(device: str) -> None:
    with open_source(device) as opened:
        assert opened.is_block_device
        assert opened.size() == 4 * MIB
        assert opened.read(1000, 5000) == noise(4 * MIB)[1000:6000]


def test_a_short_read_is_an_error(file: Path) -> None:
    with open_source(str(file)) as opened:
        with pytest.raises(DeviceError, match="ends after 99"):
            opened.read(MIB + 1, 100)
        with pytest.raises(DeviceError, match="ends after 0"):
            opened.read(2 * MIB, 1)


def test_a_read_goes_on_where_the_kernel_stopped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, length // 3, offset))
    with open_source(str(file)) as opened:
        assert opened.read(1000, 5000) == file.read_bytes()[1000:6000]
        with pytest.raises(DeviceError, match="ends after 99"):
            opened.read(MIB + 1, 100)
        assert opened.read(2 * MIB, 0) == b""


def test_a_read_error_names_the_offset(tmp_path: Path, device: str) -> None:
    """Truncate the backing file of a loop device: reads beyond its end fail."""
    os.truncate(tmp_path / "backing", MIB)
    with open_source(device) as opened:
        os.posix_fadvise(opened._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(DeviceError, match=f"cannot read 4096 bytes at {2 * MIB} of {device}: Input/output"):
            opened.read(2 * MIB, 4096)


# Views


@needs_views
@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_view_has_the_bytes(request: pytest.FixtureRequest, kind: str) -> None:
    with open_source(str(request.getfixturevalue(kind))) as opened:
        size = opened.size()
        data = opened.read(0, size)
        for offset, length in ((0, size), (0, 1), (5000, 10000), (size - 1, 1), (0, 0)):
            view = opened.view(offset, length, [Extent(offset, length)])
            assert view is not None
            assert view.readonly
            assert view == data[offset : offset + length]
            assert opened.release_view(offset, length)
            assert view == data[offset : offset + length]  # its bytes stay valid


@needs_views
def test_no_view_goes_beyond_the_end(file: Path) -> None:
    with open_source(str(file)) as opened:
        assert opened.view(MIB, 101, [Extent(MIB, 101)]) is None
        assert opened.view(2 * MIB, 1, [Extent(2 * MIB, 1)]) is None
        assert opened.view(MIB, 100, [Extent(MIB, 100)]) is not None


@needs_views
def test_after_a_read_error_there_are_no_views(tmp_path: Path, device: str) -> None:
    with open_source(device) as opened:
        assert opened.view(0, 4 * MIB, [Extent(0, 5000)]) is not None  # the rest must not be accessed
        opened.release_view(0, 4 * MIB)
        os.truncate(tmp_path / "backing", MIB)
        os.posix_fadvise(opened._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert opened.view(0, 4 * MIB, [Extent(0, 4 * MIB)]) is None
        assert opened.view(0, MIB, [Extent(0, MIB)]) is None
        assert opened.read(0, MIB) == noise(4 * MIB)[:MIB]


@needs_views
@pytest.mark.parametrize("left", [0, MIB, MIB + 99])
def test_release_view_reports_a_truncation(file: Path, left: int) -> None:
    """A view shows zeros behind the end of a file, in its last page. They must not count as bytes of the file."""
    with open_source(str(file)) as opened:
        assert opened.view(0, MIB + 100, [Extent(0, MIB + 100)]) is not None
        os.truncate(file, left)
        assert not opened.release_view(0, MIB + 100)
        assert opened.release_view(0, left)


@needs_views
def test_views_of_a_growing_file_reach_its_new_end(file: Path) -> None:
    with open_destination(str(file)) as opened:
        old = opened.view(0, 100, [Extent(0, 100)])
        opened.write(3 * MIB, b"more")
        assert opened.view(3 * MIB, 4, [Extent(3 * MIB, 4)]) == b"more"
        assert old == noise(100)


@needs_views
def test_drop_cache_waits_for_the_release_of_views(device: str) -> None:
    """The kernel drops no mapped page. A later read would come from the cache instead of the disk."""
    with open_destination(device) as opened:
        assert opened.view(0, MIB, [Extent(0, MIB)]) is not None
        dropper = threading.Thread(target=opened.drop_cache)
        dropper.start()
        until(lambda: opened._views._paused, "the wait")
        assert opened.view(MIB, MIB, [Extent(MIB, MIB)]) is None
        assert dropper.is_alive()
        assert opened.release_view(0, MIB)
        dropper.join(PATIENCE)
        assert not dropper.is_alive()
        until(lambda: not opened.drop_cache() and opened.read_cached(0, 4096) is None, "an empty cache")
        assert opened.view(MIB, MIB, [Extent(MIB, MIB)]) is not None
        opened.release_view(MIB, MIB)


@needs_views
def test_the_mapping_ends_with_the_last_view(file: Path) -> None:
    def is_mapped() -> bool:
        return str(file) in Path("/proc/self/maps").read_text()

    with open_source(str(file)) as opened:
        view = opened.view(0, MIB, [Extent(0, MIB)])
        assert is_mapped()
    assert view == noise(MIB)
    del view
    assert not is_mapped()


@needs_views
def test_locked_memory_leaves_out_the_mapping(file: Path) -> None:
    """A process that locks its memory must not keep all of a device in it."""
    support.require_root()
    script = f"""
import re, sys
from pathlib import Path
from blockcopy.block import syscalls
syscalls.lock_memory()
kept = bytearray(10 << 20)
with open(sys.argv[1], "rb") as file:
    address, view = syscalls.map_to_read(file.fileno(), {MIB})
    syscalls.populate(address, {MIB})
    for mapping in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        flags = re.search("VmFlags: (.*)", mapping)[1].split()
        if sys.argv[1] in mapping:
            print("device", "lo" in flags)
        elif "[heap]" in mapping:
            print("heap", "lo" in flags)
"""
    assert sorted(output(PYTHON, "-c", script, str(file)).splitlines()) == ["device False", "heap True"]


@needs_views
@pytest.mark.parametrize("reason", [errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP])
def test_after_a_permanent_error_no_view_is_tried_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    asked = []

    def populate(address: int, length: int) -> None:
        asked.append(length)
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(syscalls, "populate", populate)
    with open_source(str(file)) as opened:
        assert opened.view(0, 5, [Extent(0, 5)]) is None
        assert opened.view(0, 5, [Extent(0, 5)]) is None
    assert asked == [5]


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 4096), (100, 5000), (MIB - 1, MIB), (3 * MIB, MIB)])
def test_read_cached_returns_cached_bytes(device: str, offset: int, length: int) -> None:
    with open_source(device) as opened:
        data = opened.read(offset, length)
        assert opened.read_cached(offset, length) == data == noise(4 * MIB)[offset : offset + length]


def test_read_cached_does_not_wait_for_the_disk(device: str) -> None:
    with open_source(device) as opened:
        opened.read(0, MIB)

        def dropped() -> bool:  # may take a while: udev, for example, reads a new device
            os.posix_fadvise(opened._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return opened.read_cached(0, MIB) is None

        until(dropped, "a cache without it")
        assert opened.read(0, MIB) == noise(4 * MIB)[:MIB]


def test_read_cached_is_never_short(device: str, file: Path) -> None:
    for path in (device, str(file)):
        with open_source(path) as opened:
            size = opened.size()
            opened.read(0, size)
            assert opened.read_cached(size - 10, 11) is None
            assert opened.read_cached(size, 1) is None


def test_read_cached_gives_up_if_the_file_system_refuses_it(tmp_path: Path) -> None:
    path = Path("/proc/version")
    with Device(str(path), os.open(path, os.O_RDONLY)) as opened:
        assert opened.read_cached(0, 5) in (None, b"Linux")
        assert opened.read(0, 5) == b"Linux"


def test_a_write_changes_its_range_only(file: Path) -> None:
    before = file.read_bytes()
    with open_destination(str(file)) as opened:
        opened.write(1000, memoryview(b"abc"))
        opened.sync()
    assert file.read_bytes() == before[:1000] + b"abc" + before[1003:]


def test_a_write_beyond_a_block_device_is_an_error(device: str) -> None:
    with open_destination(device) as opened:
        with pytest.raises(DeviceError, match=f"cannot write 10 bytes at {4 * MIB - 5} of {device}: No space left"):
            opened.write(4 * MIB - 5, b"0123456789")
        opened.sync()


def test_grow_extends_a_file_by_a_hole(tmp_path: Path) -> None:
    with open_destination(str(tmp_path / "new"), create=True) as opened:
        opened.grow(2**40)
        assert opened.size() == 2**40
    assert os.stat(tmp_path / "new").st_blocks == 0


def test_file_id_depends_on_the_file_not_on_its_name(tmp_path: Path, file: Path, device: str) -> None:
    (tmp_path / "link").hardlink_to(file)
    (tmp_path / "symlink").symlink_to(device)
    (tmp_path / "copy").write_bytes(file.read_bytes())
    paths = [str(file), str(tmp_path / "link"), device, str(tmp_path / "symlink"), str(tmp_path / "copy")]
    identities = []
    for path in paths:
        with open_source(path) as opened:
            identities.append(opened.file_id)
    assert identities[0] == identities[1]
    assert identities[2] == identities[3]
    assert len(set(identities)) == 3


# Opening


def test_a_file_is_created_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(DeviceError, match="No such file"):
        open_destination(str(path))
    assert not path.exists()
    open_destination(str(path), create=True).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_create_keeps_an_existing_file(file: Path) -> None:
    with open_destination(str(file), create=True) as opened:
        assert opened.read(0, 100) == noise(MIB + 100)[:100]
        assert opened.size() == MIB + 100


@pytest.mark.parametrize("open_it", [open_source, open_destination])
@pytest.mark.parametrize("kind", ["fifo", "directory", "character device"])
def test_only_files_and_block_devices_are_opened(
    tmp_path: Path, open_it: Callable[[str], Device], kind: str
) -> None:
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)  # its open would wait for a writer
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(DeviceError, match="neither a regular file nor a block device"):
        open_it(str(path))


@pytest.mark.parametrize("open_it", [open_source, open_destination])
def test_a_missing_path_is_reported(tmp_path: Path, open_it: Callable[[str], Device]) -> None:
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path / "none" / "x", "No such file|there is no folder"),
    ):
        with pytest.raises(DeviceError, match=f"cannot open {path}: ({reason})"):
            open_it(str(path))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DeviceError, match="Too many levels of symbolic links"):
        open_it(str(tmp_path / "loop"))


# Claiming


def test_a_destination_is_locked_while_it_is_open(file: Path) -> None:
    with open_destination(str(file)), pytest.raises(AssertionError), held_by_another_process(file):
        pass
    with held_by_another_process(file):
        pass


def test_a_locked_file_is_refused(file: Path) -> None:
    with held_by_another_process(file):
        with pytest.raises(DestinationRefusedError, match=f"{file} is locked"):
            open_destination(str(file))
        open_destination(str(file), force=True).close()
        open_source(str(file)).close()
    open_destination(str(file)).close()


def test_a_file_behind_a_loop_device_is_refused(tmp_path: Path, device: str) -> None:
    backing = tmp_path / "backing"
    (tmp_path / "link").hardlink_to(backing)
    for path in (backing, tmp_path / "link"):
        with pytest.raises(DestinationRefusedError, match=f"attached to the loop device {device}"):
            open_destination(str(path))
    open_destination(str(backing), force=True).close()
    open_source(str(backing)).close()


def test_a_mounted_device_is_refused(tmp_path: Path, device: str) -> None:
    with mounted(device, tmp_path / "mnt"):
        with pytest.raises(DestinationRefusedError, match=f"{device} is in use"):
            open_destination(device)
        open_destination(device, force=True).close()
        open_source(device).close()
    # A mount namespace that another test made meanwhile may have a copy of the mount, until that test ends.
    until(lambda: not in_use(device), "the device is free")


def in_use(device: str) -> bool:
    try:
        open_destination(device).close()
    except DestinationRefusedError:
        return True
    return False


def test_a_device_that_another_program_holds_is_refused(device: str) -> None:
    with held_by_another_process(device, os.O_EXCL):
        with pytest.raises(DestinationRefusedError, match=f"{device} is in use"):
            open_destination(device)
        open_destination(device, force=True).close()


def test_an_open_destination_cannot_be_mounted(tmp_path: Path, device: str) -> None:
    output("mkfs.ext4", "-q", "-F", device)
    (tmp_path / "mnt").mkdir()
    with open_destination(device), pytest.raises(AssertionError, match=r"busy|already mounted|Can't open blockdev"):
        output("mount", device, tmp_path / "mnt")


def test_a_refused_destination_is_closed(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with held_by_another_process(file), suppress(DestinationRefusedError):
        open_destination(str(file))
    assert len(os.listdir("/proc/self/fd")) == before
