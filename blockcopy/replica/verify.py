"""`blockcopy verify`: which parts of the destination differ from the source. Writes nothing.

The same questions as when copying; what comes back is counted and thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import Extent, ExtentJoiner, Geometry
from blockcopy.block.identity import differences, source_identity
from blockcopy.block.unreadable import UnreadableRanges
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.replica.hydration.throttle import BATCH_BLOCKS
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.link import Link
from blockcopy.transport.command import Command

_ROUND = 16
"""Batches asked for at a time: 128 MiB."""


@dataclass
class Verdict:
    """`differing` bytes, in whole blocks, of the `size` bytes of the source; `tail`: bytes of the copy beyond."""

    size: int
    differing: int = 0
    tail: int = 0
    here: UnreadableRanges = field(default_factory=UnreadableRanges)
    """Blocks that cannot be read at this end, and were not compared."""
    there: UnreadableRanges = field(default_factory=UnreadableRanges)
    """And at the other one."""


async def verify(
    command: Command,
    destination: str,
    report: Callable[[Extent], None],
    *,
    timeout: float,
    patience: float,
    prompts: bool,
    size: int | None = None,
    progress: Progress,
) -> Verdict:
    """Compare every block; `report` gets each range that differs, in order, neighbours as one.

    Blocks that one of the ends cannot read are in the verdict, and all others are compared.
    Where the destination is shorter, all that it lacks differs; what it has beyond does not count. With `size`
    it is the other end that is the copy, of so many bytes. `progress` is told what was compared. `timeout` and
    `prompts` as for a Connector, `patience` as for a Link. SourceError, DeviceError, in exception groups.
    Ends that are equal were so at one moment: SourceChangedError or DeviceError if one of them changed meanwhile.
    """
    with open_source(destination) as device:
        before = await trio.to_thread.run_sync(source_identity, device)
        async with trio.open_nursery() as nursery:
            own = device.size()
            connector = Connector(command, guess=own, timeout=timeout, prompts=prompts)
            link = Link(connector, nursery, give_up_after=patience)
            await link.open()
            nursery.start_soon(link.run)
            there = connector.identity["size"] if connector.identity else 0
            total = there if size is None else size

            def completed(count: int) -> None:
                progress.update(Counts(count, total))

            verdict = await _compare_ends(device, there, size, link, report, completed)
            if not verdict.differing:
                await trio.to_thread.run_sync(device.check_in_place, abandon_on_cancel=True)
                await link.check()
                changes = differences(before, await trio.to_thread.run_sync(source_identity, device))
                if changes:
                    raise DeviceError(f"{destination} changed while it was compared: {'; '.join(changes)}")
            verdict.tail = max(0, own - there if size is None else there - size)
            await link.close()
    return verdict


async def _compare_ends(
    device: Device,
    there: int,
    size: int | None,
    link: Link,
    report: Callable[[Extent], None],
    completed: Callable[[int], None],
) -> Verdict:
    if size is None or size <= there:
        return await compare(device, Geometry(there if size is None else size), link, report, completed)
    verdict = await compare(device, Geometry(there), link, report, completed)
    report(Extent(there, size - there))
    return replace(verdict, size=size, differing=verdict.differing + size - there)


async def compare(
    device: Device,
    geometry: Geometry,
    link: Link,
    report: Callable[[Extent], None],
    completed: Callable[[int], None],
) -> Verdict:
    """As `verify`, over a link that is up, for a source of that geometry. SourceError, DeviceError.

    `completed` is told how many bytes have been compared, as often as there is news.
    """
    verdict = Verdict(geometry.size)

    def differs(extent: Extent) -> None:
        verdict.differing += extent.length
        report(extent)

    ranges = ExtentJoiner(differs)
    own = min(device.size(), geometry.size)
    await _compare(device, Geometry(own, geometry.block_size), link, ranges, verdict, completed)
    completed(geometry.size)
    if geometry.size > own:
        ranges.add(Extent(own, geometry.size - own))
    ranges.flush()
    return verdict


async def _compare(
    device: Device,
    geometry: Geometry,
    link: Link,
    ranges: ExtentJoiner,
    verdict: Verdict,
    completed: Callable[[int], None],
) -> None:
    """In rounds of _ROUND batches, so that what differs is told in order."""
    threads = trio.CapacityLimiter(len(os.sched_getaffinity(0)))
    step = _ROUND * BATCH_BLOCKS
    for start in range(0, geometry.block_count, step):
        stop = min(start + step, geometry.block_count)
        found: list[Extent] = []
        errors: list[BlockcopyError] = []

        async def ask(batch: range, found: list[Extent] = found, errors: list[BlockcopyError] = errors) -> None:
            try:
                since = trio.current_time()
                digest = await link.digest(since)
                here = UnreadableRanges()
                read = partial(read_signatures, device, geometry, batch, digest, here)
                asked = await trio.to_thread.run_sync(read, limiter=threads)
                answer = await link.ask(asked, _IGNORE, since)
            except BlockcopyError as error:
                errors.append(error)
                return
            for each in answer.unreadable:
                verdict.there.add(*each)
            extents = [*answer.data, *answer.zeros]
            if here:
                unread = {at for each in asked for at, own in each.blocks() if own == digest.impossible}
                for at in sorted(unread):
                    verdict.here.add(at, here.reason)
                extents = [at for each in extents for at in _blocks(each, geometry) if at not in unread]
            found += extents

        async with trio.open_nursery() as nursery:
            for first in range(start, stop, BATCH_BLOCKS):
                nursery.start_soon(ask, range(first, min(first + BATCH_BLOCKS, stop)))
        if errors:
            raise errors[0]
        for extent in sorted(found):
            ranges.add(extent)
        completed(min(stop * geometry.block_size, geometry.size))


def _blocks(extent: Extent, geometry: Geometry) -> Iterator[Extent]:
    return map(geometry.extent, geometry.span(*extent))


class _Ignore:
    def data(self, position: int, payload: Buffer) -> None: ...

    def zeros(self, position: int, length: int) -> None: ...


_IGNORE = _Ignore()
