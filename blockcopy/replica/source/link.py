"""A link to the source: a connection that is opened again after each failure, until the link is closed.

A `pool` asks over its links. A link knows how much is in flight on its connection, and how much may be. The first
link of a pool is opened again. An extra one ends with its connection, and the pool may open another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from blockcopy.errors import SourceChangedError, SourceError
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.window import Window
from blockcopy.transport import backoff

logger = logging.getLogger(__name__)

_PINGS = 3
"""Measurements of the round trip on a new connection."""

_MAX_DELAY_IF_WANTED = 5
"""Seconds until the next attempt, at most, while a task waits that has a time limit."""


class Link:
    """A link to the source. Start `run`, or `run_extra` after `open`. Call from trio's thread only."""

    def __init__(self, connector: Connector, nursery: trio.Nursery, window: Window) -> None:
        """Prepare a link. `connector`: opens the connections. `nursery`: runs their tasks.

        `window`: the Window of this link, which bounds the blocks in flight that nobody waits for.
        """
        self._connector = connector
        self._nursery = nursery
        self.window = window
        self.in_flight = 0
        """The blocks that were asked for over this link, and have not been answered."""
        self.measured = trio.Event()
        """Set once the round trip of the first connection was measured."""
        self._requests = 0
        self._retiring = False
        self._retired = trio.Event()
        self._client: Client | None = None
        self.failures = 0
        """The attempts in a row that failed since the last connection."""
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
    def client(self) -> Client | None:
        """The client of the connection. None if there is none that can be asked."""
        return self._client if self._client is not None and self._client.failure is None else None

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

    @property
    def answered_at(self) -> float:
        """When the last whole answer came, by trio's clock. Minus infinity if none did."""
        answered_at = self._client.answered_at if self._client is not None else None
        return self._answered_at if answered_at is None else answered_at

    @contextmanager
    def asked(self, blocks: int) -> Iterator[None]:
        """Count `blocks`, a number, as in flight while the `with` block runs. Adapt the window. Yields nothing."""
        self._requests += 1
        self.in_flight += blocks
        asked_at = trio.current_time()
        try:
            yield
            if blocks:
                self.window.record_fetch(blocks, trio.current_time() - asked_at)
        finally:
            self.in_flight -= blocks
            self._requests -= 1
            self._retire_if_idle()

    @property
    def load(self) -> float:
        """The blocks in flight as a share of the window. The link with the least load is asked next."""
        return self.in_flight / self.window.blocks

    @property
    def join_token(self) -> str | None:
        """The token with which other links can join the process of this connection. None if there is none."""
        return self._client.join_token if self._client is not None else None

    async def open(self, connections: int = 1, token: str | None = None) -> None:
        """Open a connection. Raises SourceError if that fails. `connections`, `token`: as for `Connector.open`."""
        self.failures += 1
        try:
            self._client = await self._connector.open(self._nursery, connections, token)
        except SourceError as error:
            self.last_error = error
            self._connector.waiting.unpark_all()  # who waits may turn to another pool now
            raise
        except Exception as error:
            location = self._connector.command.location
            logger.error("internal error while connecting to %s", location, exc_info=error)
            self.last_error = SourceError(f"{location}: internal error: {error!r}")
            raise self.last_error from error
        self.failures = 0
        self._connections += 1
        self._nursery.start_soon(self._measure, self._client)
        self._connector.waiting.unpark_all()

    async def _measure(self, client: Client) -> None:
        """Measure the round trip of `client`. Requests need not wait for that: the answer comes before theirs."""
        with suppress(SourceError):  # whoever asks for bytes is told
            for _ in range(_PINGS):
                asked_at = trio.current_time()
                if not await client.ping():
                    break
                self._connector.round_trip.record(trio.current_time() - asked_at)
        self.measured.set()

    async def run(self) -> None:
        """Keep a connection open. Returns after `close`, or once the source is found to be another."""
        self._finished = trio.Event()
        try:
            with self._running:
                await self._keep_connected()
        finally:  # also if it is cancelled from outside
            self._connector.waiting.unpark_all()
            self._finished.set()

    async def run_extra(self) -> None:
        """Keep the open connection until it is lost, or until the link is retired and all is answered."""
        if self._client is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_when_retired)
            await self._client.ended.wait()
            nursery.cancel_scope.cancel()
        self._drop(self._client)

    def retire(self) -> None:
        """Let `run_extra` end the connection as soon as everything is answered. Nothing more may be asked."""
        self._retiring = True
        self._retire_if_idle()

    def _retire_if_idle(self) -> None:
        if self._retiring and not self._requests:
            self._retired.set()

    async def _close_when_retired(self) -> None:
        await self._retired.wait()
        if self._client is not None:
            self._closing = True
            await self._client.close()

    async def _keep_connected(self) -> None:
        delays = backoff.delays()
        while not self._connector.changed:
            if self._client is not None:
                await self._client.ended.wait()
                if self._client.answered_at is not None or self._client.unanswered is not None:
                    delays = backoff.delays()  # a process that exits at a block tells as much as an answer
                self._drop(self._client)
                if not self._closing:
                    logger.warning("connection lost, reconnecting: %s", self.last_error)
            if self.last_error is not None:  # else this is the first attempt
                await self._sleep(next(delays))
            await self._reconnect()

    async def _sleep(self, delay: float) -> None:
        """Sleep for `delay` seconds, or for _MAX_DELAY_IF_WANTED if a task waits that has a time limit."""
        with trio.move_on_after(delay):
            await trio.sleep(_MAX_DELAY_IF_WANTED)
            await self._wanted.wait()

    def want(self, *, wanted: bool) -> None:
        """Note whether a task waits for a connection that has a time limit: `wanted`."""
        if wanted:
            self._wanted.set()
        elif self._wanted.is_set():
            self._wanted = trio.Event()

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
        self._answered_at = self.answered_at
        sent, received = self._past_bytes
        self._past_bytes = (sent + client.sent_bytes, received + client.received_bytes)
        self._client = None
        if not self._closing:
            self.last_error = client.failure

    async def close(self) -> None:
        """Close the link for ever. Returns when the connection has ended."""
        self._closing = True
        self._running.cancel()
        self._connector.waiting.unpark_all()
        if self._finished is not None:
            await self._finished.wait()
        if self._client is not None:
            await self._client.close()
