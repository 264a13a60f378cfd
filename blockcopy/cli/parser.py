"""What the command line takes: commands and options. Help, manual and completions are made from it too."""

from __future__ import annotations

import argparse
import math
from typing import Any, Union

from blockcopy import __version__
from blockcopy.cli import option_types
from blockcopy.cli.option_types import DEFAULT_PYTHON, DEFAULT_RSH
from blockcopy.cli.suggestions import Parser, commands_of
from blockcopy.protocol import digests

Options = Union[argparse.ArgumentParser, "argparse._ArgumentGroup"]


SHELLS = ("bash", "zsh", "fish")


def long_options(command: str) -> dict[str, bool]:
    """The long options of a command, without their dashes; whether each takes a value."""
    return {
        name[2:]: action.nargs != 0
        for action in commands_of(parser())[command]._actions
        for name in action.option_strings
        if name.startswith("--")
    }


def parser() -> Parser:
    """Of the whole command line; `command` is the name of the one that was given."""
    top = Parser(
        prog="blockcopy",
        description="Copy a disk over any pipe, and use it before the copy is complete.",
        epilog="`blockcopy COMMAND --help` tells more of each; `blockcopy manual` tells all.",
        formatter_class=_Formatter,
    )
    top.add_argument("-v", "--verbose", action="store_true", help="log what is done to standard error")
    top.add_argument("--version", action="version", version=f"blockcopy {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_mounting, _copying, _asking, _stages, _about):
        add(commands)
    return top


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Room for long options, and examples as they are."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=29, **more)


def _command(commands: Any, name: str, text: str, arguments: str, example: str) -> Parser:
    made: Parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        usage=f"blockcopy {name} [OPTION]... {arguments}".rstrip(),
        epilog=f"example: blockcopy {example}",
        formatter_class=_Formatter,
    )
    return made


# The lazy replica


def _mounting(commands: Any) -> None:
    mount = _command(
        commands,
        "mount",
        "show a remote device as a file while it is being copied",
        "SOURCE DESTINATION MOUNTPOINT",
        "mount root@host:/dev/vg/disk /dev/vg/copy /mnt/disk",
    )
    _add_both_ends(mount)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder, or a file")
    shown = mount.add_argument_group("the mount")
    shown.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, show progress")
    shown.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="of FUSE, with commas; allow_other: all may read",
    )
    shown.add_argument("--name", help="name of the file (default: DESTINATION's)")
    shown.add_argument(
        "--pid-file",
        metavar="FILE",
        type=option_types.regular_file,
        help="write the id of the mount's process here",
    )
    shown.add_argument("--replace", action="store_true", help="clear a dead mount there, of a killed blockcopy")
    shown.add_argument("--no-background", action="store_true", help="copy only what is read")
    _add_copy_options(mount)
    _add_source_options(mount, reconnect_timeout=60)
    told = _add_progress(mount)
    _add_metrics(told)
    _add_log_file(told)


def _copying(commands: Any) -> None:
    sync = _command(
        commands,
        "sync",
        "make the destination a copy of the source",
        "SOURCE DESTINATION",
        "sync root@host:/dev/vg/disk /dev/vg/copy",
    )
    _add_both_ends(sync)
    _add_copy_options(sync)
    _add_source_options(sync, reconnect_timeout=math.inf)
    told = _add_progress(sync)
    _add_metrics(told)
    _add_log_file(told)

    verify = _command(
        commands,
        "verify",
        "tell where the destination differs from the source",
        "SOURCE DESTINATION",
        "verify root@host:/dev/vg/disk /dev/vg/copy",
    )
    _add_both_ends(verify, "device or file that is to be a copy; only read")
    verify.add_argument("--json", action="store_true", help="as JSON, instead of lines of OFFSET:LENGTH")
    _add_source_options(verify, reconnect_timeout=math.inf)
    _add_progress(verify)


def _asking(commands: Any) -> None:
    def of_mount(name: str, text: str, more: str = "", example: str = "") -> Parser:
        made = _command(commands, name, text, f"MOUNTPOINT {more}", f"{name} /mnt/disk {example}".rstrip())
        made.add_argument("mountpoint", metavar="MOUNTPOINT")
        return made

    status = of_mount("status", "tell how a mount is doing")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    how.add_argument(
        "--watch",
        action="store_true",
        help="go on telling: on the whole terminal until q, or a line for each change",
    )
    listing = _command(commands, "list", "tell of all mounts of this machine", "", "list")
    listing.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    _add_progress(of_mount("wait", "return when the copy is complete"))
    of_mount("umount", "unmount, and return when the destination is synced")
    of_mount("pause", "stop the pass in the background; reads go on")
    of_mount("resume", "let the pass in the background go on")
    limit = of_mount("limit", "limit the pass in the background", "RATE", "20M")
    limit.add_argument("rate", metavar="RATE", type=option_types.rate, help="bytes a second, with K, M, G; or none")
    prefetch = of_mount(
        "prefetch", "bring parts first; return when they are here", "OFFSET:LENGTH...", "0:64M 1G:128K"
    )
    prefetch.add_argument(
        "extents", metavar="OFFSET:LENGTH", type=option_types.extent, nargs="+", help="bytes, with K, M, G, T"
    )


def _add_both_ends(parser: Options, destination: str = "device or file that is overwritten with the copy") -> None:
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("destination", metavar="DESTINATION", help=destination)


def _add_copy_options(parser: Parser) -> None:
    copy = parser.add_argument_group("the copy")
    _add_force(copy)
    copy.add_argument(
        "--limit", metavar="RATE", type=option_types.rate, help="bytes a second of the pass, with K, M, G"
    )
    copy.add_argument("--verify", action="store_true", help="compare both ends when the copy is complete")
    _add_sparse(copy)
    _add_compress(copy, "source compresses (default: auto from a host)", default=argparse.SUPPRESS)
    copy.add_argument("--on-complete", metavar="COMMAND", help="what the shell runs when it is complete")
    record = parser.add_argument_group("the record of what is here")
    record.add_argument(
        "--state", metavar="FILE", type=option_types.regular_file, help="where it is kept (default: see the manual)"
    )
    record.add_argument("--no-state", action="store_true", help="keep none; a restart checks every block")
    record.add_argument("--recheck", action="store_true", help="believe none; check every block")


def _add_source_options(parser: Parser, *, reconnect_timeout: float) -> None:
    way = _add_way(parser)
    way.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=option_types.some_seconds,
        default=30,
        help="make a silent connection again after these (30)",
    )
    default = "for ever" if math.isinf(reconnect_timeout) else f"{reconnect_timeout:g}"
    way.add_argument(
        "--reconnect-timeout",
        metavar="SECONDS",
        type=option_types.seconds,
        default=reconnect_timeout,
        help=f"wait for a source that is away ({default})",
    )


def _add_way(parser: Parser) -> Options:
    way = parser.add_argument_group("the way to a host")
    way.add_argument(
        "-e", "--rsh", metavar="RSH", default=DEFAULT_RSH, help="how it is reached, as in: ssh -p 2222 (ssh)"
    )
    way.add_argument(
        "--python",
        metavar="PYTHON",
        default=DEFAULT_PYTHON,
        help="what runs our stages there, as in: sudo -n python3",
    )
    way.add_argument("--blockcopy-path", metavar="PROGRAM", help="what is run there instead, as in: sudo blockcopy")
    way.add_argument("--no-control-master", action="store_true", help="log in once for each connection")
    return way


# The stages


def _stages(commands: Any) -> None:
    checksum = _command(
        commands,
        "checksum",
        "hash the destination's blocks: the hash stream",
        "FILE",
        "checksum /dev/copy | ssh host blockcopy retrieve /dev/disk | blockcopy save /dev/copy",
    )
    checksum.add_argument("destination_file", metavar="FILE", help="file, device or pipe; - is standard input")
    checksum.add_argument(
        "--start", type=option_types.size, metavar="OFFSET", default=0, help="first byte (default 0)"
    )
    checksum.add_argument(
        "--end", type=option_types.size, metavar="OFFSET", help="byte to stop before (default: end)"
    )
    checksum.add_argument(
        "--digest",
        metavar="NAME",
        choices=[*digests.NAMES, "auto"],
        help=f"hash with {', '.join(digests.NAMES)}, or auto, the fastest here; a retrieve of ours "
        "understands it (default: as the original program)",
    )
    _add_progress(checksum)

    retrieve = _command(
        commands,
        "retrieve",
        "hash stream in, blocks that differ out",
        "FILE",
        "checksum /dev/copy | blockcopy retrieve /dev/disk >blocks",
    )
    retrieve.add_argument("source_file", metavar="FILE", help="file or device")
    compression = retrieve.add_mutually_exclusive_group()
    compression.add_argument(
        "--lzma", action="store_true", help="compress with xz, for any save, where that makes blocks smaller"
    )
    _add_compress(compression, "compress, for a save of ours (default: none)")
    _add_progress(retrieve)

    save = _command(
        commands, "save", "write the blocks to the destination, and sync it", "FILE", "save /dev/copy <blocks"
    )
    save.add_argument("destination_file", metavar="FILE", help="file or device; it must exist")
    _add_sparse(save)
    _add_force(save)
    _add_progress(save)

    receive = _command(
        commands,
        "receive",
        "the destination's end of a push: asks, and writes what comes back",
        "FILE",
        "sync /dev/disk root@host:/dev/copy    # runs it there",
    )
    receive.add_argument("destination_file", metavar="FILE", help="file or device")
    _add_sparse(receive)
    _add_compress(receive, "what the source is to compress with (default: none)")
    _add_force(receive)


def _add_progress(parser: Parser) -> Options:
    told = parser.add_argument_group("what is told, on standard error")
    how = told.add_mutually_exclusive_group()
    how.add_argument(
        "--progress", action="store_const", const="lines", help="how far it is: a bar on a terminal, else lines"
    )
    # An option by itself, because the value of one that may have none would be taken from what follows.
    how.add_argument(
        "--progress=json", dest="progress", action="store_const", const="json", help="a line of JSON each second"
    )
    how.add_argument("-q", "--quiet", action="store_true", help="nothing but errors")
    return told


def _add_log_file(parser: Options) -> None:
    parser.add_argument("--log-file", metavar="FILE", type=option_types.file, help="log to the end of this file")


def _add_metrics(parser: Options) -> None:
    parser.add_argument(
        "--metrics",
        metavar="FILE",
        type=option_types.regular_file,
        help="for Prometheus, a file written each 10 seconds",
    )


def _add_force(parser: Options) -> None:
    parser.add_argument("--force", action="store_true", help="write even to a destination that is in use")


def _add_sparse(parser: Options) -> None:
    parser.add_argument("--no-sparse", action="store_true", help="write zeros out, rather than leave holes")


def _add_compress(parser: Options, text: str, *, default: Any = None) -> None:
    parser.add_argument(
        "--compress",
        metavar="HOW",
        type=option_types.compression,
        default=default,
        help=f"zstd[:LEVEL], auto or none: {text}",
    )


# About this program


def _about(commands: Any) -> None:
    doctor = _command(
        commands, "doctor", "tell what is missing here, and on a host", "[HOST]", "doctor root@host:/dev/vg/disk"
    )
    doctor.add_argument("host", metavar="HOST", nargs="?", help="[user@]host, or HOST:/path of a source there")
    _add_way(doctor)

    _command(commands, "manual", "the manual page, for man", "", "manual | man -l -")
    completion = _command(
        commands,
        "completion",
        "what completes commands and options, for a shell",
        "SHELL",
        "completion bash | install -D -m 644 /dev/stdin ~/.local/share/bash-completion/completions/blockcopy",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")

    facts = _command(
        commands, "facts", "tell what this host can do for a copy, as JSON", "[FILE]", "facts /dev/vg/disk"
    )
    facts.add_argument("source_file", metavar="FILE", nargs="?", help="file or device that it is to read")
