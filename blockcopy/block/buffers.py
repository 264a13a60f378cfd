"""Bytes in memory: the types that hold them, zeros, and buffers that are used again."""

from __future__ import annotations

import mmap
from typing import Union

Buffer = Union[bytes, bytearray, memoryview]

ZEROS = bytes(1024 * 1024)
"""`ZEROS.startswith(data)` tells whether `data`, of at most this length, is all zeros."""


class Buffers:
    """Buffers of `size` bytes that are used again; as many as were ever in use at once. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """Return a buffer whose content may be anything. Pages of it that are never used take no memory."""
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def give(self, buffer: memoryview) -> None:
        """Take back a buffer of which nothing is needed any more."""
        self._free.append(buffer)
