"""A link to the source: a connection that is opened again after each failure, until the link is closed.

    ask → the connection → its answer; if the connection fails first, the next connection is asked

A request without an answer is repeated over the next connection, because the asking task waits in this module.
`ask` gives up after some seconds without a whole answer. These seconds count with and without a connection. While a
link has no connection, its fallback is asked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import NamedTuple, TypeVar

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import BlockcopyError, ProtocolViolationError, SourceChangedError, SourceError
from blockcopy.protocol.digests import Digest
from blockcopy.replica.source.batches import Delta, Signatures, Sink, UnreadableBlock
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.connector import Connector
from blockcopy.transport import backoff

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_DELAY_IF_WANTED = 5
"""Seconds until the next attempt, at most, while a task waits that has a time limit."""

_MAX_VIOLATIONS = 3
"""Connections that one request may end by unexpected replies. Then the fault is the source's, not the link's."""

_SUSPECT_AFTER, _FATAL_AFTER = 2, 3
"""Connections that end by themselves at the same signatures.

After the first number, each block is asked for by itself. A block that ended the second number of connections
counts as one that the source cannot read.
"""

_MAX_FATAL = 64
"""Blocks that may be found unreadable so. Each costs connections: a source that is bad all over would take for
ever.
"""


class _FatalError(SourceError):
    """Connection after connection ended at the same signatures."""


class _GuardedSink(NamedTuple):
    """A sink that drops answers once the source is found to be another, on whatever connection."""

    sink: Sink
    connector: Connector

    def data(self, position: int, payload: Buffer) -> None:
        """Pass on `payload`, the bytes at `position`. Raises SourceChangedError if the source is another."""
        self._check()
        self.sink.data(position, payload)

    def zeros(self, position: int, length: int) -> None:
        """Pass on `length` zeros at `position`. Raises SourceChangedError if the source is another."""
        self._check()
        self.sink.zeros(position, length)

    def _check(self) -> None:
        if self.connector.changed is not None:
            raise copy(self.connector.changed)


class Link:
    """A link to the source. Start `run` in a nursery. Any task may call `ask`. Call from trio's thread only."""

    def __init__(self, connector: Connector, nursery: trio.Nursery, *, give_up_after: float) -> None:
        """Prepare a link. `connector`: opens the connections. `nursery`: runs their tasks.

        `give_up_after`: seconds without an answer of the source after which a request fails.
        """
        self._connector = connector
        self._nursery = nursery
        self._give_up_after = give_up_after
        self.fallback: Link | None = None
        """The link to ask while this one has no connection."""
        self._client: Client | None = None
        self._waiting = 0
        self._wanted = trio.Event()
        """Set while a task waits that has a time limit."""
        self._closing = False
        self._running = trio.CancelScope()
        self._finished: trio.Event | None = None  # of `run`
        self._answered_at = -math.inf
        self._past_bytes = (0, 0)
        self._connections = 0
        self.last_error: SourceError | None = None
        """The error of the last connection or attempt that failed. None if there was no failure."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, or one that has just ended."""
        return self._client is not None

    @property
    def changed(self) -> SourceChangedError | None:
        """The error once the source is found to be another: there will be no more answers. None before."""
        return self._connector.changed

    @property
    def reconnects(self) -> int:
        """The number of connections after the first one."""
        return max(0, self._connections - 1)

    @property
    def sent_bytes(self) -> int:
        """Bytes sent over all connections."""
        return self._past_bytes[0] + (self._client.sent_bytes if self._client else 0)

    @property
    def received_bytes(self) -> int:
        """Bytes received over all connections."""
        return self._past_bytes[1] + (self._client.received_bytes if self._client else 0)

    async def open(self) -> None:
        """Open a connection. Raises SourceError if that fails."""
        try:
            self._client = await self._connector.open(self._nursery)
        except SourceError as error:
            self.last_error = error
            raise
        except Exception as error:
            location = self._connector.command.location
            logger.error("internal error while connecting to %s", location, exc_info=error)
            self.last_error = SourceError(f"{location}: internal error: {error!r}")
            raise self.last_error from error
        self._connections += 1
        self._connector.waiting.unpark_all()

    async def run(self) -> None:
        """Keep a connection open. Returns after `close`, or once the source is found to be another."""
        self._finished = trio.Event()
        try:
            with self._running:
                await self._keep_connected()
        finally:  # also if it is cancelled from outside
            self._connector.waiting.unpark_all()
            self._finished.set()

    async def _keep_connected(self) -> None:
        delays = backoff.delays()
        while not self._connector.changed:
            if self._client is not None:
                await self._client.ended.wait()
                if self._client.answered_at is not None or self._client.unanswered is not None:
                    delays = backoff.delays()  # a process that exits at a block tells as much as an answer
                self._drop(self._client)
            if self.last_error is not None:  # else this is the first attempt
                await self._sleep(next(delays))
            await self._reconnect()

    async def _sleep(self, delay: float) -> None:
        """Sleep for `delay` seconds, or for _MAX_DELAY_IF_WANTED if a task waits that has a time limit."""
        with trio.move_on_after(delay):
            await trio.sleep(_MAX_DELAY_IF_WANTED)
            await self._wanted.wait()

    async def _reconnect(self) -> None:
        try:
            await self.open()
        except SourceChangedError as error:
            logger.error("%s", error)
        except SourceError as error:
            logger.warning("cannot connect to %s: %s", self._connector.command.location, error)
        else:
            if self.reconnects:
                logger.warning("reconnected to %s", self._connector.command.location)

    def _drop(self, client: Client) -> None:
        """Forget `client`, whose connection has ended."""
        sent, received = self._past_bytes
        self._past_bytes = (sent + client.sent_bytes, received + client.received_bytes)
        self._answered_at = self._last_answer()
        self._client = None
        if not self._closing:
            self.last_error = client.failure
            logger.warning("connection lost, reconnecting: %s", client.failure)

    def _last_answer(self) -> float:
        """Return when the last whole answer came, by trio's clock."""
        answered_at = self._client.answered_at if self._client is not None else None
        return self._answered_at if answered_at is None else answered_at

    async def digest(self, since: float) -> Digest:
        """Return the digest to make signatures with. Waits until the source was reached once.

        `since`: when the digest was first wanted, by trio's clock. Raises the errors of `ask`.
        """
        while (digest := self._connector.digest) is None:
            await self._connected(since)
        return digest

    async def ask(self, signatures: Sequence[Signatures], sink: Sink, since: float) -> Delta:
        """Give those bytes of the source to `sink` that differ from `signatures`. Returns the Delta.

        Takes as many connections as needed. `signatures`: ascending, made with the digest of the method `digest`.
        `since`: when the bytes were first wanted, by trio's clock. Raises SourceError if the source gives no answer
        for too long, or if the link is closed. Raises SourceChangedError if the source is another.
        """
        guarded = _GuardedSink(sink, self._connector)
        if len(signatures) > 1 or signatures[0].length > signatures[0].block_size:
            try:
                return await self._ask(signatures, guarded, since, _SUSPECT_AFTER)
            except _FatalError as error:
                logger.warning("%s; now asking for each block of that request by itself", error)
        blocks = [Signatures(*extent, each.block_size, own) for each in signatures for extent, own in each.blocks()]
        return await self._ask_each(blocks, guarded, since)

    async def _ask(self, signatures: Sequence[Signatures], sink: Sink, since: float, max_ends: int) -> Delta:
        """Ask about `signatures` together. Returns the Delta. `sink`, `since`: as for `ask`.

        Raises _FatalError if `max_ends` connections ended at these signatures.
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
                        raise _FatalError(str(error)) from error
                raise

        return await self._over_connections(ask, since)

    async def _ask_each(self, blocks: Sequence[Signatures], sink: Sink, since: float) -> Delta:
        """Ask about `blocks`, signatures of one block each, one by one. Returns the Delta of all.

        A block that ends connection after connection counts as unreadable. `sink`, `since`: as for `ask`.
        """
        delta = Delta([], [], [])
        errors: list[BlockcopyError] = []

        async def ask(block: Signatures) -> None:
            try:
                found = await self._ask([block], sink, since, _FATAL_AFTER)
            except _FatalError as error:
                found = Delta([], [], [UnreadableBlock(Extent(block.position, block.length), str(error))])
                self._connector.fatal_blocks += 1
                if self._connector.fatal_blocks > _MAX_FATAL:
                    errors.append(SourceError(f"the source ended at more than {_MAX_FATAL} blocks: {error}"))
            except BlockcopyError as error:
                errors.append(error)
                return
            delta.data.extend(found.data)
            delta.zeros.extend(found.zeros)
            delta.unreadable.extend(found.unreadable)

        async with trio.open_nursery() as nursery:
            for block in blocks:
                nursery.start_soon(ask, block)
        if errors:
            raise errors[0]
        return delta

    async def holes(self, extent: Extent, min_length: int, since: float) -> list[Extent]:
        """Return the holes of the source in `extent` that have `min_length` bytes or more.

        Takes as many connections as needed. `since`: when the answer was first wanted, by trio's clock. Raises the
        errors of `ask`.
        """
        return await self._over_connections(lambda client: client.holes(extent, min_length), since)

    async def _over_connections(
        self, ask: Callable[[Client], Awaitable[T]], since: float, others: Sequence[Link] = ()
    ) -> T:
        """Ask over one connection after another, until one answers. Returns the answer.

        `ask`: awaited with a Client, returns its answer. `since`, `others`: as for `_connected`.
        """
        violations, is_late = 0, False
        while True:
            client = await self._connected(since, others)
            try:
                answer = await ask(client)
                if self._connector.changed is None:
                    return answer
            except ProtocolViolationError:
                violations += 1
                if violations == _MAX_VIOLATIONS:
                    raise
            except SourceError as error:
                if client.failure is None or self._closing or isinstance(error, _FatalError):
                    raise
            if self._connector.changed is None:
                await client.ended.wait()
                if trio.current_time() >= self._deadline(since):
                    if is_late or self._connection() is None:
                        raise self._gave_up(client.failure)
                    is_late = True  # even a request that gives up at once is served by the fallback, once

    async def _connected(self, since: float, others: Sequence[Link] = ()) -> Client:
        """Wait for a connection that can be asked: of this link, of its fallback, or of the links `others`.

        Returns the client of the connection. `since`: when the answer was first wanted, by trio's clock. Raises
        SourceError as `ask` does.
        """
        while True:
            if self._connector.changed is not None:
                raise copy(self._connector.changed)
            if self._closing:
                raise SourceError(f"the connection to {self._connector.command.location} is closed")
            if (client := self._connection(others)) is not None:
                return client
            if not await self._wait_until(self._deadline(since)):
                raise self._gave_up(self.last_error)

    def _connection(self, others: Sequence[Link] = ()) -> Client | None:
        """Return a client of this link, its fallback, or the links `others`. Returns None if none can be asked."""
        for link in filter(None, (self, self.fallback, *others)):
            if link._client is not None and link._client.failure is None:
                return link._client
        return None

    def _deadline(self, since: float) -> float:
        """Return when a request gives up, by trio's clock. `since`: when the answer was first wanted."""
        return max(since, self._last_answer()) + self._give_up_after

    def _gave_up(self, error: SourceError | None) -> SourceError:
        location = self._connector.command.location
        text = f"gave up on {location} after {self._give_up_after:g} seconds without an answer"
        return SourceError(f"{text}: {error}" if error else text)

    async def _wait_until(self, deadline: float) -> bool:
        """Wait until a link connects, or will never connect again. Returns False if `deadline` comes first.

        `deadline`: by trio's clock.
        """
        self._waiting += 1
        if not math.isinf(deadline):
            self._wanted.set()
        try:
            with trio.move_on_at(deadline) as waiting:
                await self._connector.waiting.park()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._wanted = trio.Event()
        return not waiting.cancelled_caught

    async def check(self, *others: Link) -> None:
        """Check that the source is what it was, over as many connections as needed.

        `others`: links whose connections may be used too. Raises SourceChangedError if the source is another.
        Raises SourceError as `ask` does.
        """

        async def check(client: Client) -> None:
            try:
                await self._connector.check(client)
            except SourceError:
                if self._connector.changed is None:
                    await client.close()  # a connection without an answer is replaced
                raise

        await self._over_connections(check, trio.current_time(), others)

    async def close(self) -> None:
        """Close the link for ever. Requests that wait fail now. Returns when the connection has ended."""
        self._closing = True
        self._running.cancel()
        self._connector.waiting.unpark_all()
        if self._finished is not None:
            await self._finished.wait()
        if self._client is not None:
            await self._client.close()
