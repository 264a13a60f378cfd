"""The pages that the user wrote, those that a failed sync lost, and those that are not synced yet. No I/O.

A page is 4 KiB of the device. Of a missing block, the set of the user's pages is exact: the source's bytes may
fill only the rest. Of a present block, one page says that the block is the user's. Further writes to such a block
change nothing, so there is nothing to record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.replica.state.bits import Bits

PAGE_SIZE = 4096
"""Bytes of a page: the unit that a user's writes are tracked in."""


class UserPages:
    """The pages of one destination that are the user's. Not thread-safe."""

    def __init__(self, geometry: Geometry) -> None:
        """Begin with no page of the user. `geometry`: size and block size of the destination."""
        self._geometry = geometry
        self._count = -(-geometry.size // PAGE_SIZE)
        self._pages = Bits()
        self._blocks = Bits()  # that have at least one page
        self._lost = Bits()  # among _pages
        self._unsynced = Bits()  # written since the last sync began
        self._syncing = Bits()  # written before that
        self.written_bytes = 0
        """Bytes of all blocks with a page of the user."""

    def touched(self, extent: Extent) -> range:
        """Return the pages that `extent`, which is not empty, touches."""
        return range(extent.offset // PAGE_SIZE, -(-extent.end // PAGE_SIZE))

    def covered(self, extent: Extent) -> range:
        """Return the pages that lie wholly in `extent`. The last page of the device may be short."""
        stop = self._count if extent.end >= self._geometry.size else extent.end // PAGE_SIZE
        return range(-(-extent.offset // PAGE_SIZE), stop)

    def cut(self, extent: Extent) -> Iterator[Extent]:
        """Yield the pages at the edges of `extent` that it covers in part, as extents: two at most."""
        covered = self.covered(extent)
        for page in sorted({self.touched(extent)[0], self.touched(extent)[-1]}):
            if page not in covered:
                yield Extent(page * PAGE_SIZE, min(PAGE_SIZE, self._geometry.size - page * PAGE_SIZE))

    def has(self, extent: Extent) -> bool:
        """Return whether all pages that `extent` touches are the user's."""
        return bool(self._pages) and self._pages.has_all(self.touched(extent))

    def has_block(self, block: int) -> bool:
        """Return whether a page of `block`, a number, is the user's."""
        return block in self._blocks

    def block_runs(self) -> Iterator[range]:
        """Yield the ranges of blocks that have a page of the user, ascending. Neighbours may be separate."""
        return self._blocks.runs()

    def count_blocks(self, blocks: range) -> int:
        """Return how many of the range `blocks` have a page of the user."""
        return self._blocks.count_in(blocks)

    def is_lost(self, extent: Extent) -> bool:
        """Return whether a failed sync lost a page that `extent` touches."""
        return bool(self._lost) and self._lost.has_any(self.touched(extent))

    @property
    def lost_bytes(self) -> int:
        """Bytes of the pages that a failed sync lost."""
        return self._lost.count() * PAGE_SIZE

    def others(self, extent: Extent) -> Iterator[Extent]:
        """Yield the parts of `extent`, whole blocks that are missing, that are not the user's."""
        if not self._blocks.has_any(self._geometry.span(*extent)):
            yield extent
            return
        for pages in self._pages.gaps(self.touched(extent)):
            start = max(extent.offset, pages.start * PAGE_SIZE)
            yield Extent(start, min(extent.end, pages.stop * PAGE_SIZE) - start)

    def add(self, extent: Extent) -> None:
        """Add the pages that `extent` touches."""
        self._add(self.touched(extent))

    def _add(self, pages: range) -> None:
        self._pages.add(pages)
        per_block = self._geometry.block_size // PAGE_SIZE
        for block in range(pages.start // per_block, (pages.stop - 1) // per_block + 1):
            if self._blocks.add(range(block, block + 1)):
                self.written_bytes += self._geometry.extent(block).length

    def note_write(self, extent: Extent) -> None:
        """Note that the user wrote `extent`, which no sync has covered yet. Pages that are covered are not lost."""
        self._unsynced.add(self.touched(extent))
        if self._lost:
            self._lost.discard(self.covered(extent))

    def begin_sync(self) -> None:
        """Note that a sync begins, which covers all writes until now."""
        self._syncing, self._unsynced = self._unsynced, Bits()

    def end_sync(self) -> None:
        """Note that the sync has succeeded."""
        self._syncing = Bits()

    def lose_unsynced(self) -> None:
        """Count all pages as lost that the user wrote since the last sync that succeeded."""
        for written in (self._syncing, self._unsynced):
            self._lost.update(written)
            for pages in written.runs():
                self._add(pages)
        self._syncing, self._unsynced = Bits(), Bits()

    def lose(self, extent: Extent) -> None:
        """Count the pages that `extent` touches as the user's, and as lost."""
        self._add(self.touched(extent))
        self._lost.add(self.touched(extent))

    def take_changes(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Return the rows (number → bits) of the user's and of the lost pages that changed since the last call."""
        return self._pages.take_changes(), self._lost.take_changes()

    def restore_changes(self, pages: Mapping[int, bytes], lost: Mapping[int, bytes]) -> None:
        """Count the rows `pages` and `lost` as changed again, because they could not be recorded."""
        self._pages.restore_changes(pages)
        self._lost.restore_changes(lost)

    def resume(self, pages: Mapping[int, bytes], lost: Mapping[int, bytes]) -> None:
        """Add recorded rows (number → bits) of the user's `pages`, and of the `lost` ones.

        Raises ValueError if the device has no such pages.
        """
        self._pages.load(pages, self._count)
        self._lost.load(lost, self._count)
        for run in self._pages.runs():
            self._add(run)
