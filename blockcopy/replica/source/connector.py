"""Opens connections to one source. All of them have the same form, and see the same source.

Ours says who it is when greeted. The original ends at the first command that it does not know; it is
started again then, asked in its own form, and what there is to know of it is found by asking.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from subprocess import Popen

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.identity import Identity, differences, sample_extents, sample_of
from blockcopy.errors import OriginalProgramError, SourceChangedError, SourceError
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.protocol.digests import Digest
from blockcopy.replica.source.client import Client
from blockcopy.replica.source.dialects import unconditional
from blockcopy.replica.source.process import Process
from blockcopy.replica.source.size_search import SizeSearch
from blockcopy.transport import start_timeout
from blockcopy.transport.command import Command
from blockcopy.untrusted_text import LineBudget

logger = logging.getLogger(__name__)


class Connector:
    """See the module. `identity` is the source's, once it was reached or is known from elsewhere."""

    def __init__(
        self,
        command: Command,
        *,
        guess: int,
        timeout: float = math.inf,
        prompts: bool = False,
        compression: CompressionSpec = NO_COMPRESSION,
        started: list[Popen[bytes]] | None = None,
    ) -> None:
        """`guess` is the size in bytes that a search tries first; `compression` what the source is asked for.
        `started`: a process that was started already, taken out of the list when it is put to use.

        `timeout`: seconds without a sign of life after which a connection that was asked something is
        given up. The first one may take longer to begin where a password may be asked for, `prompts`.
        """
        self.command = command
        self.identity: Identity | None = None
        self.digest: Digest | None = None
        """What questions are digested with, on all connections, once the source was reached."""
        self.changed: SourceChangedError | None = None
        """It was found to be another: from then on nothing of it is believed."""
        self._bad_pieces: set[int] = set()  # positions of the sample at which the original ended
        self.links_changed = trio.Event()
        """Set, and replaced, when a link has a connection, or will never have one again."""
        self.fatal_blocks = 0
        """Blocks that no connection outlived."""
        self._guess = guess
        self._timeout = timeout
        self._prompts = prompts
        self._compression = compression
        self._started = started if started is not None else []
        self._budget = LineBudget()  # for the log, of what all connections say
        self._original = False
        self._finding_out = trio.Lock()

    async def open(self, nursery: trio.Nursery) -> Client:
        """A connection, whose tasks run in `nursery`. SourceError where it cannot be had.

        SourceChangedError where the source is not the one that it was.
        """
        while not self._original:
            retriever = await self._start(nursery, original=False)
            async with _closed_on_failure(retriever):
                try:
                    self._compare(await self._first_greeting(retriever))
                    if self.digest in (None, retriever.digest):
                        return self._accepted(retriever)
                except OriginalProgramError:
                    self._original = True
            await retriever.close()  # also one that, asked at the same time as another, chose another digest
        async with self._finding_out:  # its size, once
            return await self._open_original(nursery)

    async def _start(self, nursery: trio.Nursery, *, original: bool) -> Client:
        retriever = Client(
            self.command,
            original=original,
            timeout=self._timeout,
            digest=self.digest,
            compression=self._compression,
            started=Process(self._started.pop()) if self._started else None,
            budget=self._budget,
        )
        await nursery.start(retriever.run)
        return retriever

    async def check(self, retriever: Client) -> None:
        """Over an open connection: is the source still what it was? SourceChangedError, SourceError."""
        if self._original and self.identity is not None:
            await self._sample(retriever, self.identity["size"])
        else:
            self._compare(await self._greeting_again(retriever))

    async def _greeting_again(self, retriever: Client) -> Identity:
        with trio.move_on_after(self._timeout):
            return await retriever.greet_again()
        raise SourceError(f"{self.command.location} gave no answer for {self._timeout:g} seconds")

    async def _first_greeting(self, retriever: Client) -> Identity:
        """Wait for the source to begin. SourceError if it takes too long; where it takes long, that is told."""
        seconds = start_timeout.max_start_seconds(self._timeout, prompts=self._prompts and self.identity is None)
        with trio.move_on_after(min(seconds, start_timeout.WARN_SECONDS)):
            return await retriever.greet()
        if seconds > start_timeout.WARN_SECONDS:
            if self.identity is None:  # else somebody tells that it is away
                logger.warning("%s", start_timeout.still_waiting(self.command, retriever.said()))
            with trio.move_on_after(seconds - start_timeout.WARN_SECONDS):
                return await retriever.greet()
        raise SourceError(start_timeout.not_started(self.command, seconds, retriever.said()))

    async def _open_original(self, nursery: trio.Nursery) -> Client:
        start = partial(self._start, nursery, original=True)
        search = SizeSearch(await start(), start)
        async with _closed_on_failure(search):
            size = self.identity["size"] if self.identity else await search.find(self._guess)
            each = False
            while True:
                try:
                    await self._sample(search.retriever, size, each=each)
                    return self._accepted(search.retriever)
                except SourceError:
                    ended_at = search.retriever.unanswered
                    if ended_at is None:
                        raise
                    if each:
                        self._bad_pieces.add(ended_at[0].position)
                    each, search.retriever = True, await start()

    async def _sample(self, retriever: Client, size: int, *, each: bool = False) -> None:
        """Find out who a source is that does not say so: ask for the pieces that stand for it.

        `each`: by itself, so that one at which the source ends is found out.
        """
        pieces = sample_extents(size)
        asked = [unconditional(*extent) for extent in pieces if extent.offset not in self._bad_pieces]
        found = _Pieces()
        try:
            for questions in [[question] for question in asked] if each else filter(None, [asked]):
                await retriever.ask(questions, found)
            sample = sample_of(found.at.get(extent.offset) for extent in pieces)
        except SourceError as error:
            if self.identity is None or retriever.failure is not None:
                raise
            raise self._is_another(str(error)) from error  # it lives, and is too short
        self._compare({"size": size, "sample": sample})

    def _compare(self, identity: Identity) -> None:
        if self.identity is None:
            self.identity = identity
        elif differing := differences(self.identity, identity):
            raise self._is_another("; ".join(differing))

    def _is_another(self, why: str) -> SourceChangedError:
        self.changed = SourceChangedError.found(str(self.command.location), why)
        return self.changed

    def _accepted(self, retriever: Client) -> Client:
        self.digest = self.digest or retriever.digest
        retriever.accept()
        return retriever

    def wake(self) -> None:
        """All that wait for a link look again."""
        self.links_changed.set()
        self.links_changed = trio.Event()


class _Pieces:
    """Keeps what it is given: position → bytes."""

    def __init__(self) -> None:
        self.at: dict[int, bytes] = {}

    def data(self, position: int, payload: Buffer) -> None:
        self.at[position] = bytes(payload)

    def zeros(self, position: int, length: int) -> None:
        self.at[position] = bytes(length)


@asynccontextmanager
async def _closed_on_failure(holder: Client | SizeSearch) -> AsyncIterator[None]:
    """A connection that is given up, or whose opening is cancelled, is not left behind."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await (holder.retriever if isinstance(holder, SizeSearch) else holder).close()
        raise
