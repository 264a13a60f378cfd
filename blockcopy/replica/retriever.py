"""The trio client of one `retrieve` process. What is said with it is `forms`' to know.

Tasks: `run` reads and owns the process, `_write` writes, `_read_messages` collects what it says to
standard error. `ask` may be called by any task. Whatever ends the process ends every wait.
"""

from __future__ import annotations

import logging
import math
import os
import signal
from collections import deque
from collections.abc import Sequence
from copy import copy
from subprocess import PIPE

import trio

from blockcopy import __version__, digests, wire
from blockcopy.digests import NO_DIGEST
from blockcopy.errors import GarbledSourceError, OriginalProgramError, SourceError, StreamError
from blockcopy.identity import Identity, is_identity
from blockcopy.remote import Command
from blockcopy.replica.forms import AgreedForm, OriginalForm, Question
from blockcopy.stages import PIPE_SIZE, enlarge_pipe

logger = logging.getLogger(__name__)

_FAREWELL_SECONDS = 2
"""How long a process that closed its output, or was told to end, is waited for before it is killed."""


_GREETING = wire.encode(
    wire.Hello(
        {"protocol": wire.PROTOCOL, "program": f"blockcopy {__version__}", "digests": [digests.ORIGINAL]},
    )
)


class Retriever:
    """One `retrieve` process. Start `run` in a nursery, `greet` it where it may be ours, then `ask`."""

    def __init__(self, command: Command, *, original: bool = False, timeout: float = math.inf) -> None:
        """It is killed where it gives nothing for `timeout` seconds while it is asked something."""
        self._command = command
        self._timeout = timeout
        self._form = (OriginalForm if original else AgreedForm)(str(command.source))
        # Unbounded, yet bounded by those who ask: each waits for its answer before it asks again.
        self._send, self._outgoing = trio.open_memory_channel[bytes](math.inf)
        self._messages: deque[str] = deque(maxlen=5)
        self._process: trio.Process | None = None
        self._greeted = trio.Event()
        self._hello: wire.Hello | None = None
        self._last_sign = trio.current_time()  # of life, or when it was first asked
        self.answered_at: float | None = None
        """When it last gave anything but its greeting; None before."""
        self.ended = trio.Event()
        self._closing = False
        self._stalled = False
        self.failure: SourceError | None = None
        """Why nothing can be asked any more; None while it can."""
        self.quiet = True
        """What it says is logged for developers only: as long as somebody else tells it."""
        self.sent_bytes = 0
        self.received_bytes = 0
        if original:
            self._greeted.set()  # it does not know how
        else:  # before anything else, and without waiting for whoever asks
            self._transmit(_GREETING)

    async def greet(self) -> Identity:
        """Wait for the greeting of the agreed form to be returned; what the source says of itself.

        OriginalProgramError where the process knows no `helo`; SourceError where it dies of anything
        else or says what cannot be agreed to.
        """
        await self._greeted.wait()
        if self._hello is None:
            failure = self.failure or SourceError(self._let_go())
            if any("helo" in message for message in self._messages):
                raise OriginalProgramError(str(failure))
            raise copy(failure)
        facts = self._hello.facts
        identity: Identity = facts.get("identity", {})
        if not is_identity(identity) or facts.get("digest") != digests.ORIGINAL:
            raise SourceError(f"{self._command.source}: no agreement with {str(facts)[:500]}")
        return identity

    async def greet_again(self) -> Identity:
        """What the source says of itself by now; in the agreed form. SourceError."""
        self._check_open()
        self._hello, self._greeted = None, trio.Event()
        self._transmit(_GREETING)
        return await self.greet()

    async def ask(self, questions: Sequence[Question]) -> list[bytes | None]:
        """For each question, in ascending positions: the source's bytes, or None where it has the same.

        SourceError where the process is gone or went away, sent what was not asked for, or no
        longer has, or cannot read, all that was asked.
        """
        answers = await self._exchange([*questions, *self._form.proof(questions)])
        return self._form.believe(questions, answers)

    async def reaches(self, positions: Sequence[int]) -> list[bool]:
        """For each of the ascending positions: does the source have a byte there? In the original form.

        Past the end of a block device the original dies of it (SourceError).
        """
        answers = await self._exchange([Question(position, 1, NO_DIGEST) for position in positions])
        return [answer is not None for answer in answers]

    async def _exchange(self, questions: list[Question]) -> list[bytes | None]:
        self._check_open()
        if not self._form.pending:
            self._last_sign = trio.current_time()
        batch, stream = self._form.ask(questions)
        self._transmit(stream)
        await batch.settled.wait()
        if batch.error is not None:
            raise copy(batch.error)
        return batch.answers

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
        if self._form.pending or not self._greeted.is_set():
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
        environment = {**os.environ, **self._command.environment}
        try:
            process = await trio.lowlevel.open_process(
                self._command.argv,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=environment,
                cwd=self._command.folder if os.path.isdir(self._command.folder) else None,
            )
        except OSError as error:
            raise SourceError(f"cannot run `{self._command.argv[0]}`: {error.strerror}") from error
        self._process = process
        failure = SourceError(self._let_go())
        try:
            async with trio.open_nursery() as nursery:
                messages_read = trio.Event()
                nursery.start_soon(self._write, process)
                nursery.start_soon(self._watch, process)
                nursery.start_soon(self._read_messages, process, messages_read)
                reading = trio.CancelScope()
                nursery.start_soon(self._end_with, process, reading)
                task_status.started()
                try:
                    with reading:
                        await self._read(process)
                except StreamError as error:
                    process.kill()
                    garbled = f"{self._command.source} sent what was not asked for: {error}"
                else:
                    garbled = ""
                with trio.move_on_after(_FAREWELL_SECONDS):
                    await process.wait()
                    await messages_read.wait()
                if self._stalled:
                    failure = SourceError(f"{self._command.source} gave nothing for {self._timeout:g} seconds")
                elif garbled:
                    failure = GarbledSourceError(garbled + self._said())
                elif not self._closing:
                    failure = SourceError(self._describe_end(process.returncode) + self._said())
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        await pipe.aclose()
            self._fail(failure)
            self.ended.set()

    def _fail(self, error: SourceError) -> None:
        """Nothing can be asked any more: every wait ends with `error`."""
        self.failure = error
        for batch in self._form.pending:
            batch.fail(error)
        self._form.pending.clear()
        self._greeted.set()
        self._send.close()

    async def _write(self, process: trio.Process) -> None:
        pipe = process.stdin
        if not isinstance(pipe, trio.lowlevel.FdStream):
            return
        enlarge_pipe(pipe.fileno())
        try:
            async with pipe:
                async for stream in self._outgoing:
                    await pipe.send_all(stream)
                    self.sent_bytes += len(stream)
        except trio.BrokenResourceError:
            return  # it went away: reading tells why

    async def _read(self, process: trio.Process) -> None:
        """Settle batches until the output ends. StreamError for what was not asked for."""
        pipe = process.stdout
        if not isinstance(pipe, trio.lowlevel.FdStream):
            return
        enlarge_pipe(pipe.fileno())
        decoder = wire.Decoder(self._form.grammar)
        while data := await pipe.receive_some(PIPE_SIZE):
            self.received_bytes += len(data)
            self._last_sign = trio.current_time()
            decoder.feed(data)
            while (message := decoder.next()) is not None:
                if isinstance(message, wire.Hello) and self._hello is None:
                    self._hello = message
                    self._greeted.set()
                else:
                    self._form.take(message)
                    self.answered_at = self._last_sign

    async def _end_with(self, process: trio.Process, reading: trio.CancelScope) -> None:
        """What it started may hold its output open, behind a script or a sudo: that is not waited for."""
        await process.wait()
        await trio.sleep(_FAREWELL_SECONDS)
        reading.cancel()

    async def _watch(self, process: trio.Process) -> None:
        """Kill it where it owes an answer and gives nothing: whoever waits learns that, and asks another."""
        while not self._stalled:
            since = self._last_sign if self._form.pending else trio.current_time()
            await trio.sleep_until(since + self._timeout)
            silent = trio.current_time() >= self._last_sign + self._timeout
            self._stalled = silent and bool(self._form.pending)
        process.kill()

    async def _read_messages(self, process: trio.Process, finished: trio.Event) -> None:
        """What the process says to standard error is logged with the source's name, and kept."""
        pipe = process.stderr
        rest = b""
        while pipe is not None and (data := await pipe.receive_some(4096)):
            *lines, rest = (rest + data).split(b"\n")
            self._note(lines)
            rest = rest[-4096:]  # a line without an end is not waited for
        self._note([rest])
        finished.set()

    def _note(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").strip()
            if text:
                self._messages.append(text)
                self._log(f"{self._command.source}: {text}")

    def _log(self, text: str) -> None:
        logger.log(logging.DEBUG if self.quiet else logging.WARNING, "%s", text)

    def _describe_end(self, returncode: int | None) -> str:
        if returncode is None:
            how = "closed its output"
        elif returncode < 0:
            how = f"was killed by {signal.Signals(-returncode).name}"
        else:
            how = f"ended with exit status {returncode}"
        return f"the retrieve process of {self._command.source} {how}"

    def _said(self) -> str:
        return "; it said: " + " | ".join(self._messages) if self._messages else ""

    def _let_go(self) -> str:
        return f"{self._command.source} has been let go"
