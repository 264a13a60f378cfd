"""Stage 1: the destination's blocks → the hash stream. Changes nothing.

Writes the original form with SHA3-512, or the extended form with a chosen digest (see `wire`). Holes are not read.
Blocks of zeros are not digested.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Callable, NamedTuple

from blockcopy.block.buffers import BufferPool
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.block.pieces import PIECE_SIZE, Piece, PieceScanner
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.digests import Digest
from blockcopy.stage.pipeline import run_ordered
from blockcopy.stage.signature import digest_blocks, digest_piece
from blockcopy.stage.streams import InputStream, OutputStream

logger = logging.getLogger(__name__)

_ASKED_SIZE = PIECE_SIZE
"""Maximum bytes that one `asks` covers here."""

_PIPED_SIZE = 1024 * 1024
"""Bytes to collect from a pipe before they are digested."""


class _Signature(NamedTuple):
    """The joined `digests` of the blocks in `length` bytes at `position`. Empty if all blocks are zeros."""

    position: int
    length: int
    digests: bytes

    @property
    def end(self) -> int:
        return self.position + self.length


def checksum(
    fd: int,
    path: str,
    output: OutputStream,
    *,
    start: int = 0,
    end: int | None = None,
    digest: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the hash stream of the destination `fd`, from byte `start` up to byte `end`.

    `fd`: descriptor of a file, device or pipe. `path`: its name for messages. `output`: OutputStream to write to.
    `digest`: name of a digest, for the extended form. None selects the original form. `progress`: reporter of the
    bytes read. Without `end`, a message `rest` asks the source for all bytes beyond the destination's end, unless
    `fd` is a pipe.

    Raises DeviceError for the destination, and OutputError for the output. Raises BlockcopyError if `end` is not
    beyond `start`, or if this host lacks the digest.
    """
    if end is not None and end <= start:
        raise BlockcopyError(f"--end {end} must be greater than --start {start}")
    writer = _ExtendedWriter(output, digests.named(digest)) if digest else _OriginalWriter(output)
    if digest:
        output.write([wire.encode(wire.DigestName(digest))])
    progress = progress or Progress()
    size = _seek(fd, path, start)
    last = size if end is None else end
    total = None if last is None else last - start
    reached = start

    def write(signatures: list[_Signature]) -> None:
        nonlocal reached
        writer.write(signatures)
        reached = signatures[-1].end
        progress.update(Counts(reached - start, total, position=reached))

    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        device = Device(path, fd)
        stop = device.size() if end is None else min(end, device.size())
        _sign_device(device, writer.pieces(PieceScanner(device), start, stop), writer.digest, write)
    elif size is not None:
        _sign_stream(_reader(fd, path), writer.digest, write, start, end)
    else:  # a pipe may stay silent: its reader must be woken if the output fails
        with InputStream(fd) as pipe:
            _sign_stream(pipe.read_into, writer.digest, write, start, end, wake=pipe.wake)
    writer.flush()
    if end is not None and reached < end:
        raise DeviceError(f"{path} ends at {reached}, before the requested --end {end}")
    tail = [wire.encode(wire.Done())]
    if end is None and size is not None:
        tail.insert(0, wire.encode(wire.Rest(reached)))
    output.write(tail)
    progress.finish()


def write_signatures(
    device: Device, size: int, digest: Digest, output: OutputStream, *, stop: Callable[[], bool]
) -> None:
    """Write the signatures of the first `size` bytes of `device` to `output`. Writes no message `dgst` or `done`.

    `digest`: Digest of the messages `asks`. `stop`: called without arguments before each piece, in a worker thread.
    This call ends early if `stop` returns True.

    Raises DeviceError for the device, and OutputError for the output.
    """
    writer = _ExtendedWriter(output, digest)
    pieces = itertools.takewhile(lambda _: not stop(), writer.pieces(PieceScanner(device), 0, size))
    _sign_device(device, pieces, digest, writer.write)
    writer.flush()


class _OriginalWriter:
    """A writer of the original form to `output`: one `Hash` a block."""

    def __init__(self, output: OutputStream) -> None:
        self.digest = digests.named(digests.ORIGINAL)
        self._output = output

    def pieces(self, scanner: PieceScanner, start: int, stop: int) -> Iterator[Piece]:
        """Yield the Pieces of bytes `start` to `stop` of the device that `scanner` scans. Holes are included."""
        for at in range(start, stop, PIECE_SIZE):
            yield scanner.piece(at, min(PIECE_SIZE, stop - at), BLOCK_SIZE)

    def write(self, signatures: list[_Signature]) -> None:
        """Write `signatures` as one `Hash` for each block."""
        hashes, digest_size = [], self.digest.size
        for signature in signatures:
            for index, at in enumerate(range(0, signature.length, BLOCK_SIZE)):
                size = min(BLOCK_SIZE, signature.length - at)
                own = signature.digests[index * digest_size : (index + 1) * digest_size]
                digest = own or self.digest.of_zeros(size)
                hashes.append(wire.encode(wire.Hash(signature.position + at, size, digest)))
        self._output.write(hashes)

    def flush(self) -> None:
        """Write what `write()` has kept."""


class _ExtendedWriter(_OriginalWriter):
    """A writer of the extended form to `output`: `asks` by `digest`, and `zero`, for many blocks at once."""

    def __init__(self, output: OutputStream, digest: Digest) -> None:
        self.digest = digest
        self._output = output
        self._last: _Signature | None = None  # not written yet, as the next one may join it

    def pieces(self, scanner: PieceScanner, start: int, stop: int) -> Iterator[Piece]:
        """Return an iterator of the Pieces of bytes `start` to `stop`. One Piece stands for each hole.

        `scanner`: scans the device.
        """
        return scanner.pieces(start, stop - start, BLOCK_SIZE)

    def write(self, signatures: list[_Signature]) -> None:
        """Keep the last of `signatures`. Write each earlier one, joined with the next if possible."""
        for signature in signatures:
            last = self._last
            if (
                last is not None
                and last.end == signature.position
                and bool(last.digests) == bool(signature.digests)
                and (not signature.digests or last.length + signature.length <= _ASKED_SIZE)
            ):
                length, joined = last.length + signature.length, last.digests + signature.digests
                self._last = _Signature(last.position, length, joined)
            else:
                self.flush()
                self._last = signature

    def flush(self) -> None:
        """Write the signature that `write()` has kept, if any."""
        last, self._last = self._last, None
        if last is None:
            return
        asks = wire.Asks(last.position, BLOCK_SIZE, last.length, last.digests)
        self._output.write([wire.encode(asks if last.digests else wire.Zero(last.position, last.length))])


def _sign_device(
    device: Device, pieces: Iterable[Piece], digest: Digest, write: Callable[[list[_Signature]], None]
) -> None:
    """Read `pieces` of `device`, and pass lists of their signatures by `digest` to `write`.

    Logs the blocks that cannot be read. These blocks are requested, and a write may repair the disk. Raises
    DeviceError if the device ends within a piece.
    """
    drops = device.exceeds_cache()
    unreadable = UnreadableRanges()

    def sign(piece: Piece) -> list[_Signature]:
        if not piece.data:
            return [_Signature(piece.position, piece.length, b"")]
        found = digest_piece(device, piece, BLOCK_SIZE, digest, unreadable)
        if drops:
            device.drop_behind(piece.position, piece.length)
        return list(_signatures(piece, found))

    run_ordered(pieces, sign, write)
    if unreadable:
        logger.warning("%s has unreadable blocks: %s. They are requested from the source", device.path, unreadable)


def _signatures(piece: Piece, found: list[bytes | None]) -> Iterator[_Signature]:
    """Yield the signatures of `piece`: one for each run of zero blocks, one for each run of others.

    `found`: list with the digest of each block, None for zeros.
    """
    position, end = piece.position, piece.position + piece.length
    for _, group in itertools.groupby(found, key=lambda each: each is None):
        joined = [each or b"" for each in group]
        length = min(len(joined) * BLOCK_SIZE, end - position)
        yield _Signature(position, length, b"".join(joined))
        position += length


def _sign_stream(
    read_into: Callable[[memoryview], int],
    digest: Digest,
    write: Callable[[list[_Signature]], None],
    start: int,
    end: int | None,
    *,
    wake: Callable[[], None] | None = None,
) -> None:
    """Read bytes `start` to `end` by `read_into`, and pass lists of their signatures by `digest` to `write`.

    `read_into`: called with a memoryview, fills its front and returns the number of bytes, 0 at the end. `end`:
    None reads to the end. `wake`: called without arguments to interrupt a read.
    """
    buffers = BufferPool(PIECE_SIZE)

    def sign(filled: tuple[Piece, memoryview]) -> list[_Signature]:
        piece, buffer = filled
        signatures = list(_signatures(piece, digest_blocks(piece, buffer, BLOCK_SIZE, digest)))
        buffers.release(buffer)
        return signatures

    run_ordered(_read_pieces(read_into, buffers, start, end), sign, write, wake=wake)


def _seek(fd: int, path: str, start: int) -> int | None:
    """Seek in `fd` to byte `start`. Returns the bytes of `fd`, or None for a pipe.

    Raises DeviceError, which names `path`, if a pipe must start beyond byte 0.
    """
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, start, os.SEEK_SET)
    except OSError as error:
        if start:
            raise DeviceError.from_os_error(f"start at {start} of", path, error) from error
        return None
    return size


def _reader(fd: int, path: str) -> Callable[[memoryview], int]:
    def read_into(buffer: memoryview) -> int:
        with DeviceError.on_os_error("read", path):
            return os.readv(fd, [buffer])

    return read_into


def _read_pieces(
    read_into: Callable[[memoryview], int], buffers: BufferPool, start: int, end: int | None
) -> Iterator[tuple[Piece, memoryview]]:
    """Read bytes `start` to `end` by `read_into`. Yields tuples of a Piece and its buffer, which is from `buffers`.

    Only the last block may be short. The other arguments are those of `_sign_stream()`.
    """
    position = start
    while end is None or position < end:
        wanted = _PIPED_SIZE if end is None else min(_PIPED_SIZE, end - position)
        buffer = buffers.acquire()
        filled = 0
        while filled < wanted and (count := read_into(buffer[filled:wanted])):
            filled += count
        if filled:
            yield Piece(position, filled, [Extent(position, filled)]), buffer
            position += filled
        if filled < wanted:
            return
