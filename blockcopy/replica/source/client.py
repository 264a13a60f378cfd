"""The client of one `retrieve` process. What is said with it is `dialects`' to know.

    ask ─ stream ─► _write ─► (pipe) … (pipe) ─► _receive, a thread ─► the batch's sink ─► settled

Tasks: `run` owns the process, `_write` writes, `_read_messages` collects what it says to standard error.
One thread receives: it decodes, checks, and gives each answer to its sink, so that a block of data is
not handed from one to another on its way to the destination. `ask` may be called by any task. Whatever
ends the process ends every wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from functools import partial
from typing import TypeVar

import trio

from blockcopy.block.geometry import Extent
from blockcopy.block.identity import Identity
from blockcopy.errors import (
    BlockcopyError,
    OriginalProgramError,
    ProtocolViolationError,
    SourceError,
    StreamError,
    TruncatedStreamError,
)
from blockcopy.protocol import digests, wire
from blockcopy.protocol.compression import NO_COMPRESSION, CompressionSpec
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.digests import Digest
from blockcopy.protocol.handshake import Handshake
from blockcopy.replica.source.dialects import (
    Answer,
    Batch,
    ByteProbe,
    HoleQuery,
    NegotiatedDialect,
    OriginalDialect,
    Signatures,
    Sink,
)
from blockcopy.replica.source.process import Process, start
from blockcopy.replica.source.progress_timeout import ProgressTimeout
from blockcopy.stage.streams import InputStream, enlarge_pipe
from blockcopy.transport import start_timeout
from blockcopy.transport.command import MAX_NOISE, Command
from blockcopy.transport.hints import explain_end
from blockcopy.untrusted_text import LineBudget, StderrLines

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Batch)

_MOST_WORDS = 64 * 1024
"""Bytes of its words that are read at once."""
_NOT_ITS_OWN = 126
"""Exit statuses from here on are of shells, of signals, and of ssh (255)."""

_FAREWELL_SECONDS = 2
"""How long a process that closed its output, or was told to end, is waited for before it is killed."""


class Client:
    """One `retrieve` process. Start `run` in a nursery, `greet` it where it may be ours, then `ask`."""

    def __init__(
        self,
        command: Command,
        *,
        original: bool = False,
        timeout: float = math.inf,
        digest: Digest | None = None,
        compression: CompressionSpec = NO_COMPRESSION,
        started: Process | None = None,
        budget: LineBudget | None = None,
    ) -> None:
        """Kill the process if it makes no progress for `timeout` seconds while it is asked something.

        `digest`: the only one that will do; any if None. `compression`: what the source is asked for.
        `started`: the process, where it was started already. `budget`: of what it says, for the log.
        """
        self._command = command
        self._started = started
        self._dialect = (OriginalDialect if original else NegotiatedDialect)(str(command.location))
        self.digest = digests.named(digests.ORIGINAL) if original else digest
        """What questions are digested with; None until it was greeted."""
        # Unbounded, yet bounded by those who ask: each waits for its answer before it asks again.
        self._send, self._outgoing = trio.open_memory_channel[bytes](math.inf)
        self._said = StderrLines(self._log, budget or LineBudget())
        self._process: Process | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._greeted = trio.Event()
        self._hello: wire.Hello | None = None
        self._silence = ProgressTimeout(timeout)
        self._begun = not command.mark
        self._stream: InputStream | None = None
        self.ended = trio.Event()
        self._closing = False
        self._stalled = False
        self.unanswered: Sequence[Signatures] | None = None
        """The questions that were next when the process ended by itself, as a program does at a read error."""
        self._fault: Exception | None = None
        """Raised by a part of this connection, and foreseen by none."""
        self.failure: SourceError | None = None
        """Why nothing can be asked any more; None while it can."""
        self.quiet = True
        """What it says is logged for developers only: as long as somebody else tells it."""
        self.sent_bytes = 0
        self.received_bytes = 0
        self._handshake = Handshake(compression, digest=self.digest.name if self.digest else None)
        if original:
            self._greeted.set()  # the original has no greeting
        else:  # before anything else, and without waiting for whoever asks
            self._transmit(command.opening + self._handshake.greeting)

    @property
    def answered_at(self) -> float | None:
        """Return when it last gave a whole answer since it was accepted, in trio's time. None before."""
        return self._silence.answered_at

    def accept(self) -> None:
        """Begin to serve: what it says from now on is told by nobody else, and nobody was helped so far."""
        self.quiet = False
        self._silence.answered_at = None

    async def greet(self) -> Identity:
        """Wait for the greeting of the agreed form to be returned; what the source says of itself.

        OriginalProgramError where the process knows no `helo`; SourceError where it dies of anything
        else or says what cannot be agreed to.
        """
        await self._greeted.wait()
        if self._hello is None:
            failure = self.failure or SourceError(self._let_go())
            if any("helo" in line for line in self._said.last):
                raise OriginalProgramError(str(failure))
            raise copy(failure)
        try:
            identity, name = self._handshake.read(self._hello)
        except StreamError as error:
            raise SourceError(f"{self._command.location}: {error}") from error
        self.digest = digests.named(name)
        return identity

    async def greet_again(self) -> Identity:
        """What the source says of itself by now; in the agreed form. SourceError."""
        self._check_open()
        self._hello, self._greeted = None, trio.Event()
        self._transmit(self._handshake.greeting)
        return await self.greet()

    async def ask(self, questions: Sequence[Signatures], sink: Sink) -> Answer:
        """Have the source's bytes, where they differ, given to `sink`; and tell where that was.

        `questions` in ascending positions, digested with `digest`. SourceError where the process is gone
        or went away, sent what was not asked for, or, in the original form, no longer has all that was asked;
        and what the sink raised. Then some of it may have been given.
        """
        return (await self._exchange(partial(Batch, questions, sink))).answer

    async def holes(self, extent: Extent, least: int) -> list[Extent]:
        """The source's holes of `least` bytes and more in `extent`; in the original form, none. SourceError."""
        if isinstance(self._dialect, OriginalDialect):
            return []
        return (await self._exchange(partial(HoleQuery, extent, least))).holes

    async def reaches(self, positions: Sequence[int]) -> list[bool]:
        """For each of the ascending positions: does the source have a byte there? In the original form.

        Past the end of a block device the original dies of it (SourceError).
        """
        answer = (await self._exchange(partial(ByteProbe, positions))).answer
        found = {extent.offset for extent in answer.data}
        return [position in found for position in positions]

    async def _exchange(self, make: Callable[[Callable[[], None]], Kind]) -> Kind:
        self._check_open()
        if not self._dialect.pending:
            self._silence.begin()
        settled = trio.Event()
        batch = make(partial(self._token.run_sync_soon, settled.set))
        self._transmit(self._dialect.ask(batch))
        await settled.wait()
        if batch.error is not None:
            raise copy(batch.error)
        return batch

    def _transmit(self, stream: bytes) -> None:
        self._check_open()
        self._send.send_nowait(stream)

    def _check_open(self) -> None:
        if self.failure is not None:
            raise copy(self.failure)
        if self._closing:
            raise SourceError(self._let_go())

    async def close(self) -> None:
        """Let the source go: `done` where nothing is being asked, else at once. Returns when it is gone."""
        if self._process is None or self.ended.is_set():
            self._closing = True
            return
        if self._closing:
            await self.ended.wait()
            return
        self._closing = True
        if self._dialect.pending or not self._greeted.is_set():
            self._process.kill()
        else:
            self._send.send_nowait(wire.encode(wire.Done()))
            self._send.close()
        with trio.move_on_after(_FAREWELL_SECONDS):
            await self.ended.wait()
        if not self.ended.is_set():
            self._process.kill()
            await self.ended.wait()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the process, reports `started`, and see it to its end; returns, does not raise, then.

        SourceError where it cannot be started at all.
        """
        process = self._process = self._started or await start(self._command)
        failure = SourceError(self._let_go())
        task_status.started()
        try:
            failure = await self._converse(process) or failure
        except Exception as error:  # noqa: BLE001  (logged with its traceback, and told to whoever asks)
            self._note_fault(error)
            failure = self._why(process, None) or failure
        finally:
            await process.aclose()
            self._fail(failure)
            self.ended.set()

    async def _converse(self, process: Process) -> SourceError | None:
        """See the process to its end. Returns why it ended, or None if it was told to."""
        with InputStream(process.stdout) as stream:
            async with trio.open_nursery() as nursery:
                messages_read = trio.Event()
                for part in (
                    self._write(process),
                    self._watch(process),
                    self._read_messages(process, messages_read),
                    self._end_with(process, stream),
                ):
                    nursery.start_soon(self._part, process, part)
                garbled = await self._read(process, stream)
                with trio.move_on_after(_FAREWELL_SECONDS):
                    await process.wait()
                    await messages_read.wait()
                nursery.cancel_scope.cancel()
        return self._why(process, garbled)

    async def _part(self, process: Process, part: Awaitable[None]) -> None:
        """Run a part of the connection. Whatever it raises ends this connection, and nothing else."""
        try:
            await part
        except Exception as error:  # noqa: BLE001  (logged with its traceback, and told to whoever asks)
            self._note_fault(error)
            process.kill()

    def _note_fault(self, error: Exception) -> None:
        """Log what nobody foresaw, with its traceback. Thread-safe."""
        logger.error("the connection to %s met a fault of blockcopy's", self._command.location, exc_info=error)
        self._fault = error

    def _why(self, process: Process, garbled: BlockcopyError | None) -> SourceError | None:
        """Why it ended, unless it was told to."""
        if self._fault is not None:
            return ProtocolViolationError(f"{self._command.location}: internal error: {self._fault!r}")
        status = process.returncode
        if self._dialect.pending and (self._stalled or 0 < (status or 0) < _NOT_ITS_OWN):
            self.unanswered = self._dialect.pending[0].questions
        if self._stalled:
            return SourceError(f"{self._command.location} gave no answer for {self._silence.timeout:g} seconds")
        if garbled is not None:
            words = f"{self._command.location} sent what was not asked for: {garbled}"
            return ProtocolViolationError(words + self._last_words())
        if not self._closing:
            return SourceError(explain_end(self._command, status, self._said.last, begun=self._begun))
        return None

    def _fail(self, error: SourceError) -> None:
        """Nothing can be asked any more: every wait ends with `error`."""
        self.failure = error
        while self._dialect.pending:
            self._dialect.pending.popleft().fail(error)
        self._greeted.set()
        self._send.close()

    async def _write(self, process: Process) -> None:
        enlarge_pipe(process.stdin.fileno())
        try:
            async with process.stdin:
                async for stream in self._outgoing:
                    await process.stdin.send_all(stream)
                    self.sent_bytes += len(stream)
        except trio.BrokenResourceError:
            return  # it went away: reading tells why

    async def _read(self, process: Process, stream: InputStream) -> BlockcopyError | None:
        """Settle batches until the output ends, in a thread; what was not asked for, if that ended it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wake_when_cancelled, stream)
            garbled = await trio.to_thread.run_sync(self._receive, stream, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()
        if garbled is not None or self._fault is not None:
            process.kill()
        return garbled

    @staticmethod
    async def _wake_when_cancelled(stream: InputStream) -> None:
        """A thread cannot be cancelled: have it see the end of the stream."""
        try:
            await trio.sleep_forever()
        finally:
            stream.wake()

    def _receive(self, stream: InputStream) -> BlockcopyError | None:
        """In the thread. Returns what was not asked for, or could not be taken, if that ended it."""
        decoder = Decoder(self._dialect.grammar)
        try:
            if not self._begun and not self._begins(stream):
                return None
            for message in decoder.messages(partial(self._read_into, stream)):
                if message is not None:
                    with self._silence.interrupted():
                        self._take(message)
        except TruncatedStreamError:
            return None  # `_why` tells how the process ended
        except BlockcopyError as error:
            return error
        except Exception as error:  # noqa: BLE001  (logged with its traceback, and told to whoever asks)
            self._note_fault(error)
        return None

    def _read_into(self, stream: InputStream, buffer: memoryview) -> int:
        """Read as `InputStream.read_into`, and count the bytes."""
        count = stream.read_into(buffer)
        self.received_bytes += count
        self._silence.receive(count)
        return count

    def _begins(self, stream: InputStream) -> bool:
        """Pass over what a login prints. Where nothing else comes, that may tell why."""
        self._stream = stream
        self._begun = stream.skip_past(self._command.mark, MAX_NOISE)
        if not self._begun:
            self._token.run_sync_soon(self._said.feed, stream.noise + b"\n")
        return self._begun

    def said(self) -> list[str]:
        """Return the last lines on standard error, and before the stage begins those that a login printed."""
        noise = self._stream.noise if self._stream and not self._begun else b""
        return [*start_timeout.last_lines(noise), *self._said.last]

    def _take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Hello) and self._hello is None:
            self._hello = message
            self._token.run_sync_soon(self._greeted.set)
            return
        before = self._dialect.answers
        self._dialect.take(message)
        if self._dialect.answers > before:
            self._silence.answer()

    async def _end_with(self, process: Process, stream: InputStream) -> None:
        """What it started may hold its output open, behind a script or a sudo: that is not waited for."""
        await process.wait()
        await trio.sleep(_FAREWELL_SECONDS)
        stream.wake()

    async def _watch(self, process: Process) -> None:
        """Kill it if it owes an answer and makes no progress: whoever waits learns that, and asks another."""
        while not self._stalled:
            silence = self._silence
            await trio.sleep_until(silence.ends_at if self._owes() else trio.current_time() + silence.timeout)
            self._stalled = self._owes() and trio.current_time() >= silence.ends_at
        process.kill()

    def _owes(self) -> bool:
        return bool(self._dialect.pending) and not self._silence.taking

    async def _read_messages(self, process: Process, finished: trio.Event) -> None:
        """What the process says to standard error is logged with the source's name, and kept."""
        while data := await process.stderr.receive_some(_MOST_WORDS):
            self._said.feed(data)
        self._said.finish()
        finished.set()

    def _log(self, text: str) -> None:
        level = logging.DEBUG if self.quiet else logging.WARNING
        logger.log(level, "%s: %s", self._command.location, text)

    def _last_words(self) -> str:
        return "; it said: " + " | ".join(self._said.last) if self._said.last else ""

    def _let_go(self) -> str:
        return f"{self._command.location} has been let go"
