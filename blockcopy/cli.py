"""The command line: the only place that prints or exits, and the only one that knows every part.

The stages are imported here; the replica and the file system only by the commands that need them,
because a source host has neither.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from blockcopy import __version__, stages
from blockcopy.errors import BlockcopyError, DeviceError, DifferentError, Interrupted, UsageError
from blockcopy.remote import DEFAULT_RSH

if TYPE_CHECKING:
    from blockcopy.geometry import Extent
    from blockcopy.remote import Command
    from blockcopy.replica.engine import Plan


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its status; by the signal where one ended it."""
    _fill_closed_streams()
    args = _parser().parse_args(argv)
    _setup_logging(bool(args.verbose or os.environ.get("DEBUG")))
    stages.raise_on_signals()
    try:
        args.run(args)
    except BlockcopyError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        _exit_with(args.command, error)
    except Interrupted as interrupted:
        stages.die_of(interrupted.signum)
    sys.exit(0)


def _print(text: str) -> None:
    """To standard output, in full. OutputError where that cannot be."""
    stages.OutputStream(1).write([f"{text}\n".encode()])


def _fill_closed_streams() -> None:
    """Where 0, 1 or 2 is closed, the next file to be opened would be taken for it, and written to."""
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass  # read-only: what is written to a closed output fails, as it should
    os.close(fd)


def _exit_with(command: str, error: BlockcopyError) -> NoReturn:
    _say(f"ERROR ({command}): {error}")
    sys.exit(error.exit_code)


def _setup_logging(verbose: bool) -> None:
    logging.basicConfig(
        format="%(asctime)s [%(process)d %(threadName)s] %(name)s %(levelname)5s: %(message)s"
        if verbose
        else "%(message)s",
        level=logging.DEBUG if verbose else logging.WARNING,
    )


# The copy stages


def _checksum(args: argparse.Namespace) -> None:
    from blockcopy.checksum import checksum, total_size
    from blockcopy.progress import LineProgress

    stages.refuse_terminal(1)
    with _checksum_input(args.destination_file) as fd:
        progress = None
        if args.progress:
            progress = LineProgress(total_size(fd, args.start, args.end), _say)
        checksum(
            fd,
            args.destination_file,
            stages.OutputStream(1),
            start=args.start,
            end=args.end,
            progress=progress,
        )


@contextlib.contextmanager
def _checksum_input(path: str) -> Iterator[int]:
    """Whatever can be read: a file, a device, a pipe, and `-` for standard input."""
    if path == "-":
        yield 0
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError.of("open", path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _retrieve(args: argparse.Namespace) -> None:
    from blockcopy.device import open_source
    from blockcopy.retrieve import retrieve

    _refuse_dash(args.source_file)
    stages.refuse_terminal(1)
    with open_source(args.source_file) as source, stages.InputStream(0) as hashes:
        retrieve(source, hashes, stages.OutputStream(1), compress=args.lzma)


def _save(args: argparse.Namespace) -> None:
    from blockcopy.device import open_destination
    from blockcopy.save import save

    _refuse_dash(args.destination_file)
    with open_destination(args.destination_file, force=args.force) as destination, stages.InputStream(0) as blocks:
        save(destination, blocks)


def _refuse_dash(path: str) -> None:
    if path == "-":
        raise DeviceError("FILE must be a file or device, not `-`: the stream takes standard input")


# The lazy replica


def _source_command(args: argparse.Namespace) -> Command:
    from blockcopy.remote import parse_source, retrieve_command

    return retrieve_command(parse_source(args.source), args.rsh, args.blockcopy_path)


def _plan(args: argparse.Namespace, *, demand: bool, hydrate: bool) -> Plan:
    from blockcopy.replica.engine import Plan

    destination = os.path.abspath(args.destination)
    return Plan(_source_command(args), destination, demand=demand, hydrate=hydrate, force=args.force)


def _sync(args: argparse.Namespace) -> None:
    with _extra():
        from blockcopy.replica import running, sync
    plan = _plan(args, demand=False, hydrate=True)
    running.run(lambda: running.interruptible(lambda: sync.sync(plan, _terminal())))


def _verify(args: argparse.Namespace) -> None:
    with _extra():
        from blockcopy.replica import running
        from blockcopy.replica.verify import verify

    def report(extent: Extent) -> None:
        if args.json:
            ranges.append(extent._asdict())
        else:
            _print(f"{extent.offset}:{extent.length}")

    ranges: list[dict[str, int]] = []
    command, destination = _source_command(args), os.path.abspath(args.destination)
    verdict = running.run(lambda: running.interruptible(lambda: verify(command, destination, report)))
    if args.json:
        _print(json.dumps({"size": verdict.size, "differing_bytes": verdict.differing, "ranges": ranges}))
    if verdict.differing:
        raise DifferentError(
            f"{args.destination} is not a copy of {args.source}: {verdict.differing} of {verdict.size} bytes "
            "lie in blocks that differ"
        )


def _mount(args: argparse.Namespace) -> None:
    with _extra():
        from blockcopy.replica import running
        from blockcopy_fuse import daemon, mounting
    mount = mounting.MountPlan(
        plan=_plan(args, demand=True, hydrate=not args.no_background),
        mountpoint=os.path.abspath(args.mountpoint),
        name=args.name or Path(args.destination).name,
        options=mounting.parse_options(args.options),
        pid_file=os.path.abspath(args.pid_file) if args.pid_file else None,
    )
    mounting.check(mount)
    if args.foreground:
        running.run(lambda: mounting.serve(mount, lambda: None, _terminal()))
    elif daemon.run_in_background(lambda ready: running.run(lambda: mounting.serve(mount, ready, None))):
        mounting.await_first_answer(mount)


def _status(args: argparse.Namespace) -> None:
    from blockcopy.replica.status import one_line
    from blockcopy_fuse import control

    snapshot = control.read_status(args.mountpoint)
    _print(json.dumps(snapshot, indent=2) if args.json else one_line(snapshot))


def _wait(args: argparse.Namespace) -> None:
    from blockcopy_fuse import control

    control.wait(args.mountpoint)


def _umount(args: argparse.Namespace) -> None:
    from blockcopy.replica.status import one_line
    from blockcopy_fuse import control

    snapshot = control.umount(args.mountpoint)
    if snapshot is not None and snapshot["source_needed"]:
        _say(f"unmounted before the copy was complete ({one_line(snapshot)})")


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """Around the imports that need more than the standard library."""
    if sys.version_info < (3, 11):
        raise UsageError("mount and sync need Python 3.11 or newer; the copy stages work with this one")
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"mount and sync need the module `{error.name}`; install it with: pip install 'blockcopy[fuse]'"
        ) from error


def _terminal() -> TextIO | None:
    """Where a progress bar can be drawn, if anywhere."""
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None


def _say(text: str) -> None:
    if sys.stderr is not None:  # None where the program was started without one
        print(text, file=sys.stderr, flush=True)


# The parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blockcopy", description="Copy a disk over any pipe, and use it before the copy is complete."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done to standard error")
    parser.add_argument("--version", action="version", version=f"blockcopy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    checksum = _command(commands, "checksum", _checksum, "hash the destination's blocks: the hash stream")
    checksum.add_argument("destination_file", metavar="FILE", help="file, device or pipe; - is standard input")
    checksum.add_argument("--progress", action="store_true", help="tell progress on standard error")
    checksum.add_argument("--start", type=int, metavar="OFFSET", default=0, help="first byte (default 0)")
    checksum.add_argument("--end", type=int, metavar="OFFSET", help="byte to stop before (default: the end)")

    retrieve = _command(commands, "retrieve", _retrieve, "hash stream in, blocks that differ out")
    retrieve.add_argument("source_file", metavar="FILE", help="file or device")
    retrieve.add_argument("--lzma", action="store_true", help="compress blocks where that makes them smaller")

    save = _command(commands, "save", _save, "write the blocks to the destination, and sync it")
    save.add_argument("destination_file", metavar="FILE", help="file or device; it must exist")
    _add_force(save)

    mount = _command(commands, "mount", _mount, "show a remote device as a file while it is being copied")
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
    _add_source_option(mount)
    _add_force(mount)
    _add_both_ends(mount)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder")

    sync = _command(commands, "sync", _sync, "make the destination a copy of the source")
    _add_source_option(sync)
    _add_force(sync)
    _add_both_ends(sync)

    verify = _command(commands, "verify", _verify, "tell where the destination differs from the source")
    verify.add_argument("--json", action="store_true", help="as JSON, instead of lines of OFFSET:LENGTH")
    _add_source_option(verify)
    _add_both_ends(verify)

    status = _command(commands, "status", _status, "tell how a mount is doing")
    status.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    wait = _command(commands, "wait", _wait, "return when the copy is complete")
    umount = _command(commands, "umount", _umount, "unmount, and return when the destination is synced")
    for each in (status, wait, umount):
        each.add_argument("mountpoint", metavar="MOUNTPOINT")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    parser.set_defaults(run=run)
    return parser


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="write even to a destination that is in use")


def _add_source_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-e", "--rsh", metavar="RSH", default=DEFAULT_RSH, help="how to reach the host (default: ssh)"
    )
    parser.add_argument(
        "--blockcopy-path", metavar="PROGRAM", help="what to run at the source, as in: sudo blockcopy"
    )


def _add_both_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="[user@]host:/path or a local path; only read")
    parser.add_argument("destination", metavar="DESTINATION", help="device or file that becomes the copy")
