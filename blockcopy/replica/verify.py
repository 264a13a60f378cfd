"""`blockcopy verify`: which parts of the destination differ from the source. Writes nothing.

The same questions as when copying; what comes back is counted and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from blockcopy.device import Device, open_source
from blockcopy.geometry import Extent, Geometry
from blockcopy.remote import Command
from blockcopy.replica.link import connect
from blockcopy.replica.materialiser import BATCH_BLOCKS, questions
from blockcopy.replica.retriever import Retriever

_WINDOW = 6
"""Batches asked for at a time."""


@dataclass
class Verdict:
    """`differing` bytes, in whole blocks, of the `size` bytes of the source."""

    size: int
    differing: int = 0


async def verify(command: Command, destination: str, report: Callable[[Extent], None]) -> Verdict:
    """Compare every block; `report` gets each range that differs, in order, neighbours as one.

    Where the destination is shorter, all that it lacks differs; what it has beyond does not count.
    SourceError, DeviceError, in exception groups.
    """
    with open_source(destination) as device:
        async with trio.open_nursery() as nursery:
            own = device.size()
            retrievers, size = await connect(command, nursery, connections=1, guess=own)
            verdict = Verdict(size)
            ranges = _Ranges(report, verdict)
            await _compare(device, Geometry(min(own, size)), retrievers[0], ranges)
            if size > own:
                ranges.add(Extent(own, size - own))
            ranges.finish()
            await retrievers[0].close()
    return verdict


async def _compare(device: Device, geometry: Geometry, retriever: Retriever, ranges: _Ranges) -> None:
    step = _WINDOW * BATCH_BLOCKS
    for start in range(0, geometry.blocks, step):
        blocks = range(start, min(start + step, geometry.blocks))
        found: dict[int, bool] = {}

        async def ask(batch: range, found: dict[int, bool] = found) -> None:
            asked = await trio.to_thread.run_sync(questions, device, geometry, list(batch))
            answers = await retriever.ask(asked)
            found.update((block, answer is not None) for block, answer in zip(batch, answers, strict=True))

        async with trio.open_nursery() as nursery:
            for first in range(blocks.start, blocks.stop, BATCH_BLOCKS):
                nursery.start_soon(ask, range(first, min(first + BATCH_BLOCKS, blocks.stop)))
        for block in blocks:
            if found[block]:
                ranges.add(geometry.extent(block))


class _Ranges:
    """Joins neighbours, and reports a range when it has ended."""

    def __init__(self, report: Callable[[Extent], None], verdict: Verdict) -> None:
        self._report = report
        self._verdict = verdict
        self._open: Extent | None = None

    def add(self, extent: Extent) -> None:
        self._verdict.differing += extent.length
        if self._open is not None and self._open.end == extent.offset:
            self._open = Extent(self._open.offset, self._open.length + extent.length)
            return
        self.finish()
        self._open = extent

    def finish(self) -> None:
        if self._open is not None:
            self._report(self._open)
        self._open = None
