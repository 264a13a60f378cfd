"""The user's pages: what is the user's, what was lost, and what no sync has covered yet."""

from __future__ import annotations

import pytest
from support import BLOCK_SIZE

from blockcopy.block.geometry import Extent, Geometry
from blockcopy.replica.state.bits import ROW_BYTES
from blockcopy.replica.state.user_pages import PAGE_SIZE, UserPages

PAGE = PAGE_SIZE
SIZE = 3 * BLOCK_SIZE + 2 * PAGE + 100
"""Three blocks, and one of two pages and a short one."""

LAST = SIZE - 100
"""Where the short last page begins."""


@pytest.fixture
def pages() -> UserPages:
    return UserPages(Geometry(SIZE))


@pytest.mark.parametrize(
    ("extent", "touched", "covered", "cut"),
    [
        pytest.param((0, PAGE), range(1), range(1), [], id="a page"),
        pytest.param((PAGE, 3 * PAGE), range(1, 4), range(1, 4), [], id="pages"),
        pytest.param((0, 1), range(1), range(0), [(0, PAGE)], id="its first byte"),
        pytest.param((PAGE - 1, 1), range(1), range(0), [(0, PAGE)], id="its last byte"),
        pytest.param((512, 512), range(1), range(0), [(0, PAGE)], id="a sector"),
        pytest.param((PAGE - 1, 2), range(2), range(0), [(0, PAGE), (PAGE, PAGE)], id="an edge"),
        pytest.param(
            (1, 3 * PAGE), range(4), range(1, 3), [(0, PAGE), (3 * PAGE, PAGE)], id="pages, and both edges"
        ),
        pytest.param((PAGE, PAGE + 1), range(1, 3), range(1, 2), [(2 * PAGE, PAGE)], id="a page and a byte"),
        pytest.param((LAST, 100), range(98, 99), range(98, 99), [], id="the short last page"),
        pytest.param((LAST - PAGE, PAGE + 100), range(97, 99), range(97, 99), [], id="the last two pages"),
        pytest.param((LAST, 99), range(98, 99), range(0), [(LAST, 100)], id="a part of the short page"),
        pytest.param((LAST + 1, 99), range(98, 99), range(0), [(LAST, 100)], id="the rest of the short page"),
    ],
)
def test_an_extent_touches_covers_and_cuts_pages(
    extent: tuple[int, int], touched: range, covered: range, cut: list[tuple[int, int]], pages: UserPages
) -> None:
    given = Extent(*extent)
    assert pages.touched(given) == touched
    assert list(pages.covered(given)) == list(covered)
    assert list(pages.cut(given)) == cut


def test_a_block_with_one_page_counts_as_written(pages: UserPages) -> None:
    pages.add(Extent(PAGE, PAGE))
    pages.add(Extent(3 * PAGE, 1))
    assert pages.written_bytes == BLOCK_SIZE
    pages.add(Extent(3 * BLOCK_SIZE, PAGE))
    assert pages.written_bytes == BLOCK_SIZE + 2 * PAGE + 100
    assert [pages.has_block(block) for block in range(4)] == [True, False, False, True]
    assert (pages.count_blocks(range(4)), pages.count_blocks(range(1, 3))) == (2, 0)
    assert pages.has(Extent(PAGE + 7, 9))
    assert not pages.has(Extent(PAGE, 2 * PAGE))


def test_a_write_across_blocks_is_of_all_of_them(pages: UserPages) -> None:
    pages.add(Extent(BLOCK_SIZE - PAGE, BLOCK_SIZE + 2 * PAGE))
    assert [pages.has_block(block) for block in range(4)] == [True, True, True, False]
    assert list(pages.others(Extent(0, 3 * BLOCK_SIZE))) == [
        Extent(0, BLOCK_SIZE - PAGE),
        Extent(2 * BLOCK_SIZE + PAGE, BLOCK_SIZE - PAGE),
    ]


def test_what_is_left_for_the_source_ends_with_the_device(pages: UserPages) -> None:
    last = Extent(3 * BLOCK_SIZE, 2 * PAGE + 100)
    assert list(pages.others(last)) == [last]
    pages.add(Extent(3 * BLOCK_SIZE, PAGE))
    assert list(pages.others(last)) == [Extent(3 * BLOCK_SIZE + PAGE, PAGE + 100)]
    pages.add(last)
    assert list(pages.others(last)) == []


def test_what_no_sync_has_covered_is_lost_by_one_that_fails(pages: UserPages) -> None:
    def write(page: int) -> None:
        pages.add(Extent(page * PAGE, PAGE))
        pages.note_write(Extent(page * PAGE, PAGE))

    def lost() -> list[int]:
        return [page for page in range(99) if pages.is_lost(Extent(page * PAGE, 1))]

    write(0)
    pages.begin_sync()
    write(1)
    pages.end_sync()
    assert (lost(), pages.lost_bytes) == ([], 0)
    pages.begin_sync()
    write(2)
    pages.lose_unsynced()
    assert (lost(), pages.lost_bytes) == ([1, 2], 2 * PAGE)
    pages.lose_unsynced()  # nothing is lost twice
    pages.note_write(Extent(PAGE, PAGE))
    assert lost() == [2]
    pages.note_write(Extent(2 * PAGE, PAGE - 1))  # a part of the page
    assert lost() == [2]
    pages.begin_sync()
    pages.end_sync()
    pages.lose_unsynced()
    assert lost() == [2]


def test_a_lost_page_is_the_users_even_if_its_block_was_so_before(pages: UserPages) -> None:
    """A present block counts one page alone; if the block is missing again, all of its lost pages must count."""
    pages.add(Extent(0, PAGE))
    pages.note_write(Extent(5 * PAGE, 2 * PAGE))
    pages.lose_unsynced()
    assert list(pages.others(Extent(0, BLOCK_SIZE))) == [
        Extent(PAGE, 4 * PAGE),
        Extent(7 * PAGE, BLOCK_SIZE - 7 * PAGE),
    ]


def test_what_was_recorded_is_resumed(pages: UserPages) -> None:
    pages.add(Extent(BLOCK_SIZE, PAGE))
    pages.lose(Extent(3 * BLOCK_SIZE - 1, 2))
    changes = pages.take_changes()
    assert pages.take_changes() == ({}, {})
    pages.restore_changes(*changes)
    assert pages.take_changes() == changes
    again = UserPages(Geometry(SIZE))
    again.resume(*changes)
    assert again.written_bytes == pages.written_bytes == SIZE - BLOCK_SIZE
    assert again.lost_bytes == 2 * PAGE
    assert [again.is_lost(Extent(at, 1)) for at in (BLOCK_SIZE, 3 * BLOCK_SIZE - 1, 3 * BLOCK_SIZE)] == [
        *(False, True, True)
    ]
    assert again.take_changes() == ({}, {})


@pytest.mark.parametrize("which", ["pages", "lost"])
def test_pages_that_the_device_does_not_have_are_refused(which: str, pages: UserPages) -> None:
    row = bytearray(ROW_BYTES)
    row[99 // 8] = 1 << 99 % 8  # the device has 99 pages
    with pytest.raises(ValueError, match="row 0"):
        pages.resume(*(({0: bytes(row)}, {}) if which == "pages" else ({}, {0: bytes(row)})))
