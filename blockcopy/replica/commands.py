"""`sync` and `verify` as commands, and what the command line says → a Plan, which `mount` has as well.

trio is imported by the commands, and not before a source was started: that takes as long.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from blockcopy import console, packing, zstd
from blockcopy.errors import DifferentError, UsageError
from blockcopy.login import control_path, logged_in
from blockcopy.remote import Command, parse_location, stage_command

if TYPE_CHECKING:
    from subprocess import Popen

    from blockcopy.geometry import Extent
    from blockcopy.replica.replica import Plan

T = TypeVar("T")


@contextlib.contextmanager
def needs_extra() -> Iterator[None]:
    """Around the imports that need more than the standard library."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"mount and sync need the module `{error.name}`; install it with: pip install 'blockcopy[fuse]'"
        ) from error


def run(program: Callable[[], Awaitable[T]]) -> T:
    """A trio program, as `running.run` does."""
    from blockcopy.replica import running

    gc.freeze()  # what was imported stays: looking through it for garbage again and again costs a few percent
    return running.run(program)


def source_command(args: argparse.Namespace) -> Command:
    """A `retrieve` of SOURCE, run as the options say. UsageError."""
    return stage_command(
        parse_location(args.source),
        args.rsh,
        args.blockcopy_path,
        python=args.python,
        control=control_path(shared=not args.no_control_master),
    )


def plan_of(args: argparse.Namespace, command: Command, **more: Any) -> Plan:
    """What the options that `mount` and `sync` share ask for, and `more` of a Plan. UsageError."""
    from blockcopy.replica.replica import Plan

    return Plan(
        command,
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
    if "compress" in args:
        wish = args.compress
        if wish is not None and not wish.auto:
            zstd.check_available()
    else:
        wish = packing.Wish(auto=True) if parse_location(args.source).host else None
    return packing.fact_of(wish) if zstd.available() else None


def _prompts(args: argparse.Namespace) -> bool:
    """Whether the way to the source may ask something at a terminal."""
    if parse_location(args.source).host is None:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def sync(args: argparse.Namespace) -> None:
    command = source_command(args)
    with logged_in(command), _started(command) as started:
        with needs_extra():
            from blockcopy.replica import running
            from blockcopy.replica.sync import sync as make_copy
        plan = plan_of(args, command, demand=False, started=started)
        run(lambda: running.interruptible(lambda: make_copy(plan, console.terminal())))


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


def verify(args: argparse.Namespace) -> None:
    with needs_extra():
        from blockcopy.replica import running
        from blockcopy.replica.verify import verify as compare

    def report(extent: Extent) -> None:
        if args.json:
            ranges.append(extent._asdict())
        else:
            console.write(f"{extent.offset}:{extent.length}")

    ranges: list[dict[str, int]] = []
    command = source_command(args)
    run_verify = functools.partial(
        compare,
        command,
        os.path.abspath(args.destination),
        report,
        timeout=args.timeout,
        patience=args.reconnect_timeout,
        prompts=_prompts(args),
    )
    with logged_in(command):
        verdict = run(lambda: running.interruptible(run_verify))
    if args.json:
        console.write(json.dumps({"size": verdict.size, "differing_bytes": verdict.differing, "ranges": ranges}))
    if verdict.differing:
        raise DifferentError(
            f"{args.destination} is not a copy of {args.source}: {verdict.differing} of {verdict.size} bytes "
            "lie in blocks that differ"
        )
