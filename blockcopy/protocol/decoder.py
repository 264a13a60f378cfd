"""The parser of both streams: bytes in, messages (see `wire`) out. Does no I/O. Threads and trio tasks can use it.

Any bytes of a peer give a message, a wait for more bytes, or a StreamError. Memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

from blockcopy.block.buffers import Buffer
from blockcopy.errors import StreamError, TruncatedStreamError
from blockcopy.protocol.wire import FRAME_SIZE, MAX_BLOCK_SIZE, Done, Grammar, Message

_COMMAND_SIZE = 4

_LARGE = 64 * 1024
"""Messages of this many bytes are read to their end only. The next message then begins at the buffer's front,
and no bytes have to move."""

_CAPACITY = _COMMAND_SIZE + FRAME_SIZE + MAX_BLOCK_SIZE + _LARGE


class Decoder:
    """An incremental parser of one stream, whose commands `grammar` lists, a Grammar. Not thread-safe.

    `messages()` reads and parses a whole stream. Otherwise, pass bytes to `feed()`, which copies the bytes, and
    take messages from `next()`. To avoid the copy, write bytes into `get_buffer()` and call `buffer_updated()`.
    Payloads are then views of the buffer, valid until the next `get_buffer()`.

    Holds at most one incomplete message. Checks sizes and positions before the payload arrives.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._buffer = memoryview(bytearray(0))
        self._at = 0  # start of the next message in the buffer
        self._end = 0  # end of the received bytes in the buffer
        self._needed = 0  # known size of the incomplete message
        self.done = False
        """Whether the message `done` was read. All further bytes are ignored."""

    def messages(self, read_into: Callable[[memoryview], int]) -> Iterator[Message | None]:
        """Read a stream up to the message `done`, and yield its Messages. Yields None before each read.

        `read_into`: called with a memoryview, writes the stream's next bytes into the memoryview. Returns their
        number, 0 at the end. The call may wait, so None announces each call.

        Raises TruncatedStreamError if the stream ends without `done`. Raises StreamError if it contains anything
        but messages.
        """
        while not self.done:
            message = self.next()
            if message is not None:
                yield message
                continue
            yield None
            count = read_into(self.get_buffer())
            if not count:
                self.feed_eof()
            self.buffer_updated(count)

    def get_buffer(self) -> memoryview:
        """Return a memoryview for the next bytes. Invalidates earlier payloads. Call `buffer_updated()` next."""
        if len(self._buffer) != _CAPACITY:
            self._replace_buffer(bytearray(_CAPACITY))
        elif self._at:
            rest = self._end - self._at
            self._buffer[:rest] = bytes(self._buffer[self._at : self._end])
            self._at, self._end = 0, rest
        missing = self._needed - self._end
        return self._buffer[self._end :][: missing if missing > 0 and self._needed >= _LARGE else None]

    def buffer_updated(self, count: int) -> None:
        """Accept `count` bytes that the caller has written into the front of the memoryview of `get_buffer()`."""
        if not self.done:
            self._end += count

    def feed(self, data: Buffer) -> None:
        """Accept `data`, the next bytes of the stream. Copies them."""
        if self.done:
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
        """Parse and return the next Message. Returns None if more bytes are needed, or after the message `done`.

        Raises StreamError if the bytes are no message of the grammar, or exceed its limits.
        """
        if self.done:
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
        if layout.max_payload is None:
            layout.check(command, *fields)
        else:
            size = fields[-1]
            if size > layout.max_payload:
                raise StreamError(f"`{command.decode()}` with {size} bytes; the maximum is {layout.max_payload}")
            layout.check(command, *fields)
            start, end = end, end + size
            if self._end < end:
                self._needed = end - self._at
                return None
            fields = (*fields[:-1], layout.load(self._buffer[start:end]))
        message = layout.message(*fields)
        self.done = isinstance(message, Done)
        self._at = end
        return message

    def feed_eof(self) -> None:
        """Accept the end of the stream. Raises TruncatedStreamError unless the message `done` was read."""
        if self.done:
            return
        rest = self._end - self._at
        raise TruncatedStreamError(
            f"the stream ended in the middle of a message, after {rest} bytes of it"
            if rest
            else "the stream ended without `done`: its writer did not finish"
        )
