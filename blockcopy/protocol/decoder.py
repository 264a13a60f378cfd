"""Bytes of a stream → its messages (see `wire`). No I/O, no role; threads and trio tasks use the same.

Whatever a peer sends is a message, a wait for more, or a StreamError, in bounded memory.
"""

from __future__ import annotations

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import MAX_POSITION
from blockcopy.errors import StreamError, TruncatedStreamError
from blockcopy.protocol.wire import (
    FRAME_SIZE,
    MAX_ASKED,
    MAX_BLOCK_SIZE,
    MIN_ASKED_BLOCK,
    Asks,
    Done,
    Grammar,
    Hash,
    Hole,
    LegacyHash,
    Message,
    Rest,
    Zero,
)

_COMMAND_SIZE = 4

_LONG = 64 * 1024
"""A message of this size is read to its end and no further, so that the next one begins where nothing
has to be moved for it."""

_CAPACITY = _COMMAND_SIZE + FRAME_SIZE + MAX_BLOCK_SIZE + _LONG


class Decoder:
    """Bytes in, messages out (`next`). Holds at most one incomplete message, in a buffer of fixed size.

    Bytes come in by `feed`, which copies them, or into `room`, told by `filled`, which is without a
    copy: then the payloads of messages are views of the buffer, good until `room` is asked for again.
    Every size and position is checked before the bytes it promises are waited for.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._buffer = memoryview(bytearray(0))
        self._at = 0  # where the next message begins in the buffer
        self._end = 0  # where what was fed ends
        self._needed = 0  # bytes that the incomplete message has in all, as far as is known
        self._done = False

    @property
    def done(self) -> bool:
        """`done` has been read: whatever follows does not belong to the stream."""
        return self._done

    def room(self) -> memoryview:
        """Where the next bytes of the stream go; then say how many by `filled`. Ends the use of all payloads."""
        if len(self._buffer) != _CAPACITY:
            self._replace_buffer(bytearray(_CAPACITY))
        elif self._at:
            rest = self._end - self._at
            self._buffer[:rest] = bytes(self._buffer[self._at : self._end])
            self._at, self._end = 0, rest
        missing = self._needed - self._end
        return self._buffer[self._end :][: missing if missing > 0 and self._needed >= _LONG else None]

    def filled(self, count: int) -> None:
        """So many bytes were put into the `room`; what follows `done` is none of the stream, and not kept."""
        if not self._done:
            self._end += count

    def feed(self, data: Buffer) -> None:
        """More bytes of the stream; what follows `done` is none of it, and not kept."""
        if self._done:
            return
        rest = self._end - self._at
        self._replace_buffer(bytearray(rest + len(data)))
        self._buffer[rest:] = data
        self._end = len(self._buffer)

    def _replace_buffer(self, new: bytearray) -> None:
        rest = self._end - self._at
        new[:rest] = self._buffer[self._at : self._end]
        self._buffer, self._at, self._end = memoryview(new), 0, rest

    def next(self) -> Message | None:
        """The next message, or None until more bytes have come. StreamError for what is none."""
        if self._done:
            return None
        self._needed = 0
        start = self._at + _COMMAND_SIZE
        if self._end < start:
            return None
        command = bytes(self._buffer[self._at : start])
        layout = self._grammar.get(command)
        if layout is None:
            raise StreamError(
                f"unknown command in the stream: {bytes(self._buffer[self._at : min(self._at + 40, self._end)])!r} "
                "(does a login script or another program print into it?)"
            )
        end = start + layout.fields.size
        if self._end < end:
            return None
        fields = layout.fields.unpack_from(self._buffer, start)
        if layout.most_payload is not None:
            *others, size = fields
            if size > layout.most_payload:
                raise StreamError(
                    f"`{command.decode()}` with {size} bytes; {layout.most_payload} are the most it may have"
                )
            if others:
                _check_range(command, others[0], size)
            start, end = end, end + size
            if self._end < end:
                self._needed = end - self._at
                return None
            fields = (*others, self._buffer[start:end])
        message = layout.message(*fields)
        if isinstance(message, (Hash, LegacyHash)):
            _check_size(command, message.size)
            _check_range(command, message.position if isinstance(message, Hash) else 0, message.size)
        elif isinstance(message, Asks):
            _check_asks(message)
        elif isinstance(message, (Zero, Hole)):
            _check_range(command, message.position, message.length)
        elif isinstance(message, Rest):
            _check_range(command, message.offset, 0)
        elif isinstance(message, Done):
            self._done = True
        self._at = end
        return message

    def end(self) -> None:
        """The stream has no more bytes. TruncatedStreamError unless it ended with `done`."""
        if self._done:
            return
        rest = self._end - self._at
        raise TruncatedStreamError(
            f"the stream ended in the middle of a message, after {rest} bytes of it"
            if rest
            else "the stream ended without `done`: whoever wrote it did not finish"
        )


def _check_size(command: bytes, size: int) -> None:
    if size > MAX_BLOCK_SIZE:
        raise StreamError(f"`{command.decode()}` of {size} bytes; {MAX_BLOCK_SIZE} are the most a block may have")


def _check_range(command: bytes, position: int, length: int) -> None:
    if position + length > MAX_POSITION:
        raise StreamError(f"`{command.decode()}` at position {position}, which no file can have")


def _check_asks(asks: Asks) -> None:
    _check_range(b"asks", asks.position, asks.length)
    if asks.length > MAX_ASKED or not MIN_ASKED_BLOCK <= asks.block_size <= MAX_BLOCK_SIZE:
        raise StreamError(f"`asks` about {asks.length} bytes in blocks of {asks.block_size}")
    blocks = -(-asks.length // asks.block_size)
    if not blocks or len(asks.digests) % blocks:
        raise StreamError(f"`asks` with {len(asks.digests)} bytes of digests for {blocks} blocks")
