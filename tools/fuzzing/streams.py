"""Targets `decoder` and `expand`: the stream of a peer, and the payload of a compressed frame.

The stream goes through the decoder, and if it answers signatures, through the dialect.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import atheris

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import BlockcopyError
from blockcopy.protocol import wire, xz, zstd
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.digests import ORIGINAL, named
from blockcopy.replica.source.batches import Batch, HoleQuery, Signatures
from blockcopy.replica.source.dialects import FENCES, Dialect, NegotiatedDialect, OriginalDialect
from fuzzing import BrokenPromise

digest = named(ORIGINAL)

MAX_PAYLOAD = 2048
"""Bytes, instead of the real limits, so that inputs of MAX_INPUT bytes can exceed the limit."""

MAX_INPUT = 3 * MAX_PAYLOAD

PEERS: list[tuple[wire.Grammar, type[Dialect] | None]] = [
    (wire.HASH_STREAM, None),
    (wire.BLOCK_STREAM, OriginalDialect),
    (wire.NEGOTIATED_BLOCK_STREAM, NegotiatedDialect),
]

ASKED = [
    [Signatures(0, 8, 4, digest(b"old!") * 2)],
    [Signatures(8, 4, 4, digest(b"old!")), Signatures(20, 1, 4, digest(b"!"))],
    [Signatures(12, 7, 4, digest(b"old!") + digest(b"old"))],
]
QUERIED = Extent(30, 40)


class CheckingSink:
    """A sink that checks that its data was sent by the peer, and requested at this position."""

    def __init__(self) -> None:
        self.sent: set[int] = set()

    def data(self, position: int, payload: Buffer) -> None:
        """Take the bytes of a block."""
        self.check(position, len(payload))

    def zeros(self, position: int, length: int) -> None:
        """Take `length` zeros."""
        self.check(position, length)

    def check(self, position: int, length: int) -> None:
        """Raise BrokenPromise unless `length` bytes at `position` were sent and requested."""
        asked = [question for batch in ASKED for question in batch]
        if position not in self.sent or not any(
            each.position <= position and length > 0 and position + length <= each.end for each in asked
        ):
            raise BrokenPromise(f"{length} bytes at {position} were not sent or not requested")


def decode(data: bytes) -> None:
    """Decode an input. Its front is the stream; its end gives the peer and the lengths of the feeds."""
    given = atheris.FuzzedDataProvider(data)
    grammar, dialect_class = PEERS[given.ConsumeIntInRange(0, len(PEERS) - 1)]
    dialect = dialect_class("source") if dialect_class else None
    sink = CheckingSink()
    settled: list[Batch] = []
    batches = ask_all(dialect, sink, settled) if dialect else []

    def read_into(room: memoryview) -> int:
        part = given.ConsumeBytes(given.ConsumeIntInRange(0, min(255, len(room))))
        room[: len(part)] = part
        return len(part)

    try:
        for message in Decoder(shrink(grammar)).messages(read_into):
            if message is None or not dialect or isinstance(message, wire.Hello):  # greetings go to the client
                continue
            if isinstance(message, (wire.Data, wire.XzData, wire.ZstdData, wire.Zero)):
                sink.sent.add(message.position)
            dialect.receive(message)
    except BlockcopyError:
        pass  # the connection ends here
    if dialect:
        check_answers(dialect, batches, settled)


def shrink(grammar: wire.Grammar) -> wire.Grammar:
    """Return `grammar` with payloads limited to MAX_PAYLOAD bytes."""
    return {
        command: layout if layout.max_payload is None else layout._replace(max_payload=MAX_PAYLOAD)
        for command, layout in grammar.items()
    }


def ask_all(dialect: Dialect, sink: CheckingSink, settled: list[Batch]) -> list[Batch]:
    """Ask for all of ASKED, and for the holes. Returns the batches; each joins `settled` when it is settled."""
    batches: list[Batch] = []

    def settle() -> None:
        settled.append(batches[len(settled)])

    for asked in ASKED:
        batches.append(Batch(asked, sink, settle))
        dialect.request(batches[-1])
    if isinstance(dialect, NegotiatedDialect):
        batches.append(HoleQuery(QUERIED, 2, settle))
        dialect.request(batches[-1])
    return batches


def check_answers(dialect: Dialect, batches: list[Batch], settled: list[Batch]) -> None:
    """Raise BrokenPromise if the answers of `batches` break a rule."""
    if list(dialect.pending) != batches[len(settled) :]:
        raise BrokenPromise("batches were not settled in the order of the requests")
    for batch in batches:
        differing = sorted([*batch.delta.data, *batch.delta.zeros])
        if any(one.end > other.offset for one, other in zip(differing, differing[1:])):
            raise BrokenPromise(f"a block was answered twice: {differing}")
        if isinstance(batch, HoleQuery):
            inside = [QUERIED.offset <= hole.offset and hole.end <= QUERIED.end for hole in batch.holes]
            if not all(inside):
                raise BrokenPromise(f"{batch.holes} are not within {QUERIED}")


def streams() -> Iterator[bytes]:
    """Generate a valid stream of each peer, in the order of PEERS."""
    hello = wire.Hello({"program": "größer", "more": [{}, None, -1.5e9]})
    # Nested just below Python's recursion limit:
    nested = wire.Hello({"more": reduce(lambda inner, _: [inner], range(900), [])})
    data, packed = wire.Data(0, b"new!"), wire.XzData(8, xz.compress(b"new!"))
    runs = [wire.Asks(0, 4096, 5000, bytes(64)), wire.Zero(5, 6), wire.Hole(7, 8), wire.DigestName("größer")]
    hashes = [wire.Hash(0, 4, digest(b"")), wire.LegacyHash(4, digest(b"")), *runs, wire.Rest(8), wire.Fence(0)]
    yield encode(nested, *hashes)
    proofs = [wire.Data(position, b"!") for position in (7, 20, 18)]  # the last bytes of the batches
    fences = [[wire.Data(position, b"")] * FENCES for position in (1, 2, 1)]
    yield encode(data, proofs[0], *fences[0], packed, proofs[1], *fences[1], proofs[2], *fences[2])
    failed = wire.Failure(12, "cannot read /dev/größer")
    yield encode(hello, data, wire.Fence(0), packed, wire.Fence(1), failed, wire.Fence(2))


def encode(*messages: wire.Message) -> bytes:
    """Return the bytes of `messages` and `done`."""
    return b"".join(map(wire.encode, [*messages, wire.Done()]))


def decoder_seeds() -> Iterator[bytes]:
    """Generate inputs for `decode`: each stream, alone and with bytes after its `done`, in feeds of two lengths."""
    for peer, stream in enumerate(streams()):
        for behind in (b"", bytes(MAX_PAYLOAD + 500)):
            for length in (255, 50):
                feeds = -(-len(stream + behind) // length)
                yield stream + behind + bytes([length] * feeds) + bytes([peer])


# expand: the payload of a compressed frame; the last byte selects the compression


def expand(data: bytes) -> None:
    """Expand an input. Raises BrokenPromise if the result is too large."""
    kinds = [
        lambda payload: xz.expand(wire.XzData(0, payload)),
        lambda payload: zstd.expand(wire.ZstdData(0, payload)),
    ]
    try:
        expanded = kinds[data[-1] % 2 if data else 0](data[:-1])
    except BlockcopyError:
        return
    if len(expanded) > wire.MAX_BLOCK_SIZE:
        raise BrokenPromise(f"expanded to {len(expanded)} bytes")


def expand_seeds() -> Iterator[bytes]:
    """Generate inputs for `expand`."""
    for payload in (b"", b"new!", b"to be compressed " * 1000, bytes(wire.MAX_BLOCK_SIZE + 1)):
        yield xz.compress(payload) + bytes([0])
        yield zstd.compress(payload, 1) + bytes([1])
