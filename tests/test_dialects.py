"""What answers mean, whatever a peer says: only what was asked for reaches a sink, and it was said."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_wire_properties import ASKS, FAILURES, FRAMES, GREETINGS, stable

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import BlockcopyError, DeviceError, SourceError, StreamError
from blockcopy.protocol import xz, zstd
from blockcopy.protocol.digests import NO_DIGEST, ORIGINAL, named
from blockcopy.protocol.wire import Data, Done, Failure, Fence, Hole, Message, XzData, Zero, ZstdData
from blockcopy.replica.source.batches import Batch, ByteProbe, HoleQuery, Signatures
from blockcopy.replica.source.dialects import FENCES, Dialect, NegotiatedDialect, OriginalDialect

digest = named(ORIGINAL)

DIALECTS = pytest.mark.parametrize("dialect_class", [NegotiatedDialect, OriginalDialect])
BLOCK = 4


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, bytes]] = []

    def data(self, position: int, payload: Buffer) -> None:
        self.given.append((position, bytes(payload)))

    def zeros(self, position: int, length: int) -> None:
        self.given.append((position, bytes(length)))


class Asked:
    """A batch, its sink, and whether it is settled."""

    def __init__(self, dialect: Dialect, make: Callable[[Any, Callable[[], None]], Batch]) -> None:
        self.sink = Kept()
        self.settled = 0
        self.batch = make(self.sink, self.settle)
        self.stream = dialect.request(self.batch)

    def settle(self) -> None:
        self.settled += 1


def question(position: int, length: int) -> Signatures:
    return Signatures(position, length, BLOCK, NO_DIGEST * -(-length // BLOCK))


def asked(dialect: Dialect, *questions: Signatures) -> Asked:
    return Asked(dialect, partial(Batch, questions))


def survey(dialect: Dialect, extent: Extent, min_length: int = 1) -> Asked:
    return Asked(dialect, lambda _, settle: HoleQuery(extent, min_length, settle))


@st.composite
def runs(draw: st.DrawFn) -> list[Signatures]:
    """Runs of blocks, ascending, with room between them."""
    starts = sorted(draw(st.sets(st.integers(0, 8), min_size=1, max_size=3)))
    return [question(100 * start, draw(st.integers(1, 20))) for start in starts]


def honest(dialect: Dialect, each: Asked) -> list[Message]:
    """All that is asked, and the fence."""
    blocks = [extent for run in each.batch.signatures for extent, _ in run.blocks()]
    answers: list[Message] = [Data(extent.offset, bytes(extent.length)) for extent in blocks]
    if isinstance(dialect, NegotiatedDialect):
        return [*answers, Fence(each.batch.fence)]
    proof = Data(blocks[-1].end - 1, b"\0")
    return [*answers, proof, *[Data(each.batch.fence, b"")] * 2]  # the second stands for the others


def test_a_fence_comes_back_as_often_as_it_was_sent() -> None:
    """Otherwise a peer could go on for ever, and bring nothing closer to its end."""
    dialect = OriginalDialect("source")
    each = asked(dialect, question(0, BLOCK))
    for message in [*honest(dialect, each)[:-2], *[Data(each.batch.fence, b"")] * FENCES]:
        dialect.receive(message)
    assert each.settled == 1
    answers = dialect.answer_count
    with pytest.raises(StreamError, match="an empty block"):
        dialect.receive(Data(each.batch.fence, b""))
    assert dialect.answer_count == answers


STRAY = st.one_of(
    FRAMES,
    FAILURES,
    GREETINGS,
    ASKS,
    st.just(Done()),
    st.builds(Fence, st.integers(0, 3)),
    st.builds(Hole, st.integers(0, 40), st.integers(0, 40)),
    st.builds(Zero, st.integers(0, 40), st.integers(0, 40)),
    st.builds(Failure, st.integers(0, 40), st.text(max_size=5)),
    st.builds(Data, st.integers(0, 40), st.integers(0, 5).map(bytes)),
)


@st.composite
def garbled(draw: st.DrawFn, words: list[Message]) -> list[Message]:
    """`words` with some left out, said again, packed, joined, of another length, or others among them."""
    words = list(words)
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(words) - 1)) if words else 0
        here = words[at : at + 1]
        instead: list[list[Message]] = [[], here * 2, [draw(STRAY), *here]]
        if here and isinstance(here[0], Data):
            position, payload = here[0].position, bytes(here[0].payload)
            instead += [[Data(position, payload[1:])], [Data(position, payload + b"x")]]
            instead += [[Data(position, bytes(size))] for size in (2 * BLOCK, 3 * BLOCK)]
            instead += [[Zero(position, size)] for size in (0, len(payload), 2 * BLOCK)]
            instead += [[XzData(position, xz.compress(payload))]]
            if zstd.available():
                instead += [[ZstdData(position, zstd.compress(payload, 1))]]
        words[at : at + 1] = draw(st.sampled_from(instead))
    return words


class Talk(NamedTuple):
    dialect: Dialect
    batches: list[Asked]
    said: set[tuple[int, bytes]]
    """Positions and bytes the peer sent, asked for or not."""


def listen(dialect: Dialect, data: st.DataObject) -> Talk:
    """Ask some batches, and take what a garbled peer says to them, until it is an error."""
    batches = [asked(dialect, *each) for each in data.draw(st.lists(runs(), max_size=3))]
    said: set[tuple[int, bytes]] = set()
    try:
        for word in data.draw(garbled([word for each in batches for word in honest(dialect, each)])):
            if isinstance(word, Data):
                said.add((word.position, bytes(word.payload)))
            elif isinstance(word, XzData):
                said.add((word.position, xz.expand(word)))
            elif isinstance(word, ZstdData):
                said.add((word.position, zstd.expand(word)))
            elif isinstance(word, Zero) and word.length < 1000:
                said.add((word.position, bytes(word.length)))
            dialect.receive(word)
    except StreamError:
        pass  # the connection ends here
    return Talk(dialect, batches, said)


@DIALECTS
@given(data=st.data())
@stable
def test_what_reaches_a_sink_was_said_and_was_asked_for(dialect_class: type[Dialect], data: st.DataObject) -> None:
    talk = listen(dialect_class("source"), data)
    for each in talk.batches:
        assert set(each.sink.given) <= talk.said
        blocks = {extent.offset: extent.length for run in each.batch.signatures for extent, _ in run.blocks()}
        reached = -1
        for position, payload in each.sink.given:
            assert position >= reached  # in their order, and none twice
            reached = position + len(payload)
            while position < reached:  # made of whole blocks
                position += blocks[position]
            assert position == reached


@DIALECTS
@given(data=st.data())
@stable
def test_batches_are_settled_once_and_in_the_order_asked(dialect_class: type[Dialect], data: st.DataObject) -> None:
    dialect, batches, _ = listen(dialect_class("source"), data)
    settled = [each.settled for each in batches]
    assert settled == sorted(settled, reverse=True)
    assert set(settled) <= {0, 1}
    assert [each.batch for each in batches if not each.settled] == list(dialect.pending)


@given(data=st.data())
@stable
def test_without_the_proof_nothing_is_believed(data: st.DataObject) -> None:
    _, batches, said = listen(OriginalDialect("source"), data)
    for each in batches:
        last = each.batch.signatures[-1].end - 1
        if each.settled and each.batch.error is None:
            assert any(position == last and len(payload) == 1 for position, payload in said)


def test_silence_is_equal_in_the_negotiated_dialect() -> None:
    dialect = NegotiatedDialect("source")
    first, second = asked(dialect, question(0, 10)), asked(dialect, question(20, 4), question(40, 3))
    dialect.receive(Fence(0))
    assert (first.settled, second.settled) == (1, 0)
    assert first.batch.delta == ([], [], [])
    dialect.receive(Data(40, b"abc"))
    dialect.receive(Fence(1))
    assert second.batch.delta == ([Extent(40, 3)], [], [])


def test_several_blocks_may_come_as_one() -> None:
    dialect = NegotiatedDialect("source")
    each = asked(dialect, question(0, 18))
    dialect.receive(Data(4, b"abcdefgh"))
    dialect.receive(Zero(12, 6))
    dialect.receive(Fence(0))
    assert each.batch.delta == ([Extent(4, 8)], [Extent(12, 6)], [])
    assert each.sink.given == [(4, b"abcdefgh"), (12, bytes(6))]


def test_neighbouring_zeros_are_given_as_one() -> None:
    dialect = NegotiatedDialect("source")
    each = asked(dialect, question(0, 20), question(20, 8), question(40, 8))
    for message in (Zero(0, 4), Zero(4, 4), Data(8, b"abcd"), Zero(12, 4), Zero(16, 4), Zero(20, 4), Zero(40, 4)):
        dialect.receive(message)
    assert each.sink.given == [(0, bytes(8)), (8, b"abcd"), (12, bytes(12))]
    dialect.receive(Fence(0))
    assert each.sink.given[3:] == [(40, bytes(4))]
    assert each.batch.delta == ([Extent(8, 4)], [Extent(0, 8), Extent(12, 12), Extent(40, 4)], [])


@pytest.mark.parametrize(
    "word",
    [
        Data(1, b"abc"),
        Data(0, b"abc"),
        Data(0, b"abcde"),
        Data(0, b""),
        Data(8, b"ab"),
        Data(8, bytes(8)),
        Data(12, b"abcd"),
        Zero(0, 0),
        Zero(0, 2),
        Zero(4, 8),
        Hole(0, 4),
        Fence(1),
    ],
)
def test_what_was_not_asked_for_ends_the_negotiated_dialect(word: Message) -> None:
    dialect = NegotiatedDialect("source")
    each = asked(dialect, question(0, 11))
    with pytest.raises(StreamError):
        dialect.receive(word)
    assert (each.sink.given, each.settled) == ([], 0)


def test_nothing_comes_before_what_came_before() -> None:
    dialect = NegotiatedDialect("source")
    asked(dialect, question(0, 12))
    dialect.receive(Data(8, b"abcd"))
    with pytest.raises(StreamError):
        dialect.receive(Data(4, b"abcd"))


def test_a_failure_is_of_its_block_alone() -> None:
    dialect = NegotiatedDialect("source")
    first, second = asked(dialect, question(0, 11)), asked(dialect, question(12, 4))
    for word in (Failure(0, "the disk is on fire"), Data(4, b"abcd"), Failure(8, "x" * 1000), Fence(0), Fence(1)):
        dialect.receive(word)
    assert (first.batch.error, first.sink.given) == (None, [(4, b"abcd")])
    told, long = first.batch.delta.unreadable
    assert told == (Extent(0, 4), "source: the disk is on fire")
    assert (long.extent, len(long.reason)) == (Extent(8, 3), 500)
    assert second.batch.delta == ([], [], [])


@pytest.mark.parametrize("position", [2, 12, 0])
def test_a_failure_of_what_was_not_asked_or_is_answered_is_none(position: int) -> None:
    dialect = NegotiatedDialect("source")
    asked(dialect, question(0, 8))
    dialect.receive(Failure(4, "bad"))
    with pytest.raises(StreamError, match="a failure"):
        dialect.receive(Failure(position, "bad"))


def test_a_sink_that_fails_fails_its_batch_alone() -> None:
    class Full(Kept):
        def data(self, position: int, payload: Buffer) -> None:
            raise DeviceError("no space left")

    dialect = NegotiatedDialect("source")
    full = Batch([question(0, 8)], Full(), lambda: None)
    dialect.request(full)
    after = asked(dialect, question(8, 4))
    for word in (Data(0, b"abcd"), Data(4, b"abcd"), Fence(0), Data(8, b"abcd"), Fence(1)):
        dialect.receive(word)
    assert isinstance(full.error, DeviceError)
    assert (after.sink.given, after.batch.error) == ([(8, b"abcd")], None)


def test_holes_are_told_within_what_was_asked() -> None:
    dialect = NegotiatedDialect("source")
    each = survey(dialect, Extent(100, 100), min_length=10)
    for word in (Hole(100, 5), Hole(110, 20), Hole(190, 10), Fence(0)):
        dialect.receive(word)
    assert isinstance(each.batch, HoleQuery)
    assert each.batch.holes == [Extent(110, 20), Extent(190, 10)]
    assert each.settled == 1


@pytest.mark.parametrize("hole", [Hole(99, 5), Hole(190, 11), Hole(120, 0), Hole(105, 5)])
def test_a_hole_that_lies_elsewhere_ends_the_connection(hole: Hole) -> None:
    dialect = NegotiatedDialect("source")
    survey(dialect, Extent(100, 100))
    dialect.receive(Hole(101, 9))
    with pytest.raises(StreamError):
        dialect.receive(hole)


@pytest.mark.parametrize("length", [1, 4, 5, 8])
@pytest.mark.parametrize("equal", [True, False])
def test_the_proof_is_no_answer_in_the_original_dialect(length: int, equal: bool) -> None:
    """Also where the last block is the byte that the proof asks for."""
    content = b"abcdefgh"[:length]
    blocks = [content[at : at + BLOCK] for at in range(0, length, BLOCK)]
    own = blocks if equal else [bytes(len(each)) for each in blocks]
    dialect = OriginalDialect("source")
    each = asked(dialect, Signatures(0, length, BLOCK, b"".join(map(digest, own))))
    if not equal:
        for index, block in enumerate(blocks):
            dialect.receive(Data(index * BLOCK, block))
    dialect.receive(Data(length - 1, content[-1:]))
    dialect.receive(Data(1, b""))
    assert (each.settled, each.batch.error) == (1, None)
    assert each.sink.given == ([] if equal else [(at * BLOCK, block) for at, block in enumerate(blocks)])


@pytest.mark.parametrize("answers", [[], [Data(0, b"ab")], [Data(0, b"abcd")]])
def test_a_source_that_is_too_short_fails_its_batch(answers: list[Message]) -> None:
    dialect = OriginalDialect("source")
    each = asked(dialect, question(0, 8))
    for word in (*answers, Data(1, b"")):
        dialect.receive(word)
    assert each.settled == 1
    with pytest.raises(SourceError, match="shorter than it was"):
        raise each.batch.error or BlockcopyError("it was believed")


def test_a_probe_needs_no_proof() -> None:
    dialect = OriginalDialect("source")
    each = Asked(dialect, lambda _, settle: ByteProbe([0, 5, 9], settle))
    dialect.receive(Data(5, b"x"))
    dialect.receive(Data(1, b""))
    assert (each.settled, each.batch.error) == (1, None)
    assert each.batch.delta.data == [Extent(5, 1)]
