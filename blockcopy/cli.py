"""The command line: the only place that prints or exits, and the only one that knows every part.

The stages are imported here; the replica and the file system only by the commands that need them,
because a source host has neither.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import sys
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NoReturn, TextIO, TypeVar

from blockcopy import stages
from blockcopy.arguments import parser
from blockcopy.errors import (
    BlockcopyError,
    DeviceError,
    DifferentError,
    IncompleteError,
    Interrupted,
    UsageError,
)

if TYPE_CHECKING:
    from subprocess import Popen

    from blockcopy.geometry import Extent
    from blockcopy.remote import Command
    from blockcopy.replica.replica import Plan


T = TypeVar("T")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its status; by the signal where one ended it."""
    _fill_closed_streams()
    args = parser().parse_args(argv)
    _setup_logging(bool(args.verbose or os.environ.get("DEBUG")))
    stages.raise_on_signals()
    try:
        _COMMANDS[args.command](args)
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
            digest=_digest(args.digest),
            progress=progress,
        )


def _digest(name: str | None) -> str | None:
    """The fastest of this host for `auto`."""
    from blockcopy import digests

    if name != "auto":
        return name
    speeds = digests.speeds()
    return max(speeds, key=lambda each: speeds[each])


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
    from blockcopy import packing, zstd
    from blockcopy.device import open_source
    from blockcopy.retrieve import retrieve

    _refuse_dash(args.source_file)
    stages.refuse_terminal(1)
    output = stages.OutputStream(1)
    if args.compress and not args.compress.auto:
        zstd.check_available()
    chosen = packing.Xz() if args.lzma else packing.wished(args.compress, output)
    with open_source(args.source_file) as source, stages.InputStream(0) as hashes:
        retrieve(source, hashes, output, packing=chosen)


def _save(args: argparse.Namespace) -> None:
    from blockcopy.device import open_destination
    from blockcopy.save import save
    from blockcopy.statefile import default_path, retire

    _refuse_dash(args.destination_file)
    with open_destination(args.destination_file, force=args.force) as destination, stages.InputStream(0) as blocks:
        retire(default_path(destination))  # what a mount or sync has on record is overwritten
        save(destination, blocks, sparse=not args.no_sparse)


def _refuse_dash(path: str) -> None:
    if path == "-":
        raise DeviceError("FILE must be a file or device, not `-`: the stream takes standard input")


# The lazy replica


def _run(program: Callable[[], Awaitable[T]]) -> T:
    from blockcopy.replica import running

    gc.freeze()  # what was imported stays: looking through it for garbage again and again costs a few percent
    return running.run(program)


def _source_command(args: argparse.Namespace) -> Command:
    from blockcopy.remote import parse_source, retrieve_command

    return retrieve_command(parse_source(args.source), args.rsh, args.blockcopy_path)


def _plan(args: argparse.Namespace, **more: Any) -> Plan:
    from blockcopy.replica.replica import Plan

    return Plan(
        _source_command(args),
        os.path.abspath(args.destination),
        force=args.force,
        keep_state=not args.no_state,
        state=os.path.abspath(args.state) if args.state else None,
        recheck=args.recheck,
        timeout=args.timeout,
        reconnect_timeout=args.reconnect_timeout,
        prompts=_prompts(args),
        limit=args.limit,
        verify=args.verify,
        compress=_wish(args),
        sparse=not args.no_sparse,
        **more,
    )


def _wish(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the source is asked to compress with: `auto` over a network, if nothing is said."""
    from blockcopy import packing, zstd
    from blockcopy.remote import parse_source

    if "compress" in args:
        wish = args.compress
        if wish is not None and not wish.auto:
            zstd.check_available()
    else:
        wish = packing.Wish(auto=True) if parse_source(args.source).host else None
    return packing.fact_of(wish) if zstd.available() else None


def _prompts(args: argparse.Namespace) -> bool:
    """Whether the way to the source may ask something at a terminal."""
    from blockcopy.remote import parse_source

    if parse_source(args.source).host is None:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _sync(args: argparse.Namespace) -> None:
    with _started(_source_command(args)) as started:
        with _extra():
            from blockcopy.replica import running, sync
        plan = _plan(args, demand=False, started=started)
        _run(lambda: running.interruptible(lambda: sync.sync(plan, _terminal())))


@contextlib.contextmanager
def _started(command: Command) -> Iterator[list[Popen[bytes]]]:
    """Start it already, as long as we are still loading what will talk to it. Ended if nobody took it."""
    started: list[Popen[bytes]] = []
    with contextlib.suppress(OSError):  # who starts it again tells why
        started.append(command.start())
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


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
    run_verify = functools.partial(
        verify,
        _source_command(args),
        os.path.abspath(args.destination),
        report,
        timeout=args.timeout,
        patience=args.reconnect_timeout,
        prompts=_prompts(args),
    )
    verdict = _run(lambda: running.interruptible(run_verify))
    if args.json:
        _print(json.dumps({"size": verdict.size, "differing_bytes": verdict.differing, "ranges": ranges}))
    if verdict.differing:
        raise DifferentError(
            f"{args.destination} is not a copy of {args.source}: {verdict.differing} of {verdict.size} bytes "
            "lie in blocks that differ"
        )


def _mount(args: argparse.Namespace) -> None:
    from dataclasses import replace

    with _extra():
        from blockcopy_fuse import daemon, mounting
    plan = _plan(
        args,
        hydrate=not args.no_background,
        may_be_away=True,
        read_timeout=mounting.longest_request(),
    )
    if plan.prompts and not args.foreground:
        plan = replace(plan, command=plan.command.outliving_terminal())
    mount = mounting.MountPlan(
        plan=plan,
        mountpoint=os.path.abspath(args.mountpoint),
        name=args.name or Path(args.destination).name,
        options=mounting.parse_options(args.options),
        pid_file=os.path.abspath(args.pid_file) if args.pid_file else None,
    )
    mounting.check(mount)
    if args.foreground:
        _run(lambda: mounting.serve(mount, lambda: None, _terminal()))
    elif daemon.run_in_background(lambda ready: _run(lambda: mounting.serve(mount, ready, None))):
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
        kept = (
            f"what is here is recorded in {snapshot['state_file']}"
            if snapshot["state_file"]
            else "no state is kept"
        )
        raise IncompleteError(f"unmounted before the copy was complete; {kept} ({one_line(snapshot)})")


def _command_to_mount(args: argparse.Namespace) -> None:
    from blockcopy_fuse import control

    request: dict[str, Any] = {"command": args.command}
    if args.command == "limit":
        request["rate"] = args.rate
    elif args.command == "prefetch":
        request["extents"] = args.extents
    control.command(args.mountpoint, request)


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


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "checksum": _checksum,
    "retrieve": _retrieve,
    "save": _save,
    "mount": _mount,
    "sync": _sync,
    "verify": _verify,
    "status": _status,
    "wait": _wait,
    "umount": _umount,
    "pause": _command_to_mount,
    "resume": _command_to_mount,
    "limit": _command_to_mount,
    "prefetch": _command_to_mount,
}
