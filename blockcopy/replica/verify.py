"""The comparison of two ends, for `verify` and for the end of a copy with --verify. It writes nothing.

It sends the same signatures as a copy does, counts the answers, and discards their bytes.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from blockcopy.block.device import Device, open_source
from blockcopy.block.geometry import Extent, ExtentJoiner, Geometry
from blockcopy.block.identity import differences, source_identity
from blockcopy.block.unreadable_ranges import UnreadableRanges
from blockcopy.errors import BlockcopyError, DeviceError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.replica.hydration.signatures import read_signatures
from blockcopy.replica.hydration.throttle import BATCH_BLOCKS
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.batches import DISCARD
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.pool import Pool
from blockcopy.replica.state.recovery import recorded_user_pages
from blockcopy.replica.state.user_pages import UserPages

_ROUND_BLOCKS = 16 * BATCH_BLOCKS
"""Blocks that are compared at once: 512 MiB. Their differences are reported in order."""


@dataclass
class Verdict:
    """The result of a comparison."""

    size: int
    """Bytes of the source."""
    compared_bytes: int = 0
    """Bytes of the source that were to be compared: all, or those of the wanted blocks."""
    differing_bytes: int = 0
    """Bytes of the blocks that differ."""
    zero_bytes: int = 0
    """Bytes of blocks that differ and are zeros at the other end, if that end says so."""
    uncompared_bytes: int = 0
    """Bytes that count as different without a comparison, because the copy must grow. Only for a dry run."""
    user_bytes: int = 0
    """Bytes of blocks that a user has written to. They are not compared."""
    tail_bytes: int = 0
    """Bytes of the copy beyond the size of the source. They are not compared."""
    sent_bytes: int = 0
    """Bytes sent to the other end."""
    received_bytes: int = 0
    """Bytes received from the other end."""
    local_unreadable: UnreadableRanges = field(default_factory=UnreadableRanges)
    """Blocks that cannot be read on this host, and were not compared."""
    remote_unreadable: UnreadableRanges = field(default_factory=UnreadableRanges)
    """Blocks that cannot be read at the other end, and were not compared."""


async def verify(
    plan: Plan,
    report: Callable[[Extent], None],
    progress: Progress,
    source_size: int | None = None,
    examine: Callable[[Device, Pool], Awaitable[None]] | None = None,
) -> Verdict:
    """Compare the blocks that `plan` wants of the device at `plan.destination` with the other end.

    Returns the verdict. Blocks that one end cannot read are in the verdict, and all others are compared. Bytes that
    the copy lacks differ. Equal ends were equal at one moment.

    `plan.command`: runs `retrieve` at the other end.
    `report`: called with each Extent that differs, ascending. Adjacent ones are joined.
    `progress`: gets the counts of bytes compared so far.
    `source_size`: None if the other end is the source. Else `plan.destination` is a source of so many bytes.
    `examine`: called first, with the device here and the pool of connections to the other end.
    Raises SourceError or DeviceError, in exception groups.
    Raises SourceChangedError or DeviceError if one of two equal ends changed meanwhile.
    """
    with open_source(plan.destination) as device:
        before = await trio.to_thread.run_sync(source_identity, device)
        async with trio.open_nursery() as nursery:
            local_size = device.size()
            connector = Connector(plan, size_guess=local_size)
            pool = Pool(connector, nursery, give_up_after=plan.reconnect_timeout)
            await pool.open()
            nursery.start_soon(pool.run)
            if examine is not None:
                await examine(device, pool)
            remote_size = connector.identity["size"] if connector.identity else 0
            total = remote_size if source_size is None else source_size
            copy_size = local_size if source_size is None else remote_size
            wanted = plan.blocks_to_copy(Geometry(total))
            wanted_bytes = sum(map(Geometry(total).bytes_of, wanted))

            def completed(count: int) -> None:
                progress.update(Counts(count, wanted_bytes))

            geometry = Geometry(min(total, remote_size))
            user = recorded_user_pages(device, geometry) if source_size is None else None
            verdict = await compare(device, geometry, pool, report, completed, user, wanted)
            for lacking in missing_extents(Geometry(total), wanted, remote_size):
                report(lacking)
                verdict.differing_bytes += lacking.length
            verdict.size, verdict.compared_bytes = total, wanted_bytes
            if not verdict.differing_bytes:
                await trio.to_thread.run_sync(device.check_in_place, abandon_on_cancel=True)
                await pool.check()
                changes = differences(before, await trio.to_thread.run_sync(source_identity, device))
                if changes:
                    raise DeviceError(f"{plan.destination} changed during the comparison: {'; '.join(changes)}")
            verdict.tail_bytes = 0 if plan.extents else max(0, copy_size - total)
            verdict.sent_bytes, verdict.received_bytes = pool.sent_bytes, pool.received_bytes
            await pool.close()
    return verdict


async def compare(
    device: Device,
    geometry: Geometry,
    pool: Pool,
    report: Callable[[Extent], None],
    completed: Callable[[int], None],
    user: UserPages | None = None,
    wanted: Sequence[range] | None = None,
) -> Verdict:
    """Compare the `wanted` blocks of `device` with the other end of `pool`, which has this `geometry`.

    Bytes that `device` lacks differ. `pool` must be connected. Returns the verdict.

    `report`: called with each Extent that differs, ascending. Adjacent ones are joined.
    `completed`: called with the number of bytes compared so far, again and again.
    `user`: the pages that the user wrote. Their blocks are not compared.
    `wanted`: ranges of block numbers, ascending. None: all blocks.
    Raises SourceError or DeviceError.
    """
    wanted = [range(geometry.block_count)] if wanted is None else wanted
    verdict = Verdict(geometry.size, sum(map(geometry.bytes_of, wanted)))
    if user is not None:
        counts = ((blocks, user.count_blocks(blocks)) for blocks in wanted)
        verdict.user_bytes = sum(
            min(count * geometry.block_size, geometry.bytes_of(each)) for each, count in counts
        )

    def differs(extent: Extent) -> None:
        verdict.differing_bytes += extent.length
        report(extent)

    ranges = ExtentJoiner(differs)
    local = Geometry(min(device.size(), geometry.size), geometry.block_size)
    comparison = _Comparison(device, local, pool, verdict, user)
    done = 0
    for span in wanted:
        for start in range(span.start, min(span.stop, local.block_count), _ROUND_BLOCKS):
            blocks = range(start, min(start + _ROUND_BLOCKS, span.stop, local.block_count))
            for extent in await comparison.differences(blocks):
                ranges.add(extent)
            completed(done + local.bytes_of(range(span.start, blocks.stop)))
        done += geometry.bytes_of(span)
    completed(done)
    for extent in missing_extents(geometry, wanted, local.size):
        ranges.add(extent)
    ranges.flush()
    return verdict


def missing_extents(geometry: Geometry, wanted: Sequence[range], size: int) -> Iterator[Extent]:
    """Yield the byte ranges of the `wanted` blocks of `geometry` that lie behind the first `size` bytes."""
    for blocks in wanted:
        start = max(size, blocks.start * geometry.block_size)
        end = min(geometry.size, blocks.stop * geometry.block_size)
        if start < end:
            yield Extent(start, end - start)


class _Comparison:
    """A comparison of blocks that both ends have. It adds unreadable blocks to `verdict`."""

    def __init__(
        self, device: Device, geometry: Geometry, pool: Pool, verdict: Verdict, user: UserPages | None
    ) -> None:
        self._user = user
        self._device = device
        self._geometry = geometry
        self._pool = pool
        self._verdict = verdict
        self._threads = trio.CapacityLimiter(len(os.sched_getaffinity(0)))

    async def differences(self, blocks: range) -> list[Extent]:
        """Return the extents that differ in the range `blocks`, ascending. Raises SourceError or DeviceError."""
        found: list[Extent] = []
        errors: list[BlockcopyError] = []

        async def ask(batch: Sequence[int]) -> None:
            try:
                found.extend(await self._ask(batch))
            except BlockcopyError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for first in range(blocks.start, blocks.stop, BATCH_BLOCKS):
                batch = range(first, min(first + BATCH_BLOCKS, blocks.stop))
                if self._user is None or not self._user.count_blocks(batch):
                    nursery.start_soon(ask, batch)
                elif others := [block for block in batch if not self._user.has_block(block)]:
                    nursery.start_soon(ask, others)
        if errors:
            raise errors[0]
        return sorted(other for extent in found for other in self._others(extent))

    def _others(self, extent: Extent) -> Iterator[Extent]:
        """Yield `extent` without the blocks that a user has written by now."""
        blocks = self._geometry.span(*extent)
        if self._user is None or not self._user.count_blocks(blocks):
            yield extent
            return
        yield from (self._geometry.extent(block) for block in blocks if not self._user.has_block(block))

    async def _ask(self, batch: Sequence[int]) -> list[Extent]:
        since = trio.current_time()
        digest = await self._pool.digest(since)
        local_unreadable = UnreadableRanges()
        read = partial(read_signatures, self._device, self._geometry, batch, digest, local_unreadable)
        signatures = await trio.to_thread.run_sync(read, limiter=self._threads)
        answer = await self._pool.ask(signatures, DISCARD, since)
        for each in answer.unreadable:
            self._verdict.remote_unreadable.add(*each)
        self._verdict.zero_bytes += sum(each.length for each in answer.zeros)
        extents = [*answer.data, *answer.zeros]
        if not local_unreadable:
            return extents
        # The source sends each block that is unreadable here. Such blocks are no differences.
        unread = {extent for each in signatures for extent, own in each.blocks() if own == digest.impossible}
        for extent in sorted(unread):
            self._verdict.local_unreadable.add(extent, local_unreadable.reason)
        blocks = (self._geometry.extent(block) for each in extents for block in self._geometry.span(*each))
        return [extent for extent in blocks if extent not in unread]
