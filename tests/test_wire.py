from __future__ import annotations

import hashlib

import pytest
from support import FedDecoder, served

from blockcopy.block.geometry import MAX_POSITION
from blockcopy.errors import StreamError, TruncatedStreamError
from blockcopy.protocol import wire
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.wire import (
    BLOCK_STREAM,
    HASH_STREAM,
    MAX_ASKED,
    MAX_BLOCK_SIZE,
    MAX_TEXT_SIZE,
    NEGOTIATED_BLOCK_STREAM,
    Asks,
    Data,
    DigestName,
    Done,
    Failure,
    Fence,
    Grammar,
    Hash,
    Hello,
    Hole,
    LegacyHash,
    Message,
    Rest,
    XzData,
    Zero,
    ZstdData,
    encode,
)

DIGEST = hashlib.sha3_512(b"Hello World!").digest()
HASHES: list[Message] = [
    Hash(0, 131072, DIGEST),
    LegacyHash(12, DIGEST),
    Hash(MAX_POSITION - 1, 1, DIGEST),
    Hash(5, 0, bytes(64)),
    Rest(0),
    Rest(MAX_POSITION),
    Done(),
]
BLOCKS: list[Message] = [
    Data(0, b"Hello World!"),
    Data(2**40, b""),
    XzData(131072, b"\xfd7zXZ\x00 not looked into"),
    Data(7, b"done"),
    Data(0, bytes(MAX_BLOCK_SIZE)),
    Done(),
]
EXTENDED_HASHES: list[Message] = [
    DigestName("blake3"),
    Asks(0, 131072, 131073, DIGEST),
    Asks(MAX_POSITION - 64, 4096, 64, bytes(32)),
    Zero(0, MAX_POSITION),
    Zero(7, 0),
    Rest(5),
    Done(),
]
EXTENDED_BLOCKS: list[Message] = [
    Zero(0, 2**50),
    ZstdData(131072, b"\x28\xb5\x2f\xfd not looked into"),
    Data(0, b"zero"),
    Done(),
]
NEGOTIATED_HASHES: list[Message] = [
    Hello({"protocol": 1}),
    Hash(7, 9, DIGEST),
    Hole(0, 2**40),
    Fence(0),
    Fence(2**64 - 1),
    Done(),
]
NEGOTIATED_BLOCKS: list[Message] = [
    Hello({"size": 12, "program": "größer"}),
    Data(0, b"fenc"),
    Failure(131072, "cannot read — the disk is on fire"),
    Failure(0, ""),
    Hole(4096, 4096),
    Zero(5, 6),
    Fence(5),
    Done(),
]
STREAMS = pytest.mark.parametrize(
    ("grammar", "messages"),
    [
        (HASH_STREAM, HASHES),
        (BLOCK_STREAM, BLOCKS),
        (HASH_STREAM, EXTENDED_HASHES),
        (BLOCK_STREAM, EXTENDED_BLOCKS),
        (HASH_STREAM, NEGOTIATED_HASHES),
        (NEGOTIATED_BLOCK_STREAM, NEGOTIATED_BLOCKS),
    ],
)


def messages_of(decoder: FedDecoder) -> list[Message]:
    return list(iter(decoder.next, None))


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        (Hash(1, 2, DIGEST), b"Hash" + bytes(7) + b"\x01" + bytes(3) + b"\x02" + DIGEST),
        (LegacyHash(258, DIGEST), b"hash" + b"\x00\x00\x01\x02" + DIGEST),
        (Rest(12), b"rest" + bytes(7) + b"\x0c"),
        (Data(258, b"abc"), b"data" + bytes(6) + b"\x01\x02" + bytes(3) + b"\x03" + b"abc"),
        (XzData(0, b"abcd"), b"dlzm" + bytes(8) + bytes(3) + b"\x04" + b"abcd"),
        (Done(), b"done"),
        (Hello({"size": 7}), b"helo" + bytes(3) + b'\x0b{"size": 7}'),
        (Fence(258), b"fenc" + bytes(6) + b"\x01\x02"),
        (DigestName("any"), b"dgst" + bytes(3) + b"\x03any"),
        (
            Asks(1, 4096, 5000, b"0123"),
            b"asks" + bytes(7) + b"\x01" + b"\0\0\x10\0" + b"\0\0\x13\x88" + b"\0\0\0\x04" + b"0123",
        ),
        (Zero(1, 258), b"zero" + bytes(7) + b"\x01" + bytes(6) + b"\x01\x02"),
        (Hole(1, 258), b"hole" + bytes(7) + b"\x01" + bytes(6) + b"\x01\x02"),
        (ZstdData(0, b"abcd"), b"dzst" + bytes(8) + bytes(3) + b"\x04" + b"abcd"),
        (Failure(3, "why"), b"fail" + bytes(7) + b"\x03" + bytes(3) + b"\x03why"),
    ],
)
def test_bytes_are_as_the_format_has_them(message: Message, encoded: bytes) -> None:
    assert encode(message) == encoded


def test_a_frame_header_is_what_stands_before_the_payload() -> None:
    assert wire.frame_header(wire.Data, 5, 3) + b"abc" == encode(Data(5, b"abc"))


@STREAMS
def test_what_is_encoded_is_decoded(grammar: Grammar, messages: list[Message]) -> None:
    decoder = FedDecoder(grammar)
    decoder.feed(b"".join(map(encode, messages)))
    assert messages_of(decoder) == messages
    assert decoder.done
    decoder.feed_eof()


@STREAMS
@pytest.mark.parametrize("step", [1, 7, 2**20])
def test_what_is_read_is_decoded(grammar: Grammar, messages: list[Message], step: int) -> None:
    """Without a copy: a payload is good until the next read."""
    stream = b"".join(
        map(encode, messages if step > 1 else [each for each in messages if len(encode(each)) < 1000])
    )
    parts = [stream[at : at + step] for at in range(0, len(stream), step)]
    found = Decoder(grammar).messages(served(parts))
    assert b"".join(encode(each) for each in found if each is not None) == stream


@STREAMS
def test_a_stream_may_be_split_anywhere(grammar: Grammar, messages: list[Message]) -> None:
    short = [each for each in messages if len(encode(each)) < 1000]
    stream = b"".join(map(encode, short))
    for split in range(len(stream) + 1):
        decoder = FedDecoder(grammar)
        decoder.feed(stream[:split])
        found = messages_of(decoder)
        decoder.feed(stream[split:])
        assert found + messages_of(decoder) == short, split
        decoder.feed_eof()


@STREAMS
def test_a_stream_may_come_byte_by_byte(grammar: Grammar, messages: list[Message]) -> None:
    """Each message is there with its last byte, and not before."""
    decoder = FedDecoder(grammar)
    for message in (each for each in messages if len(encode(each)) < 1000):
        *first, last = encode(message)
        for byte in first:
            decoder.feed(bytes([byte]))
            assert decoder.next() is None
        decoder.feed(bytes([last]))
        assert decoder.next() == message
    assert decoder.done


def test_a_decoder_takes_any_buffer_and_keeps_none_of_it() -> None:
    buffer = bytearray(encode(Data(3, b"abc")))
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert decoder.next() == Data(3, b"abc")


@pytest.mark.parametrize(
    ("grammar", "stream"),
    [
        (HASH_STREAM, b"HASH"),
        (HASH_STREAM, b"data" + bytes(12)),
        (BLOCK_STREAM, b"Hash" + bytes(76)),
        (BLOCK_STREAM, b"rest" + bytes(8)),
        (BLOCK_STREAM, b"Last login: never"),
        (BLOCK_STREAM, b"\0\0\0\0"),
    ],
)
def test_an_unknown_command_is_told_with_what_came(grammar: Grammar, stream: bytes) -> None:
    decoder = FedDecoder(grammar)
    decoder.feed(stream)
    with pytest.raises(StreamError) as caught:
        decoder.next()
    assert repr(stream[:17])[2:-1] in str(caught.value)
    assert not isinstance(caught.value, TruncatedStreamError)


def test_messages_before_an_unknown_command_are_delivered() -> None:
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(encode(Data(0, b"abc")) + b"junk")
    assert decoder.next() == Data(0, b"abc")
    with pytest.raises(StreamError):
        decoder.next()


def header(command: bytes, position: int, size: int) -> bytes:
    """Return the bytes before the payload or the digest."""
    if command == b"hash":
        return command + size.to_bytes(4, "big")
    if command == b"rest":
        return command + position.to_bytes(8, "big")
    return command + position.to_bytes(8, "big") + size.to_bytes(4, "big")


OUT_OF_BOUNDS = [
    (0, MAX_BLOCK_SIZE + 1),
    (0, 2**32 - 1),
    (MAX_POSITION + 1, 0),
    (MAX_POSITION, 1),
    (2**64 - 1, 0),
    (2**64 - 1, 2**32 - 1),
]


@pytest.mark.parametrize("command", [b"data", b"dlzm", b"dzst"])
@pytest.mark.parametrize(("position", "size"), OUT_OF_BOUNDS)
def test_bounds_of_a_frame_are_checked_before_its_payload_comes(command: bytes, position: int, size: int) -> None:
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(header(command, position, size))
    with pytest.raises(StreamError, match=command.decode()):
        decoder.next()


@pytest.mark.parametrize(
    ("command", "position", "size"),
    [
        *((b"Hash", position, size) for position, size in OUT_OF_BOUNDS),
        (b"hash", 0, MAX_BLOCK_SIZE + 1),
        (b"hash", 0, 2**32 - 1),
        (b"rest", MAX_POSITION + 1, 0),
        (b"rest", 2**64 - 1, 0),
    ],
)
def test_bounds_of_what_is_asked_are_checked(command: bytes, position: int, size: int) -> None:
    decoder = FedDecoder(HASH_STREAM)
    decoder.feed(header(command, position, size) + (b"" if command == b"rest" else DIGEST))
    with pytest.raises(StreamError, match=command.decode()):
        decoder.next()


@pytest.mark.parametrize(
    "bad",
    [
        Asks(0, 4095, 4095, bytes(32)),
        Asks(0, 0, 0, b""),
        Asks(0, MAX_BLOCK_SIZE + 1, 5, bytes(32)),
        Asks(0, 2**32 - 1, 2**32 - 1, bytes(32)),
        Asks(0, MAX_BLOCK_SIZE, MAX_ASKED + 1, bytes(17)),
        Asks(0, 4096, 0, b""),
        Asks(0, 4096, 8193, bytes(32)),
        Asks(MAX_POSITION, 4096, 1, bytes(32)),
        Asks(2**64 - 1, 4096, 1, bytes(32)),
        Zero(0, 2**64 - 1),
        Zero(MAX_POSITION, 1),
        Hole(2**63, 0),
    ],
)
def test_bounds_of_what_is_asked_in_the_other_forms_are_checked(bad: Message) -> None:
    decoder = FedDecoder(HASH_STREAM)
    decoder.feed(encode(bad))
    with pytest.raises(StreamError):
        decoder.next()


def test_more_digests_than_can_be_asked_for_are_not_waited_for() -> None:
    decoder = FedDecoder(HASH_STREAM)
    decoder.feed(encode(Asks(0, 4096, MAX_ASKED, b""))[:-4] + (MAX_ASKED // 4096 * 64 + 1).to_bytes(4, "big"))
    with pytest.raises(StreamError, match="asks"):
        decoder.next()


@pytest.mark.parametrize("command", [b"data", b"dlzm", b"dzst"])
@pytest.mark.parametrize(("position", "size"), [(0, MAX_BLOCK_SIZE), (MAX_POSITION, 0), (MAX_POSITION - 1, 1)])
def test_what_is_just_inside_the_bounds_is_waited_for(command: bytes, position: int, size: int) -> None:
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(header(command, position, size))
    if size:
        assert decoder.next() is None
        decoder.feed(bytes(size))
    assert decoder.next() in [kind(position, bytes(size)) for kind in (Data, XzData, ZstdData)]


@STREAMS
def test_an_end_without_done_is_an_error_wherever_it_comes(grammar: Grammar, messages: list[Message]) -> None:
    short = [each for each in messages if len(encode(each)) < 1000]
    stream = b"".join(map(encode, short))
    for length in range(len(stream)):
        decoder = FedDecoder(grammar)
        decoder.feed(stream[:length])
        delivered = messages_of(decoder)
        assert not decoder.done
        with pytest.raises(TruncatedStreamError):
            decoder.feed_eof()
        assert b"".join(map(encode, delivered)) == stream[: len(b"".join(map(encode, delivered)))]


def test_an_end_inside_a_message_is_told_apart() -> None:
    whole, cut = FedDecoder(BLOCK_STREAM), FedDecoder(BLOCK_STREAM)
    cut.feed(b"da")
    with pytest.raises(TruncatedStreamError, match="without `done`"):
        whole.feed_eof()
    with pytest.raises(TruncatedStreamError, match="in the middle of a message, after 2 bytes"):
        cut.feed_eof()


def test_nothing_is_read_behind_done() -> None:
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(b"done" + encode(Data(0, b"abc")) + b"junk")
    assert decoder.next() == Done()
    assert decoder.next() is None
    decoder.feed_eof()


@pytest.mark.parametrize(
    "stream",
    [
        b"helo" + (MAX_TEXT_SIZE + 1).to_bytes(4, "big"),
        b"helo" + bytes(3) + b"\x02{]",
        b"helo" + bytes(3) + b"\x02[]",
        b"helo" + bytes(3) + b"\x01\xff",
        b"fail" + bytes(8) + (MAX_TEXT_SIZE + 1).to_bytes(4, "big"),
    ],
)
def test_a_greeting_or_a_reason_that_is_none(stream: bytes) -> None:
    decoder = FedDecoder(NEGOTIATED_BLOCK_STREAM)
    decoder.feed(stream)
    with pytest.raises(StreamError):
        decoder.next()


@pytest.mark.parametrize("message", [Hello({}), Fence(1), Hole(0, 1), Failure(0, "why")])
def test_save_knows_nothing_of_the_agreed_form(message: Message) -> None:
    decoder = FedDecoder(BLOCK_STREAM)
    decoder.feed(encode(message))
    with pytest.raises(StreamError, match="unknown command"):
        decoder.next()
