"""A connection to the source that is started again when it breaks, for as long as the replica wants it.

    ask → a connection that is up → its answer; where it breaks first, the next connection is asked

What was in flight is asked again, because it is the asker's task that waits here. Who may not wait
for ever has a patience: counted in the time for which the source gave no whole answer, whether there is
a connection meanwhile or not. While this one is away, its substitute is asked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import TypeVar

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import BlockcopyError, ProtocolViolationError, SourceChangedError, SourceError
from blockcopy.protocol.digests import Digest
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.connector import Connector
from blockcopy.replica.source.dialects import Answer, Signatures, Sink, UnreadableBlock
from blockcopy.transport.backoff import Backoff

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WANTED_DELAY = 5
"""The longest delay while somebody waits who will not wait for ever."""

_MOST_GARBLED = 3
"""Connections that one question may end by garbled answers: then it is the source and not the link."""


_SUSPECT_AFTER, _FATAL_AFTER = 2, 3
"""Connections that end by themselves at the same questions. After the first number, each block is asked for by
itself. A block that ended the second number of them counts as one that the source cannot read."""

_MOST_FATAL = 64
"""Blocks that may be found so. Each costs some connections: a source that is bad all over would take for ever."""


class _FatalError(SourceError):
    """Connection after connection ended at the same questions."""


class _Guarded:
    """Lets answers through as long as the source is not found to be another, on whatever connection."""

    def __init__(self, sink: Sink, connector: Connector) -> None:
        self._sink = sink
        self._connector = connector

    def data(self, position: int, payload: Buffer) -> None:
        self._check()
        self._sink.data(position, payload)

    def zeros(self, position: int, length: int) -> None:
        self._check()
        self._sink.zeros(position, length)

    def _check(self) -> None:
        if self._connector.changed is not None:
            raise copy(self._connector.changed)


class Link:
    """See the module. Start `run` in a nursery; `ask` may be called by any task."""

    def __init__(self, connector: Connector, nursery: trio.Nursery, *, give_up_after: float) -> None:
        """`give_up_after`: seconds without an answer of the source after which `ask` gives up."""
        self._connector = connector
        self._nursery = nursery
        self._give_up_after = give_up_after
        self.fallback: Link | None = None
        """Who is asked while this one is away."""
        self._client: Client | None = None
        self._waiting = 0
        self._wanted = trio.Event()
        """Set while somebody waits with a patience that ends."""
        self._closing = False
        self._running = trio.CancelScope()
        self._finished: trio.Event | None = None  # of `run`
        self._answered_at = -math.inf
        self._past_bytes = (0, 0)
        self._connections = 0
        self.last_error: SourceError | None = None

    @property
    def is_connected(self) -> bool:
        return self._client is not None

    @property
    def changed(self) -> SourceChangedError | None:
        """The source was found to be another: there will be no answers any more."""
        return self._connector.changed

    @property
    def reconnects(self) -> int:
        return max(0, self._connections - 1)

    @property
    def sent_bytes(self) -> int:
        return self._past_bytes[0] + (self._client.sent_bytes if self._client else 0)

    @property
    def received_bytes(self) -> int:
        return self._past_bytes[1] + (self._client.received_bytes if self._client else 0)

    async def open(self) -> None:
        """A connection, the first one. SourceError where there is none to be had."""
        try:
            self._client = await self._connector.open(self._nursery)
        except SourceError as error:
            self.last_error = error
            raise
        except Exception as error:
            location = self._connector.command.location
            logger.error("connecting to %s met a fault of blockcopy's", location, exc_info=error)
            self.last_error = SourceError(f"{location}: internal error: {error!r}")
            raise self.last_error from error
        self._connections += 1
        self._connector.wake()

    async def run(self) -> None:
        """Keep a connection, until the link is closed or the source is another."""
        self._finished = trio.Event()
        try:
            with self._running:
                await self._keep_up()
        finally:  # also where it is cancelled from outside
            self._connector.wake()
            self._finished.set()

    async def _keep_up(self) -> None:
        backoff = Backoff()
        while not self._connector.changed:
            if self._client is not None:
                await self._client.ended.wait()
                if self._client.answered_at is not None or self._client.unanswered is not None:
                    backoff.reset()  # an end that tells of what it comes is as good as an answer
                self._lose(self._client)
            if self.last_error is not None:  # else it has not been tried yet
                await self._rest(backoff.next())
            await self._try()

    async def _rest(self, delay: float) -> None:
        with trio.move_on_after(delay):
            await trio.sleep(_WANTED_DELAY)
            await self._wanted.wait()

    async def _try(self) -> None:
        try:
            await self.open()
        except SourceChangedError as error:
            logger.error("%s", error)
        except SourceError as error:
            logger.warning("%s cannot be reached: %s", self._connector.command.location, error)
        else:
            if self.reconnects:
                logger.warning("the link to %s is up again", self._connector.command.location)

    def _lose(self, retriever: Client) -> None:
        sent, received = self._past_bytes
        self._past_bytes = (sent + retriever.sent_bytes, received + retriever.received_bytes)
        self._answered_at = self._last_answer()
        self._client = None
        if not self._closing:
            self.last_error = retriever.failure
            logger.warning("the link is lost, and is made again: %s", retriever.failure)

    def _last_answer(self) -> float:
        here = self._client.answered_at if self._client is not None else None
        return self._answered_at if here is None else here

    async def digest(self, since: float) -> Digest:
        """What questions are to be digested with: known once the source was reached. SourceError as in `ask`."""
        while (digest := self._connector.digest) is None:
            await self._connected(since)
        return digest

    async def ask(self, questions: Sequence[Signatures], sink: Sink, since: float) -> Answer:
        """As `Client.ask`, over as many connections as it takes.

        `since`: when it was first wanted, in trio's time. SourceError where the patience ends, and where the
        link is closed or the source another.
        """
        guarded = _Guarded(sink, self._connector)
        if len(questions) > 1 or questions[0].length > questions[0].block_size:
            try:
                return await self._ask(questions, guarded, since, _SUSPECT_AFTER)
            except _FatalError as error:
                logger.warning("%s; each block of what it was asked is asked for by itself", error)
        return await self._ask_each([each for question in questions for each in question.split()], guarded, since)

    async def _ask(self, questions: Sequence[Signatures], sink: Sink, since: float, most: int) -> Answer:
        """Do as `ask`. Raises _FatalError if `most` connections ended while this was to be answered next."""
        ended = 0

        async def ask(retriever: Client) -> Answer:
            nonlocal ended
            try:
                return await retriever.ask(questions, sink)
            except SourceError as error:
                if retriever.unanswered is questions:
                    ended += 1
                    if ended == most:
                        raise _FatalError(str(error)) from error
                raise

        return await self._over_connections(ask, since)

    async def _ask_each(self, questions: Sequence[Signatures], sink: Sink, since: float) -> Answer:
        """Ask for blocks, each by itself. One that ends connection after connection cannot be read."""
        answer = Answer([], [], [])
        errors: list[BlockcopyError] = []

        async def ask(question: Signatures) -> None:
            try:
                found = await self._ask([question], sink, since, _FATAL_AFTER)
            except _FatalError as error:
                found = Answer([], [], [UnreadableBlock(Extent(question.position, question.length), str(error))])
                self._connector.fatal_blocks += 1
                if self._connector.fatal_blocks > _MOST_FATAL:
                    errors.append(SourceError(f"the source ended at more than {_MOST_FATAL} blocks: {error}"))
            except BlockcopyError as error:
                errors.append(error)
                return
            answer.data.extend(found.data)
            answer.zeros.extend(found.zeros)
            answer.unreadable.extend(found.unreadable)

        async with trio.open_nursery() as nursery:
            for question in questions:
                nursery.start_soon(ask, question)
        if errors:
            raise errors[0]
        return answer

    async def holes(self, extent: Extent, least: int, since: float) -> list[Extent]:
        """As `Client.holes`, over as many connections as it takes. SourceError as in `ask`."""
        return await self._over_connections(lambda retriever: retriever.holes(extent, least), since)

    async def _over_connections(
        self, ask: Callable[[Client], Awaitable[T]], since: float, others: Sequence[Link] = ()
    ) -> T:
        garbled, late = 0, False
        while True:
            retriever = await self._connected(since, others)
            try:
                answers = await ask(retriever)
                if self._connector.changed is None:
                    return answers
            except ProtocolViolationError:
                garbled += 1
                if garbled == _MOST_GARBLED:
                    raise
            except SourceError as error:
                if retriever.failure is None or self._closing or isinstance(error, _FatalError):
                    raise
            if self._connector.changed is None:
                await retriever.ended.wait()
                if trio.current_time() >= self._deadline(since):
                    if late or self._up() is None:
                        raise self._given_up(retriever.failure)
                    late = True  # whoever has no patience at all is served by the other link all the same, once

    async def _connected(self, since: float, others: Sequence[Link] = ()) -> Client:
        while True:
            if self._connector.changed is not None:
                raise copy(self._connector.changed)
            if self._closing:
                raise SourceError(f"{self._connector.command.location} has been let go")
            if (retriever := self._up(others)) is not None:
                return retriever
            if not await self._wait_until(self._deadline(since)):
                raise self._given_up(self.last_error)

    def _up(self, others: Sequence[Link] = ()) -> Client | None:
        """Return a connection that can be asked now: of this link, or else of its substitute, or of `others`."""
        for link in filter(None, (self, self.fallback, *others)):
            if link._client is not None and link._client.failure is None:
                return link._client
        return None

    def _deadline(self, since: float) -> float:
        """Return when what is wanted since then is given up, in trio's time."""
        return max(since, self._last_answer()) + self._give_up_after

    def _given_up(self, error: SourceError | None) -> SourceError:
        words = f"{self._connector.command.location} has been away for {self._give_up_after:g} seconds"
        return SourceError(f"{words}: {error}" if error else words)

    async def _wait_until(self, deadline: float) -> bool:
        """Until there is a connection, or there will never be one; False where the deadline was first."""
        self._waiting += 1
        if not math.isinf(deadline):
            self._wanted.set()
        try:
            with trio.move_on_at(deadline) as waiting:
                await self._connector.links_changed.wait()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._wanted = trio.Event()
        return not waiting.cancelled_caught

    async def check(self, *others: Link) -> None:
        """Ask whether the source is what it was, over as many connections as it takes, also those of `others`.

        Raises SourceChangedError if it is another, SourceError as in `ask`.
        """

        async def check(retriever: Client) -> None:
            try:
                await self._connector.check(retriever)
            except SourceError:
                if self._connector.changed is None:
                    await retriever.close()  # one that gives no answer is replaced
                raise

        await self._over_connections(check, trio.current_time(), others)

    async def close(self) -> None:
        """Let the source go, for good; who waits for it gets an error now. Returns when it is gone."""
        self._closing = True
        self._running.cancel()
        self._connector.wake()
        if self._finished is not None:
            await self._finished.wait()
        if self._client is not None:
            await self._client.close()
