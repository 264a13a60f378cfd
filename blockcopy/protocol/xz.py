"""The compression of `dlzm` blocks: one xz stream a block, bounded on expanding.

The module `lzma` is loaded when first needed: a Python built without it still serves the rest.
"""

from __future__ import annotations

from blockcopy.block.buffers import Buffer
from blockcopy.errors import BlockcopyError, StreamError
from blockcopy.protocol.wire import MAX_BLOCK_SIZE, XzData

_MEMORY = 32 * 1024 * 1024
"""What expanding a block may take: xz's default preset needs 9 MiB."""


def check_available() -> None:
    """BlockcopyError where this Python has no xz."""
    try:
        import lzma  # noqa: F401
    except ImportError as error:
        raise BlockcopyError(
            "this Python was built without its module `lzma`; use another one, or do without --lzma"
        ) from error


def compress(data: Buffer) -> bytes:
    """`data` as one xz stream (which may be the larger of the two)."""
    import lzma

    return lzma.compress(data)


def expand(message: XzData) -> bytes:
    """The bytes of an xz block, at most MAX_BLOCK_SIZE. StreamError for anything else."""
    check_available()
    import lzma

    try:
        expander = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        data = expander.decompress(message.payload, MAX_BLOCK_SIZE + 1)
    except lzma.LZMAError as error:
        raise StreamError(f"the xz block for position {message.position} is damaged: {error}") from error
    if len(data) > MAX_BLOCK_SIZE:
        raise StreamError(
            f"the xz block for position {message.position} expands to more than {MAX_BLOCK_SIZE} bytes"
        )
    if not expander.eof or expander.unused_data:
        raise StreamError(f"the xz block for position {message.position} is not one whole xz stream")
    return data
