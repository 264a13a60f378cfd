"""The versions that `--version` shows: of this program, and of what it works with."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import platform

from blockcopy import __version__
from blockcopy.protocol import wire

ORIGINAL = "0.0.2"
"""The version of the original program whose streams `checksum`, `retrieve` and `save` speak."""

RELEASED = "2026-11-26"
"""The date of this version, as CHANGELOG.md has it."""

_LIBFUSE = ("libfuse3.so.4", "libfuse3.so.3")
"""The names of the library: since libfuse 3.17, and before."""


def text() -> str:
    """Return the versions as lines: the program first, then its protocol, then Python and FUSE if installed."""
    parts = [f"Python {platform.python_version()}"]
    for name, version in (("pyfuse3", _package("pyfuse3")), ("libfuse", _libfuse())):
        parts += [f"{name} {version}"] if version else []
    return (
        f"blockcopy {__version__}\n"
        f"protocol {wire.PROTOCOL}, and the streams of messa/blockcopy {ORIGINAL}\n"
        f"{', '.join(parts)}"
    )


def _package(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _libfuse() -> str | None:
    """Return the version of the newest libfuse. Returns None if none is installed."""
    for name in _LIBFUSE:
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(name).fuse_pkgversion
            function.restype = ctypes.c_char_p
            found: bytes = function()
            return found.decode()
    return None
