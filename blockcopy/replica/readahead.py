"""Read-ahead: predict what readers will read next. Sequential, reverse and strided reads count.

    record_read(blocks, waits=…) → the ranges to fetch now, which nobody waits for yet

A stream is a reader in order. Two adjacent reads begin a stream, or three reads at equal distances. Reads between
them do not matter. The streams that were read least recently are forgotten. A stream is read ahead, and twice as
far after each read that had to wait. The windows of the links bound that: they are sized to keep the links busy.
"""

from __future__ import annotations

from collections import deque

from blockcopy.replica.source.window import Bounds

_MAX_STREAMS = 16
_MAX_LONE_READS = 32
"""Most reads outside of a stream that are remembered. A stream may begin with them."""

_INITIAL_STEPS = 4
"""Steps that a new stream is read ahead."""

_SLACK_BLOCKS = 16
"""Blocks by which the kernel may reorder the requests of one reader."""

_MAX_STEP = 512
"""Most blocks of a stride. Reads that are farther apart than 64 MiB are unrelated."""


class _Stream:
    """A reader in order: its last read, and the distance from the read before."""

    def __init__(self, blocks: range, step: int) -> None:
        """Begin a stream whose last read was of the range `blocks`.

        `step`: blocks between two reads, negative if reverse.
        """
        self.last = blocks
        self.step = step
        self.steps_ahead = _INITIAL_STEPS
        self.fetched_up_to: int | None = None
        """The block at which the last read-ahead ends, or begins in strides. None before the first."""

    @property
    def is_sequential(self) -> bool:
        """Whether the reads are adjacent and ascending."""
        return 0 < self.step <= len(self.last)

    def expects(self, blocks: range) -> bool:
        """Return whether `blocks`, a range, are the next read of the stream, or a part of the last read."""
        if self.is_sequential:
            return abs(blocks.start - self.last.stop) <= _SLACK_BLOCKS
        return blocks.start in (self.last.start, self.last.start + self.step)

    def advance(self, blocks: range) -> bool:
        """Record a read of the range `blocks`, which the stream expects.

        Returns False if the read is a part of the last one.
        """
        if blocks.start == self.last.start or (self.is_sequential and blocks.stop <= self.last.stop):
            return False
        if self.is_sequential:
            self.step = len(blocks)
        self.last = blocks
        return True


class ReadAhead:
    """A predictor of reads on one device. Call from trio's thread only."""

    def __init__(self, block_count: int, window: Bounds) -> None:
        """Make a predictor without streams.

        `block_count`: number of blocks of the device.
        `window`: bounds the read-ahead.
        """
        self._block_count = block_count
        self._window = window
        self._streams: list[_Stream] = []  # the most recently read is last
        self._lone_reads: deque[range] = deque(maxlen=_MAX_LONE_READS)

    def record_read(self, blocks: range, *, waits: bool) -> list[range]:
        """Record a read of `blocks`, a range. Returns a list of the ranges of blocks to fetch ahead now.

        `waits`: whether the read has to wait for the source. Then its stream is read ahead farther.
        """
        stream = next((each for each in reversed(self._streams) if each.expects(blocks)), None)
        if stream is not None:
            self._streams.remove(stream)
            if not stream.advance(blocks):
                self._streams.append(stream)
                return []
        else:
            stream = self._begin_stream(blocks)
            if stream is None:
                if blocks not in self._lone_reads:
                    self._lone_reads.append(blocks)
                return []
        self._streams = [*self._streams[1 - _MAX_STREAMS :], stream]
        if waits:
            stream.steps_ahead = min(stream.steps_ahead * 2, self._window.blocks)
        return self._sequential_ahead(stream) if stream.is_sequential else self._strided_ahead(stream)

    def _begin_stream(self, blocks: range) -> _Stream | None:
        """Return the stream that a read of the range `blocks` makes of earlier reads, or None."""
        for before in self._lone_reads:
            if 0 <= blocks.start - before.stop <= 1:
                return _Stream(blocks, len(blocks))
        starts = {before.start for before in self._lone_reads}
        for start in starts:
            step = blocks.start - start
            if step and abs(step) <= _MAX_STEP and start - step in starts:
                return _Stream(blocks, step)
        return None

    def _sequential_ahead(self, stream: _Stream) -> list[range]:
        limit = stream.last.stop + stream.steps_ahead
        start = stream.fetched_up_to if stream.fetched_up_to is not None else stream.last.stop
        if not stream.last.stop <= start <= limit:  # the reader overtook it, or the window was larger then
            start = stream.last.stop
        stop = min(limit, self._block_count)
        # In quarters of the distance, so that requests ahead are as large as they may be.
        if start >= stop or (stop - start < stream.steps_ahead // 4 and stop < self._block_count):
            return []
        stream.fetched_up_to = stop
        return [range(start, stop)]

    def _strided_ahead(self, stream: _Stream) -> list[range]:
        length, step = len(stream.last), stream.step
        steps = max(1, min(stream.steps_ahead, self._window.blocks // length))
        firsts = [stream.last.start + step * index for index in range(1, steps + 1)]
        if stream.fetched_up_to is not None:  # earlier calls returned all up to there
            firsts = [first for first in firsts if (first - stream.fetched_up_to) * step > 0]
        firsts = [first for first in firsts if first >= 0 and first + length <= self._block_count]
        if firsts:
            stream.fetched_up_to = firsts[-1]
        return [range(first, first + length) for first in firsts]
