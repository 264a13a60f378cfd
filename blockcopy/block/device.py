"""A file or block device as an array of bytes: each read and write is of full length or an error.

Nothing here keeps a position, so every method may be called from any thread at any time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from blockcopy.block import syscalls
from blockcopy.block.buffers import ZEROS, Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import DestinationLostError, DeviceError
from blockcopy.paths.places import holds_devices

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_HUGE_PAGE = 2 * 1024 * 1024
"""Or a multiple of it, on some machines."""


_WRITTEN_BACK = 256 * 1024 * 1024
"""Bytes written back between two looks at the clock."""


Opened = TypeVar("Opened", bound="Device")


class Device:
    """An open regular file or block device.

    `path` is kept for messages only; all I/O goes through the descriptor.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._nowait = getattr(os, "RWF_NOWAIT", 0)
        self._cached = memoryview(bytearray(0))
        self._mapped: tuple[int, memoryview] | None = None
        self._maps = True
        self._viewing = threading.Condition()  # of what follows
        self._views = 0
        self._dropping = False
        self.is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._mapped = None
        os.close(self._fd)

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for two paths that lead to the same device or file, whatever their names."""
        return _identity(os.fstat(self._fd))

    def lock(self) -> None:
        """Lock the whole file for writing, as long as it is open. OSError where another program has it."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def status(self) -> os.stat_result:
        """What the kernel says of it now."""
        with self._errors("look at"):
            return os.fstat(self._fd)

    def check_in_place(self) -> None:
        """Raise DestinationLostError if the path leads elsewhere. May wait for any file system on the path."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError as error:
            raise DestinationLostError(
                f"{self.path} was removed while it was in use: what was opened there has no name. Start again"
            ) from error
        except OSError as error:
            raise DeviceError.from_os_error("look at", self.path, error) from error
        if _identity(found) != self.identity:
            raise DestinationLostError(
                f"{self.path} was replaced while it was in use: it leads to another file or device. Start again"
            )

    def file_system(self) -> str:
        """The identity of the file system it is on, which outlives a restart where that has a UUID."""
        with self._errors("find the file system of"):
            return f"{os.fstatvfs(self._fd).f_fsid:x}"

    def has_exact_times(self) -> bool:
        """Return whether the times of this file show each write of it, whatever a program does to hide it."""
        return not self.is_block_device and syscalls.has_exact_times(self._fd)

    def size(self) -> int:
        """Bytes there are now."""
        with self._errors("find the size of"):
            return os.lseek(self._fd, 0, os.SEEK_END)

    def grow(self, size: int) -> None:
        """Make a regular file `size` bytes long, with a hole at its end."""
        with self._errors(f"grow to {size} bytes the file"):
            os.ftruncate(self._fd, size)

    def read_up_to(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, or fewer only where the end comes before."""
        pieces = []
        with self._errors(f"read {length} bytes at {offset} of"):
            while length:
                piece = os.pread(self._fd, length, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. DeviceError where the device ends before."""
        data = self.read_up_to(offset, length)
        if len(data) != length:
            raise DeviceError(
                f"cannot read {length} bytes at {offset} of {self.path}: "
                f"it is shorter than it was, and ends after {len(data)}"
            )
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`: how many bytes, fewer than it holds only where the end comes before."""
        filled = 0
        with self._errors(f"read {len(buffer)} bytes at {offset} of"):
            while filled < len(buffer):
                count = os.preadv(self._fd, [buffer[filled:]], offset + filled)
                if not count:
                    break
                filled += count
        return filled

    def view(self, offset: int, length: int, extents: Sequence[Extent]) -> memoryview | None:
        """Map `length` bytes at `offset`, without copying them. Thread-safe.

        Only the ranges in `extents` are brought into memory; the caller must read no others. Call `release_view`
        after use: it reports whether all bytes came from the device. Returns None if the kernel cannot map them.
        Then `read` them instead, which reports the reason.

        Reading a view can kill the process by SIGBUS: if a file is truncated, or a disk fails, at that moment.
        """
        with self._viewing:
            if not self._maps or self._dropping:
                return None
            self._views += 1
        view = None
        try:
            if self._mapped is None or len(self._mapped[1]) < offset + length:
                self._mapped = syscalls.map_to_read(self._fd, self.size())
            address, mapped = self._mapped
            if len(mapped) >= offset + length:
                for extent in extents:
                    start = extent.offset - extent.offset % _PAGE_SIZE
                    syscalls.populate(address + start, extent.end - start)
                view = mapped[offset : offset + length]
        except OSError as error:
            # A device that failed once, or became shorter, may do so again, while it is looked at.
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOMEM):
                self._maps = False
        finally:
            if view is None:
                self._end_view(offset, length)
        return view

    def release_view(self, offset: int, length: int) -> bool:
        """That view is not looked at any more; whether all of it was the device's. DeviceError."""
        self._end_view(offset, length)
        return self.size() >= offset + length  # the last page of a file goes on beyond its end, with zeros

    def _end_view(self, offset: int, length: int) -> None:
        if self._mapped is not None:
            # The kernel may have mapped a huge page for a part of it, and that would stay: it counts as our
            # memory, and cannot be dropped from the cache. Who is looking at its other parts has them again.
            start, end = offset - offset % _HUGE_PAGE, offset + length
            self._unpopulate(start, end + -end % _HUGE_PAGE)
        with self._viewing:
            self._views -= 1
            self._viewing.notify_all()

    def _unpopulate(self, start: int, end: int) -> None:
        address, mapped = self._mapped or (0, b"")
        end = min(end, len(mapped))
        if start < end:
            with contextlib.suppress(OSError):  # refused of memory that somebody has locked
                syscalls.unpopulate(address + start, end - start)

    def splice_to(self, pipe: int, offset: int, length: int) -> int:
        """Some of those bytes into `pipe`, without a copy of them: how many, 0 at the end. OSError, and not
        a DeviceError, where that cannot be had, or the pipe is full."""
        return os.splice(self._fd, pipe, length, offset_src=offset, flags=os.SPLICE_F_NONBLOCK)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Where in there, ascending, there can be other bytes than zeros: what lies between is holes.

        All of it where the file system does not know.
        """
        end = offset + length
        while offset < end:
            try:
                start = os.lseek(self._fd, offset, os.SEEK_DATA)
                stop = os.lseek(self._fd, start, os.SEEK_HOLE) if start < end else end
            except OSError as error:
                if error.errno != errno.ENXIO:  # no more data; else it cannot tell
                    yield Extent(offset, end - offset)
                return
            if start >= end:
                return
            stop = min(max(stop, start + 1), end)
            yield Extent(start, stop - start)
            offset = stop

    def read_cached(self, offset: int, length: int) -> memoryview | None:
        """As `read`, but only what the page cache holds: None where the read would wait.

        A view of a buffer that is used again: good until the next call, and for one thread only.
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
            # Refused by this file system, tmpfs among them; a real fault shows in the plain read.
            self._nowait = 0
        return None

    def write(self, offset: int, data: Buffer) -> None:
        """All of `data` at `offset`."""
        view = memoryview(data)
        with self._errors(f"write {len(view)} bytes at {offset} of"):
            while view:
                written = os.pwrite(self._fd, view, offset)
                offset += written
                view = view[written:]

    def write_nothing(self) -> None:
        """Raise DeviceError if the kernel refuses any write, as to a read-only device or an active swap file."""
        with self._errors("write to"):
            os.pwrite(self._fd, b"", 0)

    def write_zeros(self, offset: int, length: int, *, sparse: bool) -> None:
        """Have `length` zeros at `offset`; with `sparse` as a hole, where that can be had."""
        if sparse and length:
            try:
                syscalls.punch_hole(self._fd, offset, length)
                return
            except OSError:
                pass  # not here, or not at such an offset; what is wrong with the device, a write tells
        end = offset + length
        for position in range(offset, end, len(ZEROS)):
            self.write(position, memoryview(ZEROS)[: end - position])

    def start_writeback(self, offset: int, length: int) -> None:
        """Have what was written there on its way to the disk, so that `sync` has less to wait for."""
        with contextlib.suppress(OSError):  # refused: then it is all the sync's. Errors show in the sync
            syscalls.start_writeback(self._fd, offset, length)

    def exceeds_cache(self) -> bool:
        """Whether it is so large that to read or write all of it would push all else out of the cache."""
        return self.size() > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def drop_behind(self, offset: int, length: int) -> None:
        """Those bytes will not be needed soon: their place in the cache is better used otherwise."""
        with contextlib.suppress(OSError):  # an advice, no more
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def drop_cache(self) -> None:
        """What was synced is read from the disk next time, as far as the kernel heeds it: not of what is being
        looked at, so that is waited for."""
        with self._viewing:
            self._dropping = True
            self._viewing.wait_for(lambda: not self._views)
        try:
            self._unpopulate(0, sys.maxsize)
            with self._errors("drop the cache of"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            self._dropping = False

    def write_back(self, end: float) -> bool:
        """Write all dirty pages to the disk: the next store through a mapping moves a file's times then.

        Returns False if pages are left when the monotonic clock reaches `end`, in seconds.
        """
        for offset in range(0, self.size(), _WRITTEN_BACK):
            if time.monotonic() > end:
                return False
            try:
                syscalls.write_back(self._fd, offset, _WRITTEN_BACK)
            except OSError:  # it cannot be called here, or an earlier write has failed, which a reader cannot mend
                with contextlib.suppress(OSError):
                    os.fdatasync(self._fd)
                break
        return True

    def sync(self) -> None:
        """Return when all that was written is on stable storage, and the times of a file too."""
        with self._errors("sync"):
            os.fsync(self._fd)

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DeviceError.from_os_error(action, self.path, error) from error


def open_source(path: str) -> Device:
    """`path` for reading; it has to be a regular file or a block device."""
    device = open_device(path, os.O_RDONLY, Device)
    try:
        check_kind(device)
    except BaseException:
        device.close()
        raise
    return device


def check_kind(device: Device) -> None:
    """Raise DeviceError if this is a regular file in memory, among the nodes of devices."""
    if not device.is_block_device and holds_devices(os.path.dirname(os.path.realpath(device.path))):
        raise DeviceError(
            f"{device.path} is a regular file in memory, and no device: it is left of a name that was misspelt, or "
            "of a device that was not active. Remove it, and look for the device (lsblk, lvchange -ay VG/LV)"
        )


def open_device(path: str, flags: int, kind: type[Opened]) -> Opened:
    """Open a regular file or a block device as a `kind`. O_EXCL in `flags` is for a block device only.

    Raises DeviceError if `path` is anything else, or cannot be opened.
    """
    try:
        # Looked at before it is opened: the open of a FIFO waits for somebody at its other end.
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG  # created by the open, or it tells
    except OSError as error:
        raise DeviceError.from_os_error("open", path, error) from error
    if stat.S_ISDIR(mode):
        raise DeviceError(f"{path} is a folder, neither a regular file nor a block device: name the file in it")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise DeviceError(f"{path} is neither a regular file nor a block device")
    if not stat.S_ISBLK(mode):
        flags &= ~os.O_EXCL  # of a file it means another thing
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeviceError.from_os_error("open", path, error) from error
    try:
        return kind(path, fd)
    except BaseException:
        os.close(fd)
        raise


def _identity(status: os.stat_result) -> tuple[int, int]:
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
