"""The messages of both streams: bytes, layouts and limits. `decoder` parses streams, `encode` writes messages.

The client sends the hash stream. The source, `retrieve`, answers with the block stream. Clients are `checksum`,
`receive`, `mount`, `sync` and `verify`. A message is a command, fixed fields, and perhaps a payload. A command is 4
ASCII bytes. Integers are unsigned and big-endian. Sizes of fields are given here in bytes.

The original form is that of messa/blockcopy 0.0.2. It has no handshake. Digests are SHA3-512.

    hash stream
    Hash  position 8 · size 4 · digest 64       the destination's `size` bytes at `position` have this digest:
                                                send the source's bytes if they differ
    hash  size 4 · digest 64                    as `Hash`, at the position where the source's last read ended
    rest  offset 8                              send all that the source has from `offset` on
    done                                        clean end
    block stream
    data  position 8 · size 4 · bytes           write the bytes at `position`
    dlzm  position 8 · size 4 · xz stream       as `data`, compressed
    done                                        clean end

Answers come in the order of the requests. An equal block has no answer. If the source ends within a requested
block, it sends what it has. If it ends before the block, it sends nothing. An empty `Hash` with a wrong digest is
answered by an empty `data`. A stream that ends without `done` is an error.

The extended form is for two ends of this program. It adds these messages:

    hash stream
    dgst  size 4 · name                         first message: name of the digest of all `asks`
    asks  position 8 · block size 4 · length 4 · size 4 · digests
                                                digests of the blocks in `length` bytes, the last perhaps short:
                                                send what differs
    zero  position 8 · length 8                 the destination has zeros: send what differs
    block stream
    zero  position 8 · length 8                 write zeros
    dzst  position 8 · size 4 · zstd frame      as `data`, compressed

One `data` or `dzst` may hold several adjacent blocks. `checksum --digest` opens the extended form by `dgst`.

The negotiated form is the extended form with a greeting in both directions. It adds these messages:

    both streams
    helo  size 4 · JSON                         first message: facts about the sender. A later `helo` is answered
                                                by new facts
    hole  position 8 · length 8                 client: which holes are in this range? Source: this is one
    fenc  number 8                              client: answer all before. Source: all before is answered
    block stream
    fail  position 8 · size 4 · text            the block at `position` cannot be read, and why

In the negotiated form, no answer before `fenc` means "equal", because the source sends `fail` for bytes that it
lacks. `Hash` keeps SHA3-512 in every form. The JSON of `helo` is an object with these names. Others are ignored.

    protocol   1
    program    name and version, for messages
    digests    from the client: its digests, each with its speed in MB/s
    digest     from the source: the digest that suits both ends best
    compress   from the client: {"name": "zstd", "level": 1 to 19, "auto": true if only while compressing pays}.
               From the source: "zstd" or "none"
    connections  from the client: how many processes of the source share its CPUs (1)
    join         from `receive`: the token with which answers may come over further connections (see `stage.join`)
    identity   from the source: its size, and what else tells sources apart (see `block.identity`)

Without `digests` and `compress`, digests are SHA3-512 and nothing is compressed.

A further connection of a push carries answers in any order, and `fenc`. `receive` opens it by `fenc` 0, and returns
each `fenc` that it gets once all before is written. `done` ends it in both directions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Union

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import MAX_POSITION
from blockcopy.errors import StreamError
from blockcopy.protocol.digests import DIGEST_SIZE
from blockcopy.protocol.strict_json import parse_object

PROTOCOL = 1
"""Protocol version in `helo`."""

MAX_BLOCK_SIZE = 1024 * 1024
"""Maximum bytes of a block, and of a frame's payload. The original's blocks have at most 128 KiB."""

MAX_TEXT_SIZE = 64 * 1024
"""Maximum bytes of a `helo`'s JSON, a `fail`'s reason and a `dgst`'s name."""

MAX_ASKED = 16 * 1024 * 1024
"""Maximum `length` of one `asks`, in bytes."""

MIN_ASKED_BLOCK = 4096
"""Minimum block size of `asks`, in bytes."""

_MAX_TEXT_KEPT = 4096
"""Bytes of a reason or name that the receiver keeps."""


class Hash(NamedTuple):
    """`Hash`: request for `size` bytes at `position` if their SHA3-512 is not `digest`."""

    position: int
    size: int
    digest: bytes


class LegacyHash(NamedTuple):
    """`hash`: request for `size` bytes where the source's last read ended, if their SHA3-512 is not `digest`."""

    size: int
    digest: bytes


class Rest(NamedTuple):
    """`rest`: request for all that the source has from byte `offset` on."""

    offset: int


class Asks(NamedTuple):
    """`asks`: request for the differing blocks of `length` bytes at `position`, in blocks of `block_size` bytes.

    `digests`: the client's digests of these blocks, joined.
    """

    position: int
    block_size: int
    length: int
    digests: Buffer


class Zero(NamedTuple):
    """`zero`: note that the sender's device has `length` zero bytes at `position`."""

    position: int
    length: int


class DigestName(NamedTuple):
    """`dgst`: the `name` of the digest in all following `asks`. Opens the extended form."""

    name: str


class Data(NamedTuple):
    """`data`: frame whose `payload` the source has at `position`."""

    position: int
    payload: Buffer


class XzData(NamedTuple):
    """`dlzm`: frame whose `payload` is an xz stream of the source's bytes at `position`."""

    position: int
    payload: Buffer


class ZstdData(NamedTuple):
    """`dzst`: frame whose `payload` is a zstd frame of the source's bytes at `position`."""

    position: int
    payload: Buffer


class Hole(NamedTuple):
    """`hole`: request of the client for holes in `length` bytes at `position`, or one hole of the source."""

    position: int
    length: int


class Hello(NamedTuple):
    """`helo`: greeting with `facts` about the sender. Opens the negotiated form."""

    facts: dict[str, Any]


class Fence(NamedTuple):
    """`fenc`: request to answer all earlier requests. The source then returns the same `number`."""

    number: int


class Failure(NamedTuple):
    """`fail`: note that the source cannot read the block at `position`, with a `reason` for the user."""

    position: int
    reason: str


class Done(NamedTuple):
    """`done`: clean end of either stream."""


Frame = Union[Data, XzData, ZstdData]
"""A message with bytes of the source."""

Message = Union[
    Hash, LegacyHash, Asks, Zero, DigestName, Rest, Data, XzData, ZstdData, Hello, Hole, Fence, Failure, Done
]

Kind = Callable[..., Message]
"""A class of messages."""


def _check_range(command: bytes, position: int, length: int = 0, *_: object) -> None:
    if position + length > MAX_POSITION:
        raise StreamError(f"`{command.decode()}` at position {position}, which no file can have")


def _check_block(command: bytes, position: int, size: int, *_: object) -> None:
    if size > MAX_BLOCK_SIZE:
        raise StreamError(f"`{command.decode()}` of {size} bytes; a block has at most {MAX_BLOCK_SIZE}")
    _check_range(command, position, size)


def _check_legacy_hash(command: bytes, size: int, _: bytes) -> None:
    _check_block(command, 0, size)


def _check_asks(command: bytes, position: int, block_size: int, length: int, digests_size: int) -> None:
    _check_range(command, position, length)
    if length > MAX_ASKED or not MIN_ASKED_BLOCK <= block_size <= MAX_BLOCK_SIZE:
        raise StreamError(f"`asks` about {length} bytes in blocks of {block_size}")
    blocks = -(-length // block_size)
    if not blocks or digests_size % blocks:
        raise StreamError(f"`asks` with {digests_size} bytes of digests for {blocks} blocks")


def _check_nothing(*_: object) -> None:
    pass


def _dump_facts(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts).encode()


def _load_facts(payload: Buffer) -> dict[str, Any]:
    try:
        return parse_object(bytes(payload))
    except ValueError as error:
        raise StreamError(f"`helo` without valid JSON: {error}") from error


def _dump_text(text: str) -> bytes:
    return text.encode(errors="replace")[:MAX_TEXT_SIZE]


def _load_text(payload: Buffer) -> str:
    return bytes(payload[:_MAX_TEXT_KEPT]).decode(errors="replace")


def _unchanged(payload: Buffer) -> Buffer:
    return payload


class Layout(NamedTuple):
    """The bytes of the class `message`: `command`, struct `fields`, and perhaps a payload."""

    message: Kind
    command: bytes
    fields: struct.Struct
    check: Callable[..., None] = _check_nothing
    """Raises StreamError if the unpacked fields exceed a limit. Takes the command and the fields."""
    max_payload: int | None = None
    """Maximum bytes of the payload, whose size is the last field. None if there is no payload."""
    dump: Callable[[Any], Buffer] = _unchanged
    """Returns the payload for the message's last value."""
    load: Callable[[Buffer], Any] = _unchanged
    """Returns the message's last value for a payload."""


_RANGE = struct.Struct(">QQ")
_NUMBER = struct.Struct(">Q")
_SIZE = struct.Struct(">I")
_FRAME = struct.Struct(">QI")

_LAYOUTS: dict[Kind, Layout] = {
    layout.message: layout
    for layout in (
        Layout(Hash, b"Hash", struct.Struct(f">QI{DIGEST_SIZE}s"), _check_block),
        Layout(LegacyHash, b"hash", struct.Struct(f">I{DIGEST_SIZE}s"), _check_legacy_hash),
        Layout(Rest, b"rest", _NUMBER, _check_range),
        Layout(Asks, b"asks", struct.Struct(">QIII"), _check_asks, MAX_ASKED // MIN_ASKED_BLOCK * DIGEST_SIZE),
        Layout(Zero, b"zero", _RANGE, _check_range),
        Layout(DigestName, b"dgst", _SIZE, _check_nothing, MAX_TEXT_SIZE, _dump_text, _load_text),
        Layout(Data, b"data", _FRAME, _check_range, MAX_BLOCK_SIZE),
        Layout(XzData, b"dlzm", _FRAME, _check_range, MAX_BLOCK_SIZE),
        Layout(ZstdData, b"dzst", _FRAME, _check_range, MAX_BLOCK_SIZE),
        Layout(Hole, b"hole", _RANGE, _check_range),
        Layout(Hello, b"helo", _SIZE, _check_nothing, MAX_TEXT_SIZE, _dump_facts, _load_facts),
        Layout(Fence, b"fenc", _NUMBER),
        Layout(Failure, b"fail", _FRAME, _check_range, MAX_TEXT_SIZE, _dump_text, _load_text),
        Layout(Done, b"done", struct.Struct("")),
    )
}
"""The only table of commands. `encode`, `frame_header` and the grammars read it."""

FRAME_SIZE = _FRAME.size
"""Bytes of position and size, which precede a frame's payload."""


def encode(message: Message) -> bytes:
    """Return `message` as bytes of a stream. Copies a payload; `frame_header()` avoids this."""
    layout = _LAYOUTS[type(message)]
    if layout.max_payload is None:
        return layout.command + layout.fields.pack(*message)
    values: tuple[Any, ...] = message
    payload = layout.dump(values[-1])
    return b"".join((layout.command, layout.fields.pack(*values[:-1], len(payload)), payload))


def frame_header(kind: Kind, position: int, size: int) -> bytes:
    """Return the bytes that precede the payload of a frame.

    `kind`: class of the frame: Data, XzData or ZstdData. `position`: offset of the frame's data in the source.
    `size`: bytes of the payload.
    """
    layout = _LAYOUTS[kind]
    return layout.command + layout.fields.pack(position, size)


Grammar = Mapping[bytes, Layout]
"""The commands that a stream may contain, with their layouts."""


def _grammar(*kinds: Kind) -> dict[bytes, Layout]:
    return {_LAYOUTS[kind].command: _LAYOUTS[kind] for kind in kinds}


HASH_STREAM: Grammar = _grammar(Hash, LegacyHash, Rest, DigestName, Asks, Zero, Hole, Hello, Fence, Done)
"""Client → source, in all forms."""

BLOCK_STREAM: Grammar = _grammar(Data, XzData, Zero, ZstdData, Done)
"""Source → client, in the original and the extended form."""

NEGOTIATED_BLOCK_STREAM: Grammar = {**BLOCK_STREAM, **_grammar(Hole, Hello, Fence, Failure)}
"""Source → client, in the negotiated form."""
