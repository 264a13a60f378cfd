"""How much may be in flight: as much as the link needs, whatever becomes of its round trip."""

from __future__ import annotations

import pytest

from blockcopy.replica.source.window import BASE_SECONDS, Window
from blockcopy.transport.backoff import Backoff


class Route:
    """A link with a clock: a flight takes the round trip, and longer where it waits for what is before it."""

    def __init__(self, round_trip: float, blocks_per_second: float) -> None:
        self.now = 0.0
        self.round_trip = round_trip
        self._rate = blocks_per_second
        self.window = Window(32, min_blocks=8, max_blocks=1024, clock=lambda: self.now)

    def carry(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            took = max(self.round_trip, self.window.blocks / self._rate)
            self.now += took
            for _ in range(4):
                self.window.record_fetch(max(1, self.window.blocks // 4), took)


@pytest.mark.parametrize("slower", [0.05, 0.5, 2])
def test_a_route_that_becomes_slower_is_filled_again(slower: float) -> None:
    route = Route(0.01, 10_000)
    route.carry(5)
    assert route.window.blocks == 1024
    route.round_trip = slower
    route.carry(3 * BASE_SECONDS)
    assert route.window.blocks == 1024


def test_a_queue_of_our_own_is_not_taken_for_the_round_trip() -> None:
    """What waits in the link stays below a second, however long it lasts."""
    route = Route(0.01, 1000)  # 10 blocks fill it
    for _ in range(20):
        route.carry(10)
        assert route.window.blocks < 600


def test_delays_double_to_a_limit_and_are_half_chance() -> None:
    least, most = Backoff(lambda: 0), Backoff(lambda: 1)
    assert [most.next() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [least.next() for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]
    most.reset()
    assert most.next() == 1
    assert len({Backoff().next() for _ in range(20)}) > 1
