"""The blocks of a device that a plan wants, and how many of them are present."""

from __future__ import annotations

from collections.abc import Sequence

from blockcopy.replica.state.blockmap import BlockMap


class WantedBlocks:
    """The `ranges` of block numbers, ascending, that are to be present in a block map."""

    def __init__(self, blockmap: BlockMap, ranges: Sequence[range]) -> None:
        self._blockmap = blockmap
        self.ranges = ranges
        self.bytes = sum(map(blockmap.geometry.bytes_of, ranges))
        """Bytes of all these blocks."""

    @property
    def present_bytes(self) -> int:
        """Bytes of the wanted blocks that are present."""
        geometry = self._blockmap.geometry
        if self.bytes == geometry.size:
            return self._blockmap.present_bytes
        counts = ((blocks, self._blockmap.count(blocks)[0]) for blocks in self.ranges)
        return sum(min(count * geometry.block_size, geometry.bytes_of(blocks)) for blocks, count in counts)

    def bytes_to_come(self) -> float:
        """Return the bytes that the source will probably send: those missing, of which so many differed so far."""
        blockmap = self._blockmap
        seen = blockmap.present_bytes - blockmap.resumed_bytes
        return (self.bytes - self.present_bytes) * (blockmap.fetched_bytes / seen if seen else 1)

    @property
    def complete(self) -> bool:
        """Whether all wanted blocks are present."""
        return self._blockmap.complete or not any(map(self._blockmap.any_missing, self.ranges))
