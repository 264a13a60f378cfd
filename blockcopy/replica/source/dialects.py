"""The two dialects of a `retrieve` process: what to send for a batch, and what its answers mean. No I/O.

A batch is a list of signatures, which ask for the blocks of the source that differ from them. Answers come in the
order of the signatures. So no answer before the fence, which ends the batch, means "equal". An answer is checked
against the batch, and then given to the batch's sink at once.

The negotiated dialect (see `wire`) ends each batch with a numbered fence. The source says in words what it cannot
answer.

The original program has neither. It answers when 16 commands are queued. It says nothing for a block that is equal,
nor how far it is. So FENCES empty signatures (size 0, a digest that nothing has) follow each batch:

- They fill the queue. Each comes back as an empty frame with the position that it was sent with.
- Their position alternates between 1 and 2, which tells the fences of neighbouring batches apart.
- No block begins at 1 or 2. Both lie inside any block device, and the original refuses to seek past its end.

The original is also silent for a block beyond its end. A source that was shortened must not pass for an equal one.
So each batch ends with a signature for its last byte that cannot be equal. Without an answer to that signature,
nothing of the batch is believed.

A source that is shorter than before fails the blocks in question, in the original dialect the whole batch. It goes
on to serve others. A message that cannot be an answer is a StreamError, and ends the connection.

Tasks call `request`, and the receiving thread calls `receive`. They share `pending`: tasks append to it, the thread
takes from its front.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import SourceError, StreamError
from blockcopy.protocol import wire
from blockcopy.protocol.compression import expand
from blockcopy.protocol.digests import NO_DIGEST, ORIGINAL, named
from blockcopy.replica.source.batches import Batch, ByteProbe, HoleQuery, Ping

FENCES = 16
"""Empty signatures behind a batch in the original dialect, enough to fill the queue of the original program."""

_NOT_ASKED = ByteProbe([], lambda: None)
"""Stands for the first pending batch if there is none. It accepts no answer."""


class Dialect(ABC):
    """The batches of one connection, in the order in which they are answered."""

    grammar: wire.Grammar

    def __init__(self, source: str) -> None:
        """Begin a connection. `source`: the name of the source in messages."""
        self.source = source
        self.answer_count = 0
        """Whole answers so far. A batch has a bounded number of them, because each brings its end closer."""
        self.pending: deque[Batch] = deque()
        self._fences: Iterator[int] = itertools.count()
        """The number of each batch's fence. Neighbouring batches have different ones."""

    @property
    def _first(self) -> Batch:
        return self.pending[0] if self.pending else _NOT_ASKED

    @property
    def asked(self) -> Batch | None:
        """The first pending batch that somebody waits for. None if there is none."""
        # A copy, which is made at once: the receiving thread may take from the front meanwhile.
        return next((batch for batch in list(self.pending) if not isinstance(batch, Ping)), None)

    def request(self, batch: Batch) -> bytes:
        """Append `batch` to the pending ones. Returns the bytes to send for it."""
        batch.fence = next(self._fences)
        stream = self._encode(batch)
        self.pending.append(batch)
        return stream

    def receive(self, message: wire.Message) -> None:
        """Take `message` from the source. Raises StreamError if it answers nothing that was asked."""
        match message:
            case wire.Data() | wire.XzData():
                self._receive_data(message.position, expand(message))
            case wire.Done():
                pass
            case _:
                raise StreamError(f"a {type(message).__name__} out of its turn")

    def _receive_data(self, position: int, payload: Buffer) -> None:
        self._count(self._first.take_data(position, payload), f"{len(payload)} bytes for position {position}")

    def _count(self, expected: bool, shown: str) -> None:
        """Count an answer. Raises StreamError if `expected` is False. `shown`: the answer in words."""
        if not expected:
            raise StreamError(shown)
        self.answer_count += 1

    def _settle(self) -> None:
        batch = self.pending.popleft()
        batch.finish()
        self.answer_count += not isinstance(batch, Ping)  # a source that answers nothing else makes no progress

    @abstractmethod
    def _encode(self, batch: Batch) -> bytes:
        """Return the bytes to send for `batch`: its signatures, and its fence, so that all of them are answered."""


class NegotiatedDialect(Dialect):
    """The dialect between two of our programs."""

    grammar = wire.NEGOTIATED_BLOCK_STREAM

    def _encode(self, batch: Batch) -> bytes:
        messages: list[wire.Message] = [
            wire.Asks(each.position, each.block_size, each.length, each.digests) for each in batch.signatures
        ]
        if isinstance(batch, HoleQuery):
            messages.append(wire.Hole(*batch.extent))
        return b"".join(map(wire.encode, [*messages, wire.Fence(batch.fence)]))

    def receive(self, message: wire.Message) -> None:
        """Take `message` from the source. Raises StreamError if it answers nothing that was asked."""
        first = self._first
        match message:
            case wire.Fence(number):
                if not self.pending or first.fence != number:
                    raise StreamError(f"the fence {number}")
                self._settle()
            case wire.ZstdData():
                self._receive_data(message.position, expand(message))
            case wire.Zero(position, length):
                self._count(first.take_zeros(position, length), f"{length} zeros for position {position}")
            case wire.Failure(position, reason):
                expected = first.take_failure(position, f"{self.source}: {reason}")
                self._count(expected, f"a failure for position {position}")
            case wire.Hole(position, length):
                if not isinstance(first, HoleQuery) or not first.take_hole(Extent(position, length)):
                    raise StreamError(f"a hole of {length} bytes at position {position}")
                self.answer_count += length >= first.min_length
            case _:
                super().receive(message)


class OriginalDialect(Dialect):
    """The dialect of the original program, whose `retrieve` is a filter and was not made for requests."""

    grammar = wire.BLOCK_STREAM

    def __init__(self, source: str) -> None:
        """Begin a connection. `source`: the name of the source in messages."""
        super().__init__(source)
        self._fences = itertools.cycle((1, 2))
        self._old_fence: int | None = None  # of the batch that was settled last
        self._old_fences = 0  # of that batch, still to come
        self._proven = False  # the last byte of the first pending batch exists

    def _encode(self, batch: Batch) -> bytes:
        asked = [wire.Hash(*extent, own) for each in batch.signatures for extent, own in each.blocks()]
        if not isinstance(batch, ByteProbe):
            asked.append(wire.Hash(self._last_byte(batch), 1, NO_DIGEST))
        return b"".join(map(wire.encode, [*asked, *[wire.Hash(batch.fence, 0, NO_DIGEST)] * FENCES]))

    @staticmethod
    def _last_byte(batch: Batch) -> int:
        return batch.signatures[-1].end - 1

    def _receive_data(self, position: int, payload: Buffer) -> None:
        if not payload:
            self._receive_fence(position)
            return
        batch = self._first
        if self._is_proof(batch, position, payload):
            self._proven = True
            return
        block = batch.block_at(position)
        if block is not None and len(payload) < block.length:
            batch.error = batch.error or self._too_short(batch)
            return
        expected = block is not None and len(payload) == block.length and batch.take_data(position, payload)
        self._count(expected, f"{len(payload)} bytes for position {position}")

    def _receive_fence(self, position: int) -> None:
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
        """Return whether an answer only proves that the last byte of `batch` exists.

        `payload`: the bytes of the answer. `position`: theirs.
        """
        if isinstance(batch, ByteProbe) or self._proven or len(payload) != 1 or position != self._last_byte(batch):
            return False
        *_, (block, own) = batch.signatures[-1].blocks()
        # A last block of one byte asks for the same byte. If that is equal, the block has no answer of its own.
        return block.length > 1 or named(ORIGINAL)(payload) == own or batch.delta.data[-1:] == [block]

    def _too_short(self, batch: Batch) -> SourceError:
        return SourceError(
            f"{self.source} is shorter than it was: it ends before byte {self._last_byte(batch) + 1}"
        )
