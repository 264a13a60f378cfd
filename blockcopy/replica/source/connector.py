"""The connector of one source: it opens connections, of one dialect, and checks that all see the same source.

Our own program answers a greeting with the identity of its source. The original program exits at the first command
that it does not know. The connector then starts it again, and uses the dialect of the original. It finds the
identity of the source by asking for a sample of its bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from functools import partial
from typing import NamedTuple

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.identity import Identity, differences, sample_extents, sample_of
from blockcopy.errors import OriginalProgramError, SourceChangedError, SourceError
from blockcopy.protocol.digests import Digest
from blockcopy.protocol.handshake import Handshake
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.batches import Sink, unconditional
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.process import Process
from blockcopy.replica.source.size_search import SizeSearch
from blockcopy.transport import start_timeout
from blockcopy.untrusted_text import LineBudget

_ROUTE_SECONDS = 600
"""Seconds after which a later measurement of the round trip counts, although it is longer."""

logger = logging.getLogger(__name__)


class RoundTrip:
    """The least of all measured round trips: the route, without what waits on it. Forgotten after some minutes."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        """None before the first measurement."""
        self._measured_at = -math.inf

    def record(self, seconds: float) -> None:
        """Record a round trip that took `seconds`."""
        now = trio.current_time()
        if self.seconds is None or seconds < self.seconds or now > self._measured_at + _ROUTE_SECONDS:
            self.seconds, self._measured_at = seconds, now


class Connector:
    """The connector of one source, for all links. Call from trio's thread only."""

    def __init__(self, plan: Plan, *, size_guess: int) -> None:
        """Prepare connections of the processes that `plan.command` starts. The first uses `plan.started`.

        A connection that owes an answer is closed after `plan.timeout` without progress. The first may take longer
        if `plan.prompts`. `size_guess`: bytes, tried first if the size must be searched for.
        """
        self.command = plan.command
        self.identity: Identity | None = None
        """The identity of the source. None until it is known from a connection or from a record."""
        self.digest: Digest | None = None
        """The digest of all signatures, on all connections. None until the source was reached."""
        self.changed: SourceChangedError | None = None
        """The error once the source is found to be another. From then on no answer is accepted. None before."""
        self.round_trip = RoundTrip()
        """The round trip to the source, as all connections have measured it."""
        self._unreadable_pieces: set[int] = set()  # positions in the sample at which the original exited
        self.waiting = trio.lowlevel.ParkingLot()
        """The tasks that wait until a link connects, fails to, or will never connect again."""
        self.fatal_blocks = 0
        """The number of blocks at which every connection ended."""
        self._size_guess = size_guess
        self._plan = plan
        self._budget = LineBudget()  # for standard error of all connections in the log
        self.is_original = False
        """Whether the original program runs at the source."""
        self._opening_original = trio.Lock()

    async def open(self, nursery: trio.Nursery, connections: int = 1, token: str | None = None) -> Client:
        """Open a connection, whose tasks run in `nursery`. Returns its client, which can be asked.

        `connections`: how many there will be that are as busy, and share the CPUs of the source. `token`: of a
        connection whose process shall serve this one too. If that process refuses, this one gets its own.
        Raises SourceError if that fails, and SourceChangedError if the source is another than before.
        """
        while not self.is_original:
            client = await self._start(nursery, self._handshake(connections), token)
            async with _closed_on_failure(client):
                try:
                    self._compare(await self._first_greeting(client))
                    if self.digest in (None, client.digest):
                        return self._accept(client)
                except OriginalProgramError:
                    self.is_original = True
                except SourceError:
                    if token is None or not client.has_refused:
                        raise
                    token = None
            await client.close()  # also one that chose another digest than a connection opened at the same time
        async with self._opening_original:  # one search for the size
            return await self._open_original(nursery)

    def _handshake(self, connections: int) -> Handshake:
        return Handshake(
            self._plan.compression,
            digest=self.digest.name if self.digest else None,
            connections=connections,
            join=connections == 1 and self._plan.connections != 1 and self.command.location.host is not None,
        )

    async def _start(
        self, nursery: trio.Nursery, handshake: Handshake | None = None, token: str | None = None
    ) -> Client:
        client = Client(
            self.command.joining(token) if token else self.command,
            handshake,
            timeout=self._plan.timeout,
            started=Process(self._plan.started.pop()) if self._plan.started else None,
            budget=self._budget,
        )
        await nursery.start(client.run)
        return client

    async def check(self, client: Client) -> None:
        """Check over the open connection of `client` that the source is what it was.

        Raises SourceChangedError if it is another, and SourceError if it does not answer.
        """
        if self.is_original and self.identity is not None:
            await self._sample(client, self.identity["size"])
            return
        with trio.move_on_after(self._plan.timeout):
            self._compare(await client.greet_again())
            return
        raise SourceError(f"no answer from {self.command.location} for {self._plan.timeout:g} seconds")

    def hold_to(self, identity: Identity) -> None:
        """Accept no other source than the one with `identity`. Call after the first connection.

        If the source of that connection is another, `changed` is set: nothing of that source is taken.
        """
        found, self.identity = self.identity, identity
        if found is not None and (differing := differences(identity, found)):
            self.changed = SourceChangedError(
                f"{SourceChangedError.BEGINNING}{self.command.location} is not the source of this copy "
                f"({'; '.join(differing)}). "
                "Nothing of it is taken: what is missing cannot be read without the earlier source"
            )

    async def _first_greeting(self, client: Client) -> Identity:
        """Wait until `client` is greeted by the source. Returns the identity of the source.

        Logs a warning if the source takes long to start. Raises SourceError if it takes too long.
        """
        prompts = self._plan.prompts and self.identity is None
        seconds = start_timeout.max_start_seconds(self._plan.timeout, prompts=prompts)
        with trio.move_on_after(min(seconds, start_timeout.WARN_SECONDS)):
            return await client.greet()
        if seconds > start_timeout.WARN_SECONDS:
            if self.identity is None:  # else the link logs that the source is away
                logger.warning("%s", start_timeout.still_waiting(self.command, client.said()))
            with trio.move_on_after(seconds - start_timeout.WARN_SECONDS):
                return await client.greet()
        raise SourceError(start_timeout.not_started(self.command, seconds, client.said()))

    async def _open_original(self, nursery: trio.Nursery) -> Client:
        start = partial(self._start, nursery)
        search = SizeSearch(await start(), start)
        async with _closed_on_failure(search):
            size = self.identity["size"] if self.identity else await search.find(self._size_guess)
            one_by_one = False
            while True:
                try:
                    await self._sample(search.client, size, one_by_one=one_by_one)
                    return self._accept(search.client)
                except SourceError:
                    ended_at = search.client.unanswered
                    if ended_at is None:
                        raise
                    if one_by_one:
                        self._unreadable_pieces.add(ended_at[0].position)
                    one_by_one, search.client = True, await start()

    async def _sample(self, client: Client, size: int, *, one_by_one: bool = False) -> None:
        """Read the sample of a source that cannot report its identity, over `client`, and compare its identity.

        `size`: bytes of the source. `one_by_one`: ask for each piece by itself, to find one at which the original
        exits.
        """
        pieces = sample_extents(size)
        asked = [unconditional(*extent) for extent in pieces if extent.offset not in self._unreadable_pieces]
        received = _Pieces()
        try:
            for signatures in [[each] for each in asked] if one_by_one else filter(None, [asked]):
                await client.ask(signatures, received)
            sample = sample_of(received.at.get(extent.offset) for extent in pieces)
        except SourceError as error:
            if self.identity is None or client.failure is not None:
                raise
            raise self._is_another(str(error)) from error  # the process runs, and the source is too short
        self._compare({"size": size, "sample": sample})

    def _compare(self, identity: Identity) -> None:
        """Keep `identity` if it is the first. Raises SourceChangedError if it differs from the first."""
        if self.identity is None:
            self.identity = identity
        elif differing := differences(self.identity, identity):
            raise self._is_another("; ".join(differing))

    def _is_another(self, why: str) -> SourceChangedError:
        self.changed = self.changed or SourceChangedError.found(str(self.command.location), why)
        return self.changed

    def _accept(self, client: Client) -> Client:
        self.digest = self.digest or client.digest
        client.begin_serving()
        return client


class GuardedSink(NamedTuple):
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


class _Pieces:
    """A sink that keeps all bytes, by position."""

    def __init__(self) -> None:
        self.at: dict[int, bytes] = {}

    def data(self, position: int, payload: Buffer) -> None:
        """Keep a copy of `payload`, the bytes at `position`."""
        self.at[position] = bytes(payload)

    def zeros(self, position: int, length: int) -> None:
        """Keep `length` zeros at `position`."""
        self.at[position] = bytes(length)


@asynccontextmanager
async def _closed_on_failure(holder: Client | SizeSearch) -> AsyncIterator[None]:
    """Close the client of `holder` if the `async with` block raises or is cancelled. Yields nothing.

    `holder`: a client, or the search that has one.
    """
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await (holder.client if isinstance(holder, SizeSearch) else holder).close()
        raise
