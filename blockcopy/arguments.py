"""What the command line takes: commands, options, and how their values are read."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

from blockcopy import __version__, digests, zstd
from blockcopy.packing import Wish
from blockcopy.remote import DEFAULT_RSH


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; `command` is the name of the one that was given."""
    top = argparse.ArgumentParser(
        prog="blockcopy", description="Copy a disk over any pipe, and use it before the copy is complete."
    )
    top.add_argument("-v", "--verbose", action="store_true", help="log what is done to standard error")
    top.add_argument("--version", action="version", version=f"blockcopy {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    checksum = _command(commands, "checksum", "hash the destination's blocks: the hash stream")
    checksum.add_argument("destination_file", metavar="FILE", help="file, device or pipe; - is standard input")
    checksum.add_argument("--progress", action="store_true", help="tell progress on standard error")
    checksum.add_argument("--start", type=int, metavar="OFFSET", default=0, help="first byte (default 0)")
    checksum.add_argument("--end", type=int, metavar="OFFSET", help="byte to stop before (default: the end)")

    checksum.add_argument(
        "--digest",
        metavar="NAME",
        choices=[*digests.NAMES, "auto"],
        help=f"hash with {', '.join(digests.NAMES)}, or auto, the fastest here; a retrieve of ours "
        "understands it (default: as the original program)",
    )

    retrieve = _command(commands, "retrieve", "hash stream in, blocks that differ out")
    retrieve.add_argument("source_file", metavar="FILE", help="file or device")
    compression = retrieve.add_mutually_exclusive_group()
    compression.add_argument(
        "--lzma", action="store_true", help="compress with xz, for any save, where that makes blocks smaller"
    )
    compression.add_argument(
        "--compress",
        metavar="zstd[:LEVEL]|auto|none",
        type=_compression,
        help="compress with zstd, for a save of ours; auto: only while that is faster (default: none)",
    )

    save = _command(commands, "save", "write the blocks to the destination, and sync it")
    save.add_argument("destination_file", metavar="FILE", help="file or device; it must exist")
    save.add_argument("--no-sparse", action="store_true", help="write zeros out, rather than leave holes")
    _add_force(save)

    mount = _command(commands, "mount", "show a remote device as a file while it is being copied")
    mount.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, show progress")
    mount.add_argument(
        "-o",
        dest="options",
        metavar="FUSE_OPTIONS",
        action="append",
        default=[],
        help="FUSE mount options, with commas between them; allow_other lets all users read",
    )
    mount.add_argument("--no-background", action="store_true", help="copy only what is read")
    mount.add_argument("--name", help="name of the file (default: the destination's)")
    mount.add_argument("--pid-file", metavar="FILE", help="write the id of the mount's process here")
    _add_copy_options(mount)
    _add_source_options(mount, reconnect_timeout=60)
    _add_both_ends(mount)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder")

    sync = _command(commands, "sync", "make the destination a copy of the source")
    _add_copy_options(sync)
    _add_source_options(sync, reconnect_timeout=math.inf)
    _add_both_ends(sync)

    verify = _command(commands, "verify", "tell where the destination differs from the source")
    verify.add_argument("--json", action="store_true", help="as JSON, instead of lines of OFFSET:LENGTH")
    _add_source_options(verify, reconnect_timeout=math.inf)
    _add_both_ends(verify)

    status = _command(commands, "status", "tell how a mount is doing")
    status.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    wait = _command(commands, "wait", "return when the copy is complete")
    umount = _command(commands, "umount", "unmount, and return when the destination is synced")
    pause = _command(commands, "pause", "stop the pass in the background; reads go on")
    resume = _command(commands, "resume", "let the pass in the background go on")
    limit = _command(commands, "limit", "limit the pass in the background")
    prefetch = _command(commands, "prefetch", "bring parts first; return when they are here")
    for each in (status, wait, umount, pause, resume, limit, prefetch):
        each.add_argument("mountpoint", metavar="MOUNTPOINT")
    limit.add_argument("rate", metavar="RATE", type=_rate, help="bytes a second, with K, M, G; or none")
    prefetch.add_argument(
        "extents", metavar="OFFSET:LENGTH", type=_extent, nargs="+", help="bytes, with K, M, G, T"
    )
    return top


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, as 4096, 64K or 1G")
    return int(found[1]) * _UNITS[found[2]]


def _compression(text: str) -> Wish | None:
    """Also of a mount's or a sync's wish."""
    if text == "none":
        return None
    if text == "auto":
        return Wish(auto=True)
    name, colon, level = text.partition(":")
    if name != "zstd" or (colon and not (level.isdecimal() and int(level) in zstd.LEVELS)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither zstd, zstd:{zstd.LEVELS[0]} to zstd:{zstd.LEVELS[-1]}, auto nor none"
        )
    return Wish(int(level)) if level else Wish()


def _rate(text: str) -> int | None:
    if text == "none":
        return None
    rate = _size(text)
    if not 0 < rate < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; pause stops the pass, none lifts the limit")
    return rate


def _extent(text: str) -> tuple[int, int]:
    offset, colon, length = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not OFFSET:LENGTH")
    return _size(offset), _size(length)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError("nothing answers in 0 seconds")
    return seconds


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    return made


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="write even to a destination that is in use")


def _add_copy_options(parser: argparse.ArgumentParser) -> None:
    _add_force(parser)
    parser.add_argument("--state", metavar="FILE", help="where to record what is done (default: see README)")
    parser.add_argument("--no-state", action="store_true", help="record nothing; a restart checks every block")
    parser.add_argument("--recheck", action="store_true", help="believe no record; check every block")
    parser.add_argument("--verify", action="store_true", help="compare both ends when the copy is complete")
    parser.add_argument("--no-sparse", action="store_true", help="write zeros out, rather than leave holes")
    parser.add_argument(
        "--compress",
        metavar="zstd[:LEVEL]|auto|none",
        type=_compression,
        default=argparse.SUPPRESS,
        help="what the source compresses with (default: auto, only while that is faster, of a HOST)",
    )
    parser.add_argument("--limit", metavar="RATE", type=_rate, help="most bytes a second of the pass, with K, M, G")


def _add_source_options(parser: argparse.ArgumentParser, *, reconnect_timeout: float) -> None:
    parser.add_argument(
        "-e", "--rsh", metavar="RSH", default=DEFAULT_RSH, help="how to reach the host (default: ssh)"
    )
    parser.add_argument(
        "--blockcopy-path", metavar="PROGRAM", help="what to run at the source, as in: sudo blockcopy"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_some_seconds,
        default=30,
        help="start a connection again that gives nothing for so long (default: 30)",
    )
    default = "for ever" if math.isinf(reconnect_timeout) else f"{reconnect_timeout:g}"
    parser.add_argument(
        "--reconnect-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=reconnect_timeout,
        help=f"how long to wait for a source that is away (default: {default})",
    )


def _add_both_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("destination", metavar="DESTINATION", help="device or file that becomes the copy")
