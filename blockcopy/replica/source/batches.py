"""Requests to the source: the signatures of a batch, and the delta that answers them.

A batch asks for the blocks of the source that differ from its signatures. Each answer is checked against the batch,
and then given to the batch's sink. See `dialects` for how a batch is sent and answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent, ExtentJoiner
from blockcopy.errors import BlockcopyError
from blockcopy.protocol.digests import NO_DIGEST

_MAX_HOLES = 65536
"""Holes that one answer may keep. Background hydration asks about the blocks in all others."""

_MAX_REASON = 500
"""Characters that are kept of a source's reason why it cannot read a block."""


class Signatures(NamedTuple):
    """The digests of consecutive blocks of the destination, which ask for the source's bytes if these differ.

    `position`, `length`, `block_size`: bytes. The last block may be short. `digests`: one per block, joined.
    """

    position: int
    length: int
    block_size: int
    digests: bytes

    @property
    def end(self) -> int:
        """The position behind the last byte."""
        return self.position + self.length

    @property
    def block_count(self) -> int:
        """The number of blocks."""
        return -(-self.length // self.block_size)

    def blocks(self) -> Iterator[tuple[Extent, bytes]]:
        """Yield each block as a pair: its extent, and its digest."""
        size = len(self.digests) // self.block_count
        for index in range(self.block_count):
            start = index * self.block_size
            extent = Extent(self.position + start, min(self.block_size, self.length - start))
            yield extent, self.digests[index * size : (index + 1) * size]


def unconditional(position: int, length: int) -> Signatures:
    """Return Signatures of one block that no bytes equal, so that the source sends `length` bytes at `position`.

    Only for the original dialect.
    """
    return Signatures(position, length, length, NO_DIGEST)


class Sink(Protocol):
    """The receiver of a batch's answers, called by the receiving thread. Its errors fail the batch."""

    def data(self, position: int, payload: Buffer) -> None:
        """Take the source's bytes at `position`. `payload` is valid only during the call."""

    def zeros(self, position: int, length: int) -> None:
        """Take `length` zeros of the source at `position`."""


class UnreadableBlock(NamedTuple):
    """A block that the source cannot read, and the reason in the source's words."""

    extent: Extent
    reason: str


class Delta(NamedTuple):
    """The result of a batch: extents that differ (`data`, `zeros`), and unreadable blocks, all ascending.

    All other blocks of the batch are equal.
    """

    data: list[Extent]
    zeros: list[Extent]
    unreadable: list[UnreadableBlock]


class Batch:
    """Signatures that were sent, and the answers to them so far."""

    def __init__(self, signatures: Sequence[Signatures], sink: Sink, settle: Callable[[], None]) -> None:
        """Ask about `signatures`, ascending. `sink`: receives the answers.

        `settle`: called once, from any thread and without arguments, at the end of the batch.
        """
        self.signatures = signatures
        self.fence = -1
        self.delta = Delta([], [], [])
        self.error: BlockcopyError | None = None
        self.settle = settle
        self._sink = sink
        self._zeros = ExtentJoiner(self._deliver_zeros)  # one large hole is made as fast as a small one
        self._index = 0  # of the first signatures that can still be answered
        self._reached = 0  # the position up to which these were answered

    def take_data(self, position: int, payload: Buffer) -> bool:
        """Give `payload`, the bytes at `position`, to the sink. Returns False if the batch did not ask for them."""
        extent = Extent(position, len(payload))
        if not self._advance(extent):
            return False
        self._zeros.flush()
        self.delta.data.append(extent)
        self._deliver(lambda: self._sink.data(position, payload))
        return True

    def take_zeros(self, position: int, length: int) -> bool:
        """Give `length` zeros at `position` to the sink, joined with neighbouring zeros.

        Returns False if the batch did not ask for them.
        """
        extent = Extent(position, length)
        if not self._advance(extent):
            return False
        self._zeros.add(extent)
        return True

    def take_failure(self, position: int, reason: str) -> bool:
        """Note that the source cannot read the block at `position`. `reason`: the source's words.

        Returns False if the batch did not ask for this block.
        """
        block = self.block_at(position)
        if block is None or not self._advance(block):
            return False
        self.delta.unreadable.append(UnreadableBlock(block, reason[:_MAX_REASON]))
        return True

    def _deliver_zeros(self, extent: Extent) -> None:
        self.delta.zeros.append(extent)
        self._deliver(lambda: self._sink.zeros(*extent))

    def _deliver(self, deliver: Callable[[], None]) -> None:
        """Call `deliver`, which gives an answer to the sink. After a first error, the rest is dropped instead."""
        if self.error is not None:
            return
        try:
            deliver()
        except BlockcopyError as error:
            self.error = error

    def _advance(self, extent: Extent) -> bool:
        """Note an answer about `extent`.

        Returns False unless `extent` is whole blocks that were asked for, behind the last answer.
        """
        for index in range(self._index, len(self.signatures)):
            asked = self.signatures[index]
            reached = self._reached if index == self._index else asked.position
            start, end = extent.offset - asked.position, extent.end - asked.position
            if reached <= extent.offset < asked.end and start % asked.block_size == 0:
                whole = end == asked.length or (end < asked.length and end % asked.block_size == 0)
                if whole and extent.length:
                    self._index, self._reached = index, extent.end
                return whole and extent.length > 0
        return False

    def block_at(self, position: int) -> Extent | None:
        """Return the extent of the block that begins at `position`. Returns None if the batch has no such block."""
        for asked in self.signatures:
            start = position - asked.position
            if 0 <= start < asked.length and start % asked.block_size == 0:
                return Extent(position, min(asked.block_size, asked.end - position))
        return None

    def finish(self) -> None:
        """End the batch, because its fence has arrived."""
        self._zeros.flush()
        self.settle()

    def fail(self, error: BlockcopyError) -> None:
        """End the batch with `error`."""
        self.error = error
        self.settle()


class Ping(Batch):
    """A batch that asks for nothing, to measure a round trip. Only for the negotiated dialect."""

    def __init__(self, settle: Callable[[], None]) -> None:
        """Ask for nothing.

        `settle`: called once, from any thread and without arguments, at the end of the batch.
        """
        super().__init__([], DISCARD, settle)


class ByteProbe(Batch):
    """A batch for single bytes of the source, some of which may not exist. Only for the original dialect."""

    def __init__(self, positions: Sequence[int], settle: Callable[[], None]) -> None:
        """Ask for one byte at each of `positions`, ascending.

        At the end, the attribute `delta` has the bytes that exist. `settle`: as for Batch.
        """
        super().__init__([unconditional(position, 1) for position in positions], DISCARD, settle)


class HoleQuery(Batch):
    """A batch that asks for the holes of the source in `extent`. Only for the negotiated dialect."""

    def __init__(self, extent: Extent, min_length: int, settle: Callable[[], None]) -> None:
        """Ask for the holes in `extent`.

        Those of `min_length` bytes or more are kept, in the attribute `holes`.
        `settle`: called once, from any thread and without arguments, at the end of the batch.
        """
        super().__init__([], DISCARD, settle)
        self.extent = extent
        self.min_length = min_length
        self.holes: list[Extent] = []
        self._reached = extent.offset

    def take_hole(self, hole: Extent) -> bool:
        """Keep `hole` if it is long enough. Returns False if nobody asked for it, or if it is out of order."""
        if not (hole.length and self._reached <= hole.offset and hole.end <= self.extent.end):
            return False
        self._reached = hole.end
        if hole.length >= self.min_length and len(self.holes) < _MAX_HOLES:
            self.holes.append(hole)
        return True


class _Discard:
    """A sink that drops everything."""

    def data(self, position: int, payload: Buffer) -> None:
        """Drop `payload`, the bytes at `position`."""

    def zeros(self, position: int, length: int) -> None:
        """Drop `length` zeros at `position`."""


DISCARD: Sink = _Discard()
"""The sink that drops everything."""
