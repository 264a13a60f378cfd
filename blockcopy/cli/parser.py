"""The whole command line: every command with its options. Help, manual and shell completions are made from it."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, Callable

from blockcopy.cli import option_types
from blockcopy.cli.stage_parser import (
    HelpFormatter,
    Options,
    add_command,
    add_compress,
    add_force,
    add_progress,
    add_sparse,
    add_stages,
)
from blockcopy.cli.suggestions import VERBOSE_AFTER, Parser, commands_of

SHELLS = ("bash", "zsh", "fish")


class _ShowVersions(argparse.Action):
    """The option `--version`: prints all versions, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *more: Any) -> None:
        """Print the versions by `parser`, which exits with status 0. `more`: unused."""
        from blockcopy.cli import versions  # only here: the packages' metadata takes as long as all of a stage

        parser._print_message(f"{versions.text()}\n", sys.stdout)
        parser.exit()


class _Only:
    """argparse's subparsers `commands`, of which only the command named `name` is made. The others cost time."""

    def __init__(self, commands: Any, name: str) -> None:
        self._commands = commands
        self._name = name

    def add_parser(self, name: str, **more: Any) -> Any:
        """Return a new parser of the command `name`, or an object that ignores all that is added."""
        return self._commands.add_parser(name, **more) if name == self._name else _Ignored()


class _Ignored:
    """A parser or a group of a command that is not made."""

    def __getattr__(self, _method: str) -> Callable[..., _Ignored]:
        return lambda *_, **__: self


def parser(only: str | None = None) -> Parser:
    """Return the parser of the whole command line. Parsed arguments have the command's name as `command`.

    `only`: name of the one command that will be parsed, if it is known. That takes a tenth of the time. If no
    command has the name, all are made, and the parser says what is wrong.
    """
    top = Parser(
        prog="blockcopy",
        description="Copy a disk over any pipe, and use it before the copy is complete.",
        epilog="`blockcopy help` lists the pages of the manual; `blockcopy help COMMAND` shows a command's.",
        formatter_class=HelpFormatter,
    )
    _add_verbose(top, "verbose")
    top.add_argument("--version", action=_ShowVersions, nargs=0, help="show all versions, and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for add in (
        _add_mount,
        _add_sync,
        _add_verify,
        _add_discard_writes,
        _add_state,
        _add_control,
        add_stages,
        _add_about,
    ):
        add(commands if only is None else _Only(commands, only))
    if only is not None and not commands.choices:
        return parser()
    for command in commands.choices.values():
        _add_verbose(command, VERBOSE_AFTER)
    return top


def _add_verbose(parser: argparse.ArgumentParser, dest: str) -> None:
    """Add `-v` to `parser`. `dest`: name of the attribute that counts it."""
    words = "log each step; -vv logs everything"
    parser.add_argument("-v", "--verbose", dest=dest, action="count", default=0, help=words)


def long_options(command: str) -> dict[str, bool]:
    """Return the long options of the command named `command`: a dict, name without dashes → bool.

    The bool says whether the option takes a value.
    """
    return {
        name[2:]: action.nargs != 0
        for action in commands_of(parser())[command]._actions
        for name in action.option_strings
        if name.startswith("--")
    }


# The lazy replica


def _add_mount(commands: Any) -> None:
    mount = add_command(
        commands,
        "mount",
        "mount a remote device as a file while it is being copied",
        "SOURCE DESTINATION MOUNTPOINT",
        "mount root@host:/dev/vg/disk /dev/vg/copy /mnt/disk",
    )
    _add_both_ends(mount)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="existing folder or file to mount on")
    group = mount.add_argument_group("mount options")
    group.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground and show progress")
    group.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="set FUSE options, separated by commas, such as allow_other",
    )
    group.add_argument("--writable", action="store_true", help="accept writes; the source is still only read")
    group.add_argument(
        "--discard-writes", action="store_true", help="first throw away what was written to an earlier mount"
    )
    group.add_argument("--name", help="name the file NAME (default: as DESTINATION)")
    _add_file(group, "--pid-file", "write the process id of the mount to FILE")
    group.add_argument("--replace", action="store_true", help="first clear the dead mount of a killed blockcopy")
    group.add_argument("--no-background", action="store_true", help="copy only what is read")
    _add_copy_options(mount)
    _add_source_options(mount, reconnect_timeout=60)
    _add_output_options(mount)


def _add_sync(commands: Any) -> None:
    sync = add_command(
        commands,
        "sync",
        "make the destination a copy of the source",
        "SOURCE DESTINATION",
        "sync root@host:/dev/vg/disk /dev/vg/copy",
    )
    _add_both_ends(sync)
    _add_copy_options(sync, _add_dry_run)
    _add_source_options(sync, reconnect_timeout=math.inf)
    _add_result(_add_output_options(sync))


def _add_verify(commands: Any) -> None:
    verify = add_command(
        commands,
        "verify",
        "list where the destination differs from the source",
        "SOURCE DESTINATION",
        "verify root@host:/dev/vg/disk /dev/vg/copy",
    )
    _add_both_ends(verify, "device or file to compare; only read")
    _add_range(verify)
    _add_source_options(verify, reconnect_timeout=math.inf)
    _add_result(add_progress(verify))


def _add_discard_writes(commands: Any) -> None:
    discard = add_command(
        commands,
        "discard-writes",
        "throw away what was written to a mount, so that the copy can be made anew",
        "DESTINATION",
        "discard-writes /dev/vg/copy",
    )
    discard.add_argument("destination", metavar="DESTINATION", help="device or file that was mounted writable")
    discard.add_argument("-n", "--dry-run", action="store_true", help="only tell whether there are such writes")
    discard.add_argument("--json", action="store_true", help="print JSON; nothing to throw away is no error then")
    _add_file(discard, "--state", "the state is in FILE (default: see the manual)")


def _add_state(commands: Any) -> None:
    state = add_command(
        commands,
        "state",
        "list the state files, or forget what is present in a destination",
        "list | forget DESTINATION...",
        "state forget /dev/vg/copy",
    )
    state.add_argument("action", metavar="ACTION", choices=("list", "forget"), help="list or forget")
    state.add_argument(
        "destinations",
        metavar="DESTINATION",
        nargs="*",
        help="device or file, or the state file of one that is gone",
    )
    state.add_argument("--json", action="store_true", help="list as JSON, sizes in bytes")


def _add_both_ends(
    parser: argparse.ArgumentParser, destination: str = "device or file to overwrite with the copy"
) -> None:
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("destination", metavar="DESTINATION", help=destination)


def _add_range(parser: Options) -> None:
    parser.add_argument(
        "--range",
        dest="ranges",
        metavar="OFFSET:LENGTH",
        type=option_types.extent,
        action="append",
        default=[],
        help="only the blocks of this range, in bytes or as 1G:64M; may be repeated",
    )


def _add_dry_run(parser: Options) -> None:
    parser.add_argument(
        "-n",
        "--dry-run",
        action="store_true",
        help="compare (what differs is transferred), say what would be copied, write nothing",
    )
    _add_range(parser)


def _add_copy_options(parser: argparse.ArgumentParser, add_own: Callable[[Options], None] | None = None) -> None:
    copy = parser.add_argument_group("copy options")
    add_force(copy)
    copy.add_argument(
        "--limit",
        "--bwlimit",
        metavar="RATE",
        type=option_types.rate,
        help="copy at most RATE bytes per second in the background, such as 20M (default: no limit)",
    )
    copy.add_argument(
        "--connections",
        metavar="N",
        type=option_types.connections,
        help="copy over N connections (readers have their own), or auto: as many as pay (default: auto)",
    )
    copy.add_argument("--verify", action="store_true", help="compare both ends when the copy is complete")
    if add_own is not None:
        add_own(copy)
    add_sparse(copy)
    add_compress(copy, "compress on the source", "auto over a network", default=argparse.SUPPRESS)
    copy.add_argument("--on-complete", metavar="COMMAND", help="run COMMAND in a shell when the copy is complete")
    state = parser.add_argument_group("state options (which blocks are present)")
    _add_file(state, "--state", "keep the state in FILE (default: see the manual)")
    state.add_argument("--no-state", action="store_true", help="keep no state; a restart checks every block")
    state.add_argument("--recheck", action="store_true", help="ignore the state; check every block")


def _add_source_options(parser: argparse.ArgumentParser, *, reconnect_timeout: float) -> None:
    connection = _add_connection_options(parser)
    connection.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=option_types.positive_seconds,
        default=30,
        help="reconnect after SECONDS without data (default: 30)",
    )
    default = "for ever" if math.isinf(reconnect_timeout) else f"{reconnect_timeout:g}"
    connection.add_argument(
        "--reconnect-timeout",
        metavar="SECONDS",
        type=option_types.seconds,
        default=reconnect_timeout,
        help=f"keep reconnecting for SECONDS (default: {default})",
    )


def _add_connection_options(parser: argparse.ArgumentParser) -> Options:
    connection = parser.add_argument_group("connection options")
    connection.add_argument("-e", "--rsh", metavar="RSH", help="use RSH, such as `ssh -p 2222` (default: ssh)")
    connection.add_argument(
        "--python",
        metavar="PYTHON",
        help="run the stages with PYTHON there, such as `sudo -n python3` (default: python3)",
    )
    connection.add_argument(
        "--blockcopy-path",
        metavar="PROGRAM",
        help="run PROGRAM, such as `sudo blockcopy`, there instead of sending the stages",
    )
    connection.add_argument("--no-control-master", action="store_true", help="log in anew for each connection")
    return connection


def _add_file(group: Options, option: str, purpose: str) -> None:
    """Add to `group` an `option` whose value is the FILE that the command writes. `purpose`: the help text."""
    group.add_argument(option, metavar="FILE", type=option_types.regular_file, help=purpose)


def _add_result(output: Options) -> None:
    output.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def _add_output_options(parser: argparse.ArgumentParser) -> Options:
    output = add_progress(parser)
    _add_file(output, "--metrics", "write Prometheus metrics to FILE every 10 seconds")
    output.add_argument("--log-file", metavar="FILE", type=option_types.file, help="append the log to FILE")
    return output


# Control of a mount


def _add_control(commands: Any) -> None:
    def add(name: str, summary: str, more: str = "", example: str = "") -> Any:
        made = add_command(commands, name, summary, f"MOUNTPOINT {more}", f"{name} /mnt/disk {example}".rstrip())
        made.add_argument("mountpoint", metavar="MOUNTPOINT", help="folder or file of the mount")
        return made

    status = add("status", "show the status of a mount")
    choice = status.add_mutually_exclusive_group()
    choice.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    choice.add_argument(
        "--watch",
        action="store_true",
        help="keep updating: a full screen until q is pressed, or a line per change",
    )
    listing = add_command(commands, "list", "list all mounts of this machine", "", "list")
    listing.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    add_progress(add("wait", "wait until the copy of a mount is complete"))
    add("umount", "unmount, and return when the destination is synced")
    add("pause", "pause background copying; reads go on")
    add("resume", "resume background copying")
    limit = add("limit", "limit the rate of background copying", "RATE", "20M")
    limit.add_argument(
        "rate",
        metavar="RATE",
        type=option_types.rate,
        help="bytes per second, such as 20M; none lifts the limit",
    )
    prefetch = add("prefetch", "fetch ranges now, and wait for them", "OFFSET:LENGTH...", "0:64M 1G:128K")
    prefetch.add_argument(
        "extents",
        metavar="OFFSET:LENGTH",
        type=option_types.extent,
        nargs="+",
        help="range in bytes, or with units such as 4M or 4MB",
    )


# About this program


def _add_about(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        "check what is missing on this host and on another",
        "[HOST]",
        "doctor root@host:/dev/vg/disk",
    )
    doctor.add_argument("host", metavar="HOST", nargs="?", help="[user@]host, or host:/path to try to read there")
    _add_connection_options(doctor)

    shown = add_command(
        commands, "help", "show a page of the manual, of a command or a topic", "[PAGE]", "help recipes"
    )
    shown.add_argument("page", metavar="PAGE", nargs="?", help="command or topic (default: a list of all pages)")
    manual = add_command(
        commands,
        "manual",
        "print a page of the manual for man, or install all pages",
        "[PAGE]",
        "manual mount | man -l -",
    )
    manual.add_argument("page", metavar="PAGE", nargs="?", default="blockcopy", help="page (default: blockcopy)")
    manual.add_argument("--install", metavar="FOLDER", help="write all pages to FOLDER/man1 and so on")
    completion = add_command(
        commands,
        "completion",
        "print a script that completes commands and options in a shell",
        "SHELL",
        "completion bash | install -D -m 644 /dev/stdin ~/.local/share/bash-completion/completions/blockcopy",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
