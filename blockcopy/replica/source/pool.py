"""A pool of connections for one lane: it asks over its links, and has as many as pay.

    ask → the link with the least load → its answer; if the connection fails first, another link is asked

A request without an answer is repeated over another connection, because the asking task waits in this module.
`ask` gives up after some seconds without a whole answer. These seconds count with and without a connection. While a
pool has no connection, its fallback is asked.

The first link is opened again after each failure. Extra links are opened while that pays (see `scaling`). An extra
link that cannot be opened is no error: a server may allow only so many sessions.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import TypeVar

import trio

from blockcopy.block.geometry import Extent
from blockcopy.errors import ProtocolViolationError, SourceChangedError, SourceError
from blockcopy.protocol.digests import Digest
from blockcopy.replica.source.batches import Delta, Signatures, Sink
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.connector import Connector, GuardedSink
from blockcopy.replica.source.fatal_blocks import FATAL_AFTER, SUSPECT_AFTER, FatalError, ask_each
from blockcopy.replica.source.link import Link
from blockcopy.replica.source.window import Window, Windows, default_window
from blockcopy.transport.scaling import SAMPLE_SECONDS, SLOW_SAMPLE_SECONDS, Sample, Scaling

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_VIOLATIONS = 3
"""Connections that one request may end by unexpected replies. Then the fault is the source's, not the link's."""

_LOGIN_SECONDS = 0.2
"""Most seconds between two logins of extra links, at random. sshd refuses logins that come all at once."""

_FULL_SHARE = 0.75
"""Share of the windows from which on they count as full: less than a batch fits in."""


class Pool:
    """The connections of a lane. Start `run`. Any task may call `ask`. Call from trio's thread only."""

    def __init__(
        self,
        connector: Connector,
        nursery: trio.Nursery,
        *,
        give_up_after: float,
        scaling: Scaling | None = None,
        new_window: Callable[[], Window] = default_window,
    ) -> None:
        """Prepare a pool. `connector`: opens the connections. `nursery`: runs their tasks.

        `give_up_after`: seconds without an answer of the source after which a request fails.
        `scaling`: decides how many connections there are. None: always one.
        `new_window`: called without arguments, returns the Window of a new link.
        """
        self.connector = connector
        self._nursery = nursery
        self._give_up_after = give_up_after
        self.scaling = scaling or Scaling(1)
        """The Scaling that decides how many connections there are. It has the last measurement."""
        self._new_window = new_window
        self._first = Link(connector, nursery, new_window())
        self._links = [self._first]
        self.window = Windows(lambda: [link.window for link in self._links])
        """The bounds for the blocks in flight that nobody waits for."""
        self.remaining: Callable[[], float] = lambda: math.inf
        """Called without arguments, returns the bytes that are still to come."""
        self.fallback: Pool | None = None
        """The pool to ask while this one has no connection."""
        self.fallback_after = 0
        """The failed attempts in a row after which the fallback is asked."""
        self._waiting = 0
        self._closing = False
        self._running = trio.CancelScope()
        self._finished: trio.Event | None = None  # of `run`
        self._retired: set[Link] = set()  # links that end when all is answered
        self._past_bytes = (0, 0)  # of links that are gone
        self._past_answer = -math.inf

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, or one that has just ended."""
        return any(link.is_connected for link in self._links)

    @property
    def connections(self) -> int:
        """The number of connections that can be asked."""
        return sum(link.client is not None for link in self._links)

    @property
    def last_error(self) -> SourceError | None:
        """The error of the last connection or attempt of the first link that failed. None if none did."""
        return self._first.last_error

    @property
    def changed(self) -> SourceChangedError | None:
        """The error once the source is found to be another: there will be no more answers. None before."""
        return self.connector.changed

    @property
    def reconnects(self) -> int:
        """How often the connection of the first link was opened again."""
        return self._first.reconnects

    @property
    def sent_bytes(self) -> int:
        """Bytes sent over all connections."""
        return self._past_bytes[0] + sum(link.sent_bytes for link in (*self._links, *self._retired))

    @property
    def received_bytes(self) -> int:
        """Bytes received over all connections."""
        return self._past_bytes[1] + sum(link.received_bytes for link in (*self._links, *self._retired))

    @property
    def round_trip(self) -> float | None:
        """The seconds of a round trip to the source. None if unknown."""
        return self.connector.round_trip.seconds

    @property
    def link_holds(self) -> float:
        """The bytes that fill the link without a queue. 0 if unknown."""
        return (self.round_trip or 0) * self.scaling.peak_rate

    @property
    def is_full(self) -> bool:
        """Whether about as much is in flight as the windows allow, so that the source or the link binds."""
        return sum(link.in_flight for link in self._links) >= _FULL_SHARE * self.window.blocks

    async def open(self) -> None:
        """Open the first connection. Raises SourceError if that fails."""
        await self._first.open()

    async def run(self) -> None:
        """Keep connections open. Returns after `close`, or once the source is found to be another."""
        self._finished = trio.Event()
        try:
            with self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._scale, nursery)
                    await self._first.run()
                    nursery.cancel_scope.cancel()
        finally:  # also if it is cancelled from outside
            self._finished.set()

    async def _scale(self, nursery: trio.Nursery) -> None:
        """Keep as many connections as `scaling` says. `nursery`: runs the tasks of extra links."""
        while True:
            is_busy = any(link.in_flight for link in self._links) or not self.scaling.is_measured
            may_grow = self.scaling.max_connections > 1 and is_busy
            await trio.sleep(SAMPLE_SECONDS if may_grow else SLOW_SAMPLE_SECONDS)
            if self.connections:
                now = trio.current_time()
                sample = Sample(
                    now, self.received_bytes, self.connections, self.round_trip, self.is_full, self.remaining()
                )
                # The original program finds the size of its source anew for each connection.
                wanted = 1 if self.connector.is_original else self.scaling.decide(sample)
                if wanted != sample.connections:
                    logger.debug(
                        "%d connections instead of %d: %.0f bytes/s", wanted, sample.connections, self.scaling.rate
                    )
                if wanted > self.connections:
                    await self._grow(wanted, nursery)
                    self.scaling.restart(trio.current_time(), self.received_bytes)
                elif wanted < self.connections:
                    self._shrink(self.connections - wanted)

    async def _grow(self, wanted: int, nursery: trio.Nursery) -> None:
        """Open extra links until there are `wanted`: all at once over a shared login, else one after the other.

        Returns when each has a connection, or has failed. `nursery`: runs their tasks.
        """
        count = wanted - self.connections
        if self.scaling.shares_login:
            async with trio.open_nursery() as opening:
                for _ in range(count):
                    opening.start_soon(self._add_link, nursery, wanted)
            return
        for _ in range(count):
            await trio.sleep(random.uniform(0, _LOGIN_SECONDS))
            if not await self._add_link(nursery, wanted):
                return

    async def _add_link(self, nursery: trio.Nursery, wanted: int) -> bool:
        """Open an extra link, one of `wanted`. Returns False if there is no connection for it.

        `nursery`: runs its task.
        """
        link = Link(self.connector, self._nursery, self._new_window())
        try:
            await link.open(wanted, self._first.join_token)
        except SourceError as error:
            logger.info("no further connection to %s: %s", self.connector.command.location, error)
            return False
        self._links.append(link)
        nursery.start_soon(self._keep, link)
        return True

    async def _keep(self, link: Link) -> None:
        """Wait for the end of the connection of the extra `link`, and forget the link."""
        await link.run_extra()
        if link in self._links:
            logger.info("an extra connection was lost: %s", link.last_error)
            self._links.remove(link)
        self._retired.discard(link)
        self._past_answer = max(self._past_answer, link.answered_at)
        sent, received = self._past_bytes
        self._past_bytes = (sent + link.sent_bytes, received + link.received_bytes)

    def _shrink(self, count: int) -> None:
        """Take back `count` extra links. Each ends when all that it was asked is answered."""
        for link in self._links[-count:] if count < len(self._links) else self._links[1:]:
            self._links.remove(link)
            self._retired.add(link)
            link.retire()

    async def digest(self, since: float) -> Digest:
        """Return the digest to make signatures with. Waits until the source was reached once.

        `since`: when the digest was first wanted, by trio's clock. Raises the errors of `ask`.
        """
        while (digest := self.connector.digest) is None:
            await self._connected(since)
        return digest

    async def ask(self, signatures: Sequence[Signatures], sink: Sink, since: float) -> Delta:
        """Give those bytes of the source to `sink` that differ from `signatures`. Returns the Delta.

        Takes as many connections as needed. `signatures`: ascending, made with the digest of the method `digest`.
        `since`: when the bytes were first wanted, by trio's clock. Raises SourceError if the source gives no answer
        for too long, or if the link is closed. Raises SourceChangedError if the source is another.
        """
        guarded = GuardedSink(sink, self.connector)
        if len(signatures) > 1 or signatures[0].length > signatures[0].block_size:
            try:
                return await self._ask(signatures, guarded, since, SUSPECT_AFTER)
            except FatalError as error:
                logger.warning("%s; now asking for each block of that request by itself", error)
        blocks = [Signatures(*extent, each.block_size, own) for each in signatures for extent, own in each.blocks()]
        return await ask_each(blocks, lambda block: self._ask([block], guarded, since, FATAL_AFTER), self.connector)

    async def _ask(self, signatures: Sequence[Signatures], sink: Sink, since: float, max_ends: int) -> Delta:
        """Ask about `signatures` together. Returns the Delta. `sink`, `since`: as for `ask`.

        Raises FatalError if `max_ends` connections ended at these signatures.
        """
        ends = 0

        async def ask(client: Client) -> Delta:
            nonlocal ends
            try:
                return await client.ask(signatures, sink)
            except SourceError as error:
                if client.unanswered is signatures:
                    ends += 1
                    if ends == max_ends:
                        raise FatalError(str(error)) from error
                raise

        return await self._over_connections(ask, since, sum(each.block_count for each in signatures))

    async def holes(self, extent: Extent, min_length: int, since: float) -> list[Extent]:
        """Return the holes of the source in `extent` that have `min_length` bytes or more.

        Takes as many connections as needed. `since`: when the answer was first wanted, by trio's clock. Raises the
        errors of `ask`.
        """
        return await self._over_connections(lambda client: client.holes(extent, min_length), since)

    async def _over_connections(
        self, ask: Callable[[Client], Awaitable[T]], since: float, blocks: int = 0, others: Sequence[Pool] = ()
    ) -> T:
        """Ask over one connection after another, until one answers. Returns the answer.

        `ask`: awaited with a Client, returns its answer. `blocks`: the number of blocks that are asked for.
        `since`, `others`: as for `_connected`.
        """
        violations, is_late = 0, False
        while True:
            link, client = await self._connected(since, others)
            try:
                with link.asked(blocks):
                    answer = await ask(client)
                if self.connector.changed is None:
                    return answer
            except ProtocolViolationError:
                violations += 1
                if violations == _MAX_VIOLATIONS:
                    raise
            except SourceError as error:
                if client.failure is None or self._closing or isinstance(error, FatalError):
                    raise
            if self.connector.changed is None:
                await client.ended.wait()
                if trio.current_time() >= self._deadline(since):
                    if is_late or self._connection() is None:
                        raise self._gave_up(client.failure)
                    is_late = True  # even a request that gives up at once is served by the fallback, once

    async def _connected(self, since: float, others: Sequence[Pool] = ()) -> tuple[Link, Client]:
        """Wait for a connection that can be asked: of this pool, of its fallback, or of the pools `others`.

        Returns a link and the client of its connection. `since`: when the answer was first wanted, by trio's clock.
        Raises SourceError as `ask` does.
        """
        while True:
            if self.connector.changed is not None:
                raise copy(self.connector.changed)
            if self._closing:
                raise SourceError(f"the connection to {self.connector.command.location} is closed")
            if (found := self._connection(others)) is not None:
                return found
            if not await self._wait_until(self._deadline(since)):
                raise self._gave_up(self.last_error)

    def _connection(self, others: Sequence[Pool] = ()) -> tuple[Link, Client] | None:
        """Return the link with the least load and its client, of the first pool that has a connection.

        The pools are this one, its fallback, and `others`. Returns None if no link can be asked.
        """
        fallback = self.fallback if self._first.failures >= self.fallback_after else None
        for pool in filter(None, (self, fallback, *others)):
            found = [(link, client) for link in pool._links if (client := link.client) is not None]
            if found:
                return min(found, key=lambda each: each[0].load)
        return None

    def _deadline(self, since: float) -> float:
        """Return when a request gives up, by trio's clock. `since`: when the answer was first wanted."""
        answered_at = max(self._past_answer, *(link.answered_at for link in self._links))
        return max(since, answered_at) + self._give_up_after

    def _gave_up(self, error: SourceError | None) -> SourceError:
        location = self.connector.command.location
        text = f"gave up on {location} after {self._give_up_after:g} seconds without an answer"
        return SourceError(f"{text}: {error}" if error else text)

    async def _wait_until(self, deadline: float) -> bool:
        """Wait until a link connects, or will never connect again. Returns False if `deadline` comes first.

        `deadline`: by trio's clock.
        """
        self._waiting += 1
        if not math.isinf(deadline):
            self._first.want(wanted=True)
        try:
            with trio.move_on_at(deadline) as waiting:
                await self.connector.waiting.park()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._first.want(wanted=False)
        return not waiting.cancelled_caught

    async def check(self, *others: Pool) -> None:
        """Check that the source is what it was, over as many connections as needed.

        `others`: pools whose connections may be used too. Raises SourceChangedError if the source is another.
        Raises SourceError as `ask` does.
        """

        async def check(client: Client) -> None:
            try:
                await self.connector.check(client)
            except SourceError:
                if self.connector.changed is None:
                    await client.close()  # a connection without an answer is replaced
                raise

        await self._over_connections(check, trio.current_time(), others=others)

    async def close(self) -> None:
        """Close all links for ever. Requests that wait fail now. Returns when the connections have ended."""
        self._closing = True
        self._running.cancel()
        self.connector.waiting.unpark_all()
        if self._finished is not None:
            await self._finished.wait()
        async with trio.open_nursery() as nursery:
            for link in (*self._links, *self._retired):
                nursery.start_soon(link.close)
