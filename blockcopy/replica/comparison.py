"""The comparison that `verify` makes, and `sync` after a push: from the parsed options to the verdict's words."""

from __future__ import annotations

import argparse
import array
import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from blockcopy.block.device import open_source
from blockcopy.cli import console
from blockcopy.errors import DeviceError, MismatchError, SourceReadError
from blockcopy.paths.places import absolute
from blockcopy.progress.reporter import Progress
from blockcopy.replica.options import (
    command_for,
    extents_of,
    local_source,
    needs_extra,
    prompts,
    run,
    source_command,
)
from blockcopy.transport.command import Command
from blockcopy.transport.control_master import logging_out
from blockcopy.transport.location import parse_location

if TYPE_CHECKING:
    from blockcopy.block.geometry import Extent
    from blockcopy.replica.monitor.result import SyncResult, VerifyResult
    from blockcopy.replica.verify import Verdict

logger = logging.getLogger(__name__)

_OUTPUT_RANGES = 1000
"""Ranges that one write to standard output has."""


class Ends(NamedTuple):
    """The two ends of a comparison, as this host sees them."""

    command: Command
    """The command that runs `retrieve` at the other end."""
    path: str
    """The path of the device on this host."""
    source_size: int | None
    """Bytes of the source if it is on this host and the destination is not. None otherwise."""


def ends_of(args: argparse.Namespace) -> Ends:
    """Return the Ends that the parsed options `args` name.

    Raises UsageError if they are invalid. Raises DeviceError if a source on this host cannot be opened.
    """
    destination = parse_location(args.destination, "DESTINATION")
    if destination.host is None:
        return Ends(source_command(args), absolute(args.destination), None)
    source = local_source(args)  # the same comparison from the other end: only the bytes of the source count
    with open_source(source) as device:
        return Ends(command_for(args, destination, "retrieve"), source, device.size())


def compare(
    args: argparse.Namespace, ends: Ends, progress: Progress, report: Callable[[Extent], None] = lambda _: None
) -> Verdict:
    """Compare `ends` with the parsed options `args`. Returns the verdict. The dry run of a push warns as it would.

    `progress`: gets the bytes compared. `report`: called with each Extent that differs, ascending.
    """
    with needs_extra():
        from blockcopy.replica.overwrite_guard import warn_of_foreign_remote
        from blockcopy.replica.plan import Plan
        from blockcopy.replica.tasks import runner
        from blockcopy.replica.verify import verify

    plan = Plan(
        ends.command,
        ends.path,
        timeout=args.timeout,
        reconnect_timeout=args.reconnect_timeout,
        prompts=prompts(ends.command.location),
        extents=extents_of(args),
    )
    warns = getattr(args, "dry_run", False) and not args.force
    examine = warn_of_foreign_remote if warns else None
    with logging_out(ends.command):
        verify_ends = functools.partial(verify, plan, report, progress, ends.source_size, examine)
        return run(lambda: runner.run_interruptible(verify_ends))


def result_of(args: argparse.Namespace, verdict: Verdict, seconds: float) -> VerifyResult:
    """Return the VerifyResult of `verdict`. `args`: parsed options. `seconds`: how long the comparison took."""
    from blockcopy.replica.monitor.result import VerifyResult

    unreadable = (verdict.remote_unreadable, verdict.local_unreadable)
    unread = sum(each.bytes for each in unreadable)
    same = verdict.compared_bytes - verdict.differing_bytes - verdict.user_bytes - unread
    return VerifyResult(
        command=args.command,
        source=args.source,
        destination=args.destination,
        complete=not (verdict.differing_bytes or unread),
        size=verdict.size,
        same_bytes=same,
        unreadable_bytes=unread,
        unreadable_ranges=tuple(extent._asdict() for each in unreadable for extent in each.ranges),
        sent_bytes=verdict.sent_bytes,
        received_bytes=verdict.received_bytes,
        elapsed_seconds=round(seconds, 3),
        rate_bytes_per_s=int((same + verdict.differing_bytes) / max(seconds, 0.001)),
        differing_bytes=verdict.differing_bytes,
        tail_bytes=verdict.tail_bytes,
        user_bytes=verdict.user_bytes,
    )


def forecast(result: SyncResult, verdict: Verdict) -> SyncResult:
    """Return `result`, that of a dry run, with the counts of `verdict`: what a sync would do."""
    unread = verdict.local_unreadable.bytes  # a sync fetches these blocks
    return dataclasses.replace(
        result,
        dry_run=True,
        size=verdict.size,
        same_bytes=verdict.compared_bytes - verdict.differing_bytes - unread - verdict.remote_unreadable.bytes,
        fetched_bytes=verdict.differing_bytes - verdict.zero_bytes + unread,
        zero_bytes=verdict.zero_bytes,
        hole_bytes=0,
        uncompared_bytes=verdict.uncompared_bytes,
        unreadable_bytes=verdict.remote_unreadable.bytes,
        unreadable_ranges=tuple(extent._asdict() for extent in verdict.remote_unreadable.ranges),
        sent_bytes=verdict.sent_bytes,
        received_bytes=verdict.received_bytes,
    )


def write_json(result: VerifyResult, ranges: array.array[int]) -> None:
    """Print `result` as one JSON object, with one range on each line.

    `ranges`: offset and length of each range that differs, in turn.
    """
    console.write(f'{result.as_json()[:-1]}, "ranges": [')
    for at in range(0, len(ranges), 2 * _OUTPUT_RANGES):
        lines = [
            json.dumps({"offset": offset, "length": length})
            for offset, length in zip(*[iter(ranges[at : at + 2 * _OUTPUT_RANGES])] * 2, strict=True)
        ]
        console.write(",\n".join(lines) + ("," if at + 2 * _OUTPUT_RANGES < len(ranges) else ""))
    console.write("]}")


def warn(args: argparse.Namespace, verdict: Verdict) -> None:
    """Warn of bytes of the destination that were not compared, as `verdict` says. `args`: name the ends."""
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


def raise_if_different(args: argparse.Namespace, verdict: Verdict) -> None:
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
