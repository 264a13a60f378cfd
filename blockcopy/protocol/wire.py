"""The messages of both streams, and how they are written. Read they are by `decoder`, the only parser there is.

The original form is the original program's (messa/blockcopy 0.0.2): commands of 4 ASCII bytes, all
integers big-endian and unsigned, no handshake, and an explicit `done`. The end of the stream
without it is an error.

The extended form is spoken between ends of ours. It has these messages more:

    hash stream
    asks  position 8 · block size 4 · length 4 · size 4 · digests
                                the `length` bytes at `position` have these digests, one a block (the last
                                may be short): send what differs
    zero  position 8 · length 8     they are all zeros: send what differs
    block stream
    zero  position 8 · length 8     write zeros there
    dzst  position 8 · size 4 · zstd frame      as `data`, compressed

Its `data` and `dzst` hold one block or several that follow one another. It is opened in one of two ways.

Over pipes, which have no way back, by `checksum --digest`:

    dgst  size 4 · name         what `asks` are digested with; before all else, and `asks`, `zero`, `rest`
                                and `done` follow

Between a mount or a sync and our own `retrieve`, the agreed form, by a greeting in both directions:

    helo  size 4 · JSON         either way, first of all: what this end is and can. Asked again, it is
                                answered again: what the source is by now
    hole  position 8 · length 8     asked: where in there are holes; answered: here is one (any number of times)
    fenc  number 8              asked: tell when all before is answered; answered: it is
    fail  position 8 · size 4 · text    the block at this position, which was asked for, cannot be read, and why

In it, silence before a `fenc` means "equal" and nothing else: what the source does not have is a
`fail`. Of the JSON, an object, these names are read, and others passed over:

    protocol   1
    program    name and version, for messages
    digests    to the source: the digests that this end has, each with its speed here in MB/s
    digest     from the source: the one that suits both ends best
    compress   to the source: {"name": "zstd", "level": 1 to 19, "auto": only where it pays}, if wished for
               and possible here; from the source: "zstd" or "none"
    identity   from the source: its size, and what else tells it from another (see `identity`)

A name that is not there means the original's way: SHA3-512, nothing compressed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Union

from blockcopy.block.buffers import Buffer
from blockcopy.errors import StreamError
from blockcopy.protocol.digests import DIGEST_SIZE
from blockcopy.protocol.strict_json import parse_object

MAX_BLOCK_SIZE = 1024 * 1024
"""Bytes a peer may ask for, or send, as one block. The original never goes beyond 128 KiB."""


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


class Asks(NamedTuple):
    """`asks`: as many `Hash` as `length` bytes have blocks, with `digests` of the length agreed on, joined."""

    position: int
    block_size: int
    length: int
    digests: Buffer


class Zero(NamedTuple):
    """`zero`: the `length` bytes at `position` are zeros; in the hash stream here, in the other at the source."""

    position: int
    length: int


class Digests(NamedTuple):
    """`dgst`: the name of the digest that `asks` have. Opens the extended form over pipes."""

    name: str


class Data(NamedTuple):
    """`data`: write `payload` at `position`."""

    position: int
    payload: Buffer


class XzData(NamedTuple):
    """`dlzm`: write what the xz stream `payload` expands to at `position`."""

    position: int
    payload: Buffer


class ZstdData(NamedTuple):
    """`dzst`: write what the zstd frame `payload` expands to at `position`."""

    position: int
    payload: Buffer


class Hole(NamedTuple):
    """`hole`: asked, where are the holes of these `length` bytes; answered, here is one."""

    position: int
    length: int


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


Message = Union[
    Hash, LegacyHash, Asks, Zero, Digests, Rest, Data, XzData, ZstdData, Hello, Hole, Fence, Failure, Done
]

PROTOCOL = 1

MAX_TEXT_SIZE = 64 * 1024
"""Bytes of a `helo`'s JSON or a `fail`'s reason."""

_MOST_REASON = 4096
"""Bytes of a `fail`'s reason that are kept."""

_HASH = struct.Struct(f">QI{DIGEST_SIZE}s")
_LEGACY_HASH = struct.Struct(f">I{DIGEST_SIZE}s")
_OFFSET = struct.Struct(">Q")
_FRAME = struct.Struct(">QI")
_TEXT = struct.Struct(">I")
_ASKS = struct.Struct(">QIII")
_RANGE = struct.Struct(">QQ")
_NOTHING = struct.Struct("")

FRAME_SIZE = _FRAME.size
"""Bytes of position and size, which stand before a payload."""

MAX_ASKED = 16 * 1024 * 1024
"""Bytes that one `asks` may be about."""

MIN_ASKED_BLOCK = 4096

_MOST_DIGESTS = MAX_ASKED // MIN_ASKED_BLOCK * DIGEST_SIZE


def encode(message: Message) -> bytes:
    """The whole of one message. For frames with a payload see `frame_header`, which copies nothing."""
    if isinstance(message, Hash):
        return b"Hash" + _HASH.pack(*message)
    for kind, command in ((Data, b"data"), (XzData, b"dlzm"), (ZstdData, b"dzst")):
        if isinstance(message, kind):
            return frame_header(command, message.position, len(message.payload)) + bytes(message.payload)
    if isinstance(message, Asks):
        *fields, digests = message
        return b"asks" + _ASKS.pack(*fields, len(digests)) + bytes(digests)
    if isinstance(message, Zero):
        return b"zero" + _RANGE.pack(*message)
    if isinstance(message, Hole):
        return b"hole" + _RANGE.pack(*message)
    if isinstance(message, Digests):
        text = message.name.encode()
        return b"dgst" + _TEXT.pack(len(text)) + text
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
    """What stands before the payload of `data`, `dlzm` and `dzst`."""
    return command + _FRAME.pack(position, size)


def _hello(payload: Buffer) -> Hello:
    try:
        return Hello(parse_object(bytes(payload)))
    except ValueError as error:
        raise StreamError(f"`helo` without the JSON that belongs to it: {error}") from error


def _failure(position: int, payload: Buffer) -> Failure:
    return Failure(position, bytes(payload[:_MOST_REASON]).decode(errors="replace"))


def _digests(payload: Buffer) -> Digests:
    return Digests(bytes(payload).decode(errors="replace"))


class Layout(NamedTuple):
    """Fixed fields; where `most_payload` is given, the last of them is the size of what follows."""

    fields: struct.Struct
    message: Callable[..., Message]
    most_payload: int | None = None


Grammar = Mapping[bytes, Layout]

HASH_STREAM: Grammar = {
    b"Hash": Layout(_HASH, Hash),
    b"hash": Layout(_LEGACY_HASH, LegacyHash),
    b"rest": Layout(_OFFSET, Rest),
    b"dgst": Layout(_TEXT, _digests, MAX_TEXT_SIZE),
    b"asks": Layout(_ASKS, Asks, _MOST_DIGESTS),
    b"zero": Layout(_RANGE, Zero),
    b"hole": Layout(_RANGE, Hole),
    b"helo": Layout(_TEXT, _hello, MAX_TEXT_SIZE),
    b"fenc": Layout(_OFFSET, Fence),
    b"done": Layout(_NOTHING, Done),
}
"""checksum → retrieve; a mount or a sync → retrieve, in either form."""

BLOCK_STREAM: Grammar = {
    b"data": Layout(_FRAME, Data, MAX_BLOCK_SIZE),
    b"dlzm": Layout(_FRAME, XzData, MAX_BLOCK_SIZE),
    b"zero": Layout(_RANGE, Zero),
    b"dzst": Layout(_FRAME, ZstdData, MAX_BLOCK_SIZE),
    b"done": Layout(_NOTHING, Done),
}
"""retrieve → save, in either form."""

AGREED_BLOCK_STREAM: Grammar = {
    **BLOCK_STREAM,
    b"hole": Layout(_RANGE, Hole),
    b"helo": Layout(_TEXT, _hello, MAX_TEXT_SIZE),
    b"fenc": Layout(_OFFSET, Fence),
    b"fail": Layout(_FRAME, _failure, MAX_TEXT_SIZE),
}
"""retrieve → a mount or a sync, in the agreed form."""
