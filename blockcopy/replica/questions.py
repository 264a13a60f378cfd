"""The destination's blocks as questions to the source: read, and digested. In worker threads.

Holes are not read, and zeros are not hashed: the digest of zeros is known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from blockcopy.device import ZEROS, Device
from blockcopy.digests import Digest
from blockcopy.errors import DeviceError
from blockcopy.geometry import Extent, Geometry, runs
from blockcopy.replica.forms import Question
from blockcopy.wire import MAX_ASKED

_PIECE_SIZE = 1024 * 1024
"""Bytes read at once: large enough for the call not to count, small enough for the cache of the CPU."""

_own = threading.local()


def questions(device: Device, geometry: Geometry, blocks: Sequence[int], digest: Digest) -> list[Question]:
    """What to ask about ascending `blocks`; neighbours are one question. DeviceError where they cannot be read."""
    most = MAX_ASKED // geometry.block_size
    return [
        _question(device, geometry, run[start : start + most], digest)
        for run in runs(blocks)
        for start in range(0, len(run), most)
    ]


def _question(device: Device, geometry: Geometry, run: range, digest: Digest) -> Question:
    offset, end = geometry.extent(run[0]).offset, geometry.extent(run[-1]).end
    if device.size() < end:
        raise _is_shorter(device, Extent(offset, end - offset))  # what is not there is no hole
    with_data = [geometry.span(*extent) for extent in device.data_extents(offset, end - offset)]
    digests = []
    block = run.start
    for span in with_data:
        if span.stop > block:
            start = max(span.start, block)
            digests += [digest.of_zeros(geometry.extent(hole).length) for hole in range(block, start)]
            digests += _digests(device, geometry, range(start, span.stop), digest)
            block = span.stop
    digests += [digest.of_zeros(geometry.extent(hole).length) for hole in range(block, run.stop)]
    return Question(offset, end - offset, geometry.block_size, b"".join(digests))


def _digests(device: Device, geometry: Geometry, blocks: range, digest: Digest) -> Iterator[bytes]:
    buffer = _buffer()
    per_piece = max(1, _PIECE_SIZE // geometry.block_size)
    for first in range(blocks.start, blocks.stop, per_piece):
        offset = geometry.extent(first).offset
        end = geometry.extent(min(first + per_piece, blocks.stop) - 1).end
        _fill(device, Extent(offset, end - offset), buffer)
        for at in range(0, end - offset, geometry.block_size):
            own = buffer[at : min(at + geometry.block_size, end - offset)]
            yield digest.of_zeros(len(own)) if ZEROS.startswith(own) else digest(own)


def _fill(device: Device, extent: Extent, buffer: memoryview) -> None:
    if device.read_into(extent.offset, buffer[: extent.length]) != extent.length:
        raise _is_shorter(device, extent)


def _is_shorter(device: Device, extent: Extent) -> DeviceError:
    return DeviceError(
        f"cannot read {extent.length} bytes at {extent.offset} of {device.path}: "
        f"it is shorter than it was, and ends at {device.size()}"
    )


def _buffer() -> memoryview:
    """One a thread, for as long as that lives."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(_PIECE_SIZE))
    found: memoryview = _own.buffer
    return found
