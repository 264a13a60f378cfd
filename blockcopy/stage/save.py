"""Stage 3: the block stream → the destination. The only stage that writes to a device."""

from __future__ import annotations

import contextlib

from blockcopy.block.buffers import Buffer
from blockcopy.block.destination import Destination
from blockcopy.block.geometry import MAX_POSITION, Extent
from blockcopy.errors import DestinationRefusedError, DeviceError, StreamError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import wire, xz, zstd
from blockcopy.protocol.decoder import Decoder
from blockcopy.stage.streams import InputStream

_WRITEBACK_SIZE = 16 * 1024 * 1024
"""Bytes after whose writing the disk is set to work."""

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
        self._unwritten = Extent(0, 0)  # zeros that came last
        self._sparse = sparse
        self._passing = destination.exceeds_cache()
        self._own_size = destination.size() if destination.is_block_device else None
        self._source_size = size
        self._unsent = 0  # bytes written since the disk was set to work, all between these two
        self._first, self._end = MAX_POSITION, 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._write_taken_zeros()
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
            self._take_zeros(Extent(*message))
            return
        self._write_taken_zeros()
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
        self._written(message.position, len(payload))

    def _take_zeros(self, zeros: Extent) -> None:
        """Neighbours are written as one: a hole of their sum is made as fast as one of them."""
        if self._unwritten.end == zeros.offset and self._unwritten.length < _MOST_ZEROS:
            self._unwritten = Extent(self._unwritten.offset, self._unwritten.length + zeros.length)
        else:
            self._write_taken_zeros()
            self._unwritten = zeros

    def _write_taken_zeros(self) -> None:
        zeros, self._unwritten = self._unwritten, Extent(0, 0)
        if zeros.length:
            self._write_zeros(*zeros)
            self._zeros += zeros.length
            self._written(*zeros)

    def _write_zeros(self, position: int, length: int) -> None:
        end = position + length
        if self._own_size is None and self._sparse and end > self._destination.size():
            self._destination.grow(end)  # a hole that is punched makes no file longer
        self._destination.write_zeros(position, length, sparse=self._sparse)

    def _written(self, position: int, length: int) -> None:
        """Have the disk at work while more is coming, so that the sync in the end has little to wait for."""
        self._done += length
        self._progress.update(Counts(self._done, parts={"zero": self._zeros}, position=position + length))
        self._unsent += length
        self._first, self._end = min(self._first, position), max(self._end, position + length)
        if self._unsent >= _WRITEBACK_SIZE:
            self._destination.start_writeback(self._first, self._end - self._first)
            if self._passing:
                self._destination.drop_behind(0, self._first)  # on the disk by now, most of it
            self._unsent, self._first, self._end = 0, MAX_POSITION, 0

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
