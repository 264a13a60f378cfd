"""Linux calls that the module `os` lacks. From fallocate(2) and sync_file_range(2).

`ctypes` is loaded when first needed: not every Python has it, and who only reads needs none of this.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Any

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Have zeros there, without space where the file system can; of a block device only where its own
    zeroing is at hand, and is sure. OSError (EOPNOTSUPP, EINVAL, …) where it cannot be had."""
    _call("fallocate", fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have the dirty pages there on their way to the disk; waits for none of them. OSError."""
    _call("sync_file_range", fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def _call(name: str, fd: int, *arguments: int) -> None:
    function, error_of = _function(name)
    if function(fd, *arguments):
        number = error_of()
        raise OSError(number, os.strerror(number))


@functools.cache
def _function(name: str) -> tuple[Any, Any]:
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        function = getattr(libc, f"{name}64", None) or getattr(libc, name)
    except (ImportError, OSError, AttributeError) as error:
        raise OSError(errno.EOPNOTSUPP, f"{name} cannot be called here") from error
    number, offset = ctypes.c_int, ctypes.c_int64
    if name == "fallocate":
        function.argtypes = [number, number, offset, offset]
    else:
        function.argtypes = [number, offset, offset, number]
    return function, ctypes.get_errno
