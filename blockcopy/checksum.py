"""Stage 1: the destination's blocks → the hash stream. Reads; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Callable, NamedTuple

from blockcopy import wire
from blockcopy.digests import digest
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.geometry import BLOCK_SIZE
from blockcopy.progress import LineProgress
from blockcopy.stages import PIECE_SIZE, InputStream, OutputStream, run_ordered


class _Piece(NamedTuple):
    position: int
    data: bytes


class _Hashes(NamedTuple):
    end: int  # of the piece
    stream: bytes


def checksum(
    fd: int,
    path: str,
    output: OutputStream,
    *,
    start: int = 0,
    end: int | None = None,
    progress: LineProgress | None = None,
) -> None:
    """Write the hash stream of bytes `start` … `end` of `fd`, a file, device or pipe called `path`.

    Without `end`, what can tell its position (all but a pipe) is followed by `rest`, which asks the
    source for all that it has beyond. Errors: DeviceError, OutputError; BlockcopyError for a range that is none.
    """
    if start < 0:
        raise BlockcopyError(f"--start {start} does not lie in {path}")
    if end is not None and end <= start:
        raise BlockcopyError(f"--end {end} does not lie behind --start {start}")
    seekable = _seek(fd, path, start)
    reached = start

    def send(hashes: _Hashes) -> None:
        nonlocal reached
        output.write([hashes.stream])
        reached = hashes.end
        if progress is not None:
            progress.update(reached - start, reached)

    if seekable:
        run_ordered(_pieces(_device_reader(fd, path), start, end), _hash, send)
    else:  # a pipe may be silent for ever, so its reader has to be woken where the writer fails
        with InputStream(fd) as pipe:
            run_ordered(_pieces(pipe.read, start, end), _hash, send, wake=pipe.wake)
    if end is not None and reached < end:
        raise DeviceError(f"{path} ends at {reached}, before the --end {end} that was asked for")
    tail = [wire.encode(wire.Done())]
    if end is None and seekable:
        tail.insert(0, wire.encode(wire.Rest(reached)))
    output.write(tail)
    if progress is not None:
        progress.finish()


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


def _seek(fd: int, path: str, start: int) -> bool:
    """Go to `start`; False for a pipe, which is where it is and can start nowhere else."""
    try:
        os.lseek(fd, start, os.SEEK_SET)
    except OSError as error:
        if start:
            raise DeviceError.of(f"start at {start} of", path, error) from error
        return False
    return True


def _device_reader(fd: int, path: str) -> Callable[[int], bytes]:
    def read(most: int) -> bytes:
        try:
            return os.read(fd, most)
        except OSError as error:
            raise DeviceError.of("read", path, error) from error

    return read


def _pieces(read: Callable[[int], bytes], start: int, end: int | None) -> Iterator[_Piece]:
    """What there is, as whole blocks but for the last, however little a pipe gives at once."""
    position = start
    while True:
        wanted = PIECE_SIZE if end is None else min(PIECE_SIZE, end - position)
        data = read(wanted)
        while len(data) < wanted and (more := read(wanted - len(data))):
            data += more
        if data:
            yield _Piece(position, data)
            position += len(data)
        if len(data) < wanted or not wanted:
            return
        del data


def _hash(piece: _Piece) -> _Hashes:
    position, data = piece
    view = memoryview(data)
    blocks = ((at, view[at : at + BLOCK_SIZE]) for at in range(0, len(view), BLOCK_SIZE))
    stream = b"".join(wire.encode(wire.Hash(position + at, len(block), digest(block))) for at, block in blocks)
    return _Hashes(position + len(data), stream)
