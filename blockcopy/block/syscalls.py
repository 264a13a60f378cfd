"""Linux system calls that `os` lacks: fallocate, sync_file_range, mmap, mlockall, fstatfs, prctl, some ioctls.

Each function raises OSError, with EOPNOTSUPP if its call is not available. Every caller can do without the call.
`ctypes` is loaded by the first call, because not every Python has it. Other threads run while a call waits, unlike
in the module `mmap`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import re
import resource
import sys
import weakref
from typing import Any

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WHOLLY = 7  # WAIT_BEFORE | WRITE | WAIT_AFTER
_MADV_POPULATE_READ = 22
_PR_SET_IO_FLUSHER = 57
_MCL_ALL_ON_FAULT = 7  # CURRENT | FUTURE | ONFAULT
_MAP_FAILED = 2 * sys.maxsize + 1
_EXACT_TIMES = (
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # XFS
    0x9123683E,  # btrfs
    0x01021994,  # tmpfs
    0xF2F52010,  # F2FS
    0x2FC12FC1,  # ZFS
    0xCA451A4E,  # bcachefs
    0x794C7630,  # overlayfs
)
"""Types of file systems that keep both times of a file exactly. The numbers are from linux/magic.h."""

_UUID_QUERIES = (
    (0x80111500, 17, 1),  # FS_IOC_GETFSUUID, Linux 6.9
    (0x80705864, 112, 64),  # XFS_IOC_FSGEOMETRY_V1
)
"""Ioctls that tell the UUID of a file system: number, bytes that are filled, and offset of the UUID."""


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Replace `length` bytes at `offset` of file `fd` by a hole, which reads as zeros and takes no space.

    On a block device, the kernel zeroes the range if the device has a reliable command for that.
    Raises OSError (EOPNOTSUPP, EINVAL, …) if the file system or device cannot do this.
    """
    _call("fallocate", fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def become_io_flusher() -> None:
    """Tell the kernel that this thread writes for others, and so do all threads and processes that it starts.

    Its allocations then do not wait for the write-back of what it serves. It may exceed the limit of dirty pages
    a little. Otherwise both could wait for each other. Linux 5.6; needs CAP_SYS_RESOURCE.
    Raises OSError if that is not possible.
    """
    _call("prctl", _PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def lock_memory() -> None:
    """Keep the memory of this process out of swap: what it uses now, and what it will use.

    A mapped device is left out: see `map_to_read`. Child processes lock nothing. Linux 4.4; needs CAP_IPC_LOCK.
    Raises OSError if that is not possible.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # Without CAP_IPC_LOCK, memory above the limit could not be allocated later. A limit of 0 lets mlockall fail.
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    try:
        _call("mlockall", _MCL_ALL_ON_FAULT)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, hard))


def write_back(fd: int, offset: int, length: int, *, wait: bool) -> None:
    """Write the dirty pages of `length` bytes at `offset` of file `fd` to the disk.

    `wait`: return when the pages are written. Otherwise this call only starts to write them. Raises OSError if the
    kernel refuses, or if a write fails.
    """
    _call("sync_file_range", fd, offset, length, _SYNC_FILE_RANGE_WHOLLY if wait else _SYNC_FILE_RANGE_WRITE)


def map_to_read(fd: int, length: int) -> tuple[int, memoryview]:
    """Map the first `length` bytes of file `fd` into memory. Return a tuple: address, and read-only memoryview.

    The bytes stay mapped until the last view is gone. A read of bytes that the device lacks, or cannot read, kills
    the process by SIGBUS. Call `populate()` first. Raises OSError (EOPNOTSUPP) if `populate()` can hang on this
    kernel.
    """
    if not populate_returns(os.uname().release):
        raise OSError(errno.EOPNOTSUPP, "this kernel would retry a read error forever")
    if length > sys.maxsize:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    address = _function("mmap")(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise _error()
    import ctypes

    mapped = (ctypes.c_char * length).from_address(address)
    # Not at exit: a thread may still read it.
    weakref.finalize(mapped, _function("munmap"), address, length).atexit = False
    _call("munlock", address, length)  # `lock_memory` would keep all of the device
    return address, memoryview(mapped).cast("B").toreadonly()


def populate(address: int, length: int) -> None:
    """Read `length` mapped bytes at `address`, the start of a page, into the page cache.

    Raises OSError (EFAULT) if the device ends before these bytes or cannot read them.
    """
    _call("madvise", address, length, _MADV_POPULATE_READ)


def populate_returns(release: str) -> bool:
    """Return True if MADV_POPULATE_READ of kernel `release`, such as "6.1.0", returns after a read error.

    Linux 5.14 to 6.8 retry forever, and the thread reacts to no signal but SIGKILL. Commit 631426ba1d45 fixed
    6.9 and 6.6.30, but neither 6.1 nor 5.15. A distribution's release number, such as 6.1.0-50, does not show
    which fixes were backported: returns False.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    version = tuple(int(number or 0) for number in found.groups()) if found else ()
    return version >= (6, 9) or (6, 6, 30) <= version < (6, 7)


def unpopulate(address: int, length: int) -> None:
    """Unmap the pages of `length` mapped bytes at `address`, until the next access maps them again.

    Raises OSError if the memory is locked.
    """
    _call("madvise", address, length, mmap.MADV_DONTNEED)


def has_exact_times(fd: int) -> bool:
    """Return True if the file system of file `fd` is known to keep mtime and ctime exactly.

    There every write changes both at once, and no program can set the ctime back. FAT, exFAT and sshfs report
    the mtime as the ctime: returns False.
    """
    with contextlib.suppress(ImportError, OSError):
        import ctypes

        found = (ctypes.c_long * 32)()  # struct statfs is shorter, and begins with the type
        return not _function("fstatfs")(fd, ctypes.addressof(found)) and found[0] & 0xFFFFFFFF in _EXACT_TIMES
    return False


def file_system_uuid(fd: int) -> str:
    """Return the UUID of the file system of file `fd`, in hexadecimal. Returns "" if it is unknown."""
    for query, length, offset in _UUID_QUERIES:
        answer = bytearray(length)
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, query, answer)
            if any(found := answer[offset : offset + 16]):
                return found.hex()
    return ""


def _call(name: str, *arguments: int) -> None:
    if _function(name)(*arguments):
        raise _error()


def _error() -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@functools.cache
def _function(name: str) -> Any:
    """Return the libc function `name`. Raises OSError (EOPNOTSUPP) if there is none, or no ctypes."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        number, size, offset, address = ctypes.c_int, ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
        arguments = {
            "fallocate": [number, number, offset, offset],
            "sync_file_range": [number, offset, offset, number],
            "mmap": [address, size, number, number, number, offset],
            "munmap": [address, size],
            "madvise": [address, size, number],
            "mlockall": [number],
            "munlock": [address, size],
            "fstatfs": [number, address],
            "prctl": [number, offset, offset, offset, offset],
        }
        function = getattr(libc, f"{name}64", None) or getattr(libc, name)
        function.argtypes = arguments[name]
        if name == "mmap":
            function.restype = address
    except (ImportError, OSError, AttributeError) as error:
        raise OSError(errno.EOPNOTSUPP, f"{name} is not available") from error
    return function
