"""Stage 2: the hash stream → what the source has and the destination does not. Reads; changes nothing.

    InputStream → decoder → _Questions → _batches → run_ordered: Run.answer, in a lent buffer → OutputStream

Answers come in the order asked, and as soon as nothing more is at hand to be asked: a mount asks
a few blocks and waits. (The original answers when 16 are queued. The bytes are the same.)

The first message tells the form (see `wire`): `dgst` the extended one, `helo` the agreed one, in which
what cannot be read, or is not there, is said and not passed over, and the next question is answered all
the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Callable, NamedTuple, Union

from blockcopy.block import identity
from blockcopy.block.buffers import BufferPool
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.block.pieces import PIECE_SIZE, PieceScanner
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import DeviceError, StreamError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.digests import ORIGINAL
from blockcopy.protocol.handshake import read_client, source_greeting
from blockcopy.stage.compressors import Compressor, compressor_for
from blockcopy.stage.delta import Run, Terms
from blockcopy.stage.pipeline import run_ordered
from blockcopy.stage.streams import InputStream, Output, OutputStream


class _Say(NamedTuple):
    """What is sent as it is, in its turn."""

    stream: bytes
    size: int = 0

    def answer(self, source: Device, room: memoryview) -> list[Output]:
        return [self.stream]


_Item = Union[Run, _Say]

_MOST_ITEMS = 64
"""In one batch. Empty ones cost nothing to read, but each is answered."""


class _Answer(NamedTuple):
    frames: list[Output]
    room: memoryview  # what they are views of
    end: int  # of what they are about; 0 where it is nothing
    read: int  # bytes of that which are no hole


def retrieve(
    source: Device,
    hashes: InputStream,
    output: OutputStream,
    *,
    compressor: Compressor | None = None,
    progress: Progress | None = None,
    working: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Answer the hash stream from `source`, packed as `compression` or the asker has it.

    `progress` is told the position answered, and how many bytes were sent. `working` makes what surrounds each
    piece of work, in any thread: meanwhile the asker waits, and not we for the asker.

    A stream that is cut short is an error after all that arrived was answered. So are blocks that cannot be read,
    if the form has no word for them: the stream then ends without `done`, so that nobody takes it for the whole.
    Errors: StreamError, DeviceError, OutputError; BlockcopyError for a digest that this host has not.
    """
    buffers = BufferPool(PIECE_SIZE)
    passing = source.exceeds_cache()
    progress = progress or Progress()
    size = source.size()
    position = sent = read = 0

    def answer(batch: list[_Item]) -> _Answer:
        room, used, end, read = buffers.acquire(), 0, 0, 0
        frames: list[Output] = []
        with working():
            for item in batch:
                frames += item.answer(source, room[used : used + item.size])
                used += item.size
                if isinstance(item, Run):
                    end = item.piece.position + item.size
                    read += sum(extent.length for extent in item.piece.data)
                    if passing:
                        source.drop_behind(item.piece.position, item.size)
        return _Answer(frames, room, end, read)

    def send(answer: _Answer) -> None:
        nonlocal position, sent, read
        output.write(answer.frames)
        buffers.release(answer.room)
        position = answer.end or position
        read += answer.read
        sent += sum(map(len, answer.frames))
        done = min(position, size)
        progress.update(Counts(done, size, {"sent": sent}, skipped=max(0, done - read)))

    unreadable = UnreadableRanges()
    questions = _Questions(source, output, compressor or Compressor(), unreadable)
    try:
        run_ordered(_batches(_items(hashes, questions)), answer, send, wake=hashes.wake)
    finally:
        output.release()
    if unreadable:
        raise DeviceError(f"of {source.path}, {unreadable}. All else was answered, and nothing said of these")
    output.write([wire.encode(wire.Done())])
    progress.finish()


def _items(hashes: InputStream, questions: _Questions) -> Iterator[_Item | None]:
    """What is to be answered, in order; None where nothing more is at hand for now."""
    decoder = Decoder(wire.HASH_STREAM)
    for message in decoder.messages(hashes.read_into):
        if message is None:
            yield None
        else:
            yield from questions.take(message)


def _batches(items: Iterator[_Item | None]) -> Iterator[list[_Item]]:
    """Items of PIECE_SIZE bytes at most together, closed early where input runs dry."""
    batch: list[_Item] = []
    size = 0
    try:
        for item in items:
            if batch and (item is None or size + item.size > PIECE_SIZE or len(batch) == _MOST_ITEMS):
                yield batch
                batch, size = [], 0
            if item is not None:
                batch.append(item)
                size += item.size
    except StreamError:
        if batch:  # all that arrived is answered before the error is told
            yield batch
        raise
    if batch:
        yield batch


class _Questions:
    """Messages of the hash stream → what is to be answered. Knows what was agreed on so far."""

    def __init__(
        self, source: Device, output: OutputStream, compressor: Compressor, unreadable: UnreadableRanges
    ) -> None:
        """`unreadable` gets the blocks that cannot be read, where the asker has no word for them."""
        self._source = source
        self._output = output
        self._pieces = PieceScanner(source)
        self._compressor = compressor  # unless the asker wishes for another
        self._original = self._terms = Terms(digests.named(ORIGINAL), compressor, unreadable)
        self._first = True
        self._position = 0  # where the last read of the source ended, for `hash`

    def take(self, message: wire.Message) -> Iterable[_Item]:
        """StreamError for what does not belong where it stands, or cannot be answered."""
        first, self._first = self._first, False
        if isinstance(message, wire.Hash):
            return self._hash(message)
        if isinstance(message, wire.Asks):
            return self._asks(message)
        if isinstance(message, wire.Zero):
            return self._zero(message)
        if isinstance(message, wire.Fence):
            self._need(self._terms.agreed, "`fenc` before `helo`")
            return [_Say(wire.encode(message))]
        if isinstance(message, wire.Hole):
            self._need(self._terms.agreed, "`hole` before `helo`")
            return self._holes(message)
        if isinstance(message, wire.LegacyHash):
            return self._legacy_hash(message)
        if isinstance(message, wire.Rest):
            return self._rest(message)
        if isinstance(message, wire.Hello):
            self._need(first or self._terms.agreed, "`helo` in mid-stream")
            return [_Say(self._agree(message))]
        if isinstance(message, wire.DigestName):
            self._need(first, "`dgst` in mid-stream")
            self._terms = self._terms._replace(digest=digests.named(message.name), joined=True)
        return []

    def _need(self, condition: bool, otherwise: str) -> None:
        if not condition:
            raise StreamError(otherwise)

    def _agree(self, hello: wire.Hello) -> bytes:
        """Adopt the terms of a client's greeting from now on. Returns the greeting that answers."""
        name, spec = read_client(hello)
        compressor = self._compressor if spec.method == "none" else compressor_for(spec, self._output)
        self._original = self._original._replace(compressor=compressor, agreed=True)
        self._terms = self._original._replace(digest=digests.named(name), joined=True)
        return source_greeting(identity.source_identity(self._source), name, compressor.name)

    def _hash(self, asked: wire.Hash) -> Iterable[_Item]:
        position, size, digest = asked
        self._position = max(position, min(position + size, self._source.size()))
        if size:
            return [Run(self._pieces.piece(position, size, size), size, bytes(digest), self._original)]
        if digest == self._original.digest.of_zeros(0):
            return []
        return [_Say(wire.frame_header(wire.Data, position, 0))]  # how the original is asked for a fence

    def _legacy_hash(self, asked: wire.LegacyHash) -> Iterable[_Item]:
        position = self._position
        size = min(asked.size, self._source.size() - position)
        self._need(size > 0, f"`hash` asks beyond the end of {self._source.path}, at {position}")
        return self._hash(wire.Hash(position, size, asked.digest))

    def _asks(self, asked: wire.Asks) -> Iterator[_Item]:
        position, block_size, length, theirs = asked
        self._need(self._terms.joined, "`asks` before `helo` or `dgst`")
        size = self._terms.digest.size
        blocks = -(-length // block_size)
        self._need(len(theirs) == blocks * size, f"`asks` with other digests than {self._terms.digest.name}")
        step = PIECE_SIZE // block_size
        theirs = bytes(theirs)  # the decoder needs its buffer while this is being answered
        for block in range(0, blocks, step):
            at = block * block_size
            piece = self._pieces.piece(position + at, min(step * block_size, length - at), block_size)
            yield Run(piece, block_size, theirs[block * size : (block + step) * size], self._terms)

    def _zero(self, asked: wire.Zero) -> Iterator[_Item]:
        position, length = asked
        self._need(self._terms.joined, "`zero` before `helo` or `dgst`")
        end = min(position + length, self._source.size())
        for piece in self._pieces.pieces_with_data(position, end - position, BLOCK_SIZE):
            sizes = [min(BLOCK_SIZE, piece.length - at) for at in range(0, piece.length, BLOCK_SIZE)]
            yield Run(piece, BLOCK_SIZE, b"".join(map(self._terms.digest.of_zeros, sizes)), self._terms)
        beyond = max(position, end)
        if self._terms.agreed and beyond < position + length:
            reason = f"cannot read at {beyond} of {self._source.path}: it is shorter than it was"
            yield _Say(wire.encode(wire.Failure(beyond, reason)))

    def _rest(self, asked: wire.Rest) -> Iterator[_Item]:
        at, end = asked.offset, self._source.size()
        if not self._terms.joined:
            for position in range(at, end, PIECE_SIZE):
                piece = self._pieces.piece(position, min(PIECE_SIZE, end - position), BLOCK_SIZE)
                yield Run(piece, BLOCK_SIZE, None, self._terms)
            self._position = max(at, end)
            return
        for piece in self._pieces.pieces_with_data(at, end - at, BLOCK_SIZE):
            if at < piece.position:
                yield _Say(wire.encode(wire.Zero(at, piece.position - at)))
            yield Run(piece, BLOCK_SIZE, None, self._terms)
            at = piece.position + piece.length
        if at < end:
            yield _Say(wire.encode(wire.Zero(at, end - at)))

    def _holes(self, asked: wire.Hole) -> Iterator[_Item]:
        at, end = asked.position, min(asked.position + asked.length, self._source.size())
        while at < end:
            data = self._pieces.next_data(at)
            if at < data.offset:
                yield _Say(wire.encode(wire.Hole(at, min(data.offset, end) - at)))
            at = data.end
