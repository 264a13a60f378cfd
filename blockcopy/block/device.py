"""Files and block devices as arrays of bytes: each read or write has its full length, or fails.

A Device has no position. Every method may be called from any thread at any time, except `read_cached` and `close`.
Methods raise DeviceError if a system call fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Callable, TypeVar

from blockcopy.block import syscalls
from blockcopy.block.buffers import ZEROS, Buffer
from blockcopy.block.geometry import Extent
from blockcopy.block.views import Views
from blockcopy.errors import DestinationLostError, DeviceError
from blockcopy.paths.places import holds_devices

_WRITE_BACK_BYTES = 256 * 1024 * 1024
"""Bytes written back between two checks of the deadline."""

_NO_ATTRIBUTES = (errno.ENODATA, errno.EOPNOTSUPP)
"""Errors that say that a file lacks an extended attribute, or that its file system has none."""

Opened = TypeVar("Opened", bound="Device")


class Device:
    """An open regular file or block device. Closes itself at the end of a `with` statement.

    All I/O goes through the file descriptor; the path is for messages and `check_in_place()`.
    """

    def __init__(self, path: str, fd: int) -> None:
        """Take ownership of `fd`, an open file descriptor of the file or device at `path`."""
        self.path = path
        self._fd = fd
        self._nowait = getattr(os, "RWF_NOWAIT", 0)
        self._cached = memoryview(bytearray(0))
        self._views = Views(fd, self.size)
        self.is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file descriptor. The device must not be used afterwards."""
        self._views.close()
        os.close(self._fd)

    @property
    def file_id(self) -> tuple[int, int]:
        """Two numbers that are equal for all paths of the same file or device, until the next restart."""
        return _file_id(os.fstat(self._fd))

    def lock(self) -> None:
        """Lock the whole file for writing (fcntl) until the device is closed. Does not wait.

        Raises OSError if another program has a lock, or if the file system has none.
        """
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def status(self) -> os.stat_result:
        """Return the current status of the file or device: the stat_result of fstat(2). Raises DeviceError."""
        try:
            return os.fstat(self._fd)
        except OSError as error:
            raise DeviceError.from_os_error("examine", self.path, error) from error

    def check_in_place(self) -> None:
        """Check that this file or device is still at its path. Blocks while a file system on the path hangs.

        Raises DestinationLostError if the path leads nowhere or elsewhere, DeviceError if the path cannot be
        examined.
        """
        try:
            found = os.stat(self.path)
        except FileNotFoundError as error:
            raise DestinationLostError(
                f"{self.path} was removed while it was in use, so the opened file has no name. Start again"
            ) from error
        except OSError as error:
            raise DeviceError.from_os_error("examine", self.path, error) from error
        if _file_id(found) != self.file_id:
            raise DestinationLostError(
                f"{self.path} was replaced while it was in use, and leads to another file or device. Start again"
            )

    def file_system(self) -> str:
        """Return the ID of the file system of the file, as text. A UUID survives a restart; other IDs may not."""
        with self._errors("find the file system of"):
            number = os.fstatvfs(self._fd).f_fsid
            # XFS and others derive it from the device's number, which changes if disks are found in another order.
            uuid = syscalls.file_system_uuid(self._fd) if number == os.fstat(self._fd).st_dev else ""
            return uuid or f"{number:x}"

    def has_exact_times(self) -> bool:
        """Return True if this is a file whose ctime shows every write. No program can hide a write then."""
        return not self.is_block_device and syscalls.has_exact_times(self._fd)

    def size(self) -> int:
        """Return the current size, a number of bytes."""
        with self._errors("find the size of"):
            return os.lseek(self._fd, 0, os.SEEK_END)

    def grow(self, size: int) -> None:
        """Extend a regular file to `size` bytes, by a hole."""
        with self._errors(f"grow to {size} bytes the file"):
            os.ftruncate(self._fd, size)

    def read(self, offset: int, length: int) -> bytes:
        """Read and return exactly `length` bytes at byte `offset`. Raises DeviceError if the device ends early."""
        with self._errors(f"read {length} bytes at {offset} of"):
            data = os.pread(self._fd, length, offset)
            if len(data) < length:  # the device ends early, or the kernel stopped before
                rest = memoryview(bytearray(length - len(data)))
                data += rest[: self._fill(offset + len(data), rest)]
        if len(data) < length:
            raise DeviceError.ended_early(self.path, offset, length, len(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Read from byte `offset` into `buffer` until the buffer is full. Returns the number of bytes read.

        The buffer stays partly unfilled only if the device ends early.
        """
        with self._errors(f"read {len(buffer)} bytes at {offset} of"):
            return self._fill(offset, buffer)

    def _fill(self, offset: int, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer) and (count := os.preadv(self._fd, [buffer[filled:]], offset + filled)):
            filled += count
        return filled

    def view(self, offset: int, length: int, extents: Sequence[Extent]) -> memoryview | None:
        """Map `length` bytes at byte `offset` into memory. Return them as a memoryview, without a copy.

        `extents`: the ranges of the device that are read into memory. The caller must access no others, and must
        call `release_view()` after use. Returns None if the kernel cannot map the bytes; `read()` reports the
        reason.

        An access kills the process by SIGBUS if the file is truncated, or the disk fails, at that moment.
        """
        return self._views.acquire(offset, length, extents)

    def release_view(self, offset: int, length: int) -> bool:
        """Release the view of `length` bytes at byte `offset`. Call once for each view.

        Returns False if the device shrank meanwhile: everything that was read from the view is then invalid.
        """
        self._views.release(offset, length)
        return self.size() >= offset + length  # beyond the end of a file, its last page has zeros

    def splice_to(self, pipe: int, offset: int, length: int) -> int:
        """Move up to `length` bytes at byte `offset` into the file descriptor `pipe` without a copy or a wait.

        Returns the number of bytes, or 0 at the end of the device. Raises OSError, not DeviceError, if splice(2) is
        not possible or the pipe is full.
        """
        return os.splice(self._fd, pipe, length, offset_src=offset, flags=os.SPLICE_F_NONBLOCK)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the Extents with data, not holes, within `length` bytes at byte `offset`, ascending.

        Yields all `length` bytes if the file system does not know its holes.
        """
        end = offset + length
        while offset < end:
            try:
                start = os.lseek(self._fd, offset, os.SEEK_DATA)
                stop = os.lseek(self._fd, start, os.SEEK_HOLE) if start < end else end
            except OSError as error:
                if error.errno != errno.ENXIO:  # ENXIO: no more data
                    yield Extent(offset, end - offset)
                return
            if start >= end:
                return
            stop = min(max(stop, start + 1), end)
            yield Extent(start, stop - start)
            offset = stop

    def read_cached(self, offset: int, length: int) -> memoryview | None:
        """Return a memoryview of exactly `length` bytes at byte `offset`, read from the page cache.

        Returns None if the read would wait for the disk.
        The result is valid until the next call. Not thread-safe: call from one thread only.
        """
        if not self._nowait:
            return None
        if length > len(self._cached):
            self._cached = memoryview(bytearray(length))
        try:
            if os.preadv(self._fd, [self._cached[:length]], offset, self._nowait) == length:
                return self._cached[:length]
        except BlockingIOError:
            pass  # not in the cache
        except OSError:
            # Some file systems, such as tmpfs, refuse this. A real error shows in `read`.
            self._nowait = 0
        return None

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at byte `offset`. Raises DeviceError if that fails."""
        view, position = memoryview(data), offset
        try:
            while view:
                written = os.pwrite(self._fd, view, position)
                position += written
                view = view[written:]
        except OSError as error:
            action = f"write {len(memoryview(data))} bytes at {offset} of"
            raise DeviceError.from_os_error(action, self.path, error) from error

    def write_nothing(self) -> None:
        """Write zero bytes, to find out whether the kernel accepts writes at all.

        Raises DeviceError if not, such as for a read-only device or an active swap file.
        """
        with self._errors("write to"):
            os.pwrite(self._fd, b"", 0)

    def write_zeros(self, offset: int, length: int, *, sparse: bool) -> None:
        """Write `length` zero bytes at byte `offset`. `sparse`: punch a hole instead if the file system can."""
        if sparse and length:
            try:
                syscalls.punch_hole(self._fd, offset, length)
                return
            except OSError:
                pass  # not possible, or not at this offset; a write reports a faulty device
        end = offset + length
        for position in range(offset, end, len(ZEROS)):
            self.write(position, memoryview(ZEROS)[: end - position])

    def start_writeback(self, offset: int, length: int) -> None:
        """Start to write `length` bytes at byte `offset` to the disk. A later `sync()` waits less. Never fails."""
        with contextlib.suppress(OSError):  # `sync` writes them then, and reports errors
            syscalls.write_back(self._fd, offset, length, wait=False)

    def exceeds_cache(self) -> bool:
        """Return True if the device is larger than half of the memory.

        To read or write all of it would evict everything else from the page cache.
        """
        return self.size() > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def drop_behind(self, offset: int, length: int) -> None:
        """Advise the kernel to evict `length` bytes at byte `offset` from the page cache. Never fails."""
        with contextlib.suppress(OSError):  # only advice
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def drop_cache(self) -> None:
        """Evict the whole device from the page cache, so that the next read comes from the disk.

        Waits until all views are released: the kernel evicts no mapped page. Unsynced bytes stay in the cache.
        """
        with self._views.paused(), self._errors("drop the cache of"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def write_back_until(self, deadline: float) -> bool:
        """Write all dirty pages of a file to the disk, even those that other programs have mapped.

        After that, the next write through a mapping changes the file's times.
        `deadline`: seconds of the monotonic clock. Returns False if dirty pages are left at the deadline.
        """
        for offset in range(0, self.size(), _WRITE_BACK_BYTES):
            if time.monotonic() > deadline:
                return False
            try:
                syscalls.write_back(self._fd, offset, _WRITE_BACK_BYTES, wait=True)
            except OSError:  # not available, or an earlier write has failed, which a reader cannot repair
                with contextlib.suppress(OSError):
                    os.fdatasync(self._fd)
                break
        return True

    def sync(self, *, times: bool = True) -> None:
        """Wait until everything written is on stable storage. `times`: the times of a file too."""
        with self._errors("sync"):
            (os.fsync if times else os.fdatasync)(self._fd)

    def attribute(self, name: str) -> bytes | None:
        """Return the extended attribute `name` of this file, or None. Raises DeviceError if it is unknown."""
        if self.is_block_device:
            return None
        try:
            return os.getxattr(self._fd, name)
        except OSError as error:
            if error.errno in _NO_ATTRIBUTES:
                return None
            raise DeviceError.from_os_error("read the attributes of", self.path, error) from error

    def set_attribute(self, name: str, value: bytes) -> bool:
        """Set the extended attribute `name` to `value`, durably. Returns False if this device has no attributes."""
        if not self.is_block_device:
            self._change_attributes(lambda: os.setxattr(self._fd, name, value))
        return self.attribute(name) is not None

    def remove_attribute(self, name: str) -> None:
        """Remove the extended attribute `name`, durably, if there is one."""
        if not self.is_block_device:
            self._change_attributes(lambda: os.removexattr(self._fd, name))

    def _change_attributes(self, change: Callable[[], None]) -> None:
        with self._errors("change the attributes of"):
            try:
                change()
            except OSError as error:
                if error.errno not in _NO_ATTRIBUTES:
                    raise
            os.fsync(self._fd)

    def _errors(self, action: str) -> contextlib.AbstractContextManager[None]:
        return DeviceError.on_os_error(action, self.path)


def open_source(path: str) -> Device:
    """Open the regular file or block device at `path` for reading, and return its Device.

    Raises DeviceError if `path` cannot be opened, is anything else, or is a regular file among devices.
    """
    device = open_device(path, os.O_RDONLY, Device)
    try:
        check_kind(device)
    except BaseException:
        device.close()
        raise
    return device


def check_kind(device: Device) -> None:
    """Raise DeviceError if `device` is a regular file in /dev, or on another file system of device nodes.

    A misspelt device name creates such a file, which lies in memory.
    """
    if not device.is_block_device and holds_devices(os.path.dirname(os.path.realpath(device.path))):
        raise DeviceError(
            f"{device.path} is a regular file in memory, not a device. It was made for a misspelt name, or for a "
            "device that was not active. Remove it, and find the device (lsblk, lvchange -ay VG/LV)"
        )


def open_device(path: str, flags: int, kind: type[Opened]) -> Opened:
    """Open the regular file or block device at `path`. Return an object of the class `kind`: Device, or a subclass.

    `flags`: as for open(2). O_EXCL applies to a block device only. O_CREAT creates a file with mode 0600.
    Raises DeviceError if `path` is anything else, or cannot be opened.
    """
    mode = stat.S_IFREG  # of a missing file: the open creates it, or reports that it is missing
    with DeviceError.on_os_error("open", path), contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode  # before the open, which would wait at a FIFO for its other end
    if stat.S_ISDIR(mode):
        raise DeviceError(f"{path} is a folder, neither a regular file nor a block device: name a file in it")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise DeviceError(f"{path} is neither a regular file nor a block device")
    if not stat.S_ISBLK(mode):
        flags &= ~os.O_EXCL  # for a file it has another meaning
    with DeviceError.on_os_error("open", path):
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        return kind(path, fd)
    except BaseException:
        os.close(fd)
        raise


def _file_id(status: os.stat_result) -> tuple[int, int]:
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
