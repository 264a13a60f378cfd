"""What the command line takes: commands and options."""

from __future__ import annotations

import argparse
import math
from typing import Any

from blockcopy import __version__, digests, values
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
        type=values.compression,
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
    mount.add_argument("--replace", action="store_true", help="clear a dead mount there, of a killed blockcopy")
    _add_copy_options(mount)
    _add_source_options(mount, reconnect_timeout=60)
    _add_both_ends(mount)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder, or a file")

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
    limit.add_argument("rate", metavar="RATE", type=values.rate, help="bytes a second, with K, M, G; or none")
    prefetch.add_argument(
        "extents", metavar="OFFSET:LENGTH", type=values.extent, nargs="+", help="bytes, with K, M, G, T"
    )
    return top


def long_options(command: str) -> dict[str, bool]:
    """The options of a command, without their dashes; whether each takes a value."""
    [commands] = [each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return {
        name[2:]: action.nargs != 0
        for action in commands.choices[command]._actions
        for name in action.option_strings
        if name.startswith("--")
    }


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
        type=values.compression,
        default=argparse.SUPPRESS,
        help="what the source compresses with (default: auto, only while that is faster, of a HOST)",
    )
    parser.add_argument("--on-complete", metavar="COMMAND", help="run this when the copy is complete")
    parser.add_argument("--log-file", metavar="FILE", help="log to the end of this file")
    parser.add_argument(
        "--limit", metavar="RATE", type=values.rate, help="most bytes a second of the pass, with K, M, G"
    )


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
        type=values.some_seconds,
        default=30,
        help="start a connection again that gives nothing for so long (default: 30)",
    )
    default = "for ever" if math.isinf(reconnect_timeout) else f"{reconnect_timeout:g}"
    parser.add_argument(
        "--reconnect-timeout",
        metavar="SECONDS",
        type=values.seconds,
        default=reconnect_timeout,
        help=f"how long to wait for a source that is away (default: {default})",
    )


def _add_both_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("destination", metavar="DESTINATION", help="device or file that becomes the copy")
