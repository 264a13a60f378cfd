"""How fast background hydration may go, by a clock that jumps to the next event."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.replica.hydration.throttle import BATCH_BLOCKS, Throttle
from blockcopy.replica.source.window import Window

YIELDING_BLOCKS, YIELDING_SECONDS = 4, 0.25


class Ground:
    """A throttle over a window of 64 blocks, and when a reader last waited."""

    def __init__(self, limit: int | None = None, blocks: int = 64) -> None:
        self.demanded_at = -math.inf
        self.throttle = Throttle(
            Window(blocks, min_blocks=8, max_blocks=4096), lambda: self.demanded_at, limit=limit
        )

    async def admitted(self) -> float:
        """Take the next batch. Returns for how many seconds that was waited for."""
        began = trio.current_time()
        await self.throttle.admit()
        self.throttle.take(self.throttle.batch_blocks)
        return trio.current_time() - began

    async def is_held_up(self) -> bool:
        """Return whether nothing is admitted, however long it takes."""
        with trio.move_on_after(1000):
            await self.throttle.admit()
            return False
        return True

    async def admits_after(self, change: Callable[[], object]) -> bool:
        """Return whether `change` wakes waiting tasks at once."""
        admitted = trio.Event()

        async def wait() -> None:
            await self.throttle.admit()
            admitted.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not admitted.is_set()
            began = trio.current_time()
            change()
            with trio.move_on_after(1000):
                await admitted.wait()
            nursery.cancel_scope.cancel()
        return trio.current_time() == began


def in_no_time(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


def test_without_limit_and_readers_the_window_is_filled_and_no_more() -> None:
    async def scenario() -> None:
        ground = Ground()
        assert ground.throttle.batch_blocks == 16
        assert [await ground.admitted() for _ in range(4)] == [0, 0, 0, 0]
        assert await ground.is_held_up()
        assert await ground.admits_after(lambda: ground.throttle.give_back(16))

    in_no_time(scenario)


def test_no_batch_is_larger_than_is_asked_for_as_one() -> None:
    async def scenario() -> None:
        assert Ground(blocks=64 * BATCH_BLOCKS).throttle.batch_blocks == BATCH_BLOCKS

    in_no_time(scenario)


@pytest.mark.parametrize("blocks_per_second", [0.1, 1, 8, 40])
def test_the_limit_is_kept_to_evenly(blocks_per_second: float) -> None:
    async def scenario() -> None:
        ground = Ground(limit=int(blocks_per_second * BLOCK_SIZE))
        began, taken = trio.current_time(), 0
        for _ in range(50):
            waited = await ground.admitted()
            batch = ground.throttle.batch_blocks
            assert batch == max(1, int(blocks_per_second / 4))
            assert waited == pytest.approx(batch / blocks_per_second if taken else 0, rel=0.01)
            taken += batch
            ground.throttle.give_back(batch)
        seconds = trio.current_time() - began
        assert (taken - batch) / seconds == pytest.approx(blocks_per_second, rel=0.01)

    in_no_time(scenario)


def test_what_costs_nothing_counts_for_no_limit() -> None:
    async def scenario() -> None:
        ground = Ground(limit=BLOCK_SIZE)
        await ground.throttle.admit()
        ground.throttle.take(0)
        assert await ground.admitted() == 0

    in_no_time(scenario)


@pytest.mark.parametrize("limit", [None, 100 * BLOCK_SIZE])
def test_a_new_limit_holds_at_once(limit: int | None) -> None:
    async def scenario() -> None:
        ground = Ground(limit=BLOCK_SIZE // 1000)
        await ground.admitted()
        ground.throttle.give_back(1)
        assert await ground.admits_after(lambda: setattr(ground.throttle, "limit", limit))

    in_no_time(scenario)


def test_a_pause_lasts_until_it_is_over() -> None:
    async def scenario() -> None:
        ground = Ground()
        ground.throttle.paused = True
        assert await ground.is_held_up()
        ground.demanded_at = trio.current_time()
        assert await ground.is_held_up()
        assert await ground.admits_after(lambda: setattr(ground.throttle, "paused", False))

    in_no_time(scenario)


def test_beside_a_reader_little_is_in_flight_and_all_of_it_again_behind_the_last_read() -> None:
    async def scenario() -> None:
        ground = Ground()
        ground.demanded_at = trio.current_time()
        assert ground.throttle.batch_blocks == YIELDING_BLOCKS
        assert await ground.admitted() == 0
        assert await ground.admitted() == pytest.approx(YIELDING_SECONDS)
        assert await ground.admitted() == 0
        ground.demanded_at = trio.current_time()
        assert await ground.admitted() == pytest.approx(YIELDING_SECONDS)

    in_no_time(scenario)


def test_readers_that_never_cease_do_not_stop_it() -> None:
    async def scenario() -> None:
        ground = Ground(blocks=8)
        for _ in range(100):
            ground.demanded_at = trio.current_time()
            assert await ground.admitted() == 0
            ground.throttle.give_back(ground.throttle.batch_blocks)
            await trio.sleep(YIELDING_SECONDS / 10)

    in_no_time(scenario)


def test_what_is_in_flight_beyond_the_window_holds_up_the_next_batch() -> None:
    async def scenario() -> None:
        ground = Ground()
        await ground.throttle.admit()
        ground.throttle.take(1000)
        assert await ground.is_held_up()
        ground.throttle.give_back(1000)
        assert await ground.admitted() == 0

    in_no_time(scenario)


class TickingClock(trio.abc.Clock):
    """A clock of which each look takes a millisecond. It jumps over sleeps."""

    def __init__(self, now: float) -> None:
        self._now = now

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self._now += 0.001
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if math.isfinite(deadline):
            self._now = max(self._now, deadline)
        return 0


@pytest.mark.parametrize("limit", [None, 64 * BLOCK_SIZE])
def test_what_ends_between_two_looks_at_the_clock_holds_nothing_up_for_ever(limit: int | None) -> None:
    """The time of the readers ends, or that of the limit, while `admit` looks."""

    async def main() -> bool:
        ground = Ground(limit)
        ground.demanded_at = 0 if limit is None else -math.inf
        ground.throttle._free_at = -math.inf if limit is None else YIELDING_SECONDS
        return await ground.is_held_up()

    for looks in range(40):
        assert not trio.run(main, clock=TickingClock(YIELDING_SECONDS - (looks + 0.5) / 1000)), looks
