"""The parser of both streams: bytes in, messages (see `wire`) out. Does no I/O. Threads and trio tasks can use it.

Any bytes of a peer give a message, a wait for more bytes, or a StreamError. Memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

from blockcopy.errors import StreamError, TruncatedStreamError
from blockcopy.protocol.wire import FRAME_SIZE, MAX_BLOCK_SIZE, Done, Grammar, Message

_COMMAND_SIZE = 4

_LARGE = 64 * 1024
"""Messages of this many bytes are read to their end only. The next message then begins at the buffer's front,
and no bytes have to move."""

_CAPACITY = _COMMAND_SIZE + FRAME_SIZE + MAX_BLOCK_SIZE + _LARGE


class Decoder:
    """An incremental parser of one stream, whose commands `grammar` lists, a Grammar. Not thread-safe.

    `messages()` reads and parses a whole stream. Payloads are views of the decoder's buffer, valid until the next
    read. Holds at most one incomplete message. Checks sizes and positions before the payload arrives.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._buffer = memoryview(bytearray(_CAPACITY))
        self._at = 0  # start of the next message in the buffer
        self._end = 0  # end of the received bytes in the buffer
        self._needed = 0  # known size of the incomplete message

    def messages(self, read_into: Callable[[memoryview], int]) -> Iterator[Message | None]:
        """Read a stream up to the message `done`, and yield its Messages. Yields None before each read.

        `read_into`: called with a memoryview, writes the stream's next bytes into the memoryview. Returns their
        number, 0 at the end. The call may wait, so None announces each call.

        Raises TruncatedStreamError if the stream ends without `done`. Raises StreamError if it contains anything
        but messages.
        """
        message: Message | None = None
        while not isinstance(message, Done):
            message = self.next()
            if message is not None:
                yield message
                continue
            yield None
            count = read_into(self._room())
            if not count:
                raise self._ended_early()
            self._end += count

    def _room(self) -> memoryview:
        """Return a memoryview for the next bytes. Invalidates earlier payloads."""
        if self._at:
            rest = self._end - self._at
            self._buffer[:rest] = bytes(self._buffer[self._at : self._end])
            self._at, self._end = 0, rest
        missing = self._needed - self._end
        return self._buffer[self._end :][: missing if missing > 0 and self._needed >= _LARGE else None]

    def next(self) -> Message | None:
        """Parse and return the next Message. Returns None if more bytes are needed.

        Raises StreamError if the bytes are no message of the grammar, or exceed its limits.
        """
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
        if layout.max_payload is not None and fields[-1] > layout.max_payload:
            raise StreamError(f"`{command.decode()}` with {fields[-1]} bytes; the maximum is {layout.max_payload}")
        layout.check(command, *fields)
        if layout.max_payload is not None:
            start, end = end, end + fields[-1]
            if self._end < end:
                self._needed = end - self._at
                return None
            fields = (*fields[:-1], layout.load(self._buffer[start:end]))
        self._at = end
        return layout.message(*fields)

    def _ended_early(self) -> TruncatedStreamError:
        """Return the error for a stream that ends now, before its message `done`."""
        rest = self._end - self._at
        return TruncatedStreamError(
            f"the stream ended in the middle of a message, after {rest} bytes of it"
            if rest
            else "the stream ended without `done`: its writer did not finish"
        )
