"""The compression of `dzst` frames: one zstd frame each, bounded on expanding.

The module is of Python 3.14, or the package `backports.zstd`, loaded when first needed: a host with
neither serves the rest.
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
"""Those above need much memory on either side."""

DEFAULT_LEVEL = 3

_WINDOW_LOG = 23
"""What expanding may take: 8 MiB. Ours need no more than a block's 1 MiB."""


@functools.cache
def _module() -> Any:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return importlib.import_module(name)


def available() -> bool:
    """Whether this host can compress and expand."""
    try:
        _module()
    except ImportError:
        return False
    return True


def check_available() -> None:
    """BlockcopyError where this host has no zstd."""
    if not available():
        raise BlockcopyError(
            "zstd needs Python 3.14, or the package `backports.zstd`, on this host: "
            f"{optional_packages.install_command(optional_packages.ZSTD)}"
        )


def compress(data: Buffer, level: int) -> bytes:
    """`data` as one zstd frame, with a check sum (which may be the larger of the two)."""
    parameter = _module().CompressionParameter
    options = {parameter.compression_level: level, parameter.checksum_flag: 1}
    packed: bytes = _module().compress(data, options=options)
    return packed


def expand(message: ZstdData) -> bytes:
    """The bytes of a zstd frame, at most MAX_BLOCK_SIZE. StreamError for anything else."""
    check_available()
    zstd = _module()
    place = f"the zstd frame for position {message.position}"
    try:
        size = zstd.get_frame_info(message.payload).decompressed_size or 0  # None where it does not tell
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
