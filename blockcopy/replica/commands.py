"""The commands `sync`, `verify` and `discard-writes`.

The commands import trio only after they have started a source process. Both take about as long.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockcopy.block.claim import check_destination, existing_destination, open_destination, says_in_use
from blockcopy.block.device import Device, open_source
from blockcopy.cli import console, log
from blockcopy.errors import BlockcopyError, DestinationRefusedError, ForeignContentError, StateError, UsageError
from blockcopy.paths.places import absolute
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.replica import comparison
from blockcopy.replica.options import (
    command_for,
    compression_of,
    control_for,
    local_source,
    needs_extra,
    plan_of,
    prompts,
    run,
    source_command,
)
from blockcopy.transport.command import Command
from blockcopy.transport.control_master import logging_out
from blockcopy.transport.location import Location, parse_location

if TYPE_CHECKING:
    from subprocess import Popen

    from blockcopy.block.geometry import Extent
    from blockcopy.replica.monitor.result import SyncResult
    from blockcopy.replica.monitor.status import Status
    from blockcopy.replica.plan import Plan


def sync(args: argparse.Namespace) -> None:
    """Run `blockcopy sync` with the parsed options `args`. Raises BlockcopyError if the copy fails."""
    from blockcopy.replica.monitor.result import SyncResult

    started_at = time.monotonic()
    destination = parse_location(args.destination, "DESTINATION")
    results = [SyncResult(command="sync", source=args.source, destination=args.destination)]
    shown, error = False, None
    try:
        if destination.host is not None:
            shown = _push(args, destination, results)
        else:
            shown = _pull(args, absolute(destination.path), results)
    except BlockcopyError as failure:
        if not args.json:
            raise
        error = failure
    result = results[-1].ended(time.monotonic() - started_at, error)
    if args.json:
        console.write(result.as_json())
    if error is not None:
        raise error
    if not args.dry_run:
        log.announce(result.words, shown=shown)
    elif not args.json:
        console.write_line(result.words)


def _pull(args: argparse.Namespace, path: str, results: list[SyncResult]) -> bool:
    """Run `sync` with the parsed options `args`, onto the destination at `path` on this host.

    Appends the counts to `results`, also if the copy fails. Returns whether a user was shown the progress.
    """
    command = source_command(args)
    if args.ranges and args.on_complete:
        raise UsageError("--on-complete and --range exclude each other: a copy of ranges is not complete")
    if args.dry_run:
        return _dry_run(args, command, path, results)
    check_destination(path, force=args.force)  # before ssh asks for a password
    with logging_out(command), _started(command) as started:
        with needs_extra():
            from blockcopy.replica.monitor.sd_notify import Notifier
            from blockcopy.replica.sync import sync as make_copy
            from blockcopy.replica.tasks import runner
        plan = plan_of(args, command, demand=False, started=started)

        def note(status: Status) -> None:
            results.append(results[-1].with_status(status))

        def copy(plan: Plan) -> bool:
            with console.progress(args, bar_by_default=True) as progress:
                run(lambda: runner.run_interruptible(lambda: make_copy(plan, progress, notifier, note)))
            return _shows(args, progress)

        notifier = Notifier()
        try:
            return copy(plan)
        except ForeignContentError as error:
            if not console.confirm(f"{error.held}. Overwrite it?"):
                raise
            return copy(dataclasses.replace(plan, overwrite=True))


def _dry_run(args: argparse.Namespace, command: Command, path: str, results: list[SyncResult]) -> bool:
    """Compare the destination at `path` with the source of `command`, as the parsed options `args` say.

    Appends the counts to `results`. Returns whether a user was shown the progress.
    """
    with contextlib.ExitStack() as stack:
        device = existing_destination(path, force=args.force)
        if device is not None:
            stack.enter_context(device)
        stack.enter_context(logging_out(command))
        started = stack.enter_context(_started(command))
        with needs_extra():
            from blockcopy.replica.dry_run import dry_run
            from blockcopy.replica.tasks import runner
        plan = plan_of(args, command, demand=False, started=started)
        progress = stack.enter_context(console.progress(args, bar_by_default=True))
        verdict = run(lambda: runner.run_interruptible(lambda: dry_run(plan, device, progress)))
    results.append(comparison.forecast(results[-1], verdict))
    return _shows(args, progress)


def _shows(args: argparse.Namespace, progress: Progress) -> bool:
    """Return whether `progress` is shown to a user, as text, with the parsed options `args`."""
    return not progress.silent and args.progress != "json"


class _SentBytes(Progress):
    """A progress reporter that forwards to `progress`, and adds up the bytes that a push sends."""

    silent = False

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._earlier = self._last = 0

    def update(self, counts: Counts) -> None:
        sent = counts.parts.get("sent", 0)
        if sent < self._last:  # of a new connection
            self._earlier += self._last
        self._last = sent
        self._progress.update(counts)

    def finish(self) -> None:
        self._progress.finish()

    @property
    def total(self) -> int:
        """Bytes sent over all connections."""
        return self._earlier + self._last


def _push(args: argparse.Namespace, destination: Location, results: list[SyncResult]) -> bool:
    """Run `sync` with the parsed options `args`. `destination`: the Location of DESTINATION, on another host.

    Appends the counts to `results`. Returns whether a user was shown the progress.
    Raises UsageError if the options do not fit a push, MismatchError if --verify finds differences.
    """
    from blockcopy.push.push import push

    source = local_source(args)
    if args.state or args.recheck:
        raise UsageError("--state and --recheck need a local DESTINATION: a push checks every block each time")
    if args.on_complete or args.metrics:
        raise UsageError("--on-complete and --metrics need a local DESTINATION: a push ends when it is complete")
    if args.dry_run:
        with console.progress(args, bar_by_default=True) as progress:
            verdict = comparison.compare(args, comparison.ends_of(args), progress)
        # The answers were about the destination: where it has zeros, the source has other bytes.
        verdict = dataclasses.replace(verdict, zero_bytes=0)
        results.append(comparison.forecast(results[-1], verdict))
        return _shows(args, progress)
    if args.ranges:
        raise UsageError("--range needs a local DESTINATION: a push copies all")
    options = ["--no-sparse"] if args.no_sparse else []
    options += ["--compress", str(compression_of(args, destination))]
    control = control_for(args, destination)

    def copy(device: Device, *, force: bool) -> Progress:
        with console.progress(args, bar_by_default=True) as progress:
            sent = _SentBytes(progress)
            push(
                command_for(args, destination, "receive", [*options, *["--force"][:force]], control=control),
                device,
                timeout=args.timeout,
                prompts=prompts(destination),
                give_up_after=args.reconnect_timeout,
                limit=args.limit,
                connections=args.connections,
                progress=sent,
            )
        results.append(dataclasses.replace(results[-1], size=device.size(), sent_bytes=sent.total))
        return progress

    with logging_out(command_for(args, destination, "receive", control=control)), open_source(source) as device:
        try:
            progress = copy(device, force=args.force)
        except ForeignContentError as error:
            if not console.confirm(f"{error.held}. Overwrite it?"):
                raise
            progress = copy(device, force=True)
    if args.verify:
        with console.progress(args, bar_by_default=True) as progress:
            verdict = comparison.compare(args, comparison.ends_of(args), progress)
        comparison.raise_if_different(args, verdict)
    return _shows(args, progress)


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
    started_at = time.monotonic()
    ends = comparison.ends_of(args)
    ranges = array.array("q")  # offset and length of each: half of the blocks may be ranges
    with console.progress(args, bar_by_default=True) as progress:

        def report(extent: Extent) -> None:
            if args.json:
                ranges.extend(extent)
            else:
                with progress.suspended():
                    console.write(f"{extent.offset}:{extent.length}")

        verdict = comparison.compare(args, ends, progress, report)
    comparison.warn(args, verdict)
    result = comparison.result_of(args, verdict, time.monotonic() - started_at)
    if args.json:
        comparison.write_json(result, ranges)
    log.announce(result.words, shown=_shows(args, progress))
    comparison.raise_if_different(args, verdict)


def discard_writes(args: argparse.Namespace) -> None:
    """Run `blockcopy discard-writes` with the parsed options `args`. Prints how much is thrown away.

    Raises DeviceError or StateError if the destination is in use, or holds no writes of a user.
    """
    from blockcopy.replica import state_command

    state = absolute(args.state) if args.state else None
    path = absolute(args.destination)
    if state_command.is_state_file(path):
        found = state_command.discard(path, dry_run=args.dry_run)
        where = ""
    else:
        state_command.check_exists(path)
        found = discard(path, state, dry_run=args.dry_run)
        where = f" in {args.destination}"
    if args.json:
        from blockcopy.replica.monitor.status import SCHEMA_VERSION

        fields = {"command": "discard-writes", "destination": args.destination, "dry_run": args.dry_run}
        console.write(json.dumps({"schema_version": SCHEMA_VERSION, **fields, "has_writes": bool(found)}))
        return
    if not found:
        raise StateError(f"{args.destination} holds no writes of a user: there is nothing to throw away")
    if args.dry_run:
        console.write_line(f"would throw away {found}{where}")
    else:
        console.write_line(f"threw away {found}{where}; the next mount or sync checks every block")


def state(args: argparse.Namespace) -> None:
    """Run `blockcopy state` with the parsed options `args`: list the state files, or forget some.

    Raises UsageError if destinations do not fit the action. Raises StateError or DeviceError if that fails.
    """
    from blockcopy.replica import state_command

    if (args.action == "forget") != bool(args.destinations):
        raise UsageError("write `state list`, or `state forget DESTINATION`")
    if args.action == "list":
        found = state_command.states()
        console.write(state_command.as_json(found) if args.json else state_command.table(found))
    for path in args.destinations:
        console.write_line(state_command.forget(absolute(path)))


def discard(path: str, state: str | None, *, dry_run: bool = False) -> str:
    """Throw away what the user wrote to the destination at `path`. Returns in words how much that is, or "".

    `state`: the path of the state file, or None. `dry_run`: changes nothing.
    Raises DeviceError or StateError if that is not possible.
    """
    from blockcopy.replica.state.recovery import discard_user_writes

    try:
        with open_destination(path, with_user_writes=True) as device:
            return discard_user_writes(device, state, dry_run=dry_run)
    except DestinationRefusedError as error:
        if not says_in_use(str(error)):
            raise
        raise DestinationRefusedError(
            f"{path} is in use. If a mount uses it, end that first: blockcopy list shows mounts, and "
            "blockcopy umount ends one"
        ) from error
