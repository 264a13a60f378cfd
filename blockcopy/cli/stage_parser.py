"""The command lines of the copy stages. This parser is all that travels to a source host."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any, Union

from blockcopy.cli import option_types
from blockcopy.protocol import digests
from blockcopy.protocol.compression import NO_COMPRESSION

Options = Union[argparse.ArgumentParser, "argparse._ArgumentGroup"]
"""Whatever options can be added to."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A help formatter for the program `prog`, with room for long options. It leaves examples as they are."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=29, **{"width": _width(), **more})


def _width() -> int:
    """Return the columns of a help text: as argparse does by `shutil`, which takes long to import."""
    with contextlib.suppress(KeyError, ValueError):
        if (columns := int(os.environ["COLUMNS"])) > 0:
            return columns - 2
    with contextlib.suppress(OSError):
        return (os.get_terminal_size(1).columns or 80) - 2
    return 78


def add_command(commands: Any, name: str, summary: str, arguments: str, example: str) -> Any:
    """Add the command `name` to `commands`, argparse's subparsers. Return its parser.

    `summary`: one line for the help, without a full stop. `arguments`: the positional arguments for the usage line.
    `example`: a command line without `blockcopy`.
    """
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"blockcopy {name} [OPTION]... {arguments}".rstrip(),
        epilog=f"example: blockcopy {example}",
        formatter_class=HelpFormatter,
    )


def add_stages(commands: Any) -> None:
    """Add `checksum`, `retrieve`, `save`, `receive` and `facts` to `commands`, argparse's subparsers."""
    for add in (_add_checksum, _add_retrieve, _add_save, _add_receive, _add_facts):
        add(commands)


def _add_checksum(commands: Any) -> None:
    checksum = add_command(
        commands,
        "checksum",
        "write the hashes of a destination's blocks to standard output",
        "FILE",
        "checksum /dev/copy | ssh host blockcopy retrieve /dev/disk | blockcopy save /dev/copy",
    )
    checksum.add_argument("destination_file", metavar="FILE", help="file, device or pipe; - for standard input")
    checksum.add_argument(
        "--start", type=option_types.size, metavar="OFFSET", default=0, help="start at byte OFFSET (default: 0)"
    )
    checksum.add_argument(
        "--end", type=option_types.size, metavar="OFFSET", help="stop before byte OFFSET (default: end of FILE)"
    )
    checksum.add_argument(
        "--digest",
        metavar="NAME",
        choices=[*digests.NAMES, "auto"],
        help=f"hash with {', '.join(digests.NAMES)}, or auto for the fastest here; the original program cannot "
        "read these hashes (default: as the original program)",
    )
    add_progress(checksum)


def _add_retrieve(commands: Any) -> None:
    retrieve = add_command(
        commands,
        "retrieve",
        "read hashes from standard input, write the blocks that differ",
        "FILE",
        "checksum /dev/copy | blockcopy retrieve /dev/disk >blocks",
    )
    retrieve.add_argument("source_file", metavar="FILE", help="file or device to read")
    compression = retrieve.add_mutually_exclusive_group()
    compression.add_argument(
        "--lzma", action="store_true", help="compress blocks with xz if they get smaller, for any save"
    )
    add_compress(compression, "compress blocks, for a save of this program", "none")
    add_progress(retrieve)
    _add_join(retrieve)


def _add_save(commands: Any) -> None:
    save = add_command(
        commands,
        "save",
        "write blocks from standard input, and sync the destination",
        "FILE",
        "save /dev/copy <blocks",
    )
    save.add_argument("destination_file", metavar="FILE", help="existing file or device to write")
    add_sparse(save)
    add_force(save, "overwrite even a destination that is in use")
    add_progress(save)


def _add_receive(commands: Any) -> None:
    receive = add_command(
        commands,
        "receive",
        "serve a push: request blocks and write them",
        "FILE",
        "sync /dev/disk root@host:/dev/copy    # runs receive on the host",
    )
    receive.add_argument("destination_file", metavar="FILE", help="file or device to write")
    add_sparse(receive)
    add_compress(receive, "have the source compress", "none")
    add_force(receive)
    _add_join(receive)


def _add_facts(commands: Any) -> None:
    facts = add_command(
        commands, "facts", "print what this host can do for a copy, as JSON", "[FILE]", "facts /dev/vg/disk"
    )
    facts.add_argument("source_file", metavar="FILE", nargs="?", help="file or device to try to read")
    facts.add_argument("--echo", action="store_true", help="then write back standard input, to measure round trips")


def _add_join(parser: argparse.ArgumentParser) -> None:
    """Add the hidden `--join` to `parser`, for a further connection of one copy. Only this program gives it."""
    parser.add_argument("--join", metavar="TOKEN", help=argparse.SUPPRESS)


def add_progress(parser: argparse.ArgumentParser) -> Options:
    """Add `--progress` and `--quiet` to `parser`. Return their argument group, "output options"."""
    output = parser.add_argument_group("output options")
    choice = output.add_mutually_exclusive_group()
    choice.add_argument(
        "--progress",
        action="store_const",
        const="lines",
        help="show progress as a bar on a terminal, else lines",
    )
    # An option of its own: an optional value of --progress would be taken from the argument that follows.
    choice.add_argument(
        "--progress=json",
        dest="progress",
        action="store_const",
        const="json",
        help="write progress as a JSON line per second",
    )
    choice.add_argument("-q", "--quiet", action="store_true", help="report errors only")
    return output


def add_force(
    parser: Options, purpose: str = "overwrite even a destination that is in use, or holds what the source lacks"
) -> None:
    """Add `--force` to `parser`. `purpose`: its help."""
    parser.add_argument("--force", action="store_true", help=purpose)


def add_sparse(parser: Options) -> None:
    """Add `--no-sparse` to `parser`."""
    parser.add_argument("--no-sparse", action="store_true", help="write zeros instead of leaving holes")


def add_compress(parser: Options, purpose: str, default_text: str, *, default: Any = NO_COMPRESSION) -> None:
    """Add `--compress` to `parser`. `purpose`, `default_text`: texts for its help.

    `default`: value if not given.
    """
    parser.add_argument(
        "--compress",
        metavar="SPEC",
        type=option_types.compression,
        default=default,
        help=f"{purpose}: zstd[:LEVEL], auto or none (default: {default_text})",
    )
