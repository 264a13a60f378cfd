"""Stage 3: the block stream → the destination. `save` and `receive` write; no other stage does."""

from __future__ import annotations

import contextlib
import threading

from blockcopy.block.destination import Destination
from blockcopy.block.geometry import Extent, ExtentJoiner
from blockcopy.block.write_behind import WriteBehind
from blockcopy.errors import DestinationRefusedError, DeviceError, StreamError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import wire
from blockcopy.protocol.compression import expand
from blockcopy.protocol.decoder import Decoder
from blockcopy.stage.streams import InputStream

_MAX_ZEROS = 64 * 1024 * 1024
"""Bytes after which joined zeros are written."""


def save(
    destination: Destination, blocks: InputStream, *, sparse: bool = True, progress: Progress | None = None
) -> None:
    """Write the block stream of the InputStream `blocks` to `destination`, then sync.

    The destination is never shortened. `sparse`: zeros become holes if the destination can have holes. `progress`:
    reporter of the written bytes, without a total. If the stream breaks off or is invalid, all earlier blocks are
    still written and synced.

    Raises StreamError for the stream, and DeviceError for the destination. Raises BlockcopyError if this host lacks
    the stream's compression.
    """
    progress = progress or Progress()
    with Writer(destination, sparse, progress) as writer:
        for message in Decoder(wire.BLOCK_STREAM).messages(blocks.read_into):
            if message is not None:
                writer.take(message)
    progress.finish()


class Writer:
    """A context manager that writes messages to a destination, and syncs the destination at exit.

    Threads may call `take` at the same time, for different bytes of the destination.
    The exit raises DeviceError if the sync fails, and DestinationLostError if the path leads elsewhere.
    """

    def __init__(
        self, destination: Destination, sparse: bool, progress: Progress, *, size: int | None = None
    ) -> None:
        """Write to `destination`, zeros as holes if `sparse`. Report written bytes to `progress`, a Progress.

        `size`: bytes that the source declared. Nothing is written beyond. None if unknown.
        """
        self._destination = destination
        self._progress = progress
        self._lock = threading.Lock()  # guards the counters and the joined zeros
        self._done = self._zeros = 0
        # One large hole takes no longer than one small hole.
        self._unwritten_zeros = ExtentJoiner(self._write_zeros, max_length=_MAX_ZEROS)
        self._sparse = sparse
        self._write_behind = WriteBehind(destination, sequential=True)
        self._device_size = destination.size() if destination.is_block_device else None
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
            with contextlib.suppress(DeviceError):  # else the next run finds unsynced blocks equal in the cache
                self._destination.drop_cache()
            raise

    def take(self, message: wire.Message) -> None:
        """Write the bytes of `message` if this is a frame or a Zero. Ignores other messages.

        Raises StreamError if the bytes lie beyond the source's size, or if the payload is damaged. Raises
        DestinationRefusedError if the device is too small, and DeviceError if the write fails.
        """
        if isinstance(message, wire.Zero):
            self._check_fits(*message)
            with self._lock:
                self._unwritten_zeros.add(Extent(*message))
            return
        with self._lock:
            self._unwritten_zeros.flush()
        if not isinstance(message, (wire.Data, wire.XzData, wire.ZstdData)):
            return
        payload = expand(message)
        self._check_fits(message.position, len(payload))
        self._destination.write(message.position, payload)
        with self._lock:
            self._written(Extent(message.position, len(payload)))

    def _write_zeros(self, extent: Extent) -> None:
        if self._device_size is None and self._sparse and extent.end > self._destination.size():
            self._destination.grow(extent.end)  # punching a hole does not make a file longer
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
                f"the source sent {size} bytes for position {position}, but declared a size of "
                f"{self._source_size} bytes. None of these bytes were written"
            )
        if self._device_size is not None and position + size > self._device_size:
            raise DestinationRefusedError(
                f"{self._destination.path} is too small: it has {self._device_size} bytes, and the source sent "
                f"{size} for position {position}. All earlier blocks were written"
            )
