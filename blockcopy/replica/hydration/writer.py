"""Writes what the source has sent to the destination, and knows whether that is on the disk yet.

It is the sink of every flight: called in the threads that receive, one for each link. `sync` is for
tasks. `unsynced` is set by the first write after a sync began.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent, Geometry
from blockcopy.block.write_behind import WriteBehind
from blockcopy.errors import DeviceError
from blockcopy.replica.state.blockmap import BlockMap


class Writer:
    """See the module."""

    def __init__(self, device: Destination, geometry: Geometry, blockmap: BlockMap, *, sparse: bool) -> None:
        self._device = device
        self._geometry = geometry
        self._blockmap = blockmap
        self._sparse = sparse
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()  # of what follows
        self._writing = 0
        self._dirty = True  # by an earlier run, for all we know
        self._write_behind = WriteBehind(device)
        self.unsynced = trio.Event()
        self.unsynced.set()

    def data(self, position: int, payload: Buffer) -> None:
        """The source's bytes; those that are here already, by way of the other link, are dropped. DeviceError."""
        if self._is_wanted(position, len(payload)):
            with self._written(position, len(payload)):
                self._device.write(position, payload)

    def zeros(self, position: int, length: int) -> None:
        """As `data`."""
        if self._is_wanted(position, length):
            with self._written(position, length):
                self._device.write_zeros(position, length, sparse=self._sparse)

    def _is_wanted(self, position: int, length: int) -> bool:
        return self._blockmap.any_missing(self._geometry.span(position, length))

    @contextmanager
    def _written(self, position: int, length: int) -> Iterator[None]:
        with self._lock:
            self._writing += 1
            if not self._dirty:
                self._dirty = True
                self._token.run_sync_soon(self.unsynced.set)
        try:
            yield
        finally:
            with self._lock:
                self._writing -= 1
        self._write_behind.add(Extent(position, length))

    async def sync(self) -> bool:
        """Return when all that was written before is durable. Returns False if it was before.

        Raises DeviceError if the device cannot say so, or somebody else has written.
        """
        with self._lock:
            was_dirty = self._dirty
            self._dirty = self._writing > 0  # a sync need not have what is written while it runs
            if was_dirty and not self._dirty:
                self.unsynced = trio.Event()
        try:
            if was_dirty:
                await trio.to_thread.run_sync(self._device.sync)
            else:
                self._device.check_without_blocking()
        except DeviceError:
            with self._lock:
                self._dirty = True
            self.unsynced.set()
            raise
        return was_dirty
