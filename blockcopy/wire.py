"""The codec of both streams: messages ↔ bytes, no I/O, no role. The only parser there is.

The original form is the original program's (messa/blockcopy 0.0.2): commands of 4 ASCII bytes, all
integers big-endian and unsigned, no handshake, and an explicit `done`. The end of the stream
without it is an error. Threads and trio tasks use the same `Decoder`.

The agreed form is what a mount or a sync and our own `retrieve` speak between them. It opens with
`helo` in both directions, and adds to the original form:

    helo  size 4 · JSON         either way, first of all: what this end is and can. Asked again, it is
                                answered again: what the source is by now
    fenc  number 8              asked: tell when all before is answered; answered: it is
    fail  position 8 · size 4 · text    the question for this position cannot be answered, and why

In it, silence before a `fenc` means "equal" and nothing else: what the source does not have is a
`fail`. Of the JSON, an object, these names are read, and others passed over:

    protocol   1
    program    name and version, for messages
    digests    to the source: those that the questions may have, the best first
    digest     from the source: its choice of them; `sha3_512` is the only one yet
    identity   from the source: its size, and what else tells it from another (see `identity`)

What else is to be agreed on is agreed on as the digest is: the asker names what it can, in order of
preference, the source names its choice, and a name that is not there means the original's way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Union

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


class Hello(NamedTuple):
    """`helo`: `facts` about the end that sends it. Opens the agreed form."""

    facts: dict[str, Any]


class Fence(NamedTuple):
    """`fenc`: all before it is to be answered, or has been."""

    number: int


class Failure(NamedTuple):
    """`fail`: the question for `position` has no answer, for a `reason` a user can read."""

    position: int
    reason: str


class Done(NamedTuple):
    """`done`: the clean end of either stream."""


Message = Union[Hash, LegacyHash, Rest, Data, XzData, Hello, Fence, Failure, Done]

PROTOCOL = 1

MAX_TEXT_SIZE = 64 * 1024
"""Bytes of a `helo`'s JSON or a `fail`'s reason."""

_HASH = struct.Struct(f">QI{DIGEST_SIZE}s")
_LEGACY_HASH = struct.Struct(f">I{DIGEST_SIZE}s")
_OFFSET = struct.Struct(">Q")
_FRAME = struct.Struct(">QI")
_TEXT = struct.Struct(">I")
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
    if isinstance(message, Hello):
        text = json.dumps(message.facts).encode()
        return b"helo" + _TEXT.pack(len(text)) + text
    if isinstance(message, Fence):
        return b"fenc" + _OFFSET.pack(message.number)
    if isinstance(message, Failure):
        text = message.reason.encode(errors="replace")[:MAX_TEXT_SIZE]
        return frame_header(b"fail", message.position, len(text)) + text
    return b"done"


def frame_header(command: bytes, position: int, size: int) -> bytes:
    """What stands before the payload of `data` and `dlzm`."""
    return command + _FRAME.pack(position, size)


def _hello(payload: bytes) -> Hello:
    try:
        facts = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise StreamError("`helo` without the JSON that belongs to it") from error
    if not isinstance(facts, dict):
        raise StreamError("`helo` with JSON that is no object")
    return Hello(facts)


def _failure(position: int, payload: bytes) -> Failure:
    return Failure(position, payload.decode(errors="replace"))


class _Layout(NamedTuple):
    """Fixed fields; where `most_payload` is given, the last of them is the size of what follows."""

    fields: struct.Struct
    message: Callable[..., Message]
    most_payload: int | None = None


Grammar = Mapping[bytes, _Layout]

HASH_STREAM: Grammar = {
    b"Hash": _Layout(_HASH, Hash),
    b"hash": _Layout(_LEGACY_HASH, LegacyHash),
    b"rest": _Layout(_OFFSET, Rest),
    b"helo": _Layout(_TEXT, _hello, MAX_TEXT_SIZE),
    b"fenc": _Layout(_OFFSET, Fence),
    b"done": _Layout(_NOTHING, Done),
}
"""checksum → retrieve; a mount or a sync → retrieve, in either form."""

BLOCK_STREAM: Grammar = {
    b"data": _Layout(_FRAME, Data, MAX_BLOCK_SIZE),
    b"dlzm": _Layout(_FRAME, XzData, MAX_BLOCK_SIZE),
    b"done": _Layout(_NOTHING, Done),
}
"""retrieve → save."""

AGREED_BLOCK_STREAM: Grammar = {
    **BLOCK_STREAM,
    b"helo": _Layout(_TEXT, _hello, MAX_TEXT_SIZE),
    b"fenc": _Layout(_OFFSET, Fence),
    b"fail": _Layout(_FRAME, _failure, MAX_TEXT_SIZE),
}
"""retrieve → a mount or a sync, in the agreed form."""

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
        """More bytes of the stream; what follows `done` is none of it, and not kept."""
        if self._done:
            return
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
        if layout.most_payload is not None:
            *positions, size = fields
            _check_bounds(command, sum(positions), size, layout.most_payload)
            start, end = end, end + size
            if len(self._buffer) < end:
                return None
            fields = (*positions, bytes(memoryview(self._buffer)[start:end]))
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


def _check_bounds(command: bytes, position: int, size: int, most: int = MAX_BLOCK_SIZE) -> None:
    if size > most:
        raise StreamError(f"`{command.decode()}` of {size} bytes; {most} are the most a block may have")
    if position + size > MAX_POSITION:
        raise StreamError(f"`{command.decode()}` at position {position}, which no file can have")
