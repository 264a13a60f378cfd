"""The codec of both streams: messages ↔ bytes, no I/O, no role. The only parser there is.

The streams are the original program's (messa/blockcopy 0.0.2): commands of 4 ASCII bytes, all
integers big-endian and unsigned, no handshake, and an explicit `done`. The end of the stream
without it is an error. Threads and trio tasks use the same `Decoder`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Callable, NamedTuple, Union

from blockcopy.digests import DIGEST_SIZE, Buffer
from blockcopy.errors import StreamError, TruncatedStreamError

MAX_BLOCK_SIZE = 1024 * 1024
"""Bytes a peer may ask for, or send, as one block. The original never goes beyond 128 KiB."""

MAX_POSITION = 2**63 - 1
"""The last offset Linux can address (off_t is signed)."""


class Hash(NamedTuple):
    """`Hash`: the destination's `size` bytes at `position` have this digest; send yours if it differs."""

    position: int
    size: int
    digest: bytes


class LegacyHash(NamedTuple):
    """`hash`: as `Hash`, at the position where the last read of the source ended."""

    size: int
    digest: bytes


class Rest(NamedTuple):
    """`rest`: send all that the source has from `offset` on."""

    offset: int


class Data(NamedTuple):
    """`data`: write `payload` at `position`."""

    position: int
    payload: bytes


class XzData(NamedTuple):
    """`dlzm`: write what the xz stream `payload` expands to at `position`."""

    position: int
    payload: bytes


class Done(NamedTuple):
    """`done`: the clean end of either stream."""


Message = Union[Hash, LegacyHash, Rest, Data, XzData, Done]

_HASH = struct.Struct(f">QI{DIGEST_SIZE}s")
_LEGACY_HASH = struct.Struct(f">I{DIGEST_SIZE}s")
_OFFSET = struct.Struct(">Q")
_FRAME = struct.Struct(">QI")
_NOTHING = struct.Struct("")


def encode(message: Message) -> bytes:
    """The whole of one message. For frames with a payload see `frame_header`, which copies nothing."""
    if isinstance(message, Hash):
        return b"Hash" + _HASH.pack(*message)
    if isinstance(message, Data):
        return frame_header(b"data", message.position, len(message.payload)) + message.payload
    if isinstance(message, XzData):
        return frame_header(b"dlzm", message.position, len(message.payload)) + message.payload
    if isinstance(message, Rest):
        return b"rest" + _OFFSET.pack(*message)
    if isinstance(message, LegacyHash):
        return b"hash" + _LEGACY_HASH.pack(*message)
    return b"done"


def frame_header(command: bytes, position: int, size: int) -> bytes:
    """What stands before the payload of `data` and `dlzm`."""
    return command + _FRAME.pack(position, size)


class _Layout(NamedTuple):
    fields: struct.Struct
    message: Callable[..., Message]
    has_payload: bool = False


Grammar = Mapping[bytes, _Layout]

HASH_STREAM: Grammar = {
    b"Hash": _Layout(_HASH, Hash),
    b"hash": _Layout(_LEGACY_HASH, LegacyHash),
    b"rest": _Layout(_OFFSET, Rest),
    b"done": _Layout(_NOTHING, Done),
}
"""checksum → retrieve."""

BLOCK_STREAM: Grammar = {
    b"data": _Layout(_FRAME, Data, has_payload=True),
    b"dlzm": _Layout(_FRAME, XzData, has_payload=True),
    b"done": _Layout(_NOTHING, Done),
}
"""retrieve → save."""

_COMMAND_SIZE = 4


class Decoder:
    """Bytes in (`feed`), messages out (`next`). Holds at most one incomplete message.

    Every size and position is checked before the bytes it promises are waited for.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._buffer = bytearray()
        self._at = 0  # where the next message begins in the buffer
        self._done = False

    @property
    def done(self) -> bool:
        """`done` has been read: whatever follows does not belong to the stream."""
        return self._done

    def feed(self, data: Buffer) -> None:
        """More bytes of the stream."""
        if self._at:  # drop what has been read, once a feed rather than once a message
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def next(self) -> Message | None:
        """The next message, or None until more bytes are fed. StreamError for what is none."""
        if self._done:
            return None
        start = self._at + _COMMAND_SIZE
        if len(self._buffer) < start:
            return None
        command = bytes(self._buffer[self._at : start])
        layout = self._grammar.get(command)
        if layout is None:
            raise StreamError(
                f"unknown command in the stream: {bytes(self._buffer[self._at : self._at + 40])!r} "
                "(does a login script or another program print into it?)"
            )
        end = start + layout.fields.size
        if len(self._buffer) < end:
            return None
        fields = layout.fields.unpack_from(self._buffer, start)
        if layout.has_payload:
            position, size = fields
            _check_bounds(command, position, size)
            start, end = end, end + size
            if len(self._buffer) < end:
                return None
            fields = (position, bytes(memoryview(self._buffer)[start:end]))
        message = layout.message(*fields)
        if isinstance(message, Hash):
            _check_bounds(command, message.position, message.size)
        elif isinstance(message, LegacyHash):
            _check_bounds(command, 0, message.size)
        elif isinstance(message, Rest):
            _check_bounds(command, message.offset, 0)
        elif isinstance(message, Done):
            self._done = True
        self._at = end
        return message

    def end(self) -> None:
        """The stream has no more bytes. TruncatedStreamError unless it ended with `done`."""
        if self._done:
            return
        rest = len(self._buffer) - self._at
        raise TruncatedStreamError(
            f"the stream ended in the middle of a message, after {rest} bytes of it"
            if rest
            else "the stream ended without `done`: whoever wrote it did not finish"
        )


def _check_bounds(command: bytes, position: int, size: int) -> None:
    if size > MAX_BLOCK_SIZE:
        raise StreamError(f"`{command.decode()}` of {size} bytes; {MAX_BLOCK_SIZE} are the most a block may have")
    if position + size > MAX_POSITION:
        raise StreamError(f"`{command.decode()}` at position {position}, which no file can have")
