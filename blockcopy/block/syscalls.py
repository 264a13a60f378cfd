"""Linux calls that the module `os` lacks. From fallocate(2), sync_file_range(2), mmap(2) and madvise(2).

`ctypes` is loaded when first needed: not every Python has it, and all can be done without. While a call of
it waits, other threads run, which is not so for the module `mmap`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import re
import sys
import weakref
from typing import Any

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WHOLLY = 7  # wait, write, wait
_MADV_POPULATE_READ = 22
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
"""From linux/magic.h."""


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Have zeros there, without space where the file system can; of a block device only where its own
    zeroing is at hand, and is sure. OSError (EOPNOTSUPP, EINVAL, …) where it cannot be had."""
    _call("fallocate", fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have the dirty pages there on their way to the disk; waits for none of them. OSError."""
    _call("sync_file_range", fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def write_back(fd: int, offset: int, length: int) -> None:
    """Write the dirty pages of a range to the disk; return when the disk has them. Raises OSError."""
    _call("sync_file_range", fd, offset, length, _SYNC_FILE_RANGE_WHOLLY)


def map_to_read(fd: int, length: int) -> tuple[int, memoryview]:
    """The first `length` bytes of `fd` where the page cache has them: their address, and a view. OSError.

    They stay mapped until the last view of them is gone. To touch what the device has not, or cannot read,
    kills by SIGBUS: see `populate`. Raises OSError (EOPNOTSUPP) if `populate` is not safe on this kernel.
    """
    if not populate_returns(os.uname().release):
        raise OSError(errno.EOPNOTSUPP, "this kernel would retry a read error for ever")
    if length > sys.maxsize:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    address = _function("mmap")(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise _error()
    import ctypes

    mapped = (ctypes.c_char * length).from_address(address)
    # Not at exit: a thread may still be looking at it.
    weakref.finalize(mapped, _function("munmap"), address, length).atexit = False
    return address, memoryview(mapped).cast("B").toreadonly()


def populate(address: int, length: int) -> None:
    """Bring `length` mapped bytes at `address`, whole pages, into memory. Raises OSError: EFAULT if the device
    ends before, or cannot read them."""
    _call("madvise", address, length, _MADV_POPULATE_READ)


def populate_returns(release: str) -> bool:
    """Return True if MADV_POPULATE_READ of the kernel `release` fails at a read error.

    Linux 5.14 to 6.8 retry it for ever, and the thread hears no signal but SIGKILL. Commit 631426ba1d45 mended
    6.9 and 6.6.30; 6.1 and 5.15 never got it. The number that a distribution puts behind a release, as in
    6.1.0-50, does not tell what was ported back: then False.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    version = tuple(int(number or 0) for number in found.groups()) if found else ()
    return version >= (6, 9) or (6, 6, 30) <= version < (6, 7)


def unpopulate(address: int, length: int) -> None:
    """Those pages count no longer as our memory; who touches them has them again."""
    _call("madvise", address, length, mmap.MADV_DONTNEED)


def has_exact_times(fd: int) -> bool:
    """Return whether the file system of `fd` is known to keep both times of a file exactly.

    A write moves them at once, and no program can put the ctime back. FAT, exFAT and sshfs give the mtime as ctime.
    """
    with contextlib.suppress(ImportError, OSError):
        import ctypes

        found = (ctypes.c_long * 32)()  # struct statfs is shorter, and begins with the type
        return not _function("fstatfs")(fd, ctypes.addressof(found)) and found[0] & 0xFFFFFFFF in _EXACT_TIMES
    return False


def _call(name: str, *arguments: int) -> None:
    if _function(name)(*arguments):
        raise _error()


def _error() -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@functools.cache
def _function(name: str) -> Any:
    """A function of libc that returns other than 0 where it fails. OSError where it cannot be had."""
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
            "fstatfs": [number, address],
        }
        function = getattr(libc, f"{name}64", None) or getattr(libc, name)
        function.argtypes = arguments[name]
        if name == "mmap":
            function.restype = address
    except (ImportError, OSError, AttributeError) as error:
        raise OSError(errno.EOPNOTSUPP, f"{name} cannot be called here") from error
    return function
