"""The digests that compare blocks: names, speeds on this host, and the choice between two ends.

The original's streams use SHA3-512 only. Two ends of this program use the digest that is fastest at the slower end.
All digests have at least 256 bits. BLAKE3 needs the package `blake3`.
"""

from __future__ import annotations

import functools
import hashlib
import timeit
from collections.abc import Mapping
from typing import Callable

from blockcopy import optional_packages
from blockcopy.block.buffers import Buffer
from blockcopy.errors import BlockcopyError

ORIGINAL = "sha3_512"
"""Name of the original program's digest."""

DIGEST_SIZE = 64
"""Bytes of the original's digest. No other digest here is longer."""

NO_DIGEST = bytes(DIGEST_SIZE)
"""A value that is no block's digest: a request with it always gets the bytes."""


class Digest:
    """A digest with a `name` that both ends know. Thread-safe. Releases the GIL.

    `function`: called with bytes, returns their digest.
    """

    def __init__(self, name: str, function: Callable[[Buffer], bytes]) -> None:
        self.name = name
        self._function = function
        self.size = len(function(b""))
        """Bytes of each digest."""
        self.impossible = bytes(self.size)
        """A value that is no block's digest: a request with it always gets the bytes."""
        self.of_zeros = functools.lru_cache(maxsize=64)(lambda length: function(bytes(length)))
        """Function of a number of bytes: returns the digest of so many zero bytes. Remembers the results."""

    def __call__(self, data: Buffer) -> bytes:
        """Return the digest of `data`, as bytes of the length `self.size`."""
        return self._function(data)


def _blake3() -> Callable[[Buffer], bytes]:
    from blake3 import blake3

    return lambda data: bytes(blake3(data).digest())


_MAKERS: dict[str, Callable[[], Callable[[Buffer], bytes]]] = {
    "blake3": _blake3,
    "sha256": lambda: lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
    ORIGINAL: lambda: lambda data: hashlib.sha3_512(data).digest(),
}

FASTEST = "blake3"
"""Name of the digest that is the fastest on every CPU."""

NAMES = tuple(_MAKERS)
"""Names of all digests, which `--digest` and `helo` use."""


@functools.cache
def named(name: str) -> Digest:
    """Return the Digest called `name`, one of NAMES.

    Raises BlockcopyError if `name` is unknown, or if the package for the digest is missing on this host.
    """
    if name not in _MAKERS:
        raise BlockcopyError(f"there is no digest {name!r}; use one of {', '.join(NAMES)}")
    try:
        return Digest(name, _MAKERS[name]())
    except ImportError as error:
        raise BlockcopyError(
            f"the digest {name} needs the package `{name}` on this host: "
            f"{optional_packages.install_command(optional_packages.BLAKE3)}"
        ) from error


_TRIAL_SIZE = 64 * 1024
"""Bytes that one trial digests."""


@functools.cache
def speeds() -> dict[str, int]:
    """Measure the digests of this host. Returns a dict, name → MB/s of one core, the best of a few trials.

    Takes a few milliseconds in the first call.
    """
    found, data = {}, bytes(_TRIAL_SIZE)
    for name in NAMES:
        try:
            function = named(name)
        except BlockcopyError:
            continue
        seconds = min(timeit.repeat(functools.partial(function, data), number=1, repeat=3))
        found[name] = max(1, int(_TRIAL_SIZE / max(seconds, 1e-9) / 1e6))
    return found


def choose(local: Mapping[str, float], remote: Mapping[str, float]) -> str | None:
    """Return the name of the digest that is fastest at the slower end. Returns None if no name is common.

    `local`, `remote`: mappings of each end's digests, name → MB/s.
    """
    common = [name for name in local if name in remote]
    return max(common, key=lambda name: min(local[name], remote[name]), default=None)
