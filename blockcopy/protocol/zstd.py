"""zstd compression of `dzst` frames: one zstd frame each, expanded in bounded memory.

Needs Python 3.14, or the package `backports.zstd`. The module is imported at the first use. A host without zstd
can do all else.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from blockcopy import optional_packages
from blockcopy.block.buffers import Buffer
from blockcopy.errors import BlockcopyError, StreamError
from blockcopy.protocol.wire import MAX_BLOCK_SIZE, ZstdData

LEVELS = range(1, 20)
"""Levels that a user may choose. Higher levels need much memory at both ends."""

DEFAULT_LEVEL = 3

_WINDOW_LOG = 23
"""Binary logarithm of the bytes of memory for expanding: 8 MiB. Our frames need at most a block's 1 MiB."""


@functools.cache
def _module() -> Any:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return importlib.import_module(name)


def available() -> bool:
    """Return True if this host has zstd."""
    try:
        _module()
    except ImportError:
        return False
    return True


def check_available() -> None:
    """Raise BlockcopyError if this host has no zstd."""
    if not available():
        raise BlockcopyError(
            "zstd needs Python 3.14, or the package `backports.zstd`, on this host: "
            f"{optional_packages.install_command(optional_packages.ZSTD)}"
        )


def compress(data: Buffer, level: int) -> bytes:
    """Return `data` as one zstd frame with a checksum, which can be longer than `data`.

    `level`: one of LEVELS. Call only if `available()`.
    """
    parameter = _module().CompressionParameter
    options = {parameter.compression_level: level, parameter.checksum_flag: 1}
    compressed: bytes = _module().compress(data, options=options)
    return compressed


def expand(message: ZstdData) -> bytes:
    """Return the expanded payload of `message`, a `dzst` frame: at most MAX_BLOCK_SIZE bytes.

    Raises StreamError if the payload is not one whole zstd frame, or if it expands to more. Raises BlockcopyError
    if this host has no zstd.
    """
    check_available()
    zstd = _module()
    place = f"the zstd frame for position {message.position}"
    try:
        size = zstd.get_frame_info(message.payload).decompressed_size or 0  # None if the frame does not say
        if size <= MAX_BLOCK_SIZE:
            expander = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
            data: bytes = expander.decompress(message.payload, MAX_BLOCK_SIZE + 1)
            size = len(data)
    except zstd.ZstdError as error:
        raise StreamError(f"{place} is damaged: {error}") from error
    if size > MAX_BLOCK_SIZE:
        raise StreamError(f"{place} expands to more than {MAX_BLOCK_SIZE} bytes")
    if not expander.eof or expander.unused_data:
        raise StreamError(f"{place} is not one whole zstd frame")
    return data
