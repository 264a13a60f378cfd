"""The digests that blocks are compared by: which this host has, how fast, and which suits both ends.

The original's streams know one, SHA3-512. Two of ours take the one that the slower end is fastest with.
None has fewer than 256 bits. BLAKE3 is there where the package `blake3` is.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping
from typing import Callable

from blockcopy import optional_packages
from blockcopy.block.buffers import Buffer
from blockcopy.errors import BlockcopyError

ORIGINAL = "sha3_512"

DIGEST_SIZE = 64
"""Bytes of the original's, which is also the longest of them."""

NO_DIGEST = bytes(DIGEST_SIZE)
"""A digest nothing has: asking with it is asking for the bytes whatever they are."""


def digest(data: Buffer) -> bytes:
    """SHA3-512 of `data`: DIGEST_SIZE bytes. Lets other threads run while it works."""
    return hashlib.sha3_512(data).digest()


class Digest:
    """One of `NAMES`: `size` bytes of `data` when called. Lets other threads run while it works."""

    def __init__(self, name: str, function: Callable[[Buffer], bytes]) -> None:
        self.name = name
        self._function = function
        self.size = len(function(b""))
        self.impossible = bytes(self.size)
        """A digest that no data has: who asks with it asks for the bytes, whatever they are."""
        self.of_zeros = functools.lru_cache(maxsize=64)(self._of_zeros)
        """The digest of so many zeros."""

    def __call__(self, data: Buffer) -> bytes:
        return self._function(data)

    def _of_zeros(self, length: int) -> bytes:
        return self._function(bytes(length))


def _blake3() -> Callable[[Buffer], bytes]:
    from blake3 import blake3

    return lambda data: bytes(blake3(data).digest())


_MAKERS: dict[str, Callable[[], Callable[[Buffer], bytes]]] = {
    "blake3": _blake3,
    "sha256": lambda: lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
    ORIGINAL: lambda: digest,
}

NAMES = tuple(_MAKERS)


@functools.cache
def named(name: str) -> Digest:
    """The digest of that name. BlockcopyError where there is none of it, or this host has it not."""
    if name not in _MAKERS:
        raise BlockcopyError(f"there is no digest {name!r} here; there are {', '.join(NAMES)}")
    try:
        return Digest(name, _MAKERS[name]())
    except ImportError as error:
        raise BlockcopyError(
            f"the digest {name} needs the package `{name}` on this host: "
            f"{optional_packages.install_command(optional_packages.BLAKE3)}"
        ) from error


_TRIAL_SIZE = 64 * 1024


@functools.cache
def speeds() -> dict[str, int]:
    """The digests this host has, with MB/s of one core: the best of a few trials, a few milliseconds in all."""
    found = {}
    for name in NAMES:
        try:
            function = named(name)
        except BlockcopyError:
            continue
        found[name] = max(1, int(_TRIAL_SIZE / min(_trial(function) for _ in range(3)) / 1e6))
    return found


def _trial(function: Digest) -> float:
    data = bytes(_TRIAL_SIZE)
    started = time.perf_counter()
    function(data)
    return max(time.perf_counter() - started, 1e-9)


def choose(here: Mapping[str, int], there: Mapping[str, int]) -> str | None:
    """The digest with which the slower end is fastest; None where they have none in common."""
    common = [name for name in here if name in there]
    return max(common, key=lambda name: min(here[name], there[name]), default=None)
