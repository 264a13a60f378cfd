"""The destination's end of a push: requests whatever differs, and writes the answers.

    destination → signatures → standard output … a `retrieve` of the source … standard input → destination

One thread writes signatures, as `checksum` does. The caller's thread writes blocks, as `save` does. No block is
written before its signature was sent. The form is the negotiated one (see `wire`). So the source's size is known
before the first write, and the source tells which blocks it cannot read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

from blockcopy.block.claim import existing_destination, make_room, open_destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.block.identity import Identity, differences
from blockcopy.block.records import invalidate_records
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import BlockcopyError, SourceChangedError, SourceReadError, StreamError
from blockcopy.progress.reporter import Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.handshake import Handshake
from blockcopy.stage.checksum import write_signatures
from blockcopy.stage.save import Writer
from blockcopy.stage.streams import InputStream, OutputStream


def receive(
    path: str,
    output: OutputStream,
    answers: InputStream,
    *,
    force: bool = False,
    sparse: bool = True,
    compression: CompressionSpec = NO_COMPRESSION,
) -> None:
    """Make the file or device `path` a copy of the source that reads `output` and writes `answers`. Then sync.

    `force`: write even to a destination in use. `sparse`: write zeros as holes. `compression`: the source is asked
    for this. `output`, `answers`: the streams to and from the source. Everything received before an error is
    written and synced.

    Raises DestinationRefusedError or DeviceError for the destination. Raises StreamError for `answers`, and
    OutputError for `output`. Raises SourceReadError if the source cannot read some blocks. Raises
    SourceChangedError if the source has another identity at the end.
    """
    with contextlib.ExitStack() as stack:
        existing = existing_destination(path, force=force)
        if existing is not None:
            stack.enter_context(existing)
        handshake = Handshake(compression)
        messages = Decoder(wire.NEGOTIATED_BLOCK_STREAM).messages(answers.read_into)
        output.write([handshake.greeting])
        identity, name = handshake.read(next((each for each in messages if each is not None), None))
        destination = existing or stack.enter_context(open_destination(path, force=force, create=True))
        size = identity["size"]
        invalidate_records(destination)  # records of a mount or sync describe what is overwritten now
        make_room(destination, size)
        with (
            Writer(destination, sparse, Progress(), size=size) as writer,
            _requesting(destination, size, name, output, answers, handshake.greeting),
        ):
            last, unreadable = _write_all(messages, writer, handshake, identity)
        changes = differences(identity, last)
        if changes:
            raise SourceChangedError.found("it", "; ".join(changes))
        if unreadable:
            raise SourceReadError(f"the source cannot read {unreadable}. All else was copied")


def _write_all(
    messages: Iterable[wire.Message | None], writer: Writer, handshake: Handshake, identity: Identity
) -> tuple[Identity, UnreadableRanges]:
    """Pass all frames of the source's `messages` to `writer`.

    `handshake`: reads later greetings. `identity`: of the source, by its first greeting.
    Returns the identity in the last greeting, and the ranges that the source cannot read. Raises StreamError if the
    messages are invalid or break off, and what `Writer.take` raises.
    """
    size, unreadable = identity["size"], UnreadableRanges()
    for message in messages:
        if isinstance(message, wire.Failure):
            # A `fail` has no length. All requests use this block size.
            length = min(BLOCK_SIZE, size - message.position)
            if length <= 0:
                raise StreamError(f"the source cannot read bytes at {message.position}, and has {size} bytes")
            unreadable.add(Extent(message.position, length), message.reason)
        elif isinstance(message, wire.Hello):
            identity = handshake.read(message).identity
        elif message is not None:
            writer.take(message)
    return identity, unreadable


@contextlib.contextmanager
def _requesting(
    destination: Device, size: int, digest: str, output: OutputStream, answers: InputStream, greeting: bytes
) -> Iterator[None]:
    """Return a context manager that writes requests for `size` bytes of `destination` to `output`, in a thread.

    The body of the `with` statement must read `answers`. `digest`: name of the chosen digest. `greeting`: bytes to
    send after the last request. Raises the thread's error rather than an error of the body.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def request() -> None:
        try:
            write_signatures(destination, size, digests.named(digest), output, stop=stop.is_set)
            if not stop.is_set():
                output.write([greeting, wire.encode(wire.Done())])  # the source greets again: what it is by now
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            failures.append(error)
            answers.wake()

    def drain() -> None:
        """Discard the answers: the source takes no requests while it cannot send answers."""
        buffer = memoryview(bytearray(1 << 20))
        with contextlib.suppress(StreamError):
            while answers.read_into(buffer):
                pass

    requester = threading.Thread(target=request, name="request")
    requester.start()
    try:
        yield
    except BaseException as error:
        stop.set()
        threading.Thread(target=drain, name="drain", daemon=True).start()
        requester.join()
        if failures and isinstance(error, BlockcopyError):  # not a signal
            raise failures[0] from None
        raise
    requester.join()
    if failures:
        raise failures[0]
