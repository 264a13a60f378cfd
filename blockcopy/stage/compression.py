"""What is sent → frames of `data`, or compressed ones where these are smaller.

Workers of `retrieve` call `frame` from several threads at once; what they know of one another is
a guess at most, and a race about it costs a chance to compress, nothing else.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from blockcopy.block.buffers import Buffer
from blockcopy.protocol import wire, xz, zstd
from blockcopy.stage.pipeline import WORKERS
from blockcopy.stage.streams import OutputStream


class CompressionSpec(NamedTuple):
    """For zstd, of whoever asks; with `auto` only where it pays."""

    level: int = zstd.DEFAULT_LEVEL
    auto: bool = False


def wish_of(fact: object) -> CompressionSpec | None:
    """What a greeting says of `compress` (see `wire`); None where it wishes for nothing that is known here."""
    if not isinstance(fact, dict) or fact.get("name") != "zstd":
        return None
    level = fact.get("level")
    if type(level) is not int:
        level = zstd.DEFAULT_LEVEL
    return CompressionSpec(min(max(level, zstd.LEVELS[0]), zstd.LEVELS[-1]), bool(fact.get("auto")))


def fact_of(wish: CompressionSpec | None) -> dict[str, Any] | None:
    """What a greeting says for it: what `wish_of` reads."""
    return None if wish is None else {"name": "zstd", "level": wish.level, "auto": wish.auto}


def text_of(wish: CompressionSpec | None) -> str:
    """What the command line has for it."""
    if wish is None:
        return "none"
    return "auto" if wish.auto else f"zstd:{wish.level}"


class Packing:
    """None: all is sent as it is."""

    name = "none"
    """In a greeting."""

    kind: wire.Kind = wire.Data
    takes_unread = True
    """Bytes go as they are, whoever reads them."""

    def frame(self, position: int, data: Buffer) -> list[Buffer]:
        """The frame of `data` for `position`; may hold on to `data` itself."""
        packed = self._pack(data)
        if packed is not None and len(packed) < len(data):
            return [wire.frame_header(self.kind, position, len(packed)), packed]
        return [wire.frame_header(wire.Data, position, len(data)), data]

    def _pack(self, data: Buffer) -> bytes | None:
        return None


class Xz(Packing):
    """As the original's --lzma. BlockcopyError where this Python has none."""

    kind = wire.XzData
    takes_unread = False

    def __init__(self) -> None:
        xz.check_available()

    def _pack(self, data: Buffer) -> bytes | None:
        return xz.compress(data)


class Zstd(Packing):
    """At a level of `zstd.LEVELS`. BlockcopyError where this host has none."""

    name = "zstd"
    kind = wire.ZstdData
    takes_unread = False

    def __init__(self, level: int) -> None:
        zstd.check_available()
        self._level = level

    def _pack(self, data: Buffer) -> bytes | None:
        return zstd.compress(data, self._level)


class ZstdWherePaying(Zstd):
    """Only while the bytes that it saves would keep `output` busy for longer than it keeps the workers."""

    _SAMPLE = 32 * 1024
    _MOST_SKIPPED = 64

    def __init__(self, level: int, output: OutputStream) -> None:
        super().__init__(level)
        self._output = output
        self._skip = 0  # frames to come that are not tried
        self._failures = 0  # in a row: after each, twice as many are not tried

    def _pack(self, data: Buffer) -> bytes | None:
        if not self._output.seconds_per_byte:
            return None  # nothing is known of its pace yet
        if self._skip:
            self._skip -= 1
            return None
        if not self._pays(data):
            self._failures += 1
            self._skip = min(1 << self._failures, self._MOST_SKIPPED)
            return None
        self._failures = 0
        return super()._pack(data)

    def _pays(self, data: Buffer) -> bool:
        middle = len(data) // 2
        sample = memoryview(data)[middle : middle + self._SAMPLE]  # what a block begins with, tells little
        started = time.perf_counter()
        saved = len(sample) - len(zstd.compress(sample, self._level))
        seconds = (time.perf_counter() - started) / WORKERS
        return saved * 8 > len(sample) and saved * self._output.seconds_per_byte > seconds


def wished(wish: CompressionSpec | None, output: OutputStream) -> Packing:
    """What is wished for, where this host can; `auto` needs to know the `output`."""
    if wish is None or not zstd.available():
        return Packing()
    return ZstdWherePaying(wish.level, output) if wish.auto else Zstd(wish.level)
