"""Stage 3: the block stream → the destination. The only stage that writes to a device."""

from __future__ import annotations

import contextlib

from blockcopy.block.buffers import Buffer
from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent, ExtentJoiner
from blockcopy.block.write_behind import WriteBehind
from blockcopy.errors import DestinationRefusedError, DeviceError, StreamError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import wire, xz, zstd
from blockcopy.protocol.decoder import Decoder
from blockcopy.stage.streams import InputStream

_MOST_ZEROS = 64 * 1024 * 1024
"""Bytes of zeros that are written as one."""


def save(
    destination: Destination, blocks: InputStream, *, sparse: bool = True, progress: Progress | None = None
) -> None:
    """Write each block of the stream, then sync. The destination is never shortened.

    Zeros become holes where the destination can have some, unless not `sparse`. A stream that is cut
    short, or wrong, is an error, but all that came before it is written and synced. Errors: StreamError,
    DeviceError; BlockcopyError for a compression that this host has not. `progress` is told the bytes written;
    how many there will be, nobody knows.
    """
    progress = progress or Progress()
    decoder = Decoder(wire.BLOCK_STREAM)
    with Writer(destination, sparse, progress) as writer:
        for message in decoder.messages(blocks.read_into):
            if message is not None:
                writer.take(message)
    progress.finish()


class Writer:
    """Writes what a block stream says, for as long as it is entered; then that is synced, and where it was."""

    def __init__(
        self, destination: Destination, sparse: bool, progress: Progress, *, size: int | None = None
    ) -> None:
        """`size`: bytes that the source has by its own word, where it gave one. Nothing is written beyond."""
        self._destination = destination
        self._progress = progress
        self._done = self._zeros = 0
        # A hole as large as many is made as fast as one of them.
        self._unwritten_zeros = ExtentJoiner(self._write_zeros, max_length=_MOST_ZEROS)
        self._sparse = sparse
        self._write_behind = WriteBehind(destination, sequential=True)
        self._own_size = destination.size() if destination.is_block_device else None
        self._source_size = size

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._unwritten_zeros.flush()
        finally:
            self._sync()
        if kind is None:
            self._destination.check_in_place()

    def _sync(self) -> None:
        try:
            self._destination.sync()
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the next run would find equal in the cache what no disk has
                self._destination.drop_cache()
            raise

    def take(self, message: wire.Message) -> None:
        """Write what it is about, if it is about anything."""
        if isinstance(message, wire.Zero):
            self._check_fits(*message)
            self._unwritten_zeros.add(Extent(*message))
            return
        self._unwritten_zeros.flush()
        if isinstance(message, wire.XzData):
            payload: Buffer = xz.expand(message)
        elif isinstance(message, wire.ZstdData):
            payload = zstd.expand(message)
        elif isinstance(message, wire.Data):
            payload = message.payload
        else:
            return
        self._check_fits(message.position, len(payload))
        self._destination.write(message.position, payload)
        self._written(Extent(message.position, len(payload)))

    def _write_zeros(self, extent: Extent) -> None:
        if self._own_size is None and self._sparse and extent.end > self._destination.size():
            self._destination.grow(extent.end)  # a hole that is punched makes no file longer
        self._destination.write_zeros(*extent, sparse=self._sparse)
        self._zeros += extent.length
        self._written(extent)

    def _written(self, extent: Extent) -> None:
        self._done += extent.length
        self._progress.update(Counts(self._done, parts={"zero": self._zeros}, position=extent.end))
        self._write_behind.add(extent)

    def _check_fits(self, position: int, size: int) -> None:
        if self._source_size is not None and position + size > self._source_size:
            raise StreamError(
                f"the source sent {size} bytes for position {position}, and has {self._source_size} bytes by its "
                "own word. Nothing of these was written"
            )
        if self._own_size is not None and position + size > self._own_size:
            raise DestinationRefusedError(
                f"{self._destination.path} is too small: it has {self._own_size} bytes, and the source sent "
                f"{size} for position {position}. All before was written"
            )
