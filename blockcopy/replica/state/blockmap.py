"""The block map: which blocks of the destination are present, in one bit per block and counters. No I/O.

A present block has the source's bytes, or the user's. From then on it is the destination's for good: nothing is
fetched for it again. All others are missing, though some of their pages may be the user's (`user_pages`). A block
that the source cannot read is marked unreadable: it stays missing, and background hydration does not fetch it. The
hydrator knows which blocks are being fetched.

    missing ──── equal, fetched, zeros ───────────────────► present
       │                                                      │ a write of the user
       └─ a write ─► partial ─ the rest fetched or written ─► present, the user's

Changes are handed out for the state file. If the sync fails that should make them durable, they are undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from blockcopy.block.geometry import Extent, Geometry, block_runs
from blockcopy.block.unreadable_ranges import MAX_RANGES, UnreadableRanges
from blockcopy.replica.state.bits import add, next_clear
from blockcopy.replica.state.user_pages import UserPages

CHUNK_BLOCKS = 16384
"""Blocks of a chunk, whose bits are recorded together: 2 KiB for 2 GiB of the device."""

Kind = Literal["same", "fetched", "zero", "written"]
"""How a block became present: its bytes were equal, or were sent, or are zeros, which are not sent.

Or the user wrote all of it.
"""

_CHUNK_BYTES = CHUNK_BLOCKS // 8

_COARSE_CELLS = 4096
"""Parts of the device whose blocks of zeros are counted: enough for a map on a screen."""


class Changes(NamedTuple):
    """Rows (number → bits) that changed: `chunks` of the present blocks, the user's `pages`, the `lost` pages."""

    chunks: dict[int, bytes]
    pages: dict[int, bytes]
    lost: dict[int, bytes]


class _Counters(NamedTuple):
    """The counters of a block map. `zeros`: the number of zero blocks in each coarse cell."""

    resumed: int
    same: int
    fetched: int
    zero: int
    written: int
    zeros: list[int]


class BlockMap:
    """The present blocks of one destination, and counters of how they became present. Not thread-safe."""

    def __init__(self, geometry: Geometry) -> None:
        """Start with no block present. `geometry`: size and block size of the destination."""
        self.geometry = geometry
        """Size and block size of the destination once it is a copy: those of the source."""
        self.generation = 0
        """Grows with `clear`, `roll_back` and `interrupt`. What one generation learnt, no later one may mark."""
        self.user = UserPages(geometry)
        """The pages that the user wrote."""
        self.clear()

    def clear(self) -> None:
        """Make every block missing, so that each is checked again. Raises RuntimeError if the user wrote some."""
        if self.user.written_bytes:
            raise RuntimeError("the destination holds writes of a user")
        self.generation += 1
        self._bits = bytearray(-(-self.geometry.block_count // 8))
        self._unreadable = bytearray()  # bits of the unreadable blocks, if there are any
        self._fill_padding()
        self._changed: set[int] = set()
        self._taken: Changes | None = None  # handed out for the sync that runs
        self._undo: dict[int, bytes] = {}  # chunks as they were before the first change since a sync began
        self._undo_syncing: dict[int, bytes] = {}  # as they were at the last sync that succeeded
        self.resumed_bytes = 0
        """Present bytes that an earlier run recorded."""
        self.same_bytes = 0
        """Present bytes that the destination had before."""
        self.fetched_bytes = 0
        """Present bytes that were sent because they differed."""
        self.zero_bytes = 0
        """Present bytes that are zeros at the source, and were not sent."""
        self.overwritten_bytes = 0
        """Present bytes that were missing until the user wrote whole blocks."""
        self._coarse = max(1, -(-self.geometry.block_count // _COARSE_CELLS))
        self._zeros = [0] * -(-self.geometry.block_count // self._coarse)
        """The number of zero blocks in each part of _coarse blocks."""
        self._durable = self._durable_next = self._counters()

    @property
    def present_bytes(self) -> int:
        """The present bytes of the device, whatever their origin."""
        return self.resumed_bytes + self.same_bytes + self.fetched_bytes + self.zero_bytes + self.overwritten_bytes

    @property
    def complete(self) -> bool:
        """Whether all blocks are present."""
        return self.present_bytes == self.geometry.size

    def mark(self, blocks: range, kind: Kind) -> None:
        """Make the range `blocks` present, once all their bytes were written or found equal.

        `kind`: how they became present, a Kind. Counts only blocks that were missing. Raises IndexError if a block
        is outside of the device.
        """
        if not blocks:
            return
        if not 0 <= blocks.start < blocks.stop <= self.geometry.block_count:
            raise IndexError(f"blocks {blocks.start} to {blocks.stop - 1} of {self.geometry.block_count}")
        with_last = blocks.stop == self.geometry.block_count and self.any_missing(blocks[-1:])
        chunks = range(blocks.start // CHUNK_BLOCKS, blocks[-1] // CHUNK_BLOCKS + 1)
        for number in chunks:
            if number not in self._undo:
                self._undo[number] = self._chunk(number)
        added = self._set_zeros(blocks) if kind == "zero" else add(self._bits, blocks)
        if not added:
            return
        length = self._length(added, with_last=with_last)
        self._changed.update(chunks)
        if kind == "fetched":
            self.fetched_bytes += length
        elif kind == "zero":
            self.zero_bytes += length
        elif kind == "written":
            self.overwritten_bytes += length
        else:
            self.same_bytes += length

    def _length(self, count: int, *, with_last: bool) -> int:
        """Return the bytes of `count` blocks. `with_last`: whether the device's last block, maybe short, is in."""
        excess = self.geometry.block_count * self.geometry.block_size - self.geometry.size
        return count * self.geometry.block_size - (excess if with_last else 0)

    def _set_zeros(self, blocks: range) -> int:
        """Make the range `blocks` present, and count their zeros. Returns how many were missing."""
        added = 0
        for cell in range(blocks.start // self._coarse, blocks[-1] // self._coarse + 1):
            start = cell * self._coarse
            new = add(self._bits, range(max(blocks.start, start), min(blocks.stop, start + self._coarse)))
            self._zeros[cell] += new
            added += new
        return added

    def count(self, blocks: range) -> tuple[int, int]:
        """Return two numbers for the range `blocks`: the present ones, and about how many of these are zeros.

        Zeros are counted if the source did not send them.
        """
        if not blocks:
            return 0, 0
        first, last = blocks.start >> 3, (blocks.stop - 1) >> 3
        bits = int.from_bytes(self._bits[first : last + 1], "little") >> (blocks.start & 7)
        present = (bits & (1 << len(blocks)) - 1).bit_count()
        cells = range(blocks.start // self._coarse, blocks[-1] // self._coarse + 1)
        looked_at = min(cells.stop * self._coarse, self.geometry.block_count) - cells.start * self._coarse
        zeros = sum(map(self._zeros.__getitem__, cells)) * len(blocks) // looked_at
        return present, min(present, zeros)

    def resume(self, rows: Changes) -> None:
        """Take over recorded `rows`, in a map with no block present.

        Raises ValueError if the device has no such row, or if the length of a row is another.
        """
        for number, bits in rows.chunks.items():
            start = number * _CHUNK_BYTES
            if number < 0 or len(bits) != len(self._bits[start : start + _CHUNK_BYTES]) or not bits:
                raise ValueError(f"chunk {number} of {len(bits)} bytes")
            self._bits[start : start + len(bits)] = bits
        self._fill_padding()
        blocks = range(self.geometry.block_count)
        missing = len(self._bits) * 8 - int.from_bytes(self._bits, "little").bit_count()
        self.resumed_bytes = self._length(len(blocks) - missing, with_last=not self.any_missing(blocks[-1:]))
        self.user.resume(rows.pages, rows.lost)
        self._durable = self._durable_next = self._counters()

    def _fill_padding(self) -> None:
        """Set the bits behind the last block, so that no search finds them missing."""
        if self.geometry.block_count % 8:
            self._bits[-1] |= 0xFF << self.geometry.block_count % 8 & 0xFF

    def room(self, extent: Extent) -> list[Extent]:
        """Return the parts of `extent`, whole blocks, that the source's bytes may fill, ascending.

        These are neither present nor the user's. May be called while another thread changes the map.
        """
        found: list[Extent] = []
        for run in block_runs(self.missing(self.geometry.span(*extent))):
            first, last = self.geometry.extent(run[0]), self.geometry.extent(run[-1])
            found += self.user.others(Extent(first.offset, last.end - first.offset))
        return found

    def is_available(self, extent: Extent) -> bool:
        """Return whether `extent` can be read without the source: it is present, or its pages are the user's."""
        if not self.any_missing(self.geometry.span(*extent)):
            return True
        return all(
            self.user.has(_intersection(extent, self.geometry.extent(block)))
            for block in self.missing(self.geometry.span(*extent))
        )

    def note_write(self, extent: Extent) -> None:
        """Note that the user wrote `extent`. Its edges lie in pages that are available. Call after the write."""
        self.user.note_write(extent)
        for block in self.geometry.span(*extent):
            is_present = self._bits[block >> 3] & 1 << (block & 7)
            if is_present and self.user.has_block(block):
                continue
            whole = self.geometry.extent(block)
            self.user.add(_intersection(extent, whole))
            if not is_present and self.user.has(whole):
                self.mark(range(block, block + 1), "written")

    def take_changes(self) -> Changes:
        """Return what changed since the last call. A sync begins now; `settle` or `roll_back` must follow it."""
        changes = self._taken = Changes(
            {number: self._chunk(number) for number in sorted(self._changed)}, *self.user.take_changes()
        )
        self._changed.clear()
        self._undo_syncing, self._undo = {**self._undo, **self._undo_syncing}, {}
        self._durable_next = self._counters()
        self.user.begin_sync()
        return changes

    def settle(self) -> None:
        """Note that the sync has succeeded. What changed before it began is never undone."""
        self._taken, self._undo_syncing = None, {}
        self._durable = self._durable_next
        self.user.end_sync()

    def roll_back(self) -> None:
        """Undo all changes since the last sync that succeeded, because a sync has failed.

        Blocks that became present since are missing again. What the user wrote since is lost. Changes that were
        taken are handed out again, as they are then.
        """
        self.generation += 1
        if self._taken is not None:
            self.restore_changes(self._taken)
            self._taken = None
        undone = {**self._undo, **self._undo_syncing}
        for number, bits in undone.items():
            start = number * _CHUNK_BYTES
            self._bits[start : start + len(bits)] = bits
        self._changed.update(undone)
        self._undo, self._undo_syncing = {}, {}
        counters = self._durable
        self.resumed_bytes, self.same_bytes, self.fetched_bytes = counters[:3]
        self.zero_bytes, self.overwritten_bytes, self._zeros = counters[3], counters[4], [*counters.zeros]
        self._durable_next = counters
        self.user.lose_unsynced()

    def keep_user_blocks(self) -> None:
        """Make every block missing that the user did not write, so that each is checked again.

        Changes that were taken are handed out again, as they are then.
        """
        self.generation += 1
        if self._taken is not None:
            self.restore_changes(self._taken)
            self._taken = None
        kept = [
            block for run in self.user.block_runs() for block in run if self._bits[block >> 3] & 1 << (block & 7)
        ]
        before = self._bits
        self._bits = bytearray(len(before))
        self._fill_padding()
        for run in block_runs(kept):
            add(self._bits, run)
        starts = range(0, len(before), _CHUNK_BYTES)
        self._changed.update(
            number for number, at in enumerate(starts) if before[at : at + _CHUNK_BYTES] != self._chunk(number)
        )
        self._undo, self._undo_syncing = {}, {}
        self.resumed_bytes = self._length(len(kept), with_last=self.geometry.block_count - 1 in kept[-1:])
        self.same_bytes = self.fetched_bytes = self.zero_bytes = self.overwritten_bytes = 0
        self._zeros = [0] * len(self._zeros)
        self._durable = self._durable_next = self._counters()

    def interrupt(self, extent: Extent) -> None:
        """Note that a write of the user at `extent` has failed, and what it left is unknown.

        Fetches in flight mark nothing. Present blocks count as the user's: they may differ from the source.
        """
        self.generation += 1
        for block in self.geometry.span(*extent):
            if not self.any_missing(range(block, block + 1)):
                self.user.add(_intersection(extent, self.geometry.extent(block)))

    def _counters(self) -> _Counters:
        return _Counters(
            self.resumed_bytes,
            self.same_bytes,
            self.fetched_bytes,
            self.zero_bytes,
            self.overwritten_bytes,
            [*self._zeros],
        )

    def restore_changes(self, changes: Changes) -> None:
        """Count `changes` as changed again, because they could not be recorded."""
        self._changed.update(changes.chunks)
        self.user.restore_changes(changes.pages, changes.lost)

    def _chunk(self, number: int) -> bytes:
        return bytes(self._bits[number * _CHUNK_BYTES : (number + 1) * _CHUNK_BYTES])

    def missing(self, blocks: range) -> Iterator[int]:
        """Yield the missing block numbers in the range `blocks`, ascending. Skips present blocks quickly."""
        block = blocks.start
        while (found := next_clear(self._bits, block)) is not None and found < blocks.stop:
            yield found
            block = found + 1

    def mark_unreadable(self, blocks: range) -> None:
        """Note that the source cannot read the range `blocks`. They stay missing until they are marked present."""
        self._unreadable = self._unreadable or bytearray(len(self._bits))
        add(self._unreadable, blocks)

    def is_unreadable(self, block: int) -> bool:
        """Return whether `block` was marked unreadable, even if it is present by now."""
        return bool(self._unreadable) and bool(self._unreadable[block >> 3] & 1 << (block & 7))

    def fetchable(self, blocks: range) -> Iterator[int]:
        """Yield the block numbers in the range `blocks` that are missing and not marked unreadable, ascending."""
        found = self._next_fetchable(blocks.start)
        while found is not None and found < blocks.stop:
            yield found
            found = self._next_fetchable(found + 1)

    def _next_fetchable(self, block: int) -> int | None:
        while True:
            found = next_clear(self._bits, block)
            if found is None or not self.is_unreadable(found):
                return found
            behind = next_clear(self._unreadable, found)
            if behind is None:
                return None
            block = behind

    def unreadable_ranges(self, reason: str = "") -> UnreadableRanges:
        """Return the UnreadableRanges that are still missing: the first MAX_RANGES ranges, and the bytes of all.

        `reason`: the source's words, kept in the result, if known.
        """
        found = UnreadableRanges()
        if not self._unreadable:
            return found
        found.reason = reason
        left = int.from_bytes(self._unreadable, "little") & ~int.from_bytes(self._bits, "little")
        with_last = bool(left >> self.geometry.block_count - 1)
        found.bytes = self._length(left.bit_count(), with_last=with_last)
        at = 0
        while left and len(found.ranges) < MAX_RANGES:
            skipped = (left & -left).bit_length() - 1
            left >>= skipped
            run = (~left & left + 1).bit_length() - 1
            left >>= run
            first, last = self.geometry.extent(at + skipped), self.geometry.extent(at + skipped + run - 1)
            found.ranges.append(Extent(first.offset, last.end - first.offset))
            at += skipped + run
        found.more = bool(left)
        return found

    def any_missing(self, blocks: Sequence[int]) -> bool:
        """Return whether one of `blocks`, block numbers, is missing. Fast if `blocks` is a range."""
        if isinstance(blocks, range):
            found = next_clear(self._bits, blocks.start) if blocks else None
            return found is not None and found < blocks.stop
        return any(not self._bits[block >> 3] & 1 << (block & 7) for block in blocks)


def _intersection(one: Extent, other: Extent) -> Extent:
    start = max(one.offset, other.offset)
    return Extent(start, min(one.end, other.end) - start)
