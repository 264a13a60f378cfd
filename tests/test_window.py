"""How much may be in flight: as much as the link needs, whatever becomes of its round trip."""

from __future__ import annotations

import itertools

import pytest

from blockcopy.replica.source import window as module
from blockcopy.replica.source.window import BASE_SECONDS, Window
from blockcopy.transport import backoff


class Clock:
    """The clock of all windows in a test, which the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of all windows."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def a_window() -> Window:
    """Return a small window."""
    return Window(32, min_blocks=8, max_blocks=64)


class Route:
    """A link with a clock. A fetch takes the round trip, and waits for the fetches before it."""

    def __init__(self, clock: Clock, round_trip: float, blocks_per_second: float) -> None:
        self.clock = clock
        self.round_trip = round_trip
        self._rate = blocks_per_second
        self.window = Window(32, min_blocks=8, max_blocks=1024)

    def carry(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            took = max(self.round_trip, self.window.blocks / self._rate)
            self.clock.now += took
            for _ in range(4):
                self.window.record_fetch(max(1, self.window.blocks // 4), took)


@pytest.mark.parametrize("slower", [0.05, 0.5, 2])
def test_a_route_that_becomes_slower_is_filled_again(clock: Clock, slower: float) -> None:
    route = Route(clock, 0.01, 10_000)
    route.carry(5)
    assert route.window.blocks == 1024
    route.round_trip = slower
    route.carry(3 * BASE_SECONDS)
    assert route.window.blocks == 1024


def test_a_queue_of_our_own_is_not_taken_for_the_round_trip(clock: Clock) -> None:
    """What waits in the link stays below a second, however long it lasts."""
    route = Route(clock, 0.01, 1000)  # 10 blocks fill it
    for _ in range(20):
        route.carry(10)
        assert route.window.blocks < 600


def test_delays_double_to_a_limit_and_are_half_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({next(backoff.delays()) for _ in range(20)}) > 1
    for chance, seconds in (1, [1, 2, 4, 8, 16, 30, 30]), (0, [0.5, 1, 2, 4, 8, 15, 15]):
        monkeypatch.setattr("random.random", lambda chance=chance: chance)
        assert list(itertools.islice(backoff.delays(), 7)) == seconds


def test_a_window_grows_by_each_fetch_that_is_about_as_quick_as_the_quickest() -> None:
    window = a_window()
    for seconds, blocks in ((0.5, 40), (0.55, 48), (0.65, 48), (0.75, 48), (0.4, 56), (0.4, 64), (0.4, 64)):
        window.record_fetch(8, seconds)
        assert window.blocks == blocks, seconds


def test_a_window_shrinks_by_each_fetch_that_waited_and_has_a_minimum() -> None:
    window = a_window()
    window.record_fetch(1, 0.1)
    for blocks in (25, 17, 9, 8, 8):
        window.record_fetch(8, 0.5)
        assert window.blocks == blocks


@pytest.mark.parametrize(("passed", "grows"), [(BASE_SECONDS - 1, False), (BASE_SECONDS + 1, True)])
def test_the_quickest_fetch_is_forgotten_after_some_time(clock: Clock, passed: float, grows: bool) -> None:
    window = a_window()
    window.record_fetch(1, 0.1)
    clock.now += passed
    before = window.blocks
    window.record_fetch(8, 0.5)
    assert window.blocks == before + (8 if grows else -8)


def test_a_slower_fetch_is_remembered_until_a_quicker_one(clock: Clock) -> None:
    """When the quickest is forgotten, the next quickest since then counts."""
    window = a_window()
    window.record_fetch(1, 0.1)
    clock.now += BASE_SECONDS / 2
    window.record_fetch(1, 0.3)
    clock.now += BASE_SECONDS / 2 + 1
    before = window.blocks
    window.record_fetch(8, 0.7)  # 0.4 more than the one that is left
    assert window.blocks == before - 8
