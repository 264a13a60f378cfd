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
from blockcopy.remote import Command, parse_source, retrieve_command

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


def _source_command(args: argparse.Namespace) -> Command:
    return retrieve_command(parse_source(args.source), args.rsh, args.blockcopy_path)


def plan_of(args: argparse.Namespace, **more: Any) -> Plan:
    """What the options that `mount` and `sync` share ask for, and `more` of a Plan. UsageError."""
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
        on_complete=args.on_complete,
        **more,
    )


def _wish(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the source is asked to compress with: `auto` over a network, if nothing is said."""
    if "compress" in args:
        wish = args.compress
        if wish is not None and not wish.auto:
            zstd.check_available()
    else:
        wish = packing.Wish(auto=True) if parse_source(args.source).host else None
    return packing.fact_of(wish) if zstd.available() else None


def _prompts(args: argparse.Namespace) -> bool:
    """Whether the way to the source may ask something at a terminal."""
    if parse_source(args.source).host is None:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def sync(args: argparse.Namespace) -> None:
    with _started(_source_command(args)) as started:
        with needs_extra():
            from blockcopy.replica import running
            from blockcopy.replica.notify import Notifier
            from blockcopy.replica.sync import sync as make_copy
        plan = plan_of(args, demand=False, started=started)
        notifier = Notifier()
        run(lambda: running.interruptible(lambda: make_copy(plan, console.terminal(), notifier)))


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
    run_verify = functools.partial(
        compare,
        _source_command(args),
        os.path.abspath(args.destination),
        report,
        timeout=args.timeout,
        patience=args.reconnect_timeout,
        prompts=_prompts(args),
    )
    verdict = run(lambda: running.interruptible(run_verify))
    if args.json:
        console.write(json.dumps({"size": verdict.size, "differing_bytes": verdict.differing, "ranges": ranges}))
    if verdict.differing:
        raise DifferentError(
            f"{args.destination} is not a copy of {args.source}: {verdict.differing} of {verdict.size} bytes "
            "lie in blocks that differ"
        )
