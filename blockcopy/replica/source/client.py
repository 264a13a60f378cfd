"""The client of one `retrieve` process: it starts the process, sends requests, and receives the answers.

    ask ─ stream ─► _write ─► (pipe) … (pipe) ─► _receive, a thread ─► the batch's sink ─► settled

Any task may call `ask`. The task `run` owns the process, `_write` writes, `_read_stderr` keeps its error messages.
One thread receives. It decodes and checks each answer, and gives the answer to its sink. So no block is handed from
one thread to another on its way to the destination. The end of the process, whatever its cause, ends every wait.
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
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.digests import Digest
from blockcopy.protocol.handshake import Handshake
from blockcopy.replica.source.batches import Batch, ByteProbe, Delta, HoleQuery, Ping, Signatures, Sink
from blockcopy.replica.source.dialects import NegotiatedDialect, OriginalDialect
from blockcopy.replica.source.process import Process, start_process
from blockcopy.replica.source.progress_timeout import ProgressTimeout
from blockcopy.stage.streams import InputStream, enlarge_pipe
from blockcopy.transport import start_timeout
from blockcopy.transport.command import MAX_NOISE, Command
from blockcopy.transport.hints import explain_end
from blockcopy.transport.stderr_lines import StderrLines
from blockcopy.untrusted_text import LineBudget

logger = logging.getLogger(__name__)

AnyBatch = TypeVar("AnyBatch", bound=Batch)

_STDERR_BYTES = 64 * 1024

_END_SECONDS = 2
"""Seconds from a request to end, or from the end of the output, until a process is killed."""


class Client:
    """The client of one `retrieve` process.

    Start `run` in a nursery. In the negotiated dialect, call `greet` before `ask`. Call from trio's thread only.
    """

    def __init__(
        self,
        command: Command,
        handshake: Handshake | None,
        *,
        timeout: float = math.inf,
        started: Process | None = None,
        budget: LineBudget | None = None,
    ) -> None:
        """Prepare a client of the process that `command` starts.

        `handshake`: this end's Handshake, or None for the dialect of the original program. `timeout`: seconds after
        which a process is killed if it owes an answer and makes no progress. `started`: the Process, if it was
        started before. `budget`: the LineBudget of its log lines.
        """
        self._command = command
        self._started = started
        self._dialect = (NegotiatedDialect if handshake else OriginalDialect)(str(command.location))
        self.digest: Digest | None = None if handshake else digests.named(digests.ORIGINAL)
        """The digest of all signatures. None until the greeting is answered."""
        # Needs no limit: each asking task has one request here.
        self._send, self._outgoing = trio.open_memory_channel[bytes](math.inf)
        self._stderr = StderrLines(self._log, budget or LineBudget())
        self._process: Process | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._greeted = trio.Event()
        self._hello: wire.Hello | None = None
        self._progress_clock = ProgressTimeout(timeout)
        self._begun = not command.mark  # True once the mark was read
        self._stream: InputStream | None = None
        self.ended = trio.Event()
        """Set when the process has ended. Then the attribute `failure` has the error."""
        self._closing = False
        self._stalled = False
        self.unanswered: Sequence[Signatures] | None = None
        """The signatures that were next when the process exited with an error of its own or stalled, or None."""
        self._fault: Exception | None = None  # unforeseen, of a part of this client
        self.failure: SourceError | None = None
        """The error by which the process can answer no more. None while it can."""
        self._quiet = True  # log its standard error for developers only, until `begin_serving`
        self.sent_bytes = 0
        self.received_bytes = 0
        self.join_token: str | None = None
        """The token with which further connections can join this one. None if the source has told none."""
        self._handshake = handshake
        if handshake:  # at once, before any task asks
            self._send.send_nowait(command.opening + handshake.greeting)
        else:
            self._greeted.set()  # the original program knows no greeting

    @property
    def answered_at(self) -> float | None:
        """The time of the last whole answer since `begin_serving`, by trio's clock. None if there was none."""
        return self._progress_clock.answered_at

    @property
    def has_refused(self) -> bool:
        """Whether the process has exited with an error of its own instead of a greeting."""
        return self._hello is None and self._process is not None and self._process.has_failed

    def begin_serving(self) -> None:
        """Begin to serve requests: log standard error from now on, and forget earlier answers."""
        self._quiet = False
        self._progress_clock.answered_at = None

    async def greet(self) -> Identity:
        """Wait for the answer to the greeting. Returns the identity of the source, and sets the attribute `digest`.

        Raises OriginalProgramError if the process does not know the greeting. Raises SourceError if it ends for
        another reason, or if its answer is not acceptable.
        """
        await self._greeted.wait()
        if self._hello is None or self._handshake is None:
            failure = self.failure or self._closed_error()
            if any("helo" in line for line in self._stderr.last):
                raise OriginalProgramError(str(failure))
            raise copy(failure)
        try:
            identity, name, self.join_token = self._handshake.read(self._hello)
        except StreamError as error:
            raise SourceError(f"{self._command.location}: {error}") from error
        self.digest = digests.named(name)
        return identity

    async def greet_again(self) -> Identity:
        """Send the greeting once more. Returns the identity that the source has now. Raises as `greet` does."""
        self._check_open()
        if self._handshake is not None:
            self._hello, self._greeted = None, trio.Event()
            self._send.send_nowait(self._handshake.greeting)
        return await self.greet()

    async def ask(self, signatures: Sequence[Signatures], sink: Sink) -> Delta:
        """Give those bytes of the source to `sink` that differ from `signatures`. Returns the Delta.

        `signatures`: ascending, made with the attribute `digest`. Raises SourceError if the process ends, or sends
        an unexpected reply. In the original dialect, also if the source has become too short. Raises what `sink`
        raises. After an error, `sink` may have had some of the bytes.
        """
        return (await self._exchange(partial(Batch, signatures, sink))).delta

    async def holes(self, extent: Extent, min_length: int) -> list[Extent]:
        """Return the holes of the source in `extent` that have `min_length` bytes or more.

        Returns an empty list in the original dialect. Raises SourceError as `ask` does.
        """
        if isinstance(self._dialect, OriginalDialect):
            return []
        return (await self._exchange(partial(HoleQuery, extent, min_length))).holes

    async def reaches(self, positions: Sequence[int]) -> list[bool]:
        """Ask whether the source has a byte at each of `positions`, ascending. Only for the original dialect.

        Returns one bool for each position, in the same order. Raises SourceError if the process ends, as the
        original program does past the end of a block device.
        """
        delta = (await self._exchange(partial(ByteProbe, positions))).delta
        found = {extent.offset for extent in delta.data}
        return [position in found for position in positions]

    async def ping(self) -> bool:
        """Wait for an answer without work. Returns False if the dialect has none. Raises SourceError."""
        if self._hello is not None:
            await self._exchange(Ping)
        return self._hello is not None

    async def _exchange(self, make: Callable[[Callable[[], None]], AnyBatch]) -> AnyBatch:
        """Send a batch, and return the batch when it is settled.

        `make`: called with the function that settles the batch, returns the batch. Raises SourceError.
        """
        self._check_open()
        if not self._dialect.pending:
            self._progress_clock.begin()
        settled = trio.Event()
        batch = make(partial(self._token.run_sync_soon, settled.set))
        self._send.send_nowait(self._dialect.request(batch))
        await settled.wait()
        if batch.error is not None:
            raise copy(batch.error)
        return batch

    def _check_open(self) -> None:
        if self.failure is not None or self._closing:
            raise copy(self.failure or self._closed_error())

    def _closed_error(self) -> SourceError:
        return SourceError(f"the connection to {self._command.location} is closed")

    async def close(self) -> None:
        """End the process: with `done` if it is idle, else at once. Returns when it has ended."""
        was_closing, self._closing = self._closing, True
        if self._process is None or self.ended.is_set():
            return
        if not was_closing:
            if self._dialect.asked or not self._greeted.is_set():
                self._process.kill()
            else:
                self._send.send_nowait(wire.encode(wire.Done()))
                self._send.close()
            with trio.move_on_after(_END_SECONDS):
                await self.ended.wait()
            self._process.kill()
        await self.ended.wait()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the process, report that to `task_status`, and wait for its end.

        Sets the attribute `failure` then. Raises SourceError if the process cannot be started.
        """
        process = self._process = self._started or await start_process(self._command)
        failure = self._closed_error()
        task_status.started()
        try:
            failure = await self._converse(process) or failure
        except Exception as error:  # noqa: BLE001  (logged with its traceback, and reported to all waiting tasks)
            self._note_fault(error)
            failure = self._end_error(process, None) or failure
        finally:
            await process.aclose()
            self._fail(failure)
            self.ended.set()

    async def _converse(self, process: Process) -> SourceError | None:
        """Run all parts until `process` ends. Returns the error that ended it, or None if `close` did."""
        with InputStream(process.stdout) as stream:
            async with trio.open_nursery() as nursery:
                stderr_ended = trio.Event()
                for part in (
                    self._write(process),
                    self._watch(process),
                    self._read_stderr(process, stderr_ended),
                    self._wake_after_exit(process, stream),
                ):
                    nursery.start_soon(self._run_part, process, part)
                violation = await trio.to_thread.run_sync(self._receive, stream, limiter=trio.CapacityLimiter(1))
                if violation is not None or self._fault is not None:
                    process.kill()
                with trio.move_on_after(_END_SECONDS):
                    await process.wait()
                    await stderr_ended.wait()
                nursery.cancel_scope.cancel()
        return self._end_error(process, violation)

    async def _run_part(self, process: Process, part: Awaitable[None]) -> None:
        """Await `part`. If it raises any exception, kill `process`: only this connection ends."""
        try:
            await part
        except Exception as error:  # noqa: BLE001  (logged with its traceback, and reported to all waiting tasks)
            self._note_fault(error)
            process.kill()

    def _note_fault(self, error: Exception) -> None:
        """Log `error`, an unforeseen exception, with its traceback, and keep it. Thread-safe."""
        logger.error("internal error in the connection to %s", self._command.location, exc_info=error)
        self._fault = error

    def _end_error(self, process: Process, violation: BlockcopyError | None) -> SourceError | None:
        """Return the error that ended `process`, or None if `close` ended it.

        `violation`: the error about an unexpected reply, or None if there was no such reply.
        """
        location, status = self._command.location, process.returncode
        if self._fault is not None:
            return ProtocolViolationError(f"{location}: internal error: {self._fault!r}")
        asked = self._dialect.asked
        if asked is not None and (self._stalled or process.has_failed):
            self.unanswered = asked.signatures
        if self._stalled:
            return SourceError(f"no answer from {location} for {self._progress_clock.timeout:g} seconds")
        if violation is not None:
            said = "; it said: " + " | ".join(self._stderr.last) if self._stderr.last else ""
            return ProtocolViolationError(f"unexpected reply from {location}: {violation}{said}")
        if self._closing:
            return None
        return SourceError(explain_end(self._command, status, self._stderr.last, begun=self._begun))

    def _fail(self, error: SourceError) -> None:
        """End every wait, now and later, with `error`."""
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
            return  # the process has ended, and the reader finds out why

    def _receive(self, stream: InputStream) -> BlockcopyError | None:
        """Settle batches by answers in `stream`, in a thread. Returns the error of an unexpected reply, or None."""
        decoder = Decoder(self._dialect.grammar)
        try:
            if not self._begun and not self._skip_login_output(stream):
                return None
            for message in decoder.messages(partial(self._read_into, stream)):
                if message is not None:
                    with self._progress_clock.interrupted():
                        self._handle(message)
        except TruncatedStreamError:
            return None  # `_end_error` tells how the process ended
        except BlockcopyError as error:
            return error
        except Exception as error:  # noqa: BLE001  (logged with its traceback, and reported to all waiting tasks)
            self._note_fault(error)
        return None

    def _read_into(self, stream: InputStream, buffer: memoryview) -> int:
        """Read from `stream` into `buffer`, and count the bytes. Returns their number, 0 at the end."""
        count = stream.read_into(buffer)
        self.received_bytes += count
        self._progress_clock.receive(count)
        return count

    def _skip_login_output(self, stream: InputStream) -> bool:
        """Skip what a login prints to `stream` before the stage begins.

        Returns False if `stream` ends before that. What was printed may tell the reason, so it is logged.
        """
        self._stream = stream
        self._begun = stream.skip_past(self._command.mark, MAX_NOISE)
        if not self._begun:
            self._token.run_sync_soon(self._stderr.feed, stream.noise + b"\n")
        return self._begun

    def said(self) -> list[str]:
        """Return the last lines of standard error, and before the stage begins also those that a login printed."""
        noise = self._stream.noise if self._stream and not self._begun else b""
        return [*start_timeout.last_lines(noise), *self._stderr.last]

    def _handle(self, message: wire.Message) -> None:
        if isinstance(message, wire.Hello) and self._hello is None:
            self._hello = message
            self._token.run_sync_soon(self._greeted.set)
            return
        before = self._dialect.answer_count
        self._dialect.receive(message)
        if self._dialect.answer_count > before:
            self._progress_clock.answer()

    async def _wake_after_exit(self, process: Process, stream: InputStream) -> None:
        """End `stream` soon after `process` has exited, because a child of `process` may keep its output open.

        Also on cancellation, because the thread that reads `stream` cannot be cancelled.
        """
        try:
            await process.wait()
            await trio.sleep(_END_SECONDS)
        finally:
            stream.wake()

    async def _watch(self, process: Process) -> None:
        """Kill `process` if it owes an answer and makes no progress, so that its callers can ask another."""
        clock = self._progress_clock
        while not self._stalled:
            await trio.sleep_until(clock.ends_at if self._owes() else trio.current_time() + clock.timeout)
            self._stalled = self._owes() and trio.current_time() >= clock.ends_at
        process.kill()

    def _owes(self) -> bool:
        """Return whether the process owes an answer while this end is not processing one."""
        return bool(self._dialect.pending) and not self._progress_clock.taking

    async def _read_stderr(self, process: Process, ended: trio.Event) -> None:
        """Log the standard error of `process` with the source's name, and keep its last lines. Then set `ended`."""
        while data := await process.stderr.receive_some(_STDERR_BYTES):
            self._stderr.feed(data)
        self._stderr.finish()
        ended.set()

    def _log(self, line: str) -> None:
        logger.log(logging.DEBUG if self._quiet else logging.WARNING, "%s: %s", self._command.location, line)
