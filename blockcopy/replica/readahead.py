"""What a reader is going to read next, for readers that go in order: forward, backward, or in strides.

Several readers at once have a stream each; the ones not heard of longest are forgotten. A stream that
goes on as expected is read ahead for, twice as far each time it had to wait, as far as the window of
the link allows: enough to fill link × round trip, and no more.

    touch(blocks, waits) → the ranges to bring now, that nobody waits for yet
"""

from __future__ import annotations

from blockcopy.replica.window import Window

_STREAMS = 16
_FIRST_AHEAD = 4
"""Steps ahead for a stream that was just found."""

_SLACK = 16
"""Blocks by which the kernel may send the requests of one reader out of order."""

_LONGEST_STEP = 4096
"""Blocks: what lies farther apart than 512 MiB is no stride."""


class _Stream:
    """A reader: what it read last, and how far apart that was from what it read before."""

    def __init__(self, blocks: range) -> None:
        self.last = blocks
        self.step = 0  # blocks, from one read to the next; 0 while there was but one
        self.steady = 0  # how often in a row it went as expected
        self.ahead = _FIRST_AHEAD  # steps
        self.brought: int | None = None  # the first block of the last read that was brought ahead

    @property
    def in_order(self) -> bool:
        return 0 < self.step <= len(self.last)


class ReadAhead:
    """See the module. `blocks`: how many the device has; `window`: of the link."""

    def __init__(self, blocks: int, window: Window) -> None:
        self._blocks = blocks
        self._window = window
        self._streams: list[_Stream] = []  # the one read last is last

    def touch(self, blocks: range, *, waits: bool) -> list[range]:
        """`blocks` are read now, and have to be waited for or not: what should be brought as well."""
        stream = self._of(blocks)
        if stream is None:
            self._streams = [*self._streams[1 - _STREAMS :], _Stream(blocks)]
            return []
        self._streams.remove(stream)
        self._streams.append(stream)
        if not self._advance(stream, blocks):
            return []
        if waits:
            stream.ahead = min(stream.ahead * 2, self._window.blocks)
        return self._ahead_in_order(stream) if stream.in_order else self._ahead_in_strides(stream)

    def _of(self, blocks: range) -> _Stream | None:
        """The stream that this read goes on with: as expected, or as a second read of it might."""
        for stream in reversed(self._streams):
            if stream.step and self._is_expected(stream, blocks):
                return stream
        for stream in reversed(self._streams):
            if not stream.steady and abs(blocks.start - stream.last.start) <= _LONGEST_STEP:
                return stream
        return None

    @staticmethod
    def _is_expected(stream: _Stream, blocks: range) -> bool:
        if stream.in_order:
            return abs(blocks.start - stream.last.stop) <= _SLACK
        return blocks.start in (stream.last.start, stream.last.start + stream.step)

    @staticmethod
    def _advance(stream: _Stream, blocks: range) -> bool:
        """Note the read; whether the stream went on, and is going to."""
        last = stream.last
        if blocks.start == last.start:
            return False  # the rest of a block it is in already
        if stream.in_order:
            if blocks.stop <= last.stop:
                return False  # sent out of order
            stream.last, stream.step = blocks, len(blocks)
            stream.steady += 1
            return True
        step = blocks.start - last.start
        stream.steady = stream.steady + 1 if step == stream.step else 0
        stream.step, stream.last = step, blocks
        if stream.in_order:
            stream.steady += 1
        return stream.steady > 0

    def _ahead_in_order(self, stream: _Stream) -> list[range]:
        start = max(stream.brought or 0, stream.last.stop)
        stop = min(stream.last.stop + stream.ahead, self._blocks)
        if start > stream.last.stop + stream.ahead:  # brought for somebody who was elsewhere
            start = stream.last.stop
        # In pieces of a quarter, so that asking ahead is as much in bulk as it may be.
        if stop - start < max(1, stream.ahead // 4) and stop < self._blocks:
            return []
        stream.brought = stop
        return [range(start, stop)] if start < stop else []

    def _ahead_in_strides(self, stream: _Stream) -> list[range]:
        length, step = len(stream.last), stream.step
        most = max(1, min(stream.ahead, self._window.blocks // length))
        firsts = [stream.last.start + step * index for index in range(1, most + 1)]
        if stream.brought is not None:  # those behind it were brought before
            firsts = [first for first in firsts if (first - stream.brought) * step > 0]
        firsts = [first for first in firsts if first >= 0 and first + length <= self._blocks]
        if firsts:
            stream.brought = firsts[-1]
        return [range(first, first + length) for first in firsts]
