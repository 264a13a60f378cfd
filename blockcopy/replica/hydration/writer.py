"""The writer: writes what the source has sent, and what the user writes, to the destination.

No other part of the replica writes to the destination. Here the two meet, under one lock:

    a landing       bytes of the source. Written only where blocks are missing, and pages are neither the user's
                    nor claimed. A landing never waits
    a claim         the range of a user's write, from before the write until the block map knows of it. The write
                    waits until no landing is in its range. These are local writes, so it never waits for the source

So nothing of the source lands on a page of the user, whatever was in flight when the write came.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent, subtract
from blockcopy.block.write_behind import WriteBehind
from blockcopy.errors import DeviceError, ReadOnlyError
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.tasks import one_at_a_time

Run = Callable[[Callable[[], None]], Awaitable[None]]
"""The type of async functions that call a function in a thread."""

_ZEROS_STEP = 64 * 1024 * 1024
"""Most bytes of zeros that are written at once. A user's write in their range waits for so many."""


class Writer:
    """The sink of all fetches, and the writer of the user's bytes.

    The receiving thread of each link calls `data` and `zeros`. Trio tasks call `claim`, `release` and `sync`.
    """

    def __init__(self, device: Destination, blockmap: BlockMap, *, sparse: bool) -> None:
        """Make a writer for the destination `device`. Call from trio's thread.

        `blockmap`: what is present and what is the user's. Neither is written again by a landing.
        `sparse`: write zeros as holes if the device can have holes.
        """
        self.device = device
        """The destination."""
        self.blockmap = blockmap
        """The blocks that are present, and the pages that are the user's."""
        self._sparse = sparse
        self._token = trio.lowlevel.current_trio_token()
        self._write_behind = WriteBehind(device)
        self._lock = threading.Lock()  # of what follows
        self._landed = threading.Condition(self._lock)
        self._landings: list[Extent] = []
        self._claims: list[Extent] = []
        self._released: trio.Event | None = None  # set by the next release, if somebody waits for one
        self.failure: DeviceError | None = None
        """The error of the sync after which the user's writes are refused. None if they are accepted."""
        self._dirty = True  # an earlier run may have left unsynced writes
        self.unsynced = trio.Event()
        """Set by the first write after a sync began. Replaced by a sync."""
        self.unsynced.set()

    def data(self, position: int, payload: Buffer) -> None:
        """Write `payload`, bytes of the source, at `position`, where blocks are missing and pages not the user's.

        Thread-safe. Raises DeviceError if the write fails.
        """
        view = memoryview(payload)
        with self._landing(Extent(position, len(view))) as room:
            for extent in room:
                start = extent.offset - position
                self.device.write(extent.offset, view[start : start + extent.length])
                self._write_behind.add(extent)

    def zeros(self, position: int, length: int) -> None:
        """Write `length` zeros at `position`, where blocks are missing and pages not the user's.

        Thread-safe. Raises DeviceError if the write fails.
        """
        for start in range(position, position + length, _ZEROS_STEP):
            with self._landing(Extent(start, min(_ZEROS_STEP, position + length - start))) as room:
                for extent in room:
                    self.device.write_zeros(*extent, sparse=self._sparse)
                    self._write_behind.add(extent)

    @contextmanager
    def _landing(self, extent: Extent) -> Iterator[list[Extent]]:
        """Keep the user's writes out of `extent`, whole blocks. Yields the parts that may be written."""
        with self._lock:
            room = self.blockmap.room(extent)
            if self._claims:
                room = subtract(room, self._claims)
            self._landings.append(extent)
            if room and not self._dirty:
                self._dirty = True
                self._token.run_sync_soon(self.unsynced.set)
        try:
            yield room
        finally:
            with self._lock:
                self._landings.remove(extent)
                self._landed.notify_all()

    def claim(self, extent: Extent) -> bool:
        """Keep landings out of `extent`, the range of a user's write. Call from trio's thread.

        Returns whether the write can begin at once. If not, it is `write` that waits.
        """
        with self._lock:
            self._claims.append(extent)
            self._dirty = True
            self.unsynced.set()
            return not self._is_landing(extent)

    def write(self, extent: Extent, data: Buffer) -> None:
        """Write the user's `data` at `extent`, which was claimed, when no landing is in its range any more.

        Blocks: call in a thread. Raises DeviceError if the write fails.
        """
        with self._lock:
            self._landed.wait_for(lambda: not self._is_landing(extent))
        self.write_at_once(extent, data)

    def write_at_once(self, extent: Extent, data: Buffer) -> None:
        """Write the user's `data` at `extent`, of which `claim` said that it need not wait.

        Raises DeviceError if the write fails.
        """
        self.device.write(extent.offset, data)

    def _is_landing(self, extent: Extent) -> bool:
        if not self._landings:
            return False
        return any(each.offset < extent.end and extent.offset < each.end for each in self._landings)

    def claimed_blocks(self) -> frozenset[int]:
        """Return the block numbers of all claims. Call from trio's thread."""
        span = self.blockmap.geometry.span
        return frozenset(block for claim in self._claims for block in span(*claim))

    def release(self, extent: Extent) -> None:
        """End the claim on `extent`. Call from trio's thread, after the block map knows of the write."""
        with self._lock:
            self._claims.remove(extent)
        if self._released is not None:
            self._released.set()
            self._released = None

    async def await_release(self, blocks: Sequence[int]) -> None:
        """Wait until all claims have ended that are in `blocks`, numbers, now. Call from trio's thread."""
        if not self._claims:
            return
        span, wanted = self.blockmap.geometry.span, frozenset(blocks)
        known = [claim for claim in self._claims if not wanted.isdisjoint(span(*claim))]
        while any(each is claim for claim in known for each in self._claims):
            if self._released is None:
                self._released = trio.Event()
            await self._released.wait()

    def refuse_writes(self, error: DeviceError) -> None:
        """Refuse all later writes of the user, because a sync has failed with `error`. Reads go on."""
        self.failure = self.failure or error

    def check_accepts(self) -> None:
        """Raise ReadOnlyError if the user's writes are refused."""
        if self.failure is not None:
            raise ReadOnlyError(
                f"{self.device.path} takes no more writes, because a sync has failed: {self.failure}"
            )

    async def sync(self, run: Run = one_at_a_time.run, *, times: bool = True) -> bool:
        """Make all bytes durable whose write has returned. Returns False if they were durable before.

        `run`: an async function that calls its argument in a thread. Not called if nothing needs a sync.
        `times`: make the times of a destination file durable too.
        Raises DeviceError if the sync fails, or if another program has written to the destination.
        """
        with self._lock:
            was_dirty = self._dirty
            # The sync may miss what is written meanwhile.
            self._dirty = bool(self._landings or self._claims)
            if was_dirty and not self._dirty:
                self.unsynced = trio.Event()
        try:
            if was_dirty:
                await run(partial(self.device.sync, times=times))
            else:
                self.device.check_without_blocking()
        except DeviceError:
            with self._lock:
                self._dirty = True
            self.unsynced.set()
            raise
        return was_dirty
