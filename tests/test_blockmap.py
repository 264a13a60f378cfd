from __future__ import annotations

import random
import time
import tracemalloc

import pytest

from blockcopy.geometry import Geometry
from blockcopy.replica.blockmap import BlockMap

BLOCK = 10
"""Bytes in a block of these tests: the arithmetic is the same."""

SIZES = [0, 1, 9, 10, 11, *(8 * BLOCK * n + more for n in (1, 2, 3) for more in (-11, -10, -1, 0, 1, 10, 11))]


class Naive:
    """What a BlockMap means, with sets."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.same: set[int] = set()
        self.fetched: set[int] = set()

    def mark(self, block: int, *, fetched: bool) -> None:
        if block not in self.same | self.fetched:
            (self.fetched if fetched else self.same).add(block)

    def missing(self, blocks: range) -> list[int]:
        known = self.same | self.fetched
        return [block for block in blocks if block < self.geometry.blocks and block not in known]

    def bytes_in(self, blocks: set[int]) -> int:
        return sum(self.geometry.extent(block).length for block in blocks)


def assert_alike(blockmap: BlockMap, naive: Naive) -> None:
    blocks = naive.geometry.blocks
    assert list(blockmap.missing(range(blocks))) == naive.missing(range(blocks))
    assert list(blockmap.missing(range(blocks + 20))) == naive.missing(range(blocks))  # none behind the end
    assert blockmap.same_bytes == naive.bytes_in(naive.same)
    assert blockmap.fetched_bytes == naive.bytes_in(naive.fetched)
    assert blockmap.present_bytes == blockmap.same_bytes + blockmap.fetched_bytes
    assert blockmap.complete is (not naive.missing(range(blocks)))


def some_range(chance: random.Random, blocks: int) -> range:
    start = chance.randint(0, blocks)
    return range(start, chance.randint(start, blocks))


@pytest.mark.parametrize("size", SIZES)
def test_random_marks_mean_what_sets_of_blocks_mean(size: int) -> None:
    geometry, chance = Geometry(size, BLOCK), random.Random(size)
    blockmap, naive = BlockMap(geometry), Naive(geometry)
    assert_alike(blockmap, naive)
    for _ in range(3 * geometry.blocks):
        block, fetched = chance.randrange(geometry.blocks), chance.random() < 0.5
        blockmap.mark(block, fetched=fetched)
        naive.mark(block, fetched=fetched)
        assert_alike(blockmap, naive)
        part = some_range(chance, geometry.blocks)
        assert list(blockmap.missing(part)) == naive.missing(part)
        assert blockmap.any_missing(part) is bool(naive.missing(part))


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_the_last_missing_block_is_found_wherever_it_is(size: int) -> None:
    blocks = range(Geometry(size, BLOCK).blocks)
    for left in blocks:
        blockmap = BlockMap(Geometry(size, BLOCK))
        for block in blocks:
            if block != left:
                blockmap.mark(block, fetched=False)
        assert list(blockmap.missing(blocks)) == [left]
        assert not blockmap.complete
        blockmap.mark(left, fetched=True)
        assert list(blockmap.missing(blocks)) == []
        assert blockmap.complete


def test_nothing_is_missing_of_zero_blocks() -> None:
    blockmap = BlockMap(Geometry(0))
    assert blockmap.complete
    assert list(blockmap.missing(range(0))) == []
    assert list(blockmap.missing(range(0, 100))) == []
    assert blockmap.any_missing(range(0)) is False


@pytest.mark.parametrize("block", [-1, 8, 9, 15, 16, 1000])
def test_a_block_outside_the_size_cannot_be_marked(block: int) -> None:
    blockmap = BlockMap(Geometry(8 * BLOCK, BLOCK))
    with pytest.raises(IndexError):
        blockmap.mark(block, fetched=True)
    assert blockmap.present_bytes == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_block_counts_once_and_as_it_was_marked_first(first: bool) -> None:
    blockmap = BlockMap(Geometry(25, BLOCK))
    blockmap.mark(2, fetched=first)
    blockmap.mark(2, fetched=not first)
    assert (blockmap.fetched_bytes, blockmap.same_bytes) == ((5, 0) if first else (0, 5))


def test_after_forget_all_it_is_as_new() -> None:
    geometry = Geometry(12 * BLOCK - 3, BLOCK)
    blockmap = BlockMap(geometry)
    for block in range(geometry.blocks):
        blockmap.mark(block, fetched=bool(block % 2))
    assert blockmap.complete
    blockmap.forget_all()
    assert_alike(blockmap, Naive(geometry))
    blockmap.mark(11, fetched=False)
    assert blockmap.same_bytes == 7


def test_a_block_marked_during_the_search_is_not_found_after_that() -> None:
    blockmap = BlockMap(Geometry(20 * BLOCK, BLOCK))
    search = blockmap.missing(range(20))
    assert next(search) == 0
    for block in range(1, 18):
        blockmap.mark(block, fetched=False)
    assert list(search) == [18, 19]


def test_present_blocks_are_passed_over_quickly() -> None:
    blocks = 2**19
    blockmap = BlockMap(Geometry(blocks * BLOCK, BLOCK))
    for block in range(blocks - 1):
        blockmap.mark(block, fetched=False)
    started = time.monotonic()
    for _ in range(500):
        assert next(blockmap.missing(range(blocks))) == blocks - 1
    # One block at a time this takes minutes.
    assert time.monotonic() - started < 5


def test_a_huge_map_takes_one_bit_a_block_and_is_searched_lazily() -> None:
    geometry = Geometry(8 * 2**40)
    tracemalloc.start()
    try:
        blockmap = BlockMap(geometry)
        blockmap.mark(0, fetched=False)
        search = blockmap.missing(range(geometry.blocks))
        assert [next(search), next(search)] == [1, 2]
        assert next(blockmap.missing(range(geometry.blocks - 1, geometry.blocks))) == geometry.blocks - 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < geometry.blocks / 8 * 1.01
