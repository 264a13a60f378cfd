from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import pairwise

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.replica.state.blockmap import CHUNK_BLOCKS, BlockMap, Changes, Kind
from blockcopy.replica.state.user_pages import PAGE_SIZE

BLOCK = 10
"""Bytes in a block of these tests: the arithmetic is the same."""

SIZES = [0, 1, 9, 10, 11, *(8 * BLOCK * n + more for n in (1, 2) for more in (-11, -10, -1, 0, 1, 10, 11))]


def mark(blockmap: BlockMap, block: int, *, fetched: bool) -> None:
    blockmap.mark(range(block, block + 1), "fetched" if fetched else "same")


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
        return [block for block in blocks if block < self.geometry.block_count and block not in known]

    def bytes_in(self, blocks: set[int]) -> int:
        return sum(self.geometry.extent(block).length for block in blocks)


def assert_alike(blockmap: BlockMap, naive: Naive) -> None:
    blocks = naive.geometry.block_count
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
    for _ in range(3 * geometry.block_count):
        block, fetched = chance.randrange(geometry.block_count), chance.random() < 0.5
        mark(blockmap, block, fetched=fetched)
        naive.mark(block, fetched=fetched)
        assert_alike(blockmap, naive)
        part = some_range(chance, geometry.block_count)
        assert list(blockmap.missing(part)) == naive.missing(part)
        assert blockmap.any_missing(part) is bool(naive.missing(part))


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_ranges_are_marked_as_their_blocks_are(size: int) -> None:
    geometry, chance = Geometry(size, BLOCK), random.Random(size)
    kinds: list[Kind] = ["same", "fetched", "zero"]
    for _ in range(20):
        by_range, by_block = BlockMap(geometry), BlockMap(geometry)
        while not by_range.complete:
            blocks, kind = some_range(chance, geometry.block_count), chance.choice(kinds)
            by_range.mark(blocks, kind)
            for block in blocks:
                by_block.mark(range(block, block + 1), kind)
            assert counts(by_range) == counts(by_block)
            assert list(by_range.missing(range(geometry.block_count))) == list(
                by_block.missing(range(geometry.block_count))
            )
            assert by_range.present_bytes == sum(counts(by_range))
            assert changed(by_range) == changed(by_block)


def counts(blockmap: BlockMap) -> tuple[int, int, int]:
    return blockmap.same_bytes, blockmap.fetched_bytes, blockmap.zero_bytes


def test_a_resumed_last_block_counts_once() -> None:
    geometry = Geometry(12 * BLOCK - 3, BLOCK)
    before = BlockMap(geometry)
    before.mark(range(11, 12), "fetched")
    after = BlockMap(geometry)
    after.resume(before.take_changes())
    after.mark(range(12), "same")
    assert (after.resumed_bytes, after.same_bytes) == (7, 11 * BLOCK)
    assert after.complete


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_the_last_missing_block_is_found_wherever_it_is(size: int) -> None:
    blocks = range(Geometry(size, BLOCK).block_count)
    for left in blocks:
        blockmap = BlockMap(Geometry(size, BLOCK))
        for block in blocks:
            if block != left:
                mark(blockmap, block, fetched=False)
        assert list(blockmap.missing(blocks)) == [left]
        assert not blockmap.complete
        mark(blockmap, left, fetched=True)
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
        mark(blockmap, block, fetched=True)
    assert blockmap.present_bytes == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_block_counts_once_and_as_it_was_marked_first(first: bool) -> None:
    blockmap = BlockMap(Geometry(25, BLOCK))
    mark(blockmap, 2, fetched=first)
    mark(blockmap, 2, fetched=not first)
    assert (blockmap.fetched_bytes, blockmap.same_bytes) == ((5, 0) if first else (0, 5))


def test_after_forget_all_it_is_as_new() -> None:
    geometry = Geometry(12 * BLOCK - 3, BLOCK)
    blockmap = BlockMap(geometry)
    for block in range(geometry.block_count):
        mark(blockmap, block, fetched=bool(block % 2))
    assert blockmap.complete
    blockmap.clear()
    assert_alike(blockmap, Naive(geometry))
    mark(blockmap, 11, fetched=False)
    assert blockmap.same_bytes == 7


def test_a_block_marked_during_the_search_is_not_found_after_that() -> None:
    blockmap = BlockMap(Geometry(20 * BLOCK, BLOCK))
    search = blockmap.missing(range(20))
    assert next(search) == 0
    for block in range(1, 18):
        mark(blockmap, block, fetched=False)
    assert list(search) == [18, 19]


def test_present_blocks_are_passed_over_quickly() -> None:
    blocks = 2**17
    blockmap = BlockMap(Geometry(blocks * BLOCK, BLOCK))
    for block in range(blocks - 1):
        mark(blockmap, block, fetched=False)
    started = time.process_time()  # of this process alone: others may be busy
    for _ in range(2000):
        assert next(blockmap.missing(range(blocks))) == blocks - 1
    # One block at a time this takes minutes.
    assert time.process_time() - started < 5


def test_a_huge_map_takes_one_bit_a_block_and_is_searched_lazily() -> None:
    geometry = Geometry(8 * 2**40)
    tracemalloc.start()
    try:
        blockmap = BlockMap(geometry)
        mark(blockmap, 0, fetched=False)
        search = blockmap.missing(range(geometry.block_count))
        assert [next(search), next(search)] == [1, 2]
        assert (
            next(blockmap.missing(range(geometry.block_count - 1, geometry.block_count)))
            == geometry.block_count - 1
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < geometry.block_count / 8 * 1.01


# Chunks, for the record


def changed(blockmap: BlockMap) -> dict[int, bytes]:
    """Return the chunks that changed since the last call."""
    changes = blockmap.take_changes()
    blockmap.settle()
    assert (changes.pages, changes.lost) == ({}, {})  # nobody has written
    return changes.chunks


def of(chunks: dict[int, bytes]) -> Changes:
    """Return `chunks` as `take_changes` hands them out."""
    return Changes(chunks, {}, {})


def chunks_of(blockmap: BlockMap, blocks: int) -> dict[int, bytes]:
    """Return the chunks that a record of all marked blocks has."""
    blockmap.restore_changes(of(dict.fromkeys(range(-(-blocks // CHUNK_BLOCKS)), b"")))
    return changed(blockmap)


def marked(geometry: Geometry, blocks: Iterable[int]) -> BlockMap:
    blockmap = BlockMap(geometry)
    for block in blocks:
        mark(blockmap, block, fetched=bool(block % 2))
    return blockmap


RECORDED = [
    *(1, 7, 8, 9, CHUNK_BLOCKS - 8, CHUNK_BLOCKS - 1, CHUNK_BLOCKS, CHUNK_BLOCKS + 1),
    *(2 * CHUNK_BLOCKS - 1, 2 * CHUNK_BLOCKS, 2 * CHUNK_BLOCKS + 9),
]
"""Numbers of blocks."""


@pytest.mark.parametrize(
    ("blocks", "present", "last"), pairwise(RECORDED, ["none", "some", "all but the last", "all"], [1, BLOCK])
)
def test_what_was_marked_is_resumed(blocks: int, present: str, last: int) -> None:
    geometry, chance = Geometry((blocks - 1) * BLOCK + last, BLOCK), random.Random(blocks)
    wanted = {
        "none": [],
        "some": [block for block in range(blocks) if chance.random() < 0.5],
        "all but the last": range(blocks - 1),
        "all": range(blocks),
    }[present]
    before = marked(geometry, wanted)
    chunks = chunks_of(before, blocks)
    assert [len(bits) for bits in chunks.values()] == [
        -(-min(CHUNK_BLOCKS, blocks - start) // 8) for start in range(0, blocks, CHUNK_BLOCKS)
    ]
    after = BlockMap(geometry)
    after.resume(of(chunks))
    assert after.resumed_bytes == after.present_bytes == before.present_bytes
    assert (after.same_bytes, after.fetched_bytes) == (0, 0)
    assert after.complete is before.complete
    assert list(after.missing(range(blocks + 20))) == list(before.missing(range(blocks)))
    assert changed(after) == {}  # it is on record already


def test_a_chunk_that_is_not_on_record_is_missing() -> None:
    geometry = Geometry((2 * CHUNK_BLOCKS + 9) * BLOCK, BLOCK)
    chunks = chunks_of(marked(geometry, range(geometry.block_count)), geometry.block_count)
    del chunks[1]
    blockmap = BlockMap(geometry)
    blockmap.resume(of(chunks))
    assert list(blockmap.missing(range(geometry.block_count))) == list(range(CHUNK_BLOCKS, 2 * CHUNK_BLOCKS))
    assert blockmap.resumed_bytes == (CHUNK_BLOCKS + 9) * BLOCK


def test_what_is_marked_after_a_resume_counts_besides() -> None:
    geometry = Geometry(12 * BLOCK - 3, BLOCK)
    blockmap = BlockMap(geometry)
    blockmap.resume(of({0: bytes([0b10, 0])}))
    for block in (1, 2, 11):
        mark(blockmap, block, fetched=True)
    assert (blockmap.resumed_bytes, blockmap.fetched_bytes) == (BLOCK, 2 * BLOCK - 3)
    assert changed(blockmap) == {0: bytes([0b110, 0b11111000])}
    blockmap.clear()
    assert (blockmap.resumed_bytes, blockmap.present_bytes) == (0, 0)
    assert list(blockmap.missing(range(12))) == list(range(12))


@pytest.mark.parametrize("padding", [0x00, 0xF0, 0xA0])
def test_padding_bits_are_no_blocks_whatever_the_record_has_there(padding: int) -> None:
    blockmap = BlockMap(Geometry(4 * BLOCK, BLOCK))
    blockmap.resume(of({0: bytes([0b0101 | padding])}))
    assert blockmap.resumed_bytes == 2 * BLOCK
    assert list(blockmap.missing(range(8))) == [1, 3]
    for block in (1, 3):
        mark(blockmap, block, fetched=False)
    assert blockmap.complete


@pytest.mark.parametrize("blocks", [CHUNK_BLOCKS, CHUNK_BLOCKS + 9])
@pytest.mark.parametrize(
    ("number", "bits"),
    [
        pytest.param(-1, bytes(CHUNK_BLOCKS // 8), id="before the first"),
        pytest.param(2, bytes(CHUNK_BLOCKS // 8), id="after the last"),
        pytest.param(2, b"", id="empty, after the last"),
        pytest.param(10**12, b"x", id="far after the last"),
        pytest.param(0, b"", id="empty"),
        pytest.param(0, bytes(CHUNK_BLOCKS // 8 - 1), id="too short"),
        pytest.param(0, bytes(CHUNK_BLOCKS // 8 + 1), id="too long"),
        pytest.param(1, bytes(1), id="last too short"),
        pytest.param(1, bytes(3), id="last too long"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(blocks: int, number: int, bits: bytes) -> None:
    blockmap = BlockMap(Geometry(blocks * BLOCK, BLOCK))
    with pytest.raises(ValueError, match=f"chunk {number}"):
        blockmap.resume(of({number: bits}))


def test_changes_are_the_chunks_that_were_marked_in_since_the_last_time() -> None:
    geometry = Geometry((2 * CHUNK_BLOCKS + 9) * BLOCK, BLOCK)
    blockmap = BlockMap(geometry)
    assert changed(blockmap) == {}
    mark(blockmap, 2 * CHUNK_BLOCKS, fetched=True)
    mark(blockmap, 3, fetched=False)
    changes = changed(blockmap)
    assert list(changes) == [0, 2]
    assert (changes[0][:2], changes[2]) == (bytes([0b1000, 0]), bytes([1, 0b11111110]))
    assert changed(blockmap) == {}
    mark(blockmap, 3, fetched=True)  # it was before
    assert changed(blockmap) == {}
    mark(blockmap, 4, fetched=True)
    assert list(changed(blockmap)) == [0]


def test_changes_that_were_put_back_are_handed_out_as_they_are_then() -> None:
    geometry = Geometry((CHUNK_BLOCKS + 9) * BLOCK, BLOCK)
    blockmap = BlockMap(geometry)
    mark(blockmap, 0, fetched=True)
    changes = changed(blockmap)
    mark(blockmap, 1, fetched=True)
    mark(blockmap, CHUNK_BLOCKS, fetched=True)
    blockmap.restore_changes(of(changes))
    again = changed(blockmap)
    assert list(again) == [0, 1]
    assert again[0][0] == 0b11
    blockmap.restore_changes(of(again))
    blockmap.clear()
    assert changed(blockmap) == {}


def test_each_time_all_is_forgotten_it_is_another_generation() -> None:
    blockmap = BlockMap(Geometry(BLOCK, BLOCK))
    before = blockmap.generation
    mark(blockmap, 0, fetched=True)
    blockmap.resume(of({}))
    assert blockmap.generation == before
    blockmap.clear()
    assert blockmap.generation > before


# What the user writes


PAGE = PAGE_SIZE
PAGES = 4
"""Pages in a block of these tests."""

WRITTEN = Geometry(5 * PAGES * PAGE + PAGE + 100, PAGES * PAGE)
"""Five blocks, and one of a page and a short page: 22 pages."""


def pages_of(extents: Iterable[Extent]) -> set[int]:
    """Return the pages of `extents`, whole ones. The last page of the device is short."""
    found: set[int] = set()
    for extent in extents:
        assert extent.offset % PAGE == 0
        assert extent.length > 0
        assert extent.end % PAGE == 0 or extent.end == WRITTEN.size
        found |= set(range(extent.offset // PAGE, -(-extent.end // PAGE)))
    return found


class Content(NamedTuple):
    """What a map says: the present `blocks`, the `pages` of the user, the `lost` ones, the blocks `touched`."""

    blocks: frozenset[int] = frozenset()
    pages: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    touched: frozenset[int] = frozenset()

    def room(self) -> set[int]:
        """Return the pages that the source's bytes may fill."""
        return {page for page in range(22) if page // PAGES not in self.blocks and page not in self.pages}


def assert_is(blockmap: BlockMap, content: Content) -> None:
    whole = Extent(0, WRITTEN.size)
    assert set(range(6)) - set(blockmap.missing(range(6))) == content.blocks
    assert blockmap.complete is (len(content.blocks) == 6)
    assert blockmap.present_bytes == sum(WRITTEN.extent(block).length for block in content.blocks)
    assert pages_of(blockmap.room(whole)) == content.room()
    assert {page for page in range(22) if blockmap.user.is_lost(Extent(page * PAGE, 1))} == content.lost
    assert {block for block in range(6) if blockmap.user.has_block(block)} == content.touched
    assert blockmap.user.written_bytes == sum(WRITTEN.extent(block).length for block in content.touched)
    for start in range(22):
        for stop in (start + 1, min(22, start + PAGES), 22):
            extent = Extent(start * PAGE + 1, min(stop * PAGE - 1, WRITTEN.size) - start * PAGE - 1)
            assert blockmap.is_available(extent) is not bool(content.room() & set(range(start, stop)))


class Model:
    """The pages of a device, what of them is durable, and what is on record."""

    def __init__(self) -> None:
        self.now = self.durable = self.taken = Content()
        self.since: set[int] = set()  # pages written since the last sync that succeeded
        self.since_taken: set[int] = set()

    def mark(self, blocks: range) -> None:
        self.now = self.now._replace(blocks=self.now.blocks | set(blocks))

    def write(self, pages: range) -> None:
        written = self.now.pages | set(pages)
        whole = {
            block
            for block in {page // PAGES for page in pages}
            if set(range(block * PAGES, min(22, block * PAGES + PAGES))) <= written
        }
        self.now = Content(
            self.now.blocks | whole,
            written,
            self.now.lost - set(pages),
            self.now.touched | {page // PAGES for page in pages},
        )
        self.since |= set(pages)
        self.since_taken |= set(pages)

    def take(self) -> None:
        self.taken, self.since_taken = self.now, set()

    def settle(self) -> None:
        self.durable, self.since = self.taken, set(self.since_taken)

    def roll_back(self) -> None:
        blocks = self.durable.blocks
        self.now = self.now._replace(blocks=blocks, lost=self.now.lost | self.since)
        self.taken = self.now
        self.since, self.since_taken = set(), set()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), st.integers(0, 5), st.integers(1, 3)),
        st.tuples(st.sampled_from(["write", "write"]), st.integers(0, 21), st.integers(1, 9)),
        st.tuples(st.just("cut"), st.integers(0, 21), st.integers(1, 4)),
        st.tuples(st.sampled_from(["take", "settle", "settle, not recorded", "roll back"]), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(STEPS)
def test_marks_writes_and_failed_syncs_mean_what_they_mean_for_each_page(steps: list[tuple[str, int, int]]) -> None:
    """Nothing of the source fits a page of the user, what a sync has covered stays, and the record is true."""
    blockmap, model = BlockMap(WRITTEN), Model()
    record, on_record = Changes({}, {}, {}), Content()
    changes: Changes | None = None
    for step, start, length in steps:
        if step == "mark":
            blockmap.mark(range(start, min(6, start + length)), "fetched")
            model.mark(range(start, min(6, start + length)))
        elif step in ("write", "cut"):
            pages = range(start, min(22, start + length))
            extent = Extent(start * PAGE, min(WRITTEN.size, pages.stop * PAGE) - start * PAGE)
            if step == "cut":
                if set(pages) & (model.now.room() | model.now.lost):
                    continue  # the volume makes them available first, and refuses lost ones
                extent = Extent(extent.offset + 10, extent.length - 20)
            blockmap.note_write(extent)
            model.write(pages)
        elif step == "take" and changes is None:
            changes = blockmap.take_changes()
            model.take()
        elif step.startswith("settle") and changes is not None:
            blockmap.settle()
            model.settle()
            if step == "settle":
                record = Changes(*({**old, **new} for old, new in zip(record, changes, strict=True)))
                on_record = model.durable
            else:
                blockmap.restore_changes(changes)
            changes = None
        elif step == "roll back":
            generation = blockmap.generation
            blockmap.roll_back()
            assert blockmap.generation > generation
            model.roll_back()
            record = Changes(*({**old, **new} for old, new in zip(record, blockmap.take_changes(), strict=True)))
            blockmap.settle()
            model.take()
            model.settle()
            on_record, changes = model.now, None
        assert_is(blockmap, model.now)
    resumed = BlockMap(WRITTEN)
    resumed.resume(record)
    assert_is(resumed, on_record)


def test_a_map_with_writes_of_the_user_is_not_cleared() -> None:
    blockmap = BlockMap(WRITTEN)
    blockmap.note_write(Extent(0, PAGE))
    with pytest.raises(RuntimeError, match="writes of a user"):
        blockmap.clear()


def test_a_block_that_the_user_filled_counts_as_written() -> None:
    blockmap = BlockMap(WRITTEN)
    for page in (3, 0, 2, 1):
        assert not blockmap.is_available(Extent(0, PAGES * PAGE))
        blockmap.note_write(Extent(page * PAGE, PAGE))
    assert blockmap.overwritten_bytes == blockmap.present_bytes == PAGES * PAGE
    assert blockmap.room(Extent(0, 2 * PAGES * PAGE)) == [Extent(PAGES * PAGE, PAGES * PAGE)]
    blockmap.take_changes()
    blockmap.roll_back()
    assert (blockmap.overwritten_bytes, blockmap.present_bytes, blockmap.user.lost_bytes) == (0, 0, PAGES * PAGE)


def test_a_failed_write_is_another_generation_and_makes_present_blocks_the_users() -> None:
    blockmap = BlockMap(WRITTEN)
    blockmap.mark(range(1), "same")
    before = blockmap.generation
    blockmap.interrupt(Extent(0, 2 * PAGES * PAGE))
    assert blockmap.generation > before
    assert [blockmap.user.has_block(block) for block in (0, 1)] == [True, False]


def test_the_map_of_a_random_writer_is_small() -> None:
    """One page here and there on 64 GiB: a bit for each page, one more until the next sync, and one a block."""
    geometry = Geometry(1 << 36)
    blockmap = BlockMap(geometry)
    blocks = range(0, geometry.block_count, 64)
    tracemalloc.start()
    try:
        for block in blocks:
            blockmap.note_write(Extent(block * geometry.block_size + 8 * PAGE, PAGE))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert blockmap.user.written_bytes == len(blocks) * geometry.block_size
    assert peak < 2 * 1.1 * geometry.size // PAGE // 8 + (1 << 20)
