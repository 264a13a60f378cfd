"""The pool of connections of a lane: how many there are, which one is asked, and what becomes of those that end.

The decision alone, over a model of a line; the pool with connections that a test ends, and a clock that jumps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from blockcopy.errors import SourceChangedError, SourceError
from blockcopy.replica.source.batches import Delta, Signatures
from blockcopy.replica.source.connector import RoundTrip
from blockcopy.replica.source.pool import Pool
from blockcopy.transport.scaling import MAX_CONNECTIONS, SAMPLE_SECONDS, Sample, Scaling

MIB = 1 << 20
CHANNEL_WINDOW = 2 * MIB


class Line:
    """A line over which a pool copies: channels have a window, and all of them share the rate."""

    def __init__(
        self, round_trip: float, rate: float = math.inf, sessions: int = 100, size: float = math.inf
    ) -> None:
        self.round_trip, self.rate, self.sessions, self.size = round_trip, rate, sessions, size
        self.now = self.received = 0.0
        self.connections = 1
        self.most = 1

    def carry(self, scaling: Scaling, seconds: float) -> None:
        """Let `scaling` decide for `seconds`, in samples."""
        end = self.now + seconds
        while self.now < end:
            self.now += SAMPLE_SECONDS
            channel = CHANNEL_WINDOW / self.round_trip
            self.received += SAMPLE_SECONDS * min(self.rate, channel * self.connections)
            full = self.rate <= channel * self.connections
            remaining = self.size - self.received
            now, received = self.now, int(self.received)
            sample = Sample(now, received, self.connections, self.round_trip, full, remaining)
            wanted = scaling.decide(sample)
            if wanted > self.connections:
                self.connections = min(wanted, self.sessions)
                scaling.restart(self.now, int(self.received))
            else:
                self.connections = wanted
            self.most = max(self.most, self.connections)


def test_a_window_that_binds_gets_as_many_connections_as_pay() -> None:
    line = Line(0.1)
    line.carry(Scaling(MAX_CONNECTIONS), 3)
    assert line.connections == MAX_CONNECTIONS


def test_a_short_copy_gets_no_more_than_it_needs() -> None:
    for size, most in ((32 * MIB, 1), (128 * MIB, 4), (1024 * MIB, MAX_CONNECTIONS)):
        line = Line(0.1, size=size)
        scaling = Scaling(MAX_CONNECTIONS)
        while line.received < line.size:
            line.carry(scaling, SAMPLE_SECONDS)
        assert (line.most, size) == (most, size)


def test_a_line_that_one_channel_fills_has_one() -> None:
    line = Line(0.05, rate=12.5e6)
    line.carry(Scaling(MAX_CONNECTIONS), 60)
    assert line.most == 1


def test_connections_that_do_not_pay_are_taken_back_and_tried_less_and_less() -> None:
    line = Line(0.01, rate=150e6)  # the window is not far from binding
    scaling = Scaling(MAX_CONNECTIONS)
    tries = []
    for second in range(300):
        line.most = line.connections
        line.carry(scaling, 1)
        if line.most > 1:
            tries.append(second)
    assert line.connections == 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries) if later - earlier > 5]
    assert len(gaps) >= 2
    assert gaps == sorted(gaps)


def test_logins_of_their_own_are_tried_where_the_link_binds() -> None:
    line = Line(0.001, rate=100e6)
    line.carry(Scaling(4, shares_login=False), 5)
    assert line.most == 2
    line = Line(0.001, rate=100e6)
    line.carry(Scaling(4, shares_login=True), 5)
    assert line.most == 1


def test_refused_sessions_are_not_asked_for_again_at_once() -> None:
    line = Line(0.1, sessions=1)
    scaling = Scaling(MAX_CONNECTIONS)
    line.carry(scaling, 20)
    assert (line.connections, scaling.is_window_bound) == (1, True)
    line.sessions = 8
    line.carry(scaling, 40)
    assert line.connections == 8


def test_an_idle_pool_keeps_one_connection() -> None:
    line = Line(0.1)
    scaling = Scaling(MAX_CONNECTIONS)
    line.carry(scaling, 5)
    line.rate = 0
    line.carry(scaling, 60)
    assert line.connections == 1


def test_a_fixed_number_is_opened_whatever_it_brings() -> None:
    line = Line(0.05, rate=1e6)
    line.carry(Scaling(6, is_fixed=True), 2)
    assert line.connections == 6


@given(
    round_trip=st.floats(0.0001, 1),
    rates=st.lists(st.floats(0, 1e9), min_size=1, max_size=4),
    sessions=st.integers(1, 12),
    shares=st.booleans(),
)
def test_the_number_stays_within_its_bounds(
    round_trip: float, rates: list[float], sessions: int, shares: bool
) -> None:
    line, scaling = Line(round_trip, sessions=sessions), Scaling(MAX_CONNECTIONS, shares_login=shares)
    for rate in rates:
        line.rate = rate
        line.carry(scaling, 8)
        assert 1 <= line.connections <= min(MAX_CONNECTIONS, sessions)


# The pool

QUESTION = Signatures(0, 8, 1, bytes(8))
SINK: Any = object()


class Connection:
    """A connection that answers when a test says so."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.failure: SourceError | None = None
        self.unanswered: Sequence[Signatures] | None = None
        self.answered_at: float | None = None
        self.sent_bytes = self.received_bytes = 0
        self.join_token: str | None = None
        self.asked = 0
        self.answer = trio.Event()

    async def ping(self) -> bool:
        await trio.sleep(0.1)
        return True

    async def ask(self, signatures: Sequence[Signatures], sink: object) -> Delta:
        self.asked += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_at_end, nursery.cancel_scope)
            await self.answer.wait()
            nursery.cancel_scope.cancel()
        if self.failure is not None:
            raise self.failure
        self.answered_at = trio.current_time()
        return Delta([], [], [])

    async def _cancel_at_end(self, scope: trio.CancelScope) -> None:
        await self.ended.wait()
        scope.cancel()

    def end(self) -> None:
        self.failure = SourceError("it broke")
        self.ended.set()

    async def close(self) -> None:
        self.end()


class Connector:
    """Opens so many connections, and no more."""

    command = SimpleNamespace(location="fake")

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.opened: list[Connection] = []
        self.told: list[int] = []
        self.changed: SourceChangedError | None = None
        self.waiting = trio.lowlevel.ParkingLot()
        self.fatal_blocks = 0
        self.is_original = False
        self.round_trip = RoundTrip()

    async def open(self, nursery: trio.Nursery, connections: int, token: str | None = None) -> Connection:
        await trio.sleep(0.1)
        if len([each for each in self.opened if each.failure is None]) >= self.most:
            raise SourceError("session refused")
        self.told.append(connections)
        self.opened.append(Connection())
        return self.opened[-1]


def with_pool(
    scenario: Callable[[Pool, Connector, trio.Nursery], Any], connector: Connector, count: int = 4
) -> None:
    """Run `scenario` beside a pool of `count` connections; the pool is closed in the end."""

    async def main() -> None:
        with trio.fail_after(10_000):
            async with trio.open_nursery() as nursery:
                scaling = Scaling(count, is_fixed=True)
                pool = Pool(connector, nursery, give_up_after=60, scaling=scaling)  # type: ignore[arg-type]
                nursery.start_soon(pool.run)
                async with trio.open_nursery() as asking:
                    await scenario(pool, connector, asking)
                await pool.close()
                assert all(each.failure for each in connector.opened), "all connections have ended"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def answered(pool: Pool) -> None:
    """Ask the pool. Returns when it has answered."""
    assert await pool.ask([QUESTION], SINK, trio.current_time()) == Delta([], [], [])


def test_the_connection_with_the_least_in_flight_is_asked() -> None:
    async def scenario(pool: Pool, connector: Connector, asking: trio.Nursery) -> None:
        await trio.sleep(5)
        assert (pool.connections, pool.round_trip) == (4, pytest.approx(0.1))
        assert connector.told == [1, 4, 4, 4], "each source knows how many share its CPUs"
        assert pool.window.blocks == 4 * pool.window.blocks_per_link
        for _ in range(8):
            asking.start_soon(answered, pool)
        await trio.testing.wait_all_tasks_blocked()
        assert [each.asked for each in connector.opened] == [2, 2, 2, 2]
        for each in connector.opened:
            each.answer.set()

    with_pool(scenario, Connector())


def test_what_a_lost_connection_owed_is_asked_again_of_another() -> None:
    async def scenario(pool: Pool, connector: Connector, asking: trio.Nursery) -> None:
        await trio.sleep(5)
        for _ in range(4):
            asking.start_soon(answered, pool)
        await trio.testing.wait_all_tasks_blocked()
        connector.opened[2].end()  # an extra one: nobody is told of an error
        await trio.testing.wait_all_tasks_blocked()
        assert sum(each.asked for each in connector.opened) == 5
        assert pool.last_error is None
        for each in connector.opened:
            each.answer.set()

    with_pool(scenario, Connector())


def test_a_refused_session_is_no_error() -> None:
    async def scenario(pool: Pool, connector: Connector, asking: trio.Nursery) -> None:
        await trio.sleep(20)
        assert (pool.connections, pool.is_connected, pool.last_error) == (2, True, None)

    with_pool(scenario, Connector(most=2))


def test_a_pool_whose_connections_are_all_lost_is_there_again() -> None:
    async def scenario(pool: Pool, connector: Connector, asking: trio.Nursery) -> None:
        await trio.sleep(5)
        asking.start_soon(answered, pool)
        await trio.testing.wait_all_tasks_blocked()
        for each in connector.opened:
            each.end()
        await trio.sleep(40)
        assert pool.connections == 4
        for each in connector.opened:
            each.answer.set()

    with_pool(scenario, Connector())


def test_an_idle_connection_is_taken_back_and_a_busy_one_is_answered_first() -> None:
    async def main() -> None:
        connector = Connector()
        async with trio.open_nursery() as nursery:
            scaling = Scaling(4, is_fixed=True)
            pool = Pool(connector, nursery, give_up_after=60, scaling=scaling)  # type: ignore[arg-type]
            nursery.start_soon(pool.run)
            await trio.sleep(5)
            async with trio.open_nursery() as asking:
                for _ in range(4):
                    asking.start_soon(answered, pool)
                await trio.testing.wait_all_tasks_blocked()
                pool.scaling = Scaling(1, is_fixed=True)
                await trio.sleep(5)
                assert pool.connections == 1
                assert [each.failure for each in connector.opened] == [None] * 4, "all are owed an answer"
                connector.opened[3].received_bytes = 7
                connector.opened[3].answer.set()
                assert pool.received_bytes == 7
                await trio.testing.wait_all_tasks_blocked()
                assert [each.failure is None for each in connector.opened] == [True, True, True, False]
                assert pool.received_bytes == 7, "bytes of connections that are gone count as before"
                for each in connector.opened:
                    each.answer.set()
            await pool.close()
            assert all(each.failure for each in connector.opened)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_lane_that_gets_no_connection_shares_the_other_lanes() -> None:
    """A server may allow one session. The fallback is asked after two attempts, and no longer than needed."""

    async def main() -> None:
        connector = Connector(most=1)
        async with trio.open_nursery() as nursery:
            demand, bulk = (Pool(connector, nursery, give_up_after=math.inf) for _ in range(2))  # type: ignore[arg-type]
            bulk.fallback, bulk.fallback_after = demand, 2
            await demand.open()
            nursery.start_soon(demand.run)
            nursery.start_soon(bulk.run)
            async with trio.open_nursery() as asking:
                connector.opened[0].answer.set()
                asking.start_soon(answered, bulk)
                await trio.sleep(0.5)
                assert connector.opened[0].asked == 0, "one failed attempt may be chance"
            assert connector.opened[0].asked == 1
            connector.most = 2
            await trio.sleep(60)
            connector.opened[1].answer.set()
            await answered(bulk)
            assert connector.opened[1].asked == 1
            await demand.close()
            await bulk.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
