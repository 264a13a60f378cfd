"""Types of option values for argparse. Each function raises ArgumentTypeError, which names what is valid."""

from __future__ import annotations

import argparse
import os
import re

from blockcopy.block.geometry import MAX_POSITION
from blockcopy.paths.places import holds_devices, names_folder
from blockcopy.protocol.compression import CompressionSpec

MAX_CONNECTIONS = 32
"""Most connections that a user may ask for."""


def size(text: str) -> int:
    """Return the number of bytes that `text` names, such as `4096`, `64K`, `64KiB` or `64kB`.

    The units are those of rsync and dd, in any case: K and KiB are 1024, KB is 1000, likewise M, G and T.

    Raises ArgumentTypeError if `text` is no such number.
    """
    found = re.fullmatch(r"(\d+)(?:([KMGT])(B|IB)?|B)?", text.upper(), re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 4096, 64K or 64KiB, or 64kB")
    unit = 1000 if found[3] == "B" else 1024
    return int(found[1]) * int(unit ** " KMGT".find(found[2] or " "))


def file(text: str) -> str:
    """Return `text` if it is the path of a file that exists or may be created.

    Raises ArgumentTypeError for folders and for new files among devices.
    """
    if names_folder(text) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file")
    if not os.path.exists(text) and holds_devices(os.path.dirname(os.path.realpath(text))):
        raise argparse.ArgumentTypeError(f"{text!r} would be a file in memory: no file is created among devices")
    return text


def regular_file(text: str) -> str:
    """Return `text` if it is the path of a regular file, or of none yet, that may be replaced.

    Raises ArgumentTypeError for folders, devices, pipes and names among devices, such as links below /dev.
    """
    path = file(text)
    if os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{path!r} is no regular file, and would be replaced")
    if holds_devices(os.path.realpath(os.path.dirname(path) or ".")):
        raise argparse.ArgumentTypeError(f"{path!r} lies among devices, and would be replaced")
    return path


def connections(text: str) -> int | None:
    """Return the number of connections that `text` names, or None for "auto".

    Raises ArgumentTypeError if `text` is anything else.
    """
    if text == "auto":
        return None
    if not re.fullmatch(r"[1-9]\d?", text) or int(text) > MAX_CONNECTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 1 to {MAX_CONNECTIONS}")
    return int(text)


def compression(text: str) -> CompressionSpec:
    """Return the CompressionSpec that `text` names: "zstd", "zstd:LEVEL", "auto" or "none".

    Raises ArgumentTypeError if `text` is anything else.
    """
    try:
        return CompressionSpec.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def rate(text: str) -> int | None:
    """Return the number of bytes per second that `text` names, as `size()` parses it. Returns None for "none".

    Raises ArgumentTypeError if `text` is 0 or no number.
    """
    if text == "none":
        return None
    count = size(text)
    if not 0 < count < 1 << 63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no rate; `pause` stops background copying, and none lifts the limit"
        )
    return count


def extent(text: str) -> tuple[int, int]:
    """Return a tuple of the two numbers of bytes in `text`, which is `OFFSET:LENGTH`.

    Raises ArgumentTypeError if `text` is anything else.
    """
    offset, colon, length = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not OFFSET:LENGTH")
    found = size(offset), size(length)
    if max(found) > MAX_POSITION:
        raise argparse.ArgumentTypeError(f"{text!r} lies beyond 8 EiB, and no device is that large")
    return found


def seconds(text: str) -> float:
    """Return the seconds that `text` names, a float. Raises ArgumentTypeError if that is negative or no number."""
    try:
        count = float(text)
    except ValueError:
        count = -1
    if not count >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return count


def positive_seconds(text: str) -> float:
    """Return the seconds that `text` names, a float. Raises ArgumentTypeError if that is not a number above 0."""
    count = seconds(text)
    if not count:
        raise argparse.ArgumentTypeError("a timeout of 0 seconds is too short for any answer")
    return count
