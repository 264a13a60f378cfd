from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcopy.block.geometry import BLOCK_SIZE, Extent, ExtentJoiner, Geometry, block_runs, join_extents, subtract


def test_the_block_size_is_the_original_programs() -> None:
    assert BLOCK_SIZE == 131072
    assert Geometry(1).block_size == BLOCK_SIZE


def test_an_extent_ends_behind_its_last_byte() -> None:
    assert Extent(10, 5).end == 15


@pytest.mark.parametrize(
    ("size", "blocks"), [(0, 0), (1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3), (2**62, 2**62 // 10 + 1)]
)
def test_blocks_count_the_short_last_one(size: int, blocks: int) -> None:
    assert Geometry(size, 10).block_count == blocks


@pytest.mark.parametrize("size", [1, 9, 10, 11, 25, 30])
def test_extents_cover_the_size_without_gap_or_overlap(size: int) -> None:
    geometry = Geometry(size, 10)
    extents = [geometry.extent(block) for block in range(geometry.block_count)]
    assert [extent.offset for extent in extents] == [0, *(extent.end for extent in extents)][:-1]
    assert extents[-1].end == size
    assert all(extent.length == 10 for extent in extents[:-1])
    assert 1 <= extents[-1].length <= 10


@pytest.mark.parametrize(("size", "block"), [(0, 0), (10, 1), (11, 2), (10, -1)])
def test_a_missing_block_has_no_extent(size: int, block: int) -> None:
    with pytest.raises(IndexError):
        Geometry(size, 10).extent(block)


@pytest.mark.parametrize(
    ("offset", "length", "blocks"),
    [
        (0, 1, range(0, 1)),
        (0, 10, range(0, 1)),
        (0, 11, range(0, 2)),
        (9, 2, range(0, 2)),
        (10, 10, range(1, 2)),
        (24, 1, range(2, 3)),
        (24, 100, range(2, 3)),
        (0, 2**70, range(0, 3)),
        (5, 0, range(0)),
        (10, 0, range(0)),
        (5, -5, range(0)),
        (25, 1, range(0)),
        (1000, 10, range(0)),
    ],
)
def test_span_has_the_blocks_that_a_byte_range_touches(offset: int, length: int, blocks: range) -> None:
    assert Geometry(25, 10).span(offset, length) == blocks


def test_span_agrees_with_counting_byte_by_byte() -> None:
    geometry = Geometry(25, 10)
    for offset in range(30):
        for length in range(30):
            touched = sorted({byte // 10 for byte in range(offset, min(offset + length, 25))})
            assert list(geometry.span(offset, length)) == touched


def test_an_empty_device_has_no_span() -> None:
    assert Geometry(0, 10).span(0, 100) == range(0)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([], []),
        ([0], [range(0, 1)]),
        ([7], [range(7, 8)]),
        ([0, 1, 2], [range(0, 3)]),
        ([0, 2, 3, 9], [range(0, 1), range(2, 4), range(9, 10)]),
    ],
)
def test_consecutive_blocks_are_one_run(blocks: list[int], expected: list[range]) -> None:
    assert list(block_runs(iter(blocks))) == expected


@pytest.mark.parametrize(
    ("gap", "expected"), [(0, [(0, 10), (11, 9), (40, 5)]), (1, [(0, 20), (40, 5)]), (20, [(0, 45)])]
)
def test_byte_ranges_are_joined_where_they_touch_or_overlap(gap: int, expected: list[tuple[int, int]]) -> None:
    extents = [Extent(*each) for each in ((0, 5), (5, 5), (11, 9), (12, 3), (40, 5))]
    assert join_extents(extents, gap=gap) == expected


def test_a_gap_at_the_beginning_is_not_joined() -> None:
    assert join_extents([Extent(3, 5)], gap=10) == [(3, 5)]


def test_a_joined_range_that_is_long_enough_is_not_extended() -> None:
    joined: list[Extent] = []
    joiner = ExtentJoiner(joined.append, max_length=4)
    for offset in range(0, 10, 2):
        joiner.add(Extent(offset, 2))
    assert joined == [(0, 4), (4, 4)]
    joiner.flush()
    joiner.flush()
    assert joined == [(0, 4), (4, 4), (8, 2)]


EXTENTS = st.lists(st.builds(Extent, st.integers(0, 40), st.integers(1, 12)), max_size=5)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(EXTENTS, EXTENTS)
def test_what_is_subtracted_is_in_no_part_that_is_left(extents: list[Extent], others: list[Extent]) -> None:
    def covered(parts: list[Extent]) -> set[int]:
        return {at for part in parts for at in range(part.offset, part.end)}

    left = subtract(extents, others)
    assert all(part.length > 0 for part in left)
    assert covered(left) == covered(extents) - covered(others)
    assert sum(part.length for part in left) == sum(len(covered([each]) - covered(others)) for each in extents)
    assert subtract(extents, []) == extents
