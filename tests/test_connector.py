"""The connector of a source, and links over it: attempts, back-off, the time limit for the start, another source.

The processes are scripted, and the clock of trio jumps to whatever is waited for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from blockcopy.block.identity import sample_extents
from blockcopy.errors import OriginalProgramError, SourceChangedError, SourceError
from blockcopy.protocol import digests
from blockcopy.protocol.handshake import Handshake
from blockcopy.replica.plan import Plan
from blockcopy.replica.source import connector as connector_module
from blockcopy.replica.source.batches import Delta, Signatures, Sink
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.pool import Pool
from blockcopy.transport.start_timeout import LOGIN_SECONDS, WARN_SECONDS

DATA = bytes(range(256)) * 50
IDENTITY = {"size": len(DATA), "sample": ["one"], "inode": 7}
OTHER = {**IDENTITY, "inode": 8}
SILENT, ORIGINAL = object(), OriginalProgramError("Unknown command: helo")
SIGNATURES = [Signatures(0, 1, 1, b"x")]


class ScriptedClient:
    """In place of a Client. Its process does what the next step of the script says.

    A step is the identity that the source reports, an error, SILENT, or bytes that the original program has.
    """

    def __init__(self, script: Script, handshake: Handshake | None, options: dict[str, Any]) -> None:
        self.step = script.steps.pop(0) if script.steps else SourceError("no route to host")
        self.timeout, self.original = options["timeout"], handshake is None
        names = list(handshake.offered) if handshake else []
        self.offered = digests.named(names[0]) if len(names) == 1 else None
        self.digest = self.offered or digests.named(script.digests.pop(0) if script.digests else "sha3_512")
        self.ended = trio.Event()
        self.failure: SourceError | None = None
        self.unanswered: Sequence[Signatures] | None = None
        self.answered_at: float | None = None
        self.sent_bytes = self.received_bytes = 0
        self.probes: list[int] = []

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await self.ended.wait()

    def end(self) -> None:
        self.failure = self.failure or SourceError("the process ended")
        self.ended.set()

    async def close(self) -> None:
        self.end()

    async def ping(self) -> bool:
        return False

    def begin_serving(self) -> None:
        self.answered_at = None

    def said(self) -> list[str]:
        return ["Last login: today"]

    async def greet(self) -> Any:
        await trio.lowlevel.checkpoint()
        if self.step is SILENT:
            await trio.sleep_forever()
        if isinstance(self.step, Exception):
            raise self.step
        return self.step

    greet_again = greet

    async def reaches(self, positions: Sequence[int]) -> list[bool]:
        await trio.lowlevel.checkpoint()
        self.probes += positions
        return [position < len(self.step) for position in positions]

    async def ask(self, signatures: Sequence[Signatures], sink: Sink) -> Delta:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.answered_at = trio.current_time()
        if isinstance(self.step, bytes):
            for each in signatures:
                sink.data(each.position, self.step[each.position : each.end])
        return Delta([], [], [])


class Script:
    """What each process does, in order; and the clients of the processes that were started."""

    def __init__(self, steps: Sequence[object], chosen: Sequence[str] = ()) -> None:
        self.steps = list(steps)
        self.digests = list(chosen)
        self.clients: list[ScriptedClient] = []
        self.started_at: list[float] = []

    def start(self, _: object, handshake: Handshake | None, **options: Any) -> ScriptedClient:
        self.clients.append(ScriptedClient(self, handshake, options))
        self.started_at.append(trio.current_time())
        return self.clients[-1]

    @property
    def waits(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.started_at, self.started_at[1:], strict=False)]


Scenario = Callable[[Connector, trio.Nursery, Script], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    """`play(scenario, steps, chosen, **options of the connector)`; returns the script, which is over."""

    def run(scenario: Scenario, steps: Sequence[object], chosen: Sequence[str] = (), **options: Any) -> Script:
        script = Script(steps, chosen)
        monkeypatch.setattr(connector_module, "Client", script.start)
        command: Any = SimpleNamespace(
            location=SimpleNamespace(host="host", host_shown="host"),
            program="blockcopy",
            route=SimpleNamespace(by_hand=["ssh", "host"]),
        )

        plan = Plan(command, "destination", **{"timeout": math.inf, **options})

        async def main() -> None:
            with trio.fail_after(10_000):
                async with trio.open_nursery() as nursery:
                    await scenario(Connector(plan, size_guess=0), nursery, script)
                    nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        return script

    return run


def test_all_connections_have_the_digest_of_the_first(play: Callable[..., Script]) -> None:
    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        first, second = await connector.open(nursery), await connector.open(nursery)
        assert (connector.identity, connector.digest) == (IDENTITY, first.digest)
        assert [each.offered for each in script.clients] == [None, second.digest]

    play(scenario, [IDENTITY, IDENTITY], ["blake2b"])


def test_of_two_connections_opened_at_once_one_digest_holds(play: Callable[..., Script]) -> None:
    """The second process chose another digest before the first one was known. It is replaced."""

    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        opened: list[Any] = []

        async def open_one() -> None:
            opened.append(await connector.open(nursery))

        async with trio.open_nursery() as both:
            both.start_soon(open_one)
            both.start_soon(open_one)
        assert {each.digest.name for each in opened} == {connector.digest.name if connector.digest else ""}
        assert [each.ended.is_set() for each in script.clients].count(True) == 1

    assert len(play(scenario, [IDENTITY] * 3, ["blake2b", "sha3_512"]).clients) == 3


def test_another_source_is_refused_and_its_process_ends(play: Callable[..., Script]) -> None:
    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        await connector.open(nursery)
        with pytest.raises(SourceChangedError, match="inode") as raised:
            await connector.open(nursery)
        assert connector.changed is raised.value
        assert [each.ended.is_set() for each in script.clients] == [False, True]

    play(scenario, [IDENTITY, OTHER])


def test_a_check_over_an_open_connection_finds_a_change(play: Callable[..., Script]) -> None:
    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        client = await connector.open(nursery)
        await connector.check(client)
        script.clients[0].step = SILENT
        start = trio.current_time()
        with pytest.raises(SourceError, match="for 30 seconds"):
            await connector.check(client)
        assert (trio.current_time() - start, connector.changed) == (pytest.approx(30), None)
        script.clients[0].step = OTHER
        with pytest.raises(SourceChangedError):
            await connector.check(client)

    play(scenario, [IDENTITY], timeout=30)


@pytest.mark.parametrize(("prompts", "seconds"), [(False, 30), (True, LOGIN_SECONDS)])
def test_a_process_that_does_not_start_is_given_up(
    play: Callable[..., Script], prompts: bool, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The first login may ask for a password, and so take longer. The user is warned once."""

    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        for limit in (seconds, 30):  # a later one asks nobody
            start = trio.current_time()
            with pytest.raises(SourceError, match=f"after {limit:g} seconds"):
                await connector.open(nursery)
            assert trio.current_time() - start == pytest.approx(limit)
            connector.identity = IDENTITY
        assert all(each.ended.is_set() for each in script.clients)

    assert WARN_SECONDS < 30
    with caplog.at_level(logging.WARNING):
        play(scenario, [SILENT, SILENT], timeout=30, prompts=prompts)
    assert caplog.text.count("still waiting for host") == 1


def test_a_cancelled_attempt_leaves_no_process(play: Callable[..., Script]) -> None:
    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        with trio.move_on_after(5):
            await connector.open(nursery)
        assert script.clients[0].ended.is_set()

    play(scenario, [SILENT])


def test_the_original_program_is_asked_in_its_own_dialect(play: Callable[..., Script]) -> None:
    """It is found out once. Its size is searched for once, and its identity is a sample of its bytes."""

    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        for _ in range(2):
            client = await connector.open(nursery)
            await connector.check(client)
        assert connector.identity is not None
        assert connector.identity["size"] == len(DATA)
        assert len(connector.identity["sample"]) == len(sample_extents(len(DATA)))
        with pytest.raises(SourceChangedError, match="its bytes differ"):
            await connector.open(nursery)
        assert [each.original for each in script.clients] == [False, True, True, True]
        assert [bool(each.probes) for each in script.clients] == [False, True, False, False]
        assert [each.ended.is_set() for each in script.clients] == [True, False, False, True]

    play(scenario, [ORIGINAL, DATA, DATA, bytes(len(DATA))])


# Links over a connector


def test_a_lost_connection_is_opened_again_with_back_off(play: Callable[..., Script]) -> None:
    """A request that waits meanwhile is answered by the next connection."""

    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        link = Pool(connector, nursery, give_up_after=60)
        nursery.start_soon(link.run)
        await link.ask(SIGNATURES, NOWHERE, trio.current_time())
        script.clients[0].end()
        await link.ask(SIGNATURES, NOWHERE, trio.current_time())
        assert (link.is_connected, link.reconnects) == (True, 1)
        await link.close()
        assert all(each.ended.is_set() for each in script.clients if each.answered_at is not None)

    away = SourceError("no route to host")
    waits = play(scenario, [IDENTITY, away, away, away, IDENTITY]).waits
    assert all(
        longest / 2.001 <= wait <= longest * 1.001 for wait, longest in zip(waits, [1, 2, 4, 8], strict=True)
    ), waits


def test_a_task_that_will_give_up_has_attempts_each_five_seconds(play: Callable[..., Script]) -> None:
    """Nobody waits for the first 100 seconds, and the attempts are up to 30 seconds apart by then."""

    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        link = Pool(connector, nursery, give_up_after=60)
        nursery.start_soon(link.run)
        await trio.sleep(100)
        before = len(script.clients)
        with pytest.raises(SourceError, match="after 60 seconds without an answer: no route to host"):
            await link.ask(SIGNATURES, NOWHERE, trio.current_time())
        assert len(script.clients) - before >= 60 / 5 - 1
        assert max(script.waits[before:]) == pytest.approx(5)

    play(scenario, [])


def test_a_source_that_changed_on_one_link_ends_all_links(play: Callable[..., Script]) -> None:
    """Also what arrives over a connection that was opened before."""

    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        links = [Pool(connector, nursery, give_up_after=60) for _ in range(2)]
        for link in links:
            await link.open()
            nursery.start_soon(link.run)
        script.clients[1].end()
        await trio.sleep(5)
        for link in links:
            assert isinstance(link.changed, SourceChangedError)
            with pytest.raises(SourceChangedError):
                await link.ask(SIGNATURES, NOWHERE, trio.current_time())
        await trio.sleep(100)
        assert len(script.clients) == 3  # there are no more attempts

    play(scenario, [IDENTITY, IDENTITY, OTHER])


def test_a_request_is_hedged_over_the_fallback_while_its_own_link_is_away(play: Callable[..., Script]) -> None:
    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        link, fallback = (Pool(connector, nursery, give_up_after=seconds) for seconds in (0, 60))
        link.fallback = fallback
        for each in (link, fallback):
            await each.open()
            nursery.start_soon(each.run)
        own, other = script.clients
        await link.ask(SIGNATURES, NOWHERE, trio.current_time())
        assert (own.answered_at, other.answered_at) == (trio.current_time(), None)
        own.end()
        start = trio.current_time()
        await link.ask(SIGNATURES, NOWHERE, start)  # although this link gives up at once
        assert (other.answered_at, trio.current_time()) == (start, start)
        await trio.sleep(2)
        again = script.clients[2]
        await link.ask(SIGNATURES, NOWHERE, trio.current_time())
        assert (again.answered_at, other.answered_at) == (trio.current_time(), start)

    play(scenario, [IDENTITY] * 3)


def test_without_its_fallback_a_link_that_gives_up_at_once_fails_at_once(play: Callable[..., Script]) -> None:
    async def scenario(connector: Connector, nursery: trio.Nursery, script: Script) -> None:
        link = Pool(connector, nursery, give_up_after=0)
        await link.open()
        nursery.start_soon(link.run)
        script.clients[0].end()
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        with pytest.raises(SourceError, match="after 0 seconds without an answer: the process ended"):
            await link.ask(SIGNATURES, NOWHERE, start)
        assert trio.current_time() == start

    play(scenario, [IDENTITY])


class _Nowhere:
    def data(self, position: int, payload: object) -> None: ...

    def zeros(self, position: int, length: int) -> None: ...


NOWHERE = _Nowhere()
