"""What a reader is going to read next, for readers that go in order: forward, backward, or in strides.

    touch(blocks, waits) → the ranges to bring now, that nobody waits for yet

Two reads side by side, or three at the same distance, are a stream, whatever others read meanwhile; the
streams not heard of longest are forgotten. For a stream is read ahead, twice as far each time it had to
wait, as far as the window of the link allows: enough to fill link × round trip, and no more.
"""

from __future__ import annotations

from collections import deque

from blockcopy.replica.source.window import Window

_STREAMS = 16
_LONE_READS = 32
"""Reads of no stream that are remembered, since one may begin with them."""

_FIRST_AHEAD = 4
"""Steps ahead for a stream that was just found."""

_SLACK = 16
"""Blocks by which the kernel may send the requests of one reader out of order."""

_LONGEST_STEP = 512
"""Blocks: what lies farther apart than 64 MiB is no stride, but chance."""


class _Stream:
    """A reader: what it read last, and how far apart that was from what it read before."""

    def __init__(self, blocks: range, step: int) -> None:
        self.last = blocks
        self.step = step  # blocks, from one read to the next
        self.ahead = _FIRST_AHEAD  # steps
        self.brought: int | None = None  # where the last range that was brought ahead ends, or begins

    @property
    def in_order(self) -> bool:
        return 0 < self.step <= len(self.last)

    def expects(self, blocks: range) -> bool:
        """Whether it is its next read, or the rest of one it is in already."""
        if self.in_order:
            return abs(blocks.start - self.last.stop) <= _SLACK
        return blocks.start in (self.last.start, self.last.start + self.step)

    def advance(self, blocks: range) -> bool:
        """Note the read; whether it went on with that."""
        if blocks.start == self.last.start or (self.in_order and blocks.stop <= self.last.stop):
            return False
        if self.in_order:
            self.step = len(blocks)
        self.last = blocks
        return True


class ReadAhead:
    """See the module. `blocks`: how many the device has; `window`: of the link."""

    def __init__(self, blocks: int, window: Window) -> None:
        self._blocks = blocks
        self._window = window
        self._streams: list[_Stream] = []  # the one read last is last
        self._lone: deque[range] = deque(maxlen=_LONE_READS)

    def touch(self, blocks: range, *, waits: bool) -> list[range]:
        """`blocks` are read now, and have to be waited for or not: what should be brought as well."""
        stream = next((each for each in reversed(self._streams) if each.expects(blocks)), None)
        if stream is not None:
            self._streams.remove(stream)
            if not stream.advance(blocks):
                self._streams.append(stream)
                return []
        else:
            stream = self._begun_by(blocks)
            if stream is None:
                if blocks not in self._lone:
                    self._lone.append(blocks)
                return []
        self._streams = [*self._streams[1 - _STREAMS :], stream]
        if waits:
            stream.ahead = min(stream.ahead * 2, self._window.blocks)
        return self._ahead_in_order(stream) if stream.in_order else self._ahead_in_strides(stream)

    def _begun_by(self, blocks: range) -> _Stream | None:
        """The stream that this read makes of one or two before it."""
        for before in self._lone:
            if 0 <= blocks.start - before.stop <= 1:
                return _Stream(blocks, len(blocks))
        starts = {before.start for before in self._lone}
        for start in starts:
            step = blocks.start - start
            if step and abs(step) <= _LONGEST_STEP and start - step in starts:
                return _Stream(blocks, step)
        return None

    def _ahead_in_order(self, stream: _Stream) -> list[range]:
        furthest = stream.last.stop + stream.ahead
        start = stream.brought if stream.brought is not None else stream.last.stop
        if not stream.last.stop <= start <= furthest:  # overtaken, or brought when there was more room
            start = stream.last.stop
        stop = min(furthest, self._blocks)
        # In pieces of a quarter, so that asking ahead is as much in bulk as it may be.
        if start >= stop or (stop - start < stream.ahead // 4 and stop < self._blocks):
            return []
        stream.brought = stop
        return [range(start, stop)]

    def _ahead_in_strides(self, stream: _Stream) -> list[range]:
        length, step = len(stream.last), stream.step
        steps = max(1, min(stream.ahead, self._window.blocks // length))
        firsts = [stream.last.start + step * index for index in range(1, steps + 1)]
        if stream.brought is not None:  # those up to it were brought before
            firsts = [first for first in firsts if (first - stream.brought) * step > 0]
        firsts = [first for first in firsts if first >= 0 and first + length <= self._blocks]
        if firsts:
            stream.brought = firsts[-1]
        return [range(first, first + length) for first in firsts]
