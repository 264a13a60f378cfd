"""The destination's end of a push: asks about all of its blocks, and writes what comes back.

    destination → digests → standard output …  a `retrieve` of the source  … standard input → destination

One thread asks, as `checksum` does, and the caller writes, as `save` does: a block is written after it was
asked about, and never before. The agreed form is spoken (see `wire`), so the source's size is known before
anything is written, and what it cannot read is said.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from blockcopy.block.claim import existing_destination, make_room, open_destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.block.identity import Identity, differences
from blockcopy.block.records import invalidate_records
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import BlockcopyError, SourceChangedError, SourceReadError, StreamError
from blockcopy.progress.reporter import Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.handshake import Handshake
from blockcopy.stage.checksum import ask_about
from blockcopy.stage.save import Writer
from blockcopy.stage.streams import InputStream, OutputStream


def receive(
    path: str,
    questions: OutputStream,
    answers: InputStream,
    *,
    force: bool = False,
    sparse: bool = True,
    compression: CompressionSpec = NO_COMPRESSION,
) -> None:
    """Make `path` a copy of what answers; synced when it returns, or raises.

    `compression`: what the source is asked for. Errors: DestinationRefusedError, DeviceError, StreamError,
    OutputError; SourceError where the source cannot read some of its blocks, and SourceChangedError where it
    is not what it was; then all else was written.
    """
    with contextlib.ExitStack() as stack:
        existing = existing_destination(path, force=force)
        if existing is not None:
            stack.enter_context(existing)
        handshake = Handshake(compression)
        questions.write([handshake.greeting])
        source = _Source(answers, handshake)
        identity, name = source.greeting()
        destination = existing or stack.enter_context(open_destination(path, force=force, create=True))
        size = identity["size"]
        invalidate_records(destination)  # what a mount or sync has on record is overwritten
        make_room(destination, size)
        with (
            Writer(destination, sparse, Progress(), size=size) as writer,
            _asking(destination, size, name, questions, answers, handshake.greeting),
        ):
            source.write_all(writer, size)
        source.check(identity)


class _Source:
    """What the other end says."""

    def __init__(self, answers: InputStream, handshake: Handshake) -> None:
        self._handshake = handshake
        self._answers = answers
        self._decoder = Decoder(wire.NEGOTIATED_BLOCK_STREAM)
        self._last: Identity | None = None
        self._unreadable = UnreadableRanges()

    def greeting(self) -> tuple[Identity, str]:
        """What it is, and the digest that suits both ends. StreamError where that cannot be agreed to."""
        identity, name = self._handshake.read(next(self._messages(), None))
        self._last = identity
        return identity, name

    def write_all(self, writer: Writer, size: int) -> None:
        """Write what comes of a source of `size` bytes, to the end. Raises BlockcopyError."""
        for message in self._messages():
            if isinstance(message, wire.Failure):
                # It has no length: what is asked about is in blocks of this size, but for the last.
                length = min(BLOCK_SIZE, size - message.position)
                if length <= 0:
                    raise StreamError(f"the source cannot read bytes at {message.position}, and has {size} bytes")
                self._unreadable.add(Extent(message.position, length), message.reason)
            elif isinstance(message, wire.Hello):
                self._last = self._handshake.read(message).identity
            else:
                writer.take(message)

    def check(self, identity: Identity) -> None:
        """It read all that was asked, and was the same in the end."""
        changes = differences(identity, self._last or {})
        if changes:
            raise SourceChangedError(
                f"source changed: it is not what it was ({'; '.join(changes)}). Start again; of a source that is "
                "in use, take a snapshot"
            )
        if self._unreadable:
            raise SourceReadError(f"the source cannot read {self._unreadable}. All else was copied")

    def _messages(self) -> Iterator[wire.Message]:
        for message in self._decoder.messages(self._answers.read_into):
            if message is not None:
                yield message


@contextlib.contextmanager
def _asking(
    destination: Device, size: int, digest: str, questions: OutputStream, answers: InputStream, greeting: bytes
) -> Iterator[None]:
    """In a thread, as long as the block lasts, which reads the answers. Its failure comes before the block's."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            ask_about(destination, size, digests.named(digest), questions, stop=stop.is_set)
            if not stop.is_set():
                questions.write([greeting, wire.encode(wire.Done())])  # greeted again, it says what it is by now
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            failures.append(error)
            answers.wake()

    def drain() -> None:
        """As long as the other end waits for us to take its answers, it takes no questions."""
        room = memoryview(bytearray(1 << 20))
        with contextlib.suppress(StreamError):
            while answers.read_into(room):
                pass

    asker = threading.Thread(target=ask, name="ask")
    asker.start()
    try:
        yield
    except BaseException as error:
        stop.set()
        threading.Thread(target=drain, name="drain", daemon=True).start()
        asker.join()
        if failures and isinstance(error, BlockcopyError):  # and not a signal
            raise failures[0] from None
        raise
    asker.join()
    if failures:
        raise failures[0]
