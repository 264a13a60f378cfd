"""What a state file has on record, and how a destination differs from what it must hold: seen from outside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.replica.state.blockmap import BlockMap
from blockcopy.replica.state.statefile import StateFile

BLOCK = 128 * 1024
PAGE = 4096


def read_record(folder: Path, size: int) -> tuple[set[int], set[int]]:
    """Return the blocks that the state file in `folder` has on record, and the pages of the user.

    `size`: bytes of the device. Both are empty if there is no state file, or one whose run was cut before it wrote.
    """
    blockmap = BlockMap(Geometry(size))
    for path in folder.glob("*.state"):
        if path.stat().st_size:
            state_file = StateFile(path, must_be_usable=True)
            if state_file.record is not None:
                blockmap.resume(state_file.record.rows)
            state_file.close()
    blocks = {block for block in range(size // BLOCK) if not blockmap.any_missing([block])}
    return blocks, {page for page in range(size // PAGE) if blockmap.user.has(Extent(page * PAGE, PAGE))}


def pages_of(blocks: Iterable[int]) -> set[int]:
    """Return the pages of `blocks`."""
    return {page for block in blocks for page in range(block * BLOCK // PAGE, (block + 1) * BLOCK // PAGE)}


def different_pages(expected: bytes, found: bytes, pages: Iterable[int]) -> set[int]:
    """Return those of `pages` in which `found` differs from `expected`."""
    return {each for each in pages if expected[each * PAGE :][:PAGE] != found[each * PAGE :][:PAGE]}
