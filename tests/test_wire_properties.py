"""Properties of every stream: whatever a peer sends is a message, a wait for more, or a StreamError.

Memory is bounded. `tools/fuzz decoder` looks for the same without an end.
"""

from __future__ import annotations

import json
import lzma
import tracemalloc
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FedDecoder, served

from blockcopy.block.geometry import MAX_POSITION
from blockcopy.errors import StreamError, TruncatedStreamError
from blockcopy.protocol import wire, xz, zstd
from blockcopy.protocol.decoder import _COMMAND_SIZE, Decoder
from blockcopy.protocol.digests import DIGEST_SIZE
from blockcopy.protocol.wire import (
    MAX_BLOCK_SIZE,
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

# The same examples in every run, and no time limit for one: a slow machine is no defect.
stable = settings(derandomize=True, database=None, deadline=None, max_examples=100)

POSITIONS = st.integers(0, MAX_POSITION - MAX_BLOCK_SIZE)
SIZES = st.integers(0, MAX_BLOCK_SIZE)
DIGESTS = st.binary(min_size=DIGEST_SIZE, max_size=DIGEST_SIZE)
PAYLOADS = st.binary(max_size=100)
NUMBERS = st.integers(1 - 2**64, 2**64 - 1)
FACTS = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | NUMBERS | st.text(max_size=5))
GREETINGS = st.builds(Hello, FACTS)
FENCES = st.builds(Fence, st.integers(0, 2**64 - 1))
FRAMES = st.builds(Data, POSITIONS, PAYLOADS) | st.builds(XzData, POSITIONS, PAYLOADS)
RANGES = st.integers(0, MAX_POSITION).flatmap(lambda at: st.tuples(st.just(at), st.integers(0, MAX_POSITION - at)))
ZEROS = RANGES.map(lambda each: Zero(*each))
HOLES = RANGES.map(lambda each: Hole(*each))
EXTENDED_FRAMES = FRAMES | st.builds(ZstdData, POSITIONS, PAYLOADS) | ZEROS
RUNS = st.builds(
    lambda position, block_size, blocks, short, digest: Asks(
        position, block_size, blocks * block_size - short, blocks * digest
    ),
    POSITIONS,
    st.integers(4096, 8192),
    st.integers(1, 3),
    st.integers(0, 4095),
    st.binary(min_size=4, max_size=8),
)
FAILURES = st.builds(Failure, POSITIONS, st.text(max_size=20))
ASKS = (
    st.builds(Hash, POSITIONS, SIZES, DIGESTS)
    | st.builds(LegacyHash, SIZES, DIGESTS)
    | st.builds(Rest, st.integers(0, MAX_POSITION))
)
GRAMMARS = pytest.mark.parametrize(
    ("grammar", "messages"),
    [
        pytest.param(
            wire.HASH_STREAM,
            ASKS | GREETINGS | FENCES | RUNS | ZEROS | HOLES | st.builds(DigestName, st.text(max_size=9)),
            id="hashes",
        ),
        pytest.param(wire.BLOCK_STREAM, EXTENDED_FRAMES, id="blocks"),
        pytest.param(
            wire.NEGOTIATED_BLOCK_STREAM, EXTENDED_FRAMES | GREETINGS | FENCES | FAILURES | HOLES, id="agreed"
        ),
    ],
)


def encode_all(messages: Iterable[Message]) -> bytes:
    return b"".join(map(encode, messages))


def in_bytes(stream: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in stream]


@st.composite
def pieces(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    """`stream`, cut anywhere; pieces may be empty."""
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=8))
    return [stream[start:end] for start, end in pairwise([0, *sorted(cuts), len(stream)])]


@st.composite
def damaged(draw: st.DrawFn, stream: bytes) -> bytes:
    """`stream` with some bytes flipped, deleted or put in."""
    damaged = bytearray(stream)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(damaged)))
        damaged[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(damaged)


def decode(decoder: FedDecoder, parts: Iterable[bytes]) -> list[Message]:
    messages: list[Message] = []
    for part in parts:
        decoder.feed(part)
        messages += iter(decoder.next, None)
    return messages


@GRAMMARS
@given(data=st.data())
@stable
def test_a_stream_is_decoded_however_it_is_cut(
    grammar: Grammar, messages: st.SearchStrategy[Message], data: st.DataObject
) -> None:
    sent = [*data.draw(st.lists(messages, max_size=6)), Done()]
    stream = encode_all(sent)
    for parts in ([stream], in_bytes(stream), data.draw(pieces(stream))):
        decoder = FedDecoder(grammar)
        assert decode(decoder, parts) == sent
        decoder.feed_eof()
        read = Decoder(grammar).messages(served([*parts]))
        assert encode_all(each for each in read if each is not None) == stream


@GRAMMARS
@given(data=st.data())
@stable
def test_what_comes_before_a_cut_is_delivered_and_the_cut_is_told(
    grammar: Grammar, messages: st.SearchStrategy[Message], data: st.DataObject
) -> None:
    sent = [*data.draw(st.lists(messages, max_size=6)), Done()]
    stream = encode_all(sent)
    cut = data.draw(st.integers(0, len(stream) - 1))
    ends = accumulate(len(encode(message)) for message in sent)
    decoder = FedDecoder(grammar)
    assert decode(decoder, data.draw(pieces(stream[:cut]))) == sent[: sum(end <= cut for end in ends)]
    with pytest.raises(TruncatedStreamError):
        decoder.feed_eof()


SMALL = 128
"""In place of the real limits of a payload, which no example of a few hundred bytes would reach."""


def shrink(grammar: Grammar) -> Grammar:
    return {
        command: layout if layout.max_payload is None else layout._replace(max_payload=SMALL)
        for command, layout in grammar.items()
    }


GREETINGS_OF_ANYTHING = st.recursive(st.none() | st.floats() | st.text(max_size=5), st.lists, max_leaves=5).map(
    lambda facts: b"helo" + len(text := json.dumps(facts).encode()).to_bytes(4, "big") + text
)


@GRAMMARS
@given(data=st.data())
@stable
def test_any_bytes_are_messages_or_a_stream_error_in_bounded_memory(
    grammar: Grammar, messages: st.SearchStrategy[Message], data: st.DataObject
) -> None:
    streams = st.lists(messages, max_size=6).map(encode_all)
    stream = data.draw(streams.flatmap(damaged) | GREETINGS_OF_ANYTHING | st.binary(max_size=500))
    header = _COMMAND_SIZE + max(layout.fields.size for layout in grammar.values())
    decoder = FedDecoder(shrink(grammar))
    for part in data.draw(pieces(stream) | st.just(in_bytes(stream))):
        decoder.feed(part)
        try:
            assert all(isinstance(message, get_args(Message)) for message in iter(decoder.next, None))
        except StreamError:
            return
        assert len(decoder._buffer) < SMALL + header + len(part)
        if decoder.done:
            return


def test_no_payload_is_waited_for_that_is_larger_than_a_block() -> None:
    for grammar in (wire.HASH_STREAM, wire.BLOCK_STREAM, wire.NEGOTIATED_BLOCK_STREAM):
        assert all((layout.max_payload or 0) <= MAX_BLOCK_SIZE for layout in grammar.values())


def test_a_greeting_that_is_nested_too_deeply_is_a_stream_error() -> None:
    text = b"[" * wire.MAX_TEXT_SIZE
    decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
    decoder.feed(b"helo" + len(text).to_bytes(4, "big") + text)
    with pytest.raises(StreamError):
        decoder.next()


def test_a_reason_may_name_a_path_that_is_no_utf_8() -> None:
    """Python has such a path's bytes as surrogates (`os.fsdecode`)."""
    decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
    decoder.feed(encode(Failure(0, "cannot read /srv/\udcff")))
    assert isinstance(decoder.next(), Failure)


@given(payload=PAYLOADS.map(xz.compress).flatmap(damaged) | PAYLOADS)
@stable
def test_any_xz_block_is_expanded_or_a_stream_error(payload: bytes) -> None:
    try:
        data = xz.expand(XzData(0, payload))
    except StreamError:
        return
    assert len(data) <= MAX_BLOCK_SIZE
    assert lzma.decompress(payload) == data


needs_zstd = pytest.mark.skipif(not zstd.available(), reason="this host has no zstd")


@needs_zstd
@given(
    payload=PAYLOADS.map(lambda data: zstd.compress(data, 3) if zstd.available() else data).flatmap(damaged)
    | PAYLOADS
)
@stable
def test_any_zstd_frame_is_expanded_or_a_stream_error(payload: bytes) -> None:
    try:
        data = zstd.expand(ZstdData(0, payload))
    except StreamError:
        return
    assert len(data) <= MAX_BLOCK_SIZE
    assert zstd._module().decompress(payload) == data


@needs_zstd
@pytest.mark.parametrize("size", [0, MAX_BLOCK_SIZE])
def test_a_zstd_frame_may_expand_to_a_whole_block(size: int) -> None:
    assert zstd.expand(ZstdData(0, zstd.compress(bytes(size), 19))) == bytes(size)


@pytest.mark.parametrize("size", [0, MAX_BLOCK_SIZE])
def test_an_xz_block_may_expand_to_a_whole_block(size: int) -> None:
    assert xz.expand(XzData(0, xz.compress(bytes(size)))) == bytes(size)


@pytest.mark.parametrize("size", [MAX_BLOCK_SIZE + 1, 64 * MAX_BLOCK_SIZE])
def test_no_more_than_a_block_is_expanded(size: int) -> None:
    bomb = XzData(0, lzma.compress(bytes(size), preset=0))
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="expands to more"):
            xz.expand(bomb)
        assert tracemalloc.get_traced_memory()[1] < xz._MEMORY + 2 * MAX_BLOCK_SIZE
    finally:
        tracemalloc.stop()
