"""Stage 3: the block stream → the destination. The only stage that writes to a device."""

from __future__ import annotations

from blockcopy import wire, xz
from blockcopy.device import Device
from blockcopy.errors import DestinationRefusedError
from blockcopy.stages import InputStream


def save(destination: Device, blocks: InputStream) -> None:
    """Write each block of the stream, then sync. The destination is never shortened.

    A stream that is cut short, or wrong, is an error, but all that came before it is written and
    synced. Errors: StreamError, DeviceError.
    """
    limit = destination.size() if destination.is_block_device else None
    decoder = wire.Decoder(wire.BLOCK_STREAM)
    try:
        while not decoder.done:
            message = decoder.next()
            if message is None:
                data = blocks.read()
                if not data:
                    decoder.end()
                decoder.feed(data)
            elif isinstance(message, (wire.Data, wire.XzData)):
                payload = xz.expand(message) if isinstance(message, wire.XzData) else message.payload
                _check_fits(destination, limit, message.position, len(payload))
                destination.write(message.position, payload)
    finally:
        destination.sync()


def _check_fits(destination: Device, limit: int | None, position: int, size: int) -> None:
    if limit is not None and position + size > limit:
        raise DestinationRefusedError(
            f"{destination.path} is too small: it has {limit} bytes, and the source sent {size} for position "
            f"{position}. All before was written"
        )
