"""What is asked of a `retrieve`, and what its answers mean, in each of the two forms. No I/O.

The agreed form (see `wire`) closes each batch of questions with a numbered fence, and says in words
what it cannot answer.

The original form has neither. It answers when 16 commands are queued, says nothing for a block that
is equal, and never says how far it got. So a batch is followed by FENCES empty questions (size 0, a
digest nothing has): they fill the queue, and each comes back as an empty frame with the position it
was sent with. The position of the fences alternates between 1 and 2, which tells those of
neighbouring batches apart: no block begins there, and both lie inside any block device (one refuses
to seek past its end). ProgressTimeout is also what the original gives for a block beyond its end. So that a
source which was shortened cannot pass for an equal one, each batch ends with a question for its last
byte that cannot be equal: without that answer nothing of the batch is believed.

In both, answers come in the order asked, so silence before a fence means "equal". An answer is checked
against what was asked, and then given to the batch's sink as it comes. A source that no longer has what
it had fails the blocks in question (in the original form, the batch), and goes on serving others; what cannot be
an answer at all is a StreamError, and ends the connection.

`ask` is called by tasks, `take` by the thread that receives; `pending` is what they share: the one
appends to it, the other takes from its front.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent, ExtentJoiner
from blockcopy.errors import BlockcopyError, SourceError, StreamError
from blockcopy.protocol import wire, xz, zstd
from blockcopy.protocol.digests import NO_DIGEST, digest

_MOST_HOLES = 65536
"""Holes of one answer that are kept; the pass asks about what lies in the others."""

FENCES = 16
"""Empty questions behind a batch in the original form: whatever its queue held, one of them fills it."""

_MAX_REASON = 500
"""Characters that are kept of what a source says of a block."""


class Signatures(NamedTuple):
    """`length` bytes (at least 1) at `position` have these `digests` here, one a block, joined: the
    source's, where they differ?"""

    position: int
    length: int
    block_size: int
    digests: bytes

    @property
    def end(self) -> int:
        return self.position + self.length

    def split(self) -> list[Signatures]:
        """Return the same as questions of one block each."""
        return [Signatures(*extent, self.block_size, own) for extent, own in self.blocks()]

    def blocks(self) -> Iterator[tuple[Extent, bytes]]:
        """Each block, and its digest."""
        count = -(-self.length // self.block_size)
        size = len(self.digests) // count
        for index in range(count):
            start = index * self.block_size
            extent = Extent(self.position + start, min(self.block_size, self.length - start))
            yield extent, self.digests[index * size : (index + 1) * size]


def unconditional(position: int, length: int) -> Signatures:
    """A question for one block's bytes, whatever they are; in the original form."""
    return Signatures(position, length, length, NO_DIGEST)


class Sink(Protocol):
    """Where answers go, in the thread that receives them. What it raises fails the batch."""

    def data(self, position: int, payload: Buffer) -> None:
        """These are the source's bytes; `payload` is good for as long as the call lasts."""

    def zeros(self, position: int, length: int) -> None:
        """The source has zeros there."""


class UnreadableBlock(NamedTuple):
    """A block that the source cannot read, and why, in its words."""

    extent: Extent
    reason: str


class Answer(NamedTuple):
    """Where the source's bytes differ, and what it cannot read, each in ascending order; all else that was asked
    about is equal."""

    data: list[Extent]
    zeros: list[Extent]
    unreadable: list[UnreadableBlock]


class Batch:
    """Questions on their way, and what has come back for them."""

    def __init__(self, questions: Sequence[Signatures], sink: Sink, settle: Callable[[], None]) -> None:
        """`settle` is called once, from any thread, when there is nothing more to come."""
        self.questions = questions
        self.fence = 0
        self.answer = Answer([], [], [])
        self.error: BlockcopyError | None = None
        self.settle = settle
        self._sink = sink
        # A hole as large as many is made as fast as one of them.
        self._zeros = ExtentJoiner(self._give_zeros)
        self._question = 0  # the first that can still be answered
        self._reached = 0  # and what of it was passed already

    def data(self, position: int, payload: Buffer) -> bool:
        """Take an answer; False if it answers nothing that was asked."""
        extent = Extent(position, len(payload))
        if not self._fits(extent):
            return False
        self._zeros.flush()
        self.answer.data.append(extent)
        self._deliver(lambda: self._sink.data(position, payload))
        return True

    def zeros(self, position: int, length: int) -> bool:
        """Take zeros as an answer, as `data` takes bytes."""
        extent = Extent(position, length)
        if not self._fits(extent):
            return False
        self._zeros.add(extent)
        return True

    def failure(self, position: int, reason: str) -> bool:
        """Take that a block cannot be read. Returns False if it answers nothing that was asked."""
        block = self.block_at(position)
        if block is None or not self._fits(block):
            return False
        self.answer.unreadable.append(UnreadableBlock(block, reason[:_MAX_REASON]))
        return True

    def _give_zeros(self, extent: Extent) -> None:
        self.answer.zeros.append(extent)
        self._deliver(lambda: self._sink.zeros(*extent))

    def finish(self) -> None:
        """There is nothing more to come."""
        self._zeros.flush()
        self.settle()

    def _deliver(self, deliver: Callable[[], None]) -> None:
        if self.error is not None:
            return  # the rest of it is of no use
        try:
            deliver()
        except BlockcopyError as error:
            self.error = error

    def _fits(self, extent: Extent) -> bool:
        """Whether it is whole blocks of one question, behind all that was answered before."""
        for index in range(self._question, len(self.questions)):
            question = self.questions[index]
            reached = self._reached if index == self._question else question.position
            start, end = extent.offset - question.position, extent.end - question.position
            if reached <= extent.offset < question.end and start % question.block_size == 0:
                whole = end == question.length or (end < question.length and end % question.block_size == 0)
                if whole and extent.length:
                    self._question, self._reached = index, extent.end
                return whole and extent.length > 0
        return False

    def block_at(self, position: int) -> Extent | None:
        """The block that was asked for and begins there."""
        for question in self.questions:
            start = position - question.position
            if 0 <= start < question.length and start % question.block_size == 0:
                return Extent(position, min(question.block_size, question.end - position))
        return None

    def fail(self, error: BlockcopyError) -> None:
        self.error = error
        self.settle()


class ByteProbe(Batch):
    """Questions for single bytes that may not be there, which silence tells; in the original form."""

    def __init__(self, positions: Sequence[int], settle: Callable[[], None]) -> None:
        super().__init__([unconditional(position, 1) for position in positions], _NOWHERE, settle)


class HoleQuery(Batch):
    """A question for the holes of the source in `extent`, on its way."""

    def __init__(self, extent: Extent, least: int, settle: Callable[[], None]) -> None:
        """Holes of fewer than `least` bytes are passed over."""
        super().__init__([], _NOWHERE, settle)
        self.extent = extent
        self.holes: list[Extent] = []
        self.least = least
        self._reached = extent.offset

    def hole(self, hole: Extent) -> bool:
        """Take an answer; False if it lies elsewhere, or not behind the one before."""
        if not (hole.length and self._reached <= hole.offset and hole.end <= self.extent.end):
            return False
        self._reached = hole.end
        if hole.length >= self.least and len(self.holes) < _MOST_HOLES:
            self.holes.append(hole)
        return True


class _Nowhere:
    def data(self, position: int, payload: Buffer) -> None: ...

    def zeros(self, position: int, length: int) -> None: ...


_NOWHERE = _Nowhere()


class Dialect(ABC):
    """The batches of one connection, in the order in which they are answered."""

    grammar: wire.Grammar

    def __init__(self, source: str) -> None:
        """`source` is its name in messages."""
        self.source = source
        self.answers = 0
        """Whole answers taken so far. Each brings a batch closer to its end, so a batch has a bounded number."""
        self.pending: deque[Batch] = deque()
        self._sequence = 0

    def ask(self, batch: Batch) -> bytes:
        """What to send for it. It is pending from now on."""
        batch.fence = self._fence_of(self._sequence)
        self._sequence += 1
        stream = self._questions(batch) + self._closing(batch)
        self.pending.append(batch)
        return stream

    def take(self, message: wire.Message) -> None:
        """A message that came. StreamError for what was not asked for."""
        if isinstance(message, wire.XzData):
            self._take_data(message.position, xz.expand(message))
        elif isinstance(message, wire.Data):
            self._take_data(message.position, message.payload)
        elif not isinstance(message, wire.Done):
            raise StreamError(f"a {type(message).__name__} out of its turn")

    def _take_data(self, position: int, payload: Buffer) -> None:
        if not self.pending or not self.pending[0].data(position, payload):
            raise StreamError(f"{len(payload)} bytes for position {position}")
        self.answers += 1

    def _settle(self) -> None:
        self.pending.popleft().finish()
        self.answers += 1

    @abstractmethod
    def _fence_of(self, sequence: int) -> int:
        """What tells a batch's fence from its neighbours'."""

    @abstractmethod
    def _questions(self, batch: Batch) -> bytes:
        """The questions as they are sent."""

    @abstractmethod
    def _closing(self, batch: Batch) -> bytes:
        """What follows the questions, so that all of them are answered."""


class NegotiatedDialect(Dialect):
    """Between two of ours."""

    grammar = wire.NEGOTIATED_BLOCK_STREAM

    def _fence_of(self, sequence: int) -> int:
        return sequence

    def _questions(self, batch: Batch) -> bytes:
        if isinstance(batch, HoleQuery):
            return wire.encode(wire.Hole(*batch.extent))
        return b"".join(
            wire.encode(wire.Asks(each.position, each.block_size, each.length, each.digests))
            for each in batch.questions
        )

    def _closing(self, batch: Batch) -> bytes:
        return wire.encode(wire.Fence(batch.fence))

    def take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Fence):
            if not self.pending or self.pending[0].fence != message.number:
                raise StreamError(f"the fence {message.number}")
            self._settle()
        elif isinstance(message, wire.ZstdData):
            self._take_data(message.position, zstd.expand(message))
        elif isinstance(message, wire.Zero):
            if not self.pending or not self.pending[0].zeros(*message):
                raise StreamError(f"{message.length} zeros for position {message.position}")
            self.answers += 1
        elif isinstance(message, wire.Hole):
            survey = self.pending[0] if self.pending else None
            if not isinstance(survey, HoleQuery) or not survey.hole(Extent(*message)):
                raise StreamError(f"a hole of {message.length} bytes at position {message.position}")
            self.answers += message.length >= survey.least
        elif isinstance(message, wire.Failure):
            if not self.pending or not self.pending[0].failure(message.position, self._told(message)):
                raise StreamError(f"a failure for position {message.position}")
            self.answers += 1
        else:
            super().take(message)

    def _told(self, failure: wire.Failure) -> str:
        return f"{self.source}: {failure.reason}"


class OriginalDialect(Dialect):
    """With the original program, whose `retrieve` is a filter and was not made to be asked."""

    grammar = wire.BLOCK_STREAM

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self._old_fence: int | None = None  # of the batch that was settled last
        self._old_fences = 0  # how many of it are to follow
        self._proven = False  # the last byte of the first pending batch is there

    def _fence_of(self, sequence: int) -> int:
        return 1 + sequence % 2

    def _questions(self, batch: Batch) -> bytes:
        asked = [wire.Hash(*extent, own) for question in batch.questions for extent, own in question.blocks()]
        if not isinstance(batch, ByteProbe):
            asked.append(wire.Hash(self._last_byte(batch), 1, NO_DIGEST))
        return b"".join(map(wire.encode, asked))

    @staticmethod
    def _last_byte(batch: Batch) -> int:
        return batch.questions[-1].end - 1

    def _closing(self, batch: Batch) -> bytes:
        return wire.encode(wire.Hash(batch.fence, 0, NO_DIGEST)) * FENCES

    def _take_data(self, position: int, payload: Buffer) -> None:
        if not payload:
            self._take_fence(position)
            return
        batch = self.pending[0] if self.pending else None
        if batch is not None and self._is_proof(batch, position, payload):
            self._proven = True
            return
        block = batch.block_at(position) if batch else None
        if batch is None or block is None or len(payload) > block.length:
            raise StreamError(f"{len(payload)} bytes for position {position}")
        if len(payload) < block.length:
            batch.error = batch.error or self._too_short(batch)
        else:
            super()._take_data(position, payload)

    def _take_fence(self, position: int) -> None:
        if self.pending and position == self.pending[0].fence:
            batch = self.pending[0]
            if not (self._proven or isinstance(batch, ByteProbe)):
                batch.error = batch.error or self._too_short(batch)
            self._proven = False
            self._settle()
            self._old_fence, self._old_fences = position, FENCES - 1
        elif position == self._old_fence and self._old_fences:
            self._old_fences -= 1
        else:
            raise StreamError(f"an empty block for position {position}")

    def _is_proof(self, batch: Batch, position: int, payload: Buffer) -> bool:
        if isinstance(batch, ByteProbe) or self._proven or len(payload) != 1 or position != self._last_byte(batch):
            return False
        *_, (block, own) = batch.questions[-1].blocks()
        # A last block of one byte asks for the same byte: if that is equal, it has no answer of its own.
        return block.length > 1 or digest(payload) == own or batch.answer.data[-1:] == [block]

    def _too_short(self, batch: Batch) -> SourceError:
        return SourceError(f"{self.source} is shorter than it was: it does not reach {self._last_byte(batch) + 1}")
