"""Parsed options, made into a Plan and into the command that runs a stage at the other end."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from blockcopy import optional_packages
from blockcopy.block.geometry import Extent
from blockcopy.errors import UsageError
from blockcopy.paths.places import absolute
from blockcopy.protocol.compression import CompressionSpec
from blockcopy.transport.command import Command, stage_command
from blockcopy.transport.control_master import control_path
from blockcopy.transport.location import Location, parse_location

if TYPE_CHECKING:
    from blockcopy.replica.plan import Plan

T = TypeVar("T")


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


def command_for(
    args: argparse.Namespace,
    location: Location,
    stage: str,
    options: Sequence[str] = (),
    *,
    control: str | None = None,
) -> Command:
    """Return the command that runs the stage named `stage` at `location`, as the parsed options `args` say.

    `options`: options of the stage itself. `control`: from `control_for`, if several commands share a
    login. Raises UsageError if an option is invalid.
    """
    return stage_command(
        location,
        args.rsh,
        args.blockcopy_path,
        python=args.python,
        control=control or control_for(args, location),
        stage=stage,
        options=options,
    )


def control_for(args: argparse.Namespace, location: Location) -> str | None:
    """Return ssh's ControlPath for a new login to `location`, as the parsed options `args` say.

    Returns None if `location` is on this host.
    """
    return control_path(shared=not args.no_control_master) if location.host else None


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
    compression = compression_of(args, parse_location(args.source))
    compression.check_available()
    return Plan(
        command,
        absolute(destination.path),
        force=args.force,
        keep_state=not args.no_state,
        state=absolute(args.state) if args.state else None,
        recheck=args.recheck,
        extents=extents_of(args),
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


def extents_of(args: argparse.Namespace) -> tuple[Extent, ...]:
    """Return the byte ranges that the parsed options `args` name with --range, in their order."""
    return tuple(map(Extent._make, getattr(args, "ranges", ())))


def compression_of(args: argparse.Namespace, location: Location) -> CompressionSpec:
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


def local_source(args: argparse.Namespace) -> str:
    """Return the path of SOURCE in the parsed options `args`. Raises UsageError if SOURCE is on another host."""
    source = parse_location(args.source)
    if source.host is not None:
        raise UsageError("SOURCE and DESTINATION are both on another host: run blockcopy on one of the two")
    return absolute(source.path)
