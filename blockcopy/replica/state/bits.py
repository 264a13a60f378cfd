"""Bits by number, in rows that exist only where a bit is set. Rows are what a state file records. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

ROW_BYTES = 2048
"""Bytes of a row."""

_ROW_BITS = ROW_BYTES * 8

_SET = re.compile(rb"[^\0]", re.DOTALL)
_CLEAR = re.compile(rb"[^\xff]", re.DOTALL)


def add(bits: bytearray, numbers: range) -> int:
    """Set the bits of the range `numbers` in `bits`. Returns how many were not set before."""
    first, last = numbers.start >> 3, (numbers.stop - 1) >> 3
    if len(numbers) == 1:
        bit = 1 << (numbers.start & 7)
        is_new = not bits[first] & bit
        bits[first] |= bit
        return int(is_new)
    old = int.from_bytes(bits[first : last + 1], "little")
    new = old | ((1 << len(numbers)) - 1) << (numbers.start & 7)
    bits[first : last + 1] = new.to_bytes(last + 1 - first, "little")
    return (new ^ old).bit_count()


def next_clear(bits: bytearray, number: int) -> int | None:
    """Return the first number from `number` on whose bit in `bits` is not set. Returns None if there is none."""
    index = number >> 3
    if index >= len(bits):
        return None
    byte = bits[index] | (1 << (number & 7)) - 1  # bits before `number` do not count
    if byte == 0xFF:
        found = _CLEAR.search(bits, index + 1)
        if found is None:
            return None
        index = found.start()
        byte = bits[index]
    lowest_zero = ~byte & byte + 1
    return index * 8 + lowest_zero.bit_length() - 1


def next_set(bits: bytearray, number: int) -> int | None:
    """Return the first number from `number` on whose bit in `bits` is set. Returns None if there is none."""
    index = number >> 3
    if index >= len(bits):
        return None
    byte = bits[index] & -(1 << (number & 7))
    if not byte:
        found = _SET.search(bits, index + 1)
        if found is None:
            return None
        index = found.start()
        byte = bits[index]
    return index * 8 + (byte & -byte).bit_length() - 1


class Bits:
    """A set of numbers, in memory that grows only with the rows in use. Not thread-safe."""

    def __init__(self) -> None:
        """Begin empty."""
        self._rows: dict[int, bytearray] = {}
        self._changed: set[int] = set()

    def __contains__(self, number: int) -> bool:
        row, at = divmod(number, _ROW_BITS)
        bits = self._rows.get(row)
        return bits is not None and bool(bits[at >> 3] & 1 << (at & 7))

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, numbers: range) -> int:
        """Add the range `numbers`. Returns how many were not in the set before."""
        added = 0
        for row, part in _parts(numbers):
            bits = self._rows.get(row)
            if bits is None:
                bits = self._rows[row] = bytearray(ROW_BYTES)
            if own := add(bits, part):
                self._changed.add(row)
                added += own
        return added

    def update(self, other: Bits) -> None:
        """Add all numbers of `other`."""
        for row, bits in other._rows.items():
            mine = int.from_bytes(self._rows.get(row, b""), "little")
            self._rows[row] = bytearray((mine | int.from_bytes(bits, "little")).to_bytes(ROW_BYTES, "little"))
            self._changed.add(row)

    def discard(self, numbers: range) -> None:
        """Remove the range `numbers`."""
        for row, part in _parts(numbers):
            bits = self._rows.get(row)
            if bits is None:
                continue
            old = int.from_bytes(bits, "little")
            new = old & ~(((1 << len(part)) - 1) << part.start)
            if new != old:
                bits[:] = new.to_bytes(ROW_BYTES, "little")
                self._changed.add(row)

    def has_all(self, numbers: range) -> bool:
        """Return whether the set has all of the range `numbers`."""
        return next(self.gaps(numbers), None) is None

    def has_any(self, numbers: range) -> bool:
        """Return whether the set has one of the range `numbers`."""
        if not self._rows:
            return False
        for row, part in _parts(numbers):
            bits = self._rows.get(row)
            if bits is not None:
                found = next_set(bits, part.start)
                if found is not None and found < part.stop:
                    return True
        return False

    def gaps(self, numbers: range) -> Iterator[range]:
        """Yield the parts of the range `numbers` that are not in the set, ascending. Neighbours may be separate."""
        for row, part in _parts(numbers):
            bits, base = self._rows.get(row), row * _ROW_BITS
            at = part.start
            while at < part.stop:
                start = at if bits is None else next_clear(bits, at)
                if start is None or start >= part.stop:
                    break
                found = None if bits is None else next_set(bits, start)
                at = part.stop if found is None else min(found, part.stop)
                yield range(base + start, base + at)

    def runs(self) -> Iterator[range]:
        """Yield the ranges of numbers in the set, ascending. Neighbours in two rows may be separate."""
        for row in sorted(self._rows):
            bits, base = self._rows[row], row * _ROW_BITS
            start = next_set(bits, 0)
            while start is not None:
                stop = next_clear(bits, start)
                yield range(base + start, base + (_ROW_BITS if stop is None else stop))
                start = None if stop is None else next_set(bits, stop)

    def count(self) -> int:
        """Return how many numbers the set has."""
        return sum(int.from_bytes(bits, "little").bit_count() for bits in self._rows.values())

    def count_in(self, numbers: range) -> int:
        """Return how many of the range `numbers` are in the set."""
        count = 0
        for row, part in _parts(numbers):
            if bits := self._rows.get(row):
                count += (int.from_bytes(bits, "little") >> part.start & (1 << len(part)) - 1).bit_count()
        return count

    def take_changes(self) -> dict[int, bytes]:
        """Return the rows (number → bits) that changed since the last call, as they are now."""
        changes = {row: bytes(self._rows[row]) for row in sorted(self._changed)}
        self._changed.clear()
        return changes

    def restore_changes(self, rows: Iterable[int]) -> None:
        """Count the `rows`, numbers of rows, as changed again, because they could not be recorded."""
        self._changed.update(rows)

    def load(self, rows: Mapping[int, bytes], end: int) -> None:
        """Add recorded `rows` (number → bits). All numbers lie below `end`. Raises ValueError if one does not."""
        for row, bits in rows.items():
            if (
                row < 0
                or len(bits) != ROW_BYTES
                or row * _ROW_BITS + int.from_bytes(bits, "little").bit_length() > end
            ):
                raise ValueError(f"row {row} of {len(bits)} bytes")
            self._rows[row] = bytearray(bits)


def _parts(numbers: range) -> Iterable[tuple[int, range]]:
    """Return the range `numbers` by rows: pairs of a row's number and a range of numbers within the row."""
    row, at = divmod(numbers.start, _ROW_BITS)
    if at + len(numbers) <= _ROW_BITS:
        return ((row, range(at, at + len(numbers))),) if numbers else ()
    return _split(numbers)


def _split(numbers: range) -> Iterator[tuple[int, range]]:
    start = numbers.start
    while start < numbers.stop:
        row, at = divmod(start, _ROW_BITS)
        stop = min(numbers.stop - row * _ROW_BITS, _ROW_BITS)
        yield row, range(at, stop)
        start = row * _ROW_BITS + stop
