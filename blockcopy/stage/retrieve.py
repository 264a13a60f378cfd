"""Stage 2: the hash stream → the block stream, from the source's blocks. Changes nothing.

    InputStream → Decoder → _Responder → _batches → run_ordered: Request.answer, in a borrowed buffer → OutputStream

Answers come in the order of the requests. They are sent as soon as no further request is at hand, because a mount
sends few requests and waits. The original answers 16 requests at a time; the bytes are the same.

The first message selects the form (see `wire`): `dgst` the extended form, `helo` the negotiated form, any other the
original form. In the negotiated form, unreadable or missing blocks are answered by `fail`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Union

from blockcopy.block import identity
from blockcopy.block.buffers import BufferPool
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.block.pieces import PIECE_SIZE, PieceScanner
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import BlockcopyError, DeviceError, StreamError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.compression import NO_COMPRESSION
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.digests import ORIGINAL
from blockcopy.protocol.handshake import read_client, source_greeting
from blockcopy.stage.compressors import Compressor, compressor_for
from blockcopy.stage.delivery import Answer, Delivery
from blockcopy.stage.delta import Request, Terms
from blockcopy.stage.join import Joins
from blockcopy.stage.pipeline import WORKERS, run_ordered
from blockcopy.stage.streams import InputStream, Output, OutputStream


class _Reply(NamedTuple):
    """A ready answer: the bytes `stream`, which are sent in their turn. The `size` in bytes of the piece is 0."""

    stream: bytes
    size: int = 0

    def answer(self, source: Device, buffer: memoryview) -> list[Output]:
        """Return a list with the reply. `source`, `buffer`: unused, but `Request.answer()` needs them."""
        return [self.stream]


_Item = Union[Request, _Reply]

_MAX_ITEMS = 64
"""Maximum number of items in a batch. Items of no bytes need no reading, but each has an answer."""


class _Result(NamedTuple):
    """The answer to one batch."""

    answer: Answer
    read: int  # requested bytes that are in no hole


def serve(
    source: Device,
    hashes: InputStream,
    output: OutputStream,
    *,
    new_compressor: Callable[[OutputStream], Compressor],
    progress: Progress,
) -> None:
    """Answer a client as `retrieve` does, and all further connections that it opens. Returns once each has ended.

    `source`, `hashes`, `output`, `progress`: as for `retrieve`. `new_compressor`: called with the OutputStream of
    a connection, returns its Compressor. Raises what `retrieve` raises for the first connection.
    """

    def answer(hashes: InputStream, output: OutputStream, progress: Progress | None = None) -> None:
        retrieve(
            source,
            hashes,
            output,
            compressor=new_compressor(output),
            progress=progress,
            open_joins=lambda: joins.open(answer),
        )

    with Joins() as joins:
        try:
            answer(hashes, output, progress)
        except BlockcopyError:  # no signal: other connections go on
            joins.finish()
            raise
        joins.finish()


def retrieve(
    source: Device,
    hashes: InputStream,
    output: OutputStream,
    *,
    delivery: Delivery | None = None,
    compressor: Compressor | None = None,
    progress: Progress | None = None,
    working: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    open_joins: Callable[[], str | None] = lambda: None,
) -> None:
    """Answer the requests in the InputStream `hashes` from `source`, by frames to the OutputStream `output`.

    Returns after the message `done`. `delivery`: sends the answers instead of `output`.
    `compressor`: used unless the client's greeting asks for zstd. `progress`:
    gets the answered position and the number of sent bytes. `working`: called without arguments for each batch and
    report, in any thread. Returns a context manager, within which the client waits for this stage.
    `open_joins`: called without arguments if the client may open further connections. Returns the token for them,
    or None. Called in any thread.
    Earlier requests are answered before any error is raised. The output of a failed stage has no `done`.
    Raises StreamError if `hashes` breaks off or is invalid. Raises DeviceError if blocks cannot be read and the
    form has no message `fail`. Raises OutputError if `output` fails, and BlockcopyError if this host lacks the
    digest.
    """
    buffers = BufferPool(PIECE_SIZE)
    drops = source.exceeds_cache()
    progress = progress or Progress()
    delivery = delivery or Delivery(output)
    size = source.size()
    position = sent = read = 0

    def answer(batch: list[_Item]) -> _Result:
        buffer, used, end, read = buffers.acquire(), 0, 0, 0
        frames: list[Output] = []
        with working():
            for item in batch:
                frames += item.answer(source, buffer[used : used + item.size])
                used += item.size
                if isinstance(item, Request):
                    end = item.piece.position + item.size
                    read += sum(extent.length for extent in item.piece.data)
                    if drops:
                        source.drop_behind(item.piece.position, item.size)
        is_ordered = any(isinstance(item, _Reply) for item in batch)
        again = None if is_ordered else lambda: answer(batch).answer
        # The frames may be views of the buffer.
        return _Result(Answer(frames, lambda: buffers.release(buffer), again, end), read)

    def send(result: _Result) -> None:
        nonlocal position, sent, read
        delivery.deliver(result.answer)
        position = result.answer.end or position
        read += result.read
        sent += sum(map(len, result.answer.frames))
        done = min(position, size)
        with working():
            progress.update(Counts(done, size, {"sent": sent}, skipped=max(0, done - read)))

    unreadable = UnreadableRanges()
    responder = _Responder(source, delivery, compressor or Compressor(), unreadable, open_joins)
    try:
        items = _batches(responder.items(hashes))
        run_ordered(items, answer, send, wake=hashes.wake, workers=lambda: responder.workers)
        if unreadable:
            raise DeviceError(
                f"{source.path} has unreadable blocks: {unreadable}. All other requests were answered"
            )
        delivery.deliver(Answer([wire.encode(wire.Done())], lambda: None, again=None))
    finally:
        delivery.close()
    progress.finish()


def _batches(items: Iterator[_Item | None]) -> Iterator[list[_Item]]:
    """Yield `items` in batches: lists of at most PIECE_SIZE bytes and _MAX_ITEMS items. None ends a batch early."""
    batch: list[_Item] = []
    size = 0
    try:
        for item in items:
            if batch and (item is None or size + item.size > PIECE_SIZE or len(batch) == _MAX_ITEMS):
                yield batch
                batch, size = [], 0
            if item is not None:
                batch.append(item)
                size += item.size
    except StreamError:
        if batch:  # earlier requests are answered before the error is raised
            yield batch
        raise
    if batch:
        yield batch


class _Responder:
    """Messages of the hash stream → items to answer. Keeps the terms that hold for the next message."""

    def __init__(
        self,
        source: Device,
        delivery: Delivery,
        compressor: Compressor,
        unreadable: UnreadableRanges,
        open_joins: Callable[[], str | None],
    ) -> None:
        """Answer from `source`, by `compressor` unless a greeting asks for zstd.

        `delivery`: sends the answers. The compression adapts to its pace. `open_joins`: as for `retrieve`.
        `unreadable`: collects blocks that cannot be read, if the client knows no `fail`.
        """
        self._open_joins = open_joins
        self._source = source
        self._delivery = delivery
        self._pieces = PieceScanner(source)
        self._compressor = compressor
        self._hash_terms = self._terms = Terms(digests.named(ORIGINAL), compressor, unreadable)
        self.workers = WORKERS
        """The threads that may work. All connections of a client share the CPUs here."""
        self._is_first = True
        self._position = 0  # end of the source's last read, for `hash`
        self._answers: dict[wire.Kind, Callable[[Any], Iterable[_Item]]] = {
            wire.Hash: self._hash,
            wire.LegacyHash: self._legacy_hash,
            wire.Rest: self._rest,
            wire.DigestName: self._digest_name,
            wire.Asks: self._asks,
            wire.Zero: self._zero,
            wire.Hello: self._hello,
            wire.Fence: self._fence,
            wire.Hole: self._hole,
            wire.Done: lambda _: [],
        }

    def items(self, hashes: InputStream) -> Iterator[_Item | None]:
        """Yield the items that answer the messages in `hashes`. Yields None if no further message is at hand.

        Raises StreamError if a message is out of place or invalid.
        """
        for message in Decoder(wire.HASH_STREAM).messages(hashes.read_into):
            if message is None:
                yield None
            else:
                yield from self._answers[type(message)](message)
                self._is_first = False

    def _require(self, condition: bool, otherwise: str) -> None:
        if not condition:
            raise StreamError(otherwise)

    def _digest_name(self, message: wire.DigestName) -> Iterable[_Item]:
        self._require(self._is_first, "`dgst` in mid-stream")
        self._terms = self._terms._replace(digest=digests.named(message.name), extended=True)
        return []

    def _hello(self, hello: wire.Hello) -> Iterable[_Item]:
        """Adopt the terms of a client's greeting `hello`. Returns a list with the greeting that answers."""
        self._require(self._is_first or self._terms.negotiated, "`helo` in mid-stream")
        greeting = read_client(hello)
        name, spec, connections, *_ = greeting
        self._delivery.greeted(greeting)
        self.workers = max(1, WORKERS // connections)
        compressor = self._compressor if spec == NO_COMPRESSION else compressor_for(spec, self._delivery)
        self._hash_terms = self._hash_terms._replace(compressor=compressor, negotiated=True)
        self._terms = self._hash_terms._replace(digest=digests.named(name), extended=True)
        join = self._open_joins() if greeting.wants_token else None
        return [_Reply(source_greeting(identity.source_identity(self._source), name, compressor.name, join))]

    def _fence(self, fence: wire.Fence) -> Iterable[_Item]:
        self._require(self._terms.negotiated, "`fenc` before `helo`")
        self._delivery.fenced()
        return [_Reply(wire.encode(fence))]

    def _hash(self, message: wire.Hash) -> Iterable[_Item]:
        position, size, digest = message
        self._position = max(position, min(position + size, self._source.size()))
        if size:
            return [Request(self._pieces.piece(position, size, size), size, bytes(digest), self._hash_terms)]
        if digest == self._hash_terms.digest.of_zeros(0):
            return []
        return [_Reply(wire.frame_header(wire.Data, position, 0))]  # clients of the original use this as a fence

    def _legacy_hash(self, message: wire.LegacyHash) -> Iterable[_Item]:
        position = self._position
        size = min(message.size, self._source.size() - position)
        self._require(size > 0, f"`hash` asks beyond the end of {self._source.path}, at {position}")
        return self._hash(wire.Hash(position, size, message.digest))

    def _asks(self, asks: wire.Asks) -> Iterator[_Item]:
        position, block_size, length, view = asks
        self._require(self._terms.extended, "`asks` before `helo` or `dgst`")
        size = self._terms.digest.size
        blocks = -(-length // block_size)
        self._require(len(view) == blocks * size, f"`asks` with other digests than {self._terms.digest.name}")
        step = PIECE_SIZE // block_size
        remote = bytes(view)  # the decoder reuses its buffer before the items are answered
        for block in range(0, blocks, step):
            at = block * block_size
            piece = self._pieces.piece(position + at, min(step * block_size, length - at), block_size)
            yield Request(piece, block_size, remote[block * size : (block + step) * size], self._terms)

    def _zero(self, zero: wire.Zero) -> Iterator[_Item]:
        position, length = zero
        self._require(self._terms.extended, "`zero` before `helo` or `dgst`")
        end = min(position + length, self._source.size())
        for piece in self._pieces.pieces_with_data(position, end - position, BLOCK_SIZE):
            sizes = [min(BLOCK_SIZE, piece.length - at) for at in range(0, piece.length, BLOCK_SIZE)]
            yield Request(piece, BLOCK_SIZE, b"".join(map(self._terms.digest.of_zeros, sizes)), self._terms)
        beyond = max(position, end)
        if self._terms.negotiated and beyond < position + length:
            error = DeviceError.ended_early(self._source.path, beyond, position + length - beyond, 0)
            yield _Reply(wire.encode(wire.Failure(beyond, str(error))))

    def _rest(self, rest: wire.Rest) -> Iterator[_Item]:
        at, end = rest.offset, self._source.size()
        if not self._terms.extended:
            for position in range(at, end, PIECE_SIZE):
                piece = self._pieces.piece(position, min(PIECE_SIZE, end - position), BLOCK_SIZE)
                yield Request(piece, BLOCK_SIZE, None, self._terms)
            self._position = max(at, end)
            return
        for piece in self._pieces.pieces(at, end - at, BLOCK_SIZE):
            if piece.data:
                yield Request(piece, BLOCK_SIZE, None, self._terms)
            else:
                yield _Reply(wire.encode(wire.Zero(piece.position, piece.length)))

    def _hole(self, hole: wire.Hole) -> Iterator[_Item]:
        self._require(self._terms.negotiated, "`hole` before `helo`")
        at, end = hole.position, min(hole.position + hole.length, self._source.size())
        while at < end:
            data = self._pieces.next_data(at)
            if at < data.offset:
                yield _Reply(wire.encode(wire.Hole(at, min(data.offset, end) - at)))
            at = data.end
