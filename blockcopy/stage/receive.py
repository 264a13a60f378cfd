"""The destination's end of a push: requests whatever differs, and writes the answers.

    destination → signatures → standard output … a `retrieve` of the source … standard input → destination

One thread writes signatures, as `checksum` does. The caller's thread writes blocks, as `save` does. No block is
written before its signature was sent. The form is the negotiated one (see `wire`). So the source's size is known
before the first write, and the source tells which blocks it cannot read.

A channel of ssh carries little a round trip. So answers may also come over further connections (see `join`), in any
order. A thread for each writes them, and confirms what is written. Signatures use the first connection alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Callable

from blockcopy.block.claim import existing_destination, make_room, open_destination
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.block.identity import Identity, differences
from blockcopy.block.records import invalidate_records
from blockcopy.block.superblocks import head_of, refuse_foreign, superblocks
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import BlockcopyError, OutputError, SourceChangedError, SourceReadError, StreamError
from blockcopy.progress.reporter import Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec, expand
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.handshake import Handshake
from blockcopy.stage.checksum import write_signatures
from blockcopy.stage.join import Joins
from blockcopy.stage.save import Writer
from blockcopy.stage.streams import InputStream, OutputStream

logger = logging.getLogger(__name__)

_LAST_FENCE = 1
"""The number of the fence behind the last request. The one behind the greeting is 0."""

_HEAD_FENCE = 2
"""The number of the fence behind the request for the source's first bytes."""


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

    Raises DestinationRefusedError or DeviceError for the destination. Raises ForeignContentError without `force` if
    it holds a file system or the like that the source has not. Raises StreamError for `answers`, and
    OutputError for `output`. Raises SourceReadError if the source cannot read some blocks. Raises
    SourceChangedError if the source has another identity at the end.
    """
    with Joins() as joins, contextlib.ExitStack() as stack:
        existing = existing_destination(path, force=force)
        if existing is not None:
            stack.enter_context(existing)
        handshake = Handshake(compression, join=joins.listen() or False)
        messages = Decoder(wire.NEGOTIATED_BLOCK_STREAM).messages(answers.read_into)
        output.write([handshake.greeting])
        identity, name, _ = handshake.read(next((each for each in messages if each is not None), None))
        output.write([wire.encode(wire.Fence(0))])  # at once, so that the source can measure the round trip
        destination = existing or stack.enter_context(open_destination(path, force=force, create=True))
        size = identity["size"]
        if existing is not None and not force:
            _refuse_foreign_content(existing, size, digests.named(name), output, messages)
        invalidate_records(destination)  # records of a mount or sync describe what is overwritten now
        make_room(destination, size)
        with (
            Writer(destination, sparse, Progress(), size=size) as writer,
            _requesting(destination, size, name, output, answers, handshake.greeting) as answered,
        ):
            unreadable = UnreadableRanges()
            take = functools.partial(_take, writer, size, unreadable)
            with _joined_by(joins, answers, take):
                last = _take_all(messages, take, handshake, answered) or identity
        changes = differences(identity, last)
        if changes:
            raise SourceChangedError.found("it", "; ".join(changes))
        if unreadable:
            raise SourceReadError(f"the source cannot read {unreadable}. All else was copied")


def _refuse_foreign_content(
    destination: Device,
    size: int,
    digest: digests.Digest,
    output: OutputStream,
    messages: Iterable[wire.Message | None],
) -> None:
    """Raise ForeignContentError if `destination` holds a file system or the like that the source does not hold.

    Asks the source for what differs in its first bytes, by `digest`. This comes before further connections, so all
    `messages` of the source until the fence answer that. `output`: gets the request. `size`: bytes of the source.
    Raises StreamError if the answers are invalid, and OutputError if the source is gone.
    """
    head = head_of(destination)
    held = superblocks(head)
    if not held:
        return
    others, is_whole = bytearray(head[:size]), True
    if others:
        blocks = [others[at : at + BLOCK_SIZE] for at in range(0, len(others), BLOCK_SIZE)]
        asks = wire.Asks(0, BLOCK_SIZE, len(others), b"".join(map(digest, blocks)))
        output.write([wire.encode(asks), wire.encode(wire.Fence(_HEAD_FENCE))])
        for message in messages:
            if message == wire.Fence(_HEAD_FENCE):
                break
            is_whole = is_whole and not isinstance(message, wire.Failure)
            _take_head(others, message)
    refuse_foreign(destination.path, held, "the source", superblocks(bytes(others)), is_whole=is_whole)


def _take_head(head: bytearray, message: wire.Message | None) -> None:
    """Put the bytes of `message` into `head`, if the message has any. A block that cannot be read becomes zeros.

    Raises StreamError if the bytes lie outside.
    """
    if isinstance(message, (wire.Data, wire.ZstdData)):
        position, payload = message.position, bytes(expand(message))
    elif isinstance(message, wire.Zero):
        position, payload = message.position, bytes(min(message.length, len(head) + 1))
    elif isinstance(message, wire.Failure):
        position, payload = message.position, bytes(max(0, min(BLOCK_SIZE, len(head) - message.position)))
    else:
        return
    if position + len(payload) > len(head):
        raise StreamError(f"the source sent {len(payload)} bytes for position {position}, which nobody asked for")
    head[position : position + len(payload)] = payload


def _take(writer: Writer, size: int, unreadable: UnreadableRanges, message: wire.Message) -> None:
    """Pass `message` to `writer` if it is a frame. If the source cannot read a block, add that to `unreadable`.

    `size`: bytes of the source. Thread-safe. Raises StreamError if the message is invalid, and what `Writer.take`
    raises.
    """
    if not isinstance(message, wire.Failure):
        writer.take(message)
        return
    # A `fail` has no length. All requests use this block size.
    length = min(BLOCK_SIZE, size - message.position)
    if length <= 0:
        raise StreamError(f"the source cannot read bytes at {message.position}, and has {size} bytes")
    unreadable.add(Extent(message.position, length), message.reason)


def _take_all(
    messages: Iterable[wire.Message | None],
    take: Callable[[wire.Message], None],
    handshake: Handshake,
    answered: threading.Event,
) -> Identity | None:
    """Pass all of the source's `messages` on the first connection to `take`, except later greetings and fences.

    `handshake`: reads the greetings. `answered`: set by the fence behind the last answer. Returns the identity in
    the last greeting, or None if there is none. Raises StreamError if the messages are invalid or break off, and
    what `take` raises.
    """
    identity = None
    for message in messages:
        if isinstance(message, wire.Hello):
            identity = handshake.read(message).identity
        elif isinstance(message, wire.Fence):
            if message.number == _LAST_FENCE:
                answered.set()
        elif message is not None:
            take(message)
    return identity


def _take_further(stream: InputStream, output: OutputStream, take: Callable[[wire.Message], None]) -> None:
    """Pass the source's messages on a further connection to `take`, and confirm by fences what was taken.

    `stream`, `output`: its streams. Raises StreamError if the messages are invalid or break off, OutputError if the
    source is gone, and what `take` raises.
    """
    output.write([wire.encode(wire.Fence(0))])
    for message in Decoder(wire.NEGOTIATED_BLOCK_STREAM).messages(stream.read_into):
        if isinstance(message, (wire.Fence, wire.Done)):
            output.write([wire.encode(message)])
        elif message is not None:
            take(message)


@contextlib.contextmanager
def _joined_by(joins: Joins, answers: InputStream, take: Callable[[wire.Message], None]) -> Iterator[None]:
    """Return a context manager within which `take` also gets the messages of all further connections of `joins`.

    The body of the `with` statement must read `answers`. A further connection that breaks ends alone: the source
    repeats what was not confirmed. Raises the first other error of a further connection.
    """
    failures: list[BaseException] = []

    def serve(stream: InputStream, output: OutputStream) -> None:
        try:
            _take_further(stream, output, take)
        except (StreamError, OutputError) as error:
            logger.debug("a further connection ended: %s", error)
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            failures.append(error)
            answers.wake()

    joins.start(serve)
    try:
        yield
    except BlockcopyError:  # no signal
        joins.close()
        if failures:
            raise failures[0] from None
        raise
    finally:
        joins.close()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _requesting(
    destination: Device, size: int, digest: str, output: OutputStream, answers: InputStream, greeting: bytes
) -> Iterator[threading.Event]:
    """Return a context manager that writes requests for `size` bytes of `destination` to `output`, in a thread.

    Yields an event. The body of the `with` statement must read `answers`, and set the event at the fence
    _LAST_FENCE. `digest`: name of the chosen digest. `greeting`: bytes to send then. So the source's second
    identity is no older than any of its bytes.
    Raises the thread's error rather than an error of the body.
    """
    stop, answered = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def request() -> None:
        try:
            write_signatures(destination, size, digests.named(digest), output, stop=stop.is_set)
            if not stop.is_set():
                output.write([wire.encode(wire.Fence(_LAST_FENCE))])
                answered.wait()
            if not stop.is_set():
                output.write([greeting, wire.encode(wire.Done())])  # the source greets again: what it is by now
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            failures.append(error)
            answers.wake()

    requester = threading.Thread(target=request, name="request")
    requester.start()
    try:
        yield answered
    except BaseException as error:
        stop.set()
        answered.set()
        # The source takes no requests while it cannot send answers.
        threading.Thread(target=answers.discard, name="drain", daemon=True).start()
        requester.join()
        if failures and isinstance(error, BlockcopyError):  # not a signal
            raise failures[0] from None
        raise
    is_answered = answered.is_set()
    answered.set()
    requester.join()
    if failures:
        raise failures[0]
    if not is_answered:
        raise StreamError("the source ended before it had answered all requests")
