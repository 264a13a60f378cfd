"""The map of a replica: the device in cells, for the screen."""

from __future__ import annotations

from collections.abc import Iterable

from blockcopy.replica.monitor.status import MapCell
from blockcopy.replica.state.blockmap import BlockMap


def device_map(
    blockmap: BlockMap, in_flight: Iterable[int], reading: Iterable[int], max_cells: int
) -> list[MapCell]:
    """Divide the device of `blockmap` into at most `max_cells` cells, and count the blocks of each.

    `in_flight`, `reading`: block numbers that background hydration fetches, and that readers wait for.
    Returns cells in device order. All cover the same number of blocks, but the last cell may cover fewer.
    """
    block_count = blockmap.geometry.block_count
    blocks_per_cell = max(1, -(-block_count // max(1, max_cells)))
    cells = []
    for start in range(0, block_count, blocks_per_cell):
        blocks = range(start, min(start + blocks_per_cell, block_count))
        cells.append(MapCell(len(blocks), *blockmap.count(blocks), blockmap.user.count_blocks(blocks)))
    for block in in_flight:
        cells[block // blocks_per_cell].in_flight += 1
    for block in reading:
        cells[block // blocks_per_cell].reading += 1
    return cells
