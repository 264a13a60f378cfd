"""Bytes in memory: their types, a block of zeros, and a pool of buffers."""

from __future__ import annotations

import mmap
from typing import Union

Buffer = Union[bytes, bytearray, memoryview]

ZEROS = bytes(1024 * 1024)
"""A MiB of zeros. `ZEROS.startswith(data)` is true if `data`, of at most this length, is all zeros."""


class BufferPool:
    """A pool of reusable buffers of `size` bytes. It grows as needed and never shrinks. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[memoryview] = []

    def acquire(self) -> memoryview:
        """Return a buffer of the pool's size: a memoryview with undefined content.

        Untouched pages take no memory.
        """
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def release(self, buffer: memoryview) -> None:
        """Return `buffer` to the pool. The caller must not use it, or any part of it, afterwards."""
        self._free.append(buffer)
