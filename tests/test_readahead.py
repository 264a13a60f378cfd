"""How far ahead is read, and for whom; how much may be in flight. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from blockcopy.replica.readahead import ReadAhead
from blockcopy.replica.source.window import Window

BLOCKS = 10_000


def ahead() -> ReadAhead:
    return ReadAhead(BLOCKS, Window(64, min_blocks=8, max_blocks=512))


def brought(reader: ReadAhead, starts: Iterable[int], *, length: int = 1, waits: bool = True) -> list[int]:
    """The blocks that are brought while these are read, in the order in which they are."""
    found: list[int] = []
    for start in starts:
        for piece in reader.record_read(range(start, start + length), waits=waits):
            found += piece
    return found


@pytest.mark.parametrize("length", [1, 2, 8])
@pytest.mark.parametrize("first", [0, 500])
def test_a_reader_in_order_is_read_ahead_for_from_its_second_read(first: int, length: int) -> None:
    reader = ahead()
    assert brought(reader, [first], length=length) == []
    found = brought(reader, range(first + length, first + 100 * length, length), length=length)
    assert found == sorted(set(found)), "each once, in order"
    assert found[0] == first + 2 * length
    assert found[-1] >= first + 100 * length


def test_the_window_grows_for_who_waits_and_not_for_others() -> None:
    waiting, served = ahead(), ahead()
    far = brought(waiting, range(20))[-1]
    near = brought(served, range(20), waits=False)[-1]
    assert near <= 20 + 8 < far
    assert far <= 20 + 64, "what the link's window allows"


def test_no_further_than_the_end() -> None:
    assert brought(ahead(), range(BLOCKS - 20, BLOCKS))[-1] == BLOCKS - 1


def test_a_reader_that_goes_backward() -> None:
    found = brought(ahead(), range(1000, 900, -1))
    assert set(found) >= set(range(990, 900, -1))
    assert len(found) == len(set(found))


@pytest.mark.parametrize("step", [10, -10, 300])
def test_a_reader_in_strides(step: int) -> None:
    starts = [4000 + step * index for index in range(12)]
    found = brought(ahead(), starts, length=2)
    assert set(found) >= {block for start in starts[5:] for block in (start, start + 1)}
    assert {(block - 4000) % step for block in found} <= {0, 1, 1 + step}, "and nothing between"


def test_several_readers_at_once() -> None:
    reader = ahead()
    orders = [range(0, 50), range(3000, 3050), range(9000, 8950, -1), range(5000, 5500, 10)]
    found = set()
    for starts in zip(*orders, strict=True):
        found |= set(brought(reader, starts))
    for order in orders:
        assert set(order[10:]) <= found


def test_random_reads_bring_little() -> None:
    chance = random.Random(1)
    found = brought(ahead(), (chance.randrange(BLOCKS) for _ in range(2000)))
    assert len(found) < 400


def test_requests_of_the_kernel_come_a_little_out_of_order() -> None:
    reader = ahead()
    starts = [*range(10), 11, 10, 12, 14, 13, *range(15, 40)]
    assert set(brought(reader, starts)) >= set(range(15, 40))


def test_a_block_that_is_read_in_pieces_is_one_read() -> None:
    assert brought(ahead(), [5, 5, 5, 5]) == []


# The window of a link


def test_it_grows_while_flights_land_as_soon_as_the_quickest() -> None:
    window = Window(32, min_blocks=8, max_blocks=1024)
    for _ in range(200):
        window.record_fetch(8, 0.1)
    assert window.blocks == 1024


def test_it_shrinks_when_they_queue_and_grows_again() -> None:
    window = Window(32, min_blocks=8, max_blocks=1024)
    window.record_fetch(8, 0.01)
    for _ in range(20):
        window.record_fetch(8, 2.0)
    assert window.blocks == 8
    window.record_fetch(8, 0.05)
    assert window.blocks == 16


def test_a_slow_link_settles_where_little_queues() -> None:
    """100 blocks a second, a round trip of 50 ms: what is in flight takes less than a second to come."""
    window = Window(32, min_blocks=8, max_blocks=1024)
    for _ in range(500):
        window.record_fetch(4, 0.05 + window.blocks / 100)
    assert window.blocks < 60
