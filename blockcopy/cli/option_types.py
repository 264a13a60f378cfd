"""How the values of options are read: ArgumentTypeError, with what would do, for those that cannot be."""

from __future__ import annotations

import argparse
import os
import re

from blockcopy.paths.places import holds_devices, names_folder
from blockcopy.protocol import zstd
from blockcopy.stage.compression import CompressionSpec

DEFAULT_RSH = "ssh"

DEFAULT_PYTHON = "python3"
"""Options' values if nothing is said; of a host."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Bytes, with K, M, G, T (binary)."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, as 4096, 64K or 1G")
    return int(found[1]) * _UNITS[found[2]]


def file(text: str) -> str:
    """Return the path of a file that is there, or can be made. Refuses folders, and new files below /dev."""
    if names_folder(text) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file")
    if not os.path.exists(text) and holds_devices(os.path.dirname(os.path.realpath(text))):
        raise argparse.ArgumentTypeError(f"{text!r} would be a file in memory: none is created among devices")
    return text


def regular_file(text: str) -> str:
    """Do as `file`, for a file that is replaced or removed in its folder: no device, pipe or link of /dev."""
    path = file(text)
    if os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{path!r} is no regular file, and would be replaced")
    if holds_devices(os.path.realpath(os.path.dirname(path) or ".")):
        raise argparse.ArgumentTypeError(f"{path!r} lies among devices, and would be replaced")
    return path


def compression(text: str) -> CompressionSpec | None:
    """None for `none`; also what a mount or a sync wishes for."""
    if text == "none":
        return None
    if text == "auto":
        return CompressionSpec(auto=True)
    name, colon, level = text.partition(":")
    if name != "zstd" or (colon and not (level.isdecimal() and int(level) in zstd.LEVELS)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither zstd, zstd:{zstd.LEVELS[0]} to zstd:{zstd.LEVELS[-1]}, auto nor none"
        )
    return CompressionSpec(int(level)) if level else CompressionSpec()


def rate(text: str) -> int | None:
    """Bytes a second; None for `none`."""
    if text == "none":
        return None
    count = size(text)
    if not 0 < count < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; pause stops the pass, none lifts the limit")
    return count


def extent(text: str) -> tuple[int, int]:
    """OFFSET:LENGTH, as `size` reads each."""
    offset, colon, length = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not OFFSET:LENGTH")
    return size(offset), size(length)


def seconds(text: str) -> float:
    """Not below 0; fractions count."""
    try:
        count = float(text)
    except ValueError:
        count = -1
    if not count >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return count


def some_seconds(text: str) -> float:
    """Above 0."""
    count = seconds(text)
    if not count:
        raise argparse.ArgumentTypeError("nothing answers in 0 seconds")
    return count
