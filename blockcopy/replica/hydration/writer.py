"""The writer: write what the source has sent to the destination, and track whether it is durable.

No other part of the replica writes to the destination.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent
from blockcopy.block.write_behind import WriteBehind
from blockcopy.errors import DeviceError
from blockcopy.replica.state.blockmap import BlockMap


class Writer:
    """The sink of all fetches.

    The receiving thread of each link calls `data` and `zeros`. Trio tasks call `sync`.
    """

    def __init__(self, device: Destination, blockmap: BlockMap, *, sparse: bool) -> None:
        """Make a writer for the destination `device`. Call from trio's thread.

        `blockmap`: the present blocks, which are not written again.
        `sparse`: write zeros as holes if the device can have holes.
        """
        self.device = device
        """The destination."""
        self.blockmap = blockmap
        """The blocks that are present."""
        self._sparse = sparse
        self._token = trio.lowlevel.current_trio_token()
        self._write_behind = WriteBehind(device)
        self._lock = threading.Lock()  # of what follows
        self._writes = 0  # under way
        self._dirty = True  # an earlier run may have left unsynced writes
        self.unsynced = trio.Event()
        """Set by the first write after a sync began. Replaced by a sync."""
        self.unsynced.set()

    def data(self, position: int, payload: Buffer) -> None:
        """Write `payload`, bytes of the source, at `position`, unless all their blocks are present.

        Another link may have brought the same bytes before.
        Thread-safe. Raises DeviceError if the write fails.
        """
        self._write(position, len(payload), lambda: self.device.write(position, payload))

    def zeros(self, position: int, length: int) -> None:
        """Write `length` zeros at `position`, unless all their blocks are present.

        Thread-safe. Raises DeviceError if the write fails.
        """
        self._write(position, length, lambda: self.device.write_zeros(position, length, sparse=self._sparse))

    def _write(self, position: int, length: int, write: Callable[[], None]) -> None:
        """Call `write`, which writes `length` bytes at `position`, unless all their blocks are present."""
        if not self.blockmap.any_missing(self.blockmap.geometry.span(position, length)):
            return
        with self._lock:
            self._writes += 1
            if not self._dirty:
                self._dirty = True
                self._token.run_sync_soon(self.unsynced.set)
        try:
            write()
        finally:
            with self._lock:
                self._writes -= 1
        self._write_behind.add(Extent(position, length))

    async def sync(self) -> bool:
        """Make all bytes durable whose write has returned. Returns False if they were durable before.

        Raises DeviceError if the sync fails, or if another program has written to the destination.
        """
        with self._lock:
            was_dirty = self._dirty
            self._dirty = self._writes > 0  # the sync may miss what is written meanwhile
            if was_dirty and not self._dirty:
                self.unsynced = trio.Event()
        try:
            if was_dirty:
                await trio.to_thread.run_sync(self.device.sync)
            else:
                self.device.check_without_blocking()
        except DeviceError:
            with self._lock:
                self._dirty = True
            self.unsynced.set()
            raise
        return was_dirty
