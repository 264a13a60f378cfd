"""Write-behind: written bytes are sent to the disk while more are coming, and leave the page cache behind that.

A sync at the end then has little to wait for. Without drop-behind, a copy larger than the memory would evict
everything else from the page cache.
"""

from __future__ import annotations

import threading

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent, join_extents

_BATCH_BYTES = 8 * 1024 * 1024
"""Written bytes for which write-back is started at once."""

_GAP_BYTES = 64 * 1024 * 1024
"""Bytes between two writes, at most, that are written back by one system call. The kernel searches the gap."""


class WriteBehind:
    """Write-back of a device in batches, and drop-behind if the device exceeds the page cache. Thread-safe."""

    def __init__(self, device: Device, *, sequential: bool = False) -> None:
        """Write back nothing of `device` yet.

        `sequential`: the writes ascend and nobody reads the device, so everything before a batch is dropped.
        Otherwise only the previous batch is dropped. Most of that batch is on the disk by then.
        """
        self._device = device
        self._sequential = sequential
        self._drops = device.exceeds_cache()
        self._lock = threading.Lock()  # guards the attributes below
        self._batch: list[Extent] = []
        self._batch_bytes = 0
        self._previous: list[Extent] = []

    def add(self, extent: Extent) -> None:
        """Note that `extent` was written. Starts the write-back of the batch if that has become large enough."""
        with self._lock:
            self._batch.append(extent)
            self._batch_bytes += extent.length
            if self._batch_bytes < _BATCH_BYTES:
                return
            extents, self._batch, self._batch_bytes = join_extents(sorted(self._batch)), [], 0
            previous, self._previous = self._previous, extents
        for span in join_extents(extents, gap=_GAP_BYTES):
            self._device.start_writeback(*span)
        if self._drops:
            for passed in [Extent(0, extents[0].offset)] if self._sequential else previous:
                if passed.length:  # to the kernel, 0 means all up to the end
                    self._device.drop_behind(*passed)
