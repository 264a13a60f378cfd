"""The commands `sync` and `verify`, and the Plan that the options of `sync` and `mount` make.

The commands import trio only after they have started a source process. Both take about as long.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import functools
import gc
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from blockcopy import optional_packages
from blockcopy.block.claim import check_destination, open_destination
from blockcopy.block.device import open_source
from blockcopy.cli import console
from blockcopy.errors import DeviceError, MismatchError, SourceReadError, StateError, UsageError
from blockcopy.paths.places import absolute
from blockcopy.protocol.compression import CompressionSpec
from blockcopy.transport.command import Command, stage_command
from blockcopy.transport.control_master import control_path, logging_out
from blockcopy.transport.location import Location, parse_location

if TYPE_CHECKING:
    from subprocess import Popen

    from blockcopy.block.geometry import Extent
    from blockcopy.replica.plan import Plan
    from blockcopy.replica.verify import Verdict

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OUTPUT_RANGES = 1000
"""Ranges that one write to standard output has."""


@contextlib.contextmanager
def needs_extra() -> Iterator[None]:
    """Wrap imports of optional packages: use as a context manager. Yields nothing.

    Raises UsageError with the command that installs a missing package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this needs the module `{error.name}`; install it with: "
            f"{optional_packages.install_command(*optional_packages.FUSE)}"
        ) from error


def run(program: Callable[[], Awaitable[T]]) -> T:
    """Run `program`, an async function without arguments, as `runner.run` does. Returns its result."""
    from blockcopy.replica.tasks import runner

    gc.freeze()  # imported modules stay: scans of them for garbage cost a few percent
    return runner.run(program)


def source_command(args: argparse.Namespace) -> Command:
    """Return the command that runs `retrieve` at the SOURCE of the parsed options `args`.

    Raises UsageError if SOURCE or an option is invalid.
    """
    return command_for(args, parse_location(args.source), "retrieve")


def command_for(args: argparse.Namespace, location: Location, stage: str, options: Sequence[str] = ()) -> Command:
    """Return the command that runs the stage named `stage` at `location`, as the parsed options `args` say.

    `options`: options of the stage itself. Raises UsageError if an option is invalid.
    """
    return stage_command(
        location,
        args.rsh,
        args.blockcopy_path,
        python=args.python,
        control=control_path(shared=not args.no_control_master) if location.host else None,
        stage=stage,
        options=options,
    )


def plan_of(args: argparse.Namespace, command: Command, **more: Any) -> Plan:
    """Return the Plan that the parsed options `args` make. `mount` and `sync` share these options.

    `command`: runs `retrieve` at the source.
    `more`: further fields of the Plan.
    Raises UsageError if DESTINATION is on another host.
    """
    from blockcopy.replica.plan import Plan

    destination = parse_location(args.destination, "DESTINATION")
    if destination.host is not None:
        raise UsageError(f"DESTINATION {args.destination} must be on this host: a mount reads its blocks")
    compression = _compression(args, parse_location(args.source))
    compression.check_available()
    return Plan(
        command,
        absolute(destination.path),
        force=args.force,
        keep_state=not args.no_state,
        state=absolute(args.state) if args.state else None,
        recheck=args.recheck,
        timeout=args.timeout,
        reconnect_timeout=args.reconnect_timeout,
        prompts=prompts(command.location),
        connections=args.connections,
        limit=args.limit,
        verify=args.verify,
        compression=compression,
        sparse=not args.no_sparse,
        on_complete=args.on_complete,
        metrics=absolute(args.metrics) if args.metrics else None,
        **more,
    )


def _compression(args: argparse.Namespace, location: Location) -> CompressionSpec:
    """Return the compression that the parsed options `args` ask for.

    The default is "auto" if `location`, the other end, is on another host, otherwise "none".
    """
    default = CompressionSpec("auto" if location.host else "none")
    spec: CompressionSpec = getattr(args, "compress", default)
    return spec


def prompts(location: Location) -> bool:
    """Return whether ssh may ask for a password to `location`: the host is another, and there is a terminal."""
    if location.host is None:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def sync(args: argparse.Namespace) -> None:
    """Run `blockcopy sync` with the parsed options `args`. Raises BlockcopyError if the copy fails."""
    destination = parse_location(args.destination, "DESTINATION")
    if destination.host is not None:
        _push(args, destination)
        return
    command = source_command(args)
    check_destination(absolute(destination.path), force=args.force)  # before ssh asks for a password
    with logging_out(command), _started(command) as started:
        with needs_extra():
            from blockcopy.replica.monitor.sd_notify import Notifier
            from blockcopy.replica.sync import sync as make_copy
            from blockcopy.replica.tasks import runner
        plan = plan_of(args, command, demand=False, started=started)
        with console.progress(args, bar_by_default=True) as progress:
            notifier = Notifier()
            run(lambda: runner.run_interruptible(lambda: make_copy(plan, progress, notifier)))


def _push(args: argparse.Namespace, destination: Location) -> None:
    """Run `sync` with the parsed options `args`. `destination`: the Location of DESTINATION, on another host.

    Raises UsageError if the options do not fit a push, MismatchError if --verify finds differences.
    """
    from blockcopy.push import push

    source = _local_source(args)
    if args.state or args.recheck:
        raise UsageError("--state and --recheck need a local DESTINATION: a push checks every block each time")
    if args.on_complete or args.metrics:
        raise UsageError("--on-complete and --metrics need a local DESTINATION: a push ends when it is complete")
    options = [name for name, given in (("--force", args.force), ("--no-sparse", args.no_sparse)) if given]
    compression = _compression(args, destination)
    command = command_for(args, destination, "receive", [*options, "--compress", str(compression)])
    with logging_out(command), open_source(source) as device:
        with console.progress(args, bar_by_default=True) as progress:
            push(
                command,
                device,
                timeout=args.timeout,
                prompts=prompts(destination),
                give_up_after=args.reconnect_timeout,
                limit=args.limit,
                progress=progress,
            )
        if args.verify:
            _raise_if_different(
                args, _compare(args, command_for(args, destination, "retrieve"), source, device.size())
            )


def _local_source(args: argparse.Namespace) -> str:
    """Return the path of SOURCE in the parsed options `args`. Raises UsageError if SOURCE is on another host."""
    source = parse_location(args.source)
    if source.host is not None:
        raise UsageError("SOURCE and DESTINATION are both on another host: run blockcopy on one of the two")
    return absolute(source.path)


@contextlib.contextmanager
def _started(command: Command) -> Iterator[list[Popen[bytes]]]:
    """Start a process of `command` early, while modules are still loading.

    Yields a list with the process. Whoever uses the process removes it. Otherwise it is ended at the end.
    """
    started: list[Popen[bytes]] = []
    with contextlib.suppress(OSError):  # the next start reports the reason
        started.append(command.start())
    try:
        yield started
    finally:
        for process in started:
            from blockcopy.replica.tasks import abandonable

            abandonable.abandon_process(process).join(abandonable.EXIT_SECONDS)


def verify(args: argparse.Namespace) -> None:
    """Run `blockcopy verify` with the parsed options `args`. Prints the ranges that differ.

    Raises MismatchError if the ends differ, SourceReadError or DeviceError if blocks were not compared.
    """
    destination = parse_location(args.destination, "DESTINATION")
    if destination.host is None:
        verdict = _compare(args, source_command(args), absolute(args.destination))
    else:  # the same comparison from the other end: only the bytes of the source count
        source = _local_source(args)
        with open_source(source) as device:
            verdict = _compare(args, command_for(args, destination, "retrieve"), source, device.size())
    if verdict.user_bytes:
        logger.warning(
            "%d bytes of %s lie in blocks that a user has written to: they were not compared",
            verdict.user_bytes,
            args.destination,
        )
    if verdict.tail_bytes:
        logger.warning(
            "%s is %d bytes longer than %s: its tail was not compared",
            args.destination,
            verdict.tail_bytes,
            args.source,
        )
    _raise_if_different(args, verdict)


def discard_writes(args: argparse.Namespace) -> None:
    """Run `blockcopy discard-writes` with the parsed options `args`. Prints how much is thrown away.

    Raises DeviceError or StateError if the destination is in use, or holds no writes of a user.
    """
    found = discard(absolute(args.destination), absolute(args.state) if args.state else None)
    if not found:
        raise StateError(f"{args.destination} holds no writes of a user: there is nothing to throw away")
    console.write_line(f"threw away {found} in {args.destination}; the next mount or sync checks every block")


def discard(path: str, state: str | None) -> str:
    """Throw away what the user wrote to the destination at `path`. Returns in words how much that is, or "".

    `state`: the path of the state file, or None. Raises DeviceError or StateError if that is not possible.
    """
    from blockcopy.replica.state.recovery import discard_user_writes

    with open_destination(path, with_user_writes=True) as device:
        return discard_user_writes(device, state)


def _compare(args: argparse.Namespace, command: Command, path: str, source_size: int | None = None) -> Verdict:
    """Compare the device at `path` with the other end, and print the ranges that differ. Returns the verdict.

    `args`: parsed options. `command`: runs `retrieve` at the other end.
    `source_size`: None if the other end is the source, else the bytes of the source at `path`.
    """
    with needs_extra():
        from blockcopy.replica.plan import Plan
        from blockcopy.replica.tasks import runner
        from blockcopy.replica.verify import verify as compare

    def report(extent: Extent) -> None:
        if as_json:
            ranges.extend(extent)
        else:
            with progress.suspended():
                console.write(f"{extent.offset}:{extent.length}")

    as_json = getattr(args, "json", False)
    ranges = array.array("q")  # offset and length of each: half of the blocks may be ranges
    plan = Plan(
        command,
        path,
        timeout=args.timeout,
        reconnect_timeout=args.reconnect_timeout,
        prompts=prompts(command.location),
    )
    with logging_out(command), console.progress(args, bar_by_default=True) as progress:
        run_verify = functools.partial(compare, plan, report, progress, source_size)
        verdict = run(lambda: runner.run_interruptible(run_verify))
    if as_json:
        _write_json(verdict, ranges)
    return verdict


def _write_json(verdict: Verdict, ranges: array.array[int]) -> None:
    """Print `verdict` as one JSON object, with one range on each line.

    `ranges`: offset and length of each range that differs, in turn.
    """
    unread = [
        extent._asdict() for each in (verdict.remote_unreadable, verdict.local_unreadable) for extent in each.ranges
    ]
    figures = {
        "size": verdict.size,
        "differing_bytes": verdict.differing_bytes,
        "tail_bytes": verdict.tail_bytes,
        "user_bytes": verdict.user_bytes,
        "unreadable_bytes": verdict.remote_unreadable.bytes + verdict.local_unreadable.bytes,
        "unreadable_ranges": unread,
    }
    console.write(f'{json.dumps(figures)[:-1]}, "ranges": [')
    for at in range(0, len(ranges), 2 * _OUTPUT_RANGES):
        lines = [
            json.dumps({"offset": offset, "length": length})
            for offset, length in zip(*[iter(ranges[at : at + 2 * _OUTPUT_RANGES])] * 2, strict=True)
        ]
        console.write(",\n".join(lines) + ("," if at + 2 * _OUTPUT_RANGES < len(ranges) else ""))
    console.write("]}")


def _raise_if_different(args: argparse.Namespace, verdict: Verdict) -> None:
    """Raise MismatchError if the ends differ, as `verdict` says. `args` name the ends in the message.

    Raises SourceReadError or DeviceError if blocks of equal ends were not compared.
    """
    ends = (verdict.remote_unreadable, verdict.local_unreadable)
    source, destination = ends if parse_location(args.destination).host is None else reversed(ends)
    uncompared = [
        f"of {path}, cannot read {found}"
        for path, found in ((args.source, source), (args.destination, destination))
        if found
    ]
    if verdict.differing_bytes:
        differing = (
            f"{args.destination} is not a copy of {args.source}: {verdict.differing_bytes} of {verdict.size} bytes "
            "lie in blocks that differ"
        )
        raise MismatchError("; ".join([differing, *uncompared]))
    if uncompared:
        words = "; ".join(uncompared) + ". All else is equal"
        raise SourceReadError(words) if source else DeviceError(words)
