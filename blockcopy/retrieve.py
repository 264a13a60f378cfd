"""Stage 2: the hash stream → what the source has and the destination does not. Reads; changes nothing.

Answers come in the order asked, and as soon as nothing more is at hand to be asked: a mount asks
a few blocks and waits. (The original answers when 16 are queued. The bytes are the same.)

A stream that opens with `helo` is of the agreed form (see `wire`): then what cannot be read, or is
not there, is said and not passed over, and the next question is answered all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from blockcopy import __version__, identity, wire, xz
from blockcopy.device import Device
from blockcopy.digests import ORIGINAL, Buffer, digest
from blockcopy.errors import DeviceError, StreamError
from blockcopy.geometry import BLOCK_SIZE
from blockcopy.stages import PIECE_SIZE, InputStream, OutputStream, run_ordered


class _Ask(NamedTuple):
    position: int
    size: int
    digest: bytes | None  # None: send it whatever it is
    agreed: bool = False  # say where it cannot be answered


class _Say(NamedTuple):
    """What is sent as it is, in its turn."""

    stream: bytes
    size: int = 0


_MOST_ASKS = 64
"""Asks in one item. Empty ones cost nothing to read, but each is answered."""


def retrieve(source: Device, hashes: InputStream, output: OutputStream, *, compress: bool = False) -> None:
    """Answer the hash stream from `source`, with xz where `compress` and where that is smaller.

    A stream that is cut short is an error after all that arrived was answered. Errors: StreamError,
    DeviceError, OutputError.
    """
    if compress:
        xz.check_available()

    def answer(asks: list[_Ask | _Say]) -> list[Buffer]:
        buffers: list[Buffer] = []
        for ask in asks:
            if isinstance(ask, _Say):
                buffers.append(ask.stream)
                continue
            try:
                data = (source.read if ask.agreed else source.read_up_to)(ask.position, ask.size)
            except DeviceError as error:
                if not ask.agreed:
                    raise
                buffers.append(wire.encode(wire.Failure(ask.position, str(error))))
                continue
            if ask.size and not data:
                continue  # beyond the end of the source: there is nothing to send
            if len(data) == ask.size and ask.digest is not None and digest(data) == ask.digest:
                continue
            buffers += _frame(ask.position, data, compress)
        return buffers

    run_ordered(_batches(_asks(source, hashes)), answer, output.write, wake=hashes.wake)
    output.write([wire.encode(wire.Done())])


def _frame(position: int, data: bytes, compress: bool) -> tuple[bytes, bytes]:
    if compress:
        packed = xz.compress(data)
        if len(packed) < len(data):
            return wire.frame_header(b"dlzm", position, len(packed)), packed
    return wire.frame_header(b"data", position, len(data)), data


def _asks(source: Device, hashes: InputStream) -> Iterator[_Ask | _Say | None]:
    """What is asked, in order; None where nothing more is at hand for now."""
    decoder = wire.Decoder(wire.HASH_STREAM)
    first, agreed = True, False
    position = 0  # where the last read of the source ended, for the old form
    while True:
        message = decoder.next()
        if message is None:
            yield None
            data = hashes.read()
            if not data:
                decoder.end()
                return
            decoder.feed(data)
            continue
        if isinstance(message, wire.Hello):
            if not (first or agreed):
                raise StreamError("`helo` in mid-stream")
            offered = message.facts.get("digests")
            if isinstance(offered, list) and ORIGINAL not in offered:
                raise StreamError(f"`helo` without a digest that both ends have; this one has {ORIGINAL}")
            agreed = True
            yield _Say(wire.encode(_hello(source)))
        elif isinstance(message, wire.Fence):
            if not agreed:
                raise StreamError("`fenc` before `helo`")
            yield _Say(wire.encode(message))
        elif isinstance(message, wire.Hash):
            yield _Ask(*message, agreed=agreed)
            position = max(message.position, min(message.position + message.size, source.size()))
        elif isinstance(message, wire.LegacyHash):
            size = min(message.size, source.size() - position)
            if size <= 0:
                raise StreamError(f"`hash` asks beyond the end of {source.path}, at {position}")
            yield _Ask(position, size, message.digest)
            position += size
        elif isinstance(message, wire.Rest):
            end = source.size()
            for position in range(message.offset, end, BLOCK_SIZE):
                yield _Ask(position, min(BLOCK_SIZE, end - position), None)
            position = max(message.offset, end)
        else:
            return
        first = False


def _hello(source: Device) -> wire.Hello:
    facts = {"protocol": wire.PROTOCOL, "program": f"blockcopy {__version__}", "digest": ORIGINAL}
    return wire.Hello({**facts, "identity": identity.of_source(source)})


def _batches(asks: Iterator[_Ask | _Say | None]) -> Iterator[list[_Ask | _Say]]:
    """Asks in items of at most PIECE_SIZE bytes (or one ask), closed early where input runs dry."""
    batch: list[_Ask | _Say] = []
    size = 0
    try:
        for ask in asks:
            if batch and (ask is None or size + ask.size > PIECE_SIZE or len(batch) == _MOST_ASKS):
                yield batch
                batch, size = [], 0
            if ask is not None:
                batch.append(ask)
                size += ask.size
    except StreamError:
        if batch:  # all that arrived is answered before the error is told
            yield batch
        raise
    if batch:
        yield batch
