"""xz compression of `dlzm` frames: one xz stream a frame, expanded in bounded memory.

The module `lzma` is imported at the first use. A Python without `lzma` can do all else.
"""

from __future__ import annotations

from blockcopy.block.buffers import Buffer
from blockcopy.errors import BlockcopyError, StreamError
from blockcopy.protocol.wire import MAX_BLOCK_SIZE, XzData

_MEMORY = 32 * 1024 * 1024
"""Bytes of memory for expanding a frame. The default preset of xz needs 9 MiB."""


def check_available() -> None:
    """Raise BlockcopyError if this Python has no xz."""
    try:
        import lzma  # noqa: F401
    except ImportError as error:
        raise BlockcopyError(
            "this Python was built without its module `lzma`; use another one, or do without --lzma"
        ) from error


def compress(data: Buffer) -> bytes:
    """Return `data` as one xz stream, which can be longer than `data`."""
    import lzma

    return lzma.compress(data)


def expand(message: XzData) -> bytes:
    """Return the expanded payload of `message`, a `dlzm` frame: at most MAX_BLOCK_SIZE bytes.

    Raises StreamError if the payload is not one whole xz stream, or if it expands to more. Raises BlockcopyError
    if this Python has no xz.
    """
    check_available()
    import lzma

    place = f"the xz block for position {message.position}"
    try:
        expander = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        data = expander.decompress(message.payload, MAX_BLOCK_SIZE + 1)
    except lzma.LZMAError as error:
        raise StreamError(f"{place} is damaged: {error}") from error
    if len(data) > MAX_BLOCK_SIZE:
        raise StreamError(f"{place} expands to more than {MAX_BLOCK_SIZE} bytes")
    if not expander.eof or expander.unused_data:
        raise StreamError(f"{place} is not one whole xz stream")
    return data
