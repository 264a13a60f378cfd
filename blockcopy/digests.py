"""The digest of a block. The original's streams know one: SHA3-512, 64 bytes."""

from __future__ import annotations

import hashlib
from typing import Union

Buffer = Union[bytes, bytearray, memoryview]

NAME = "sha3_512"

DIGEST_SIZE = 64

NO_DIGEST = bytes(DIGEST_SIZE)
"""A digest nothing has: asking with it is asking for the bytes whatever they are."""


def digest(data: Buffer) -> bytes:
    """SHA3-512 of `data`: DIGEST_SIZE bytes. Lets other threads run while it works."""
    return hashlib.sha3_512(data).digest()
