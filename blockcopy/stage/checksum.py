"""Stage 1: the destination's blocks → the hash stream. Reads; changes nothing.

In the original form, or with a digest of choice in the extended form (see `wire`). In either, blocks of
zeros are not hashed, because their digest is known, and holes of the destination are not even read.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Callable, NamedTuple

from blockcopy.block.buffers import BufferPool
from blockcopy.block.device import Device
from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.block.pieces import PIECE_SIZE, Piece, PieceScanner
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.protocol import digests, wire
from blockcopy.protocol.digests import Digest
from blockcopy.stage.pipeline import run_ordered
from blockcopy.stage.streams import InputStream, OutputStream

logger = logging.getLogger(__name__)

ASKED_SIZE = PIECE_SIZE
"""Bytes that one `asks` is about at most."""

_PIPED_SIZE = 1024 * 1024
"""Bytes of a pipe that are waited for before they are hashed."""


class _Run(NamedTuple):
    """`length` bytes at `position` that have these digests; none where they are zeros."""

    position: int
    length: int
    digests: bytes

    @property
    def end(self) -> int:
        return self.position + self.length


class _Item(NamedTuple):
    """What a worker does next: read `piece` and hash it, or hash what is in `room` of it already."""

    piece: Piece
    room: memoryview | None = None


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
    """Write the hash stream of bytes `start` … `end` of `fd`, a file, device or pipe called `path`.

    In the original form, or with `digest`, the name of one, in the extended form. Without `end`, what can
    tell its position (all but a pipe) is followed by `rest`, which asks the source for all that it has
    beyond. Errors: DeviceError, OutputError; BlockcopyError for a range or a digest that is none.
    """
    if end is not None and end <= start:
        raise BlockcopyError(f"--end {end} does not lie behind --start {start}")
    voice = _Extended(output, digests.named(digest)) if digest else _Original(output)
    voice.announce()
    hasher = _Hasher(voice.digest)
    progress = progress or Progress()
    total = total_size(fd, start, end)
    seekable = _seek(fd, path, start)
    reached = start

    def send(runs: list[_Run]) -> None:
        nonlocal reached
        for run in runs:
            voice.say(run)
            reached = run.end
        progress.update(Counts(reached - start, total, position=reached))

    if _is_device(fd):
        device = Device(path, fd)
        stop = device.size() if end is None else min(end, device.size())
        hasher.read_from(device)
        run_ordered(voice.items(PieceScanner(device), start, stop), hasher.hash, send)
        hasher.tell_unreadable()
    elif seekable:
        run_ordered(_piped(_reader(fd, path), hasher, start, end), hasher.hash, send)
    else:  # a pipe may be silent for ever, so whoever reads it has to be woken where the writer fails
        with InputStream(fd) as pipe:
            run_ordered(_piped(pipe.read_into, hasher, start, end), hasher.hash, send, wake=pipe.wake)
    voice.pause()
    if end is not None and reached < end:
        raise DeviceError(f"{path} ends at {reached}, before the --end {end} that was asked for")
    tail = [wire.encode(wire.Done())]
    if end is None and seekable:
        tail.insert(0, wire.encode(wire.Rest(reached)))
    output.write(tail)
    progress.finish()


def ask_about(device: Device, size: int, digest: Digest, output: OutputStream, *, stop: Callable[[], bool]) -> None:
    """Ask about the first `size` bytes of `device`, in the agreed form, and say no more; ends early where `stop()`.

    Errors: DeviceError, OutputError.
    """
    voice = _Extended(output, digest)
    hasher = _Hasher(digest)
    hasher.read_from(device)

    def send(runs: list[_Run]) -> None:
        for run in runs:
            voice.say(run)

    items = itertools.takewhile(lambda _: not stop(), voice.items(PieceScanner(device), 0, size))
    run_ordered(items, hasher.hash, send)
    hasher.tell_unreadable()
    voice.pause()


def total_size(fd: int, start: int, end: int | None) -> int | None:
    """Bytes that `checksum` will read; None for a pipe."""
    if end is not None:
        return end - start
    try:
        here = os.lseek(fd, 0, os.SEEK_CUR)
        size = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, here, os.SEEK_SET)
    except OSError:
        return None
    return size - start


class _Original:
    """Says each block by itself."""

    def __init__(self, output: OutputStream) -> None:
        self.digest = digests.named(digests.ORIGINAL)
        self._output = output

    def announce(self) -> None:
        """Say how it will be said, where that is not agreed on."""

    def items(self, pieces: PieceScanner, start: int, stop: int) -> Iterator[_Item]:
        """All pieces, because each block of them has its message."""
        for at in range(start, stop, PIECE_SIZE):
            yield _Item(pieces.piece(at, min(PIECE_SIZE, stop - at), BLOCK_SIZE))

    def say(self, run: _Run) -> None:
        hashes = []
        for index, at in enumerate(range(0, run.length, BLOCK_SIZE)):
            size = min(BLOCK_SIZE, run.length - at)
            digest = run.digests[index * self.digest.size :][: self.digest.size] or self.digest.of_zeros(size)
            hashes.append(wire.encode(wire.Hash(run.position + at, size, digest)))
        self._output.write(hashes)

    def pause(self) -> None:
        """Have all of it said."""


class _Extended(_Original):
    """Says many blocks at once."""

    def __init__(self, output: OutputStream, digest: Digest) -> None:
        self.digest = digest
        self._output = output
        self._unsaid: _Run | None = None

    def announce(self) -> None:
        self._output.write([wire.encode(wire.DigestName(self.digest.name))])

    def items(self, pieces: PieceScanner, start: int, stop: int) -> Iterator[_Item]:
        """The pieces that have data; and what lies between, as pieces that have none, however large."""
        at = start
        for piece in pieces.pieces_with_data(start, stop - start, BLOCK_SIZE):
            if at < piece.position:
                yield _Item(Piece(at, piece.position - at, []))
            yield _Item(piece)
            at = piece.position + piece.length
        if at < stop:
            yield _Item(Piece(at, stop - at, []))

    def say(self, run: _Run) -> None:
        last = self._unsaid
        if last is None:
            self._unsaid = run
        elif (
            last.end == run.position
            and bool(last.digests) == bool(run.digests)
            and (not run.digests or last.length + run.length <= ASKED_SIZE)
        ):
            self._unsaid = _Run(last.position, last.length + run.length, last.digests + run.digests)
        else:
            self.pause()
            self._unsaid = run

    def pause(self) -> None:
        run, self._unsaid = self._unsaid, None
        if run is None:
            return
        said = wire.Asks(run.position, BLOCK_SIZE, run.length, run.digests)
        self._output.write([wire.encode(said if run.digests else wire.Zero(run.position, run.length))])


class _Hasher:
    """Items → what is said of them, in the worker threads."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._device: Device | None = None
        self._passing = False
        self.buffers = BufferPool(PIECE_SIZE)
        self.unreadable = UnreadableRanges()

    def read_from(self, device: Device) -> None:
        """Where pieces are that are not read yet."""
        self._device = device
        self._passing = device.exceeds_cache()

    def tell_unreadable(self) -> None:
        """Log what could not be read. It is asked for in any case, and a write may mend it."""
        if self.unreadable and self._device is not None:
            logger.warning("of %s, %s. These are asked for", self._device.path, self.unreadable)

    def hash(self, item: _Item) -> list[_Run]:
        piece, room = item
        if not piece.data:
            return [_Run(piece.position, piece.length, b"")] if piece.length else []
        if room is None:
            return self._read_and_hash(piece)
        runs = list(self._runs(piece, room))
        self.buffers.release(room)
        return runs

    def _read_and_hash(self, piece: Piece) -> list[_Run]:
        device = self._device
        if device is None:
            raise BlockcopyError("a piece that was not read, of nothing that it could be read from")
        runs: list[_Run] = []
        whole = False
        if (view := piece.view(device)) is not None:
            try:
                runs = list(self._runs(piece, view))
            finally:
                whole = piece.release_view(device)
        if not whole:
            room = self.buffers.acquire()
            there, errors = piece.read_skipping_errors(device, room, BLOCK_SIZE)
            if there < piece.length:
                raise DeviceError(
                    f"cannot read at {piece.position + there} of {device.path}: it is shorter than it was"
                )
            runs = list(self._runs(piece._replace(length=there), room, errors))
            self.buffers.release(room)
        if self._passing:
            device.drop_behind(piece.position, piece.length)
        return runs

    def _runs(
        self, piece: Piece, data: memoryview, errors: Mapping[int, DeviceError] | None = None
    ) -> Iterator[_Run]:
        """Digests of the blocks. For one that could not be read, by its `errors`: a digest that nothing has."""
        start = at = 0
        found: list[bytes] = []  # digests of the blocks from `start` on, or none where these are zeros
        for size, block in piece.blocks(data, BLOCK_SIZE):
            error = errors.get(at) if errors else None
            if at > start and (block is None and error is None) == bool(found):
                yield _Run(piece.position + start, at - start, b"".join(found))
                start, found = at, []
            if error is not None:
                self.unreadable.add(Extent(piece.position + at, size), str(error))
                found.append(self._digest.impossible)
            elif block is not None:
                found.append(self._digest(block))
            at += size
        if at > start:
            yield _Run(piece.position + start, at - start, b"".join(found))


def _is_device(fd: int) -> bool:
    """Whether any part of it can be read at any time."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _seek(fd: int, path: str, start: int) -> bool:
    """Go to `start`; False for a pipe, which is where it is and can start nowhere else."""
    try:
        os.lseek(fd, start, os.SEEK_SET)
    except OSError as error:
        if start:
            raise DeviceError.from_os_error(f"start at {start} of", path, error) from error
        return False
    return True


def _reader(fd: int, path: str) -> Callable[[memoryview], int]:
    def read_into(buffer: memoryview) -> int:
        try:
            return os.readv(fd, [buffer])
        except OSError as error:
            raise DeviceError.from_os_error("read", path, error) from error

    return read_into


def _piped(read_into: Callable[[memoryview], int], hasher: _Hasher, start: int, end: int | None) -> Iterator[_Item]:
    """What there is, as whole blocks but for the last, however little a pipe gives at once."""
    position = start
    while end is None or position < end:
        wanted = _PIPED_SIZE if end is None else min(_PIPED_SIZE, end - position)
        room = hasher.buffers.acquire()
        filled = 0
        while filled < wanted and (count := read_into(room[filled:wanted])):
            filled += count
        if filled:
            yield _Item(Piece(position, filled, [Extent(position, filled)]), room)
            position += filled
        if filled < wanted:
            return
