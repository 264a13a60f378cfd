"""Compressors: blocks → frames, compressed if the result is smaller.

Several worker threads of `retrieve` use one compressor. Their shared counters are estimates. A race costs at most a
chance to compress.
"""

from __future__ import annotations

import time
from typing import Protocol

from blockcopy.block.buffers import Buffer
from blockcopy.protocol import wire, xz, zstd
from blockcopy.protocol.compression import CompressionSpec
from blockcopy.stage.pipeline import WORKERS


class Paced(Protocol):
    """Where frames go: an OutputStream, or a Delivery."""

    @property
    def seconds_per_byte(self) -> float:
        """Recent time of writing one byte."""
        ...


class Compressor:
    """The compressor "none": every frame is `data`. Base class of all compressors. Thread-safe."""

    name = "none"
    """Name in a greeting."""

    kind: wire.Kind = wire.Data
    """Class of the compressed frames. If it is Data, the kernel may splice bytes that this process never reads."""

    def frame(self, position: int, data: Buffer) -> list[Buffer]:
        """Return the list `[header, payload]` of a frame with `data`, which the source has at byte `position`.

        The payload is `data` itself if the compressed bytes are not smaller.
        """
        compressed = self._compress(data)
        if compressed is not None and len(compressed) < len(data):
            return [wire.frame_header(self.kind, position, len(compressed)), compressed]
        return [wire.frame_header(wire.Data, position, len(data)), data]

    def _compress(self, data: Buffer) -> bytes | None:
        """Return `data` compressed, as bytes. Returns None if compressing is not worth a try."""
        return None


class XzCompressor(Compressor):
    """The compressor of the original's --lzma: `dlzm` frames."""

    kind = wire.XzData

    def __init__(self) -> None:
        """Raise BlockcopyError if this Python has no xz."""
        xz.check_available()

    def _compress(self, data: Buffer) -> bytes | None:
        return xz.compress(data)


class ZstdCompressor(Compressor):
    """A compressor with a fixed zstd level: `dzst` frames."""

    name = "zstd"
    kind = wire.ZstdData

    def __init__(self, level: int) -> None:
        """Compress at `level`, one of `zstd.LEVELS`. Raises BlockcopyError if this host has no zstd."""
        zstd.check_available()
        self._level = level

    def _compress(self, data: Buffer) -> bytes | None:
        return zstd.compress(data, self._level)


class AdaptiveCompressor(ZstdCompressor):
    """A zstd compressor that works only if compressing a block takes less time than sending the saved bytes."""

    _SAMPLE = 32 * 1024
    """Bytes from the middle of a block that are tried first."""
    _MAX_SKIPPED = 64
    """Maximum number of frames that pass without a trial."""

    def __init__(self, level: int, output: Paced) -> None:
        """Compress at zstd `level`, depending on the pace of `output`.

        Raises as ZstdCompressor does.
        """
        super().__init__(level)
        self._output = output
        self._skip = 0  # next frames without a trial
        self._failures = 0  # consecutive failed trials: each doubles the skipped frames

    def _compress(self, data: Buffer) -> bytes | None:
        if not self._output.seconds_per_byte:
            return None  # the output's pace is unknown yet
        if self._skip:
            self._skip -= 1
            return None
        if not self._pays(data):
            self._failures += 1
            self._skip = min(1 << self._failures, self._MAX_SKIPPED)
            return None
        self._failures = 0
        return super()._compress(data)

    def _pays(self, data: Buffer) -> bool:
        middle = len(data) // 2
        sample = memoryview(data)[middle : middle + self._SAMPLE]  # a block's first bytes are often not typical
        started = time.perf_counter()
        saved = len(sample) - len(zstd.compress(sample, self._level))
        seconds = (time.perf_counter() - started) / WORKERS
        return saved * 8 > len(sample) and saved * self._output.seconds_per_byte > seconds


def compressor_for(spec: CompressionSpec, output: Paced) -> Compressor:
    """Return the Compressor for `spec`. Returns the compressor "none" if this host has no zstd.

    `output`: where the frames go. Its pace decides whether "auto" compresses.
    """
    if spec.method == "none" or not zstd.available():
        return Compressor()
    return AdaptiveCompressor(spec.level, output) if spec.method == "auto" else ZstdCompressor(spec.level)
