"""The trio client of one `retrieve` process that speaks the original form, ours or the original.

The original answers when 16 commands are queued, says nothing for a block that is equal, and never
says how far it got. So a batch of questions is followed by FENCES empty ones (size 0, a digest
nothing has): they fill the queue, and each comes back as an empty frame with the position it was
sent with. Answers come in order, so silence before a fence means "equal". The position of the
fences alternates between 1 and 2, which tells those of neighbouring batches apart: no block begins
there, and both lie inside any block device (one refuses to seek past its end).

Silence is also what the original gives for a block beyond its end. So that a source which was
shortened cannot pass for an equal one, each batch ends with a question for its last byte that
cannot be equal: without that answer nothing of the batch is believed. Such a source fails the
batches that it no longer has, and goes on serving others; what cannot be an answer at all ends it.

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
from typing import NamedTuple

import trio

from blockcopy import wire, xz
from blockcopy.digests import NO_DIGEST, digest
from blockcopy.errors import BlockcopyError, GarbledSourceError, SourceError, StreamError
from blockcopy.remote import Command
from blockcopy.stages import PIPE_SIZE, enlarge_pipe

logger = logging.getLogger(__name__)

FENCES = 16
"""Empty questions behind a batch: whatever the queue held before, one of them fills it."""

_FAREWELL_SECONDS = 2
"""How long a process that closed its output, or was told to end, is waited for before it is killed."""


class Question(NamedTuple):
    """`size` bytes (at least 1) at `position` have `digest` here: the source's, if they differ."""

    position: int
    size: int
    digest: bytes


class _Batch:
    """Questions on their way, and what has come back for them."""

    def __init__(self, questions: Sequence[Question], fence: int) -> None:
        self.questions = questions
        self.fence = fence
        self.answers: list[bytes | None] = [None] * len(questions)
        self.next = 0  # the first question that can still be answered
        self.settled = trio.Event()
        self.error: BlockcopyError | None = None

    def take(self, position: int, payload: bytes) -> bool:
        """Put an answer where it belongs; False if it answers nothing that was asked."""
        for index in range(self.next, len(self.questions)):
            if self.questions[index].position == position:
                if len(payload) > self.questions[index].size:
                    return False
                self.answers[index] = payload
                self.next = index + 1
                return True
        return False


class Retriever:
    """One `retrieve` process. Start `run` in a nursery, then `ask`."""

    def __init__(self, command: Command) -> None:
        self._command = command
        # Unbounded, yet bounded by those who ask: each waits for its answer before it asks again.
        self._send, self._outgoing = trio.open_memory_channel[bytes](math.inf)
        self._pending: deque[_Batch] = deque()
        self._sequence = 0
        self._messages: deque[str] = deque(maxlen=5)
        self._process: trio.Process | None = None
        self._ended = trio.Event()
        self._closing = False
        self._old_fence: int | None = None  # of the batch that was settled last; more of them follow
        self.failure: SourceError | None = None
        """Why nothing can be asked any more; None while it can."""
        self.quiet = True
        """What it says, and dies of, is logged for developers only: as long as somebody else tells it."""
        self.sent_bytes = 0
        self.received_bytes = 0

    async def ask(self, questions: Sequence[Question]) -> list[bytes | None]:
        """For each question, in ascending positions: the source's bytes, or None where it has the same.

        SourceError where the process is gone or went away, sent what was not asked for, or no
        longer has all that was asked.
        """
        last = questions[-1]
        proof = Question(last.position + last.size - 1, 1, NO_DIGEST)
        answers = await self._exchange([*questions, proof])
        proven = answers.pop()
        if proven is None and last.size == 1 and answers[-1] is not None and digest(answers[-1]) == last.digest:
            # The proof asks for the same byte as the last question: where that is equal, the one
            # answer there is, is the proof's.
            proven, answers[-1] = answers[-1], None
        whole = all(
            answer is None or len(answer) == asked.size for asked, answer in zip(questions, answers, strict=True)
        )
        if proven is None or not whole:
            raise SourceError(
                f"{self._command.source} is shorter than it was: it does not reach {last.position + last.size}"
            )
        return answers

    async def reaches(self, positions: Sequence[int]) -> list[bool]:
        """For each of the ascending positions: does the source have a byte there?

        Past the end of a block device the original dies of it (SourceError).
        """
        answers = await self._exchange([Question(position, 1, NO_DIGEST) for position in positions])
        return [answer is not None for answer in answers]

    async def _exchange(self, questions: list[Question]) -> list[bytes | None]:
        if self.failure is not None:
            raise copy(self.failure)
        if self._closing:
            raise SourceError(self._let_go())
        batch = _Batch(questions, 1 + self._sequence % 2)
        self._sequence += 1
        stream = [wire.encode(wire.Hash(*question)) for question in questions]
        stream += [wire.encode(wire.Hash(batch.fence, 0, NO_DIGEST))] * FENCES
        self._pending.append(batch)
        self._send.send_nowait(b"".join(stream))
        await batch.settled.wait()
        if batch.error is not None:
            raise copy(batch.error)
        return batch.answers

    async def close(self) -> None:
        """Let the source go: `done` where nothing is being asked, else at once. Returns when it is gone."""
        if self._process is None or self._ended.is_set():
            self._closing = True
            return
        if self._closing:
            await self._ended.wait()
            return
        self._closing = True
        if self._pending or self.failure is not None:
            self._process.kill()
        else:
            self._send.send_nowait(wire.encode(wire.Done()))
            self._send.close()
        with trio.move_on_after(_FAREWELL_SECONDS):
            await self._ended.wait()
        if not self._ended.is_set():
            self._process.kill()
            await self._ended.wait()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the process, reports `started`, and see it to its end; returns, does not raise, then.

        SourceError where it cannot be started at all.
        """
        environment = {**os.environ, **self._command.environment}
        try:
            process = await trio.lowlevel.open_process(
                self._command.argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment
            )
        except OSError as error:
            raise SourceError(f"cannot run `{self._command.argv[0]}`: {error.strerror}") from error
        self._process = process
        failure = SourceError(self._let_go())
        try:
            async with trio.open_nursery() as nursery:
                messages_read = trio.Event()
                nursery.start_soon(self._write, process)
                nursery.start_soon(self._read_messages, process, messages_read)
                task_status.started()
                try:
                    await self._read(process)
                except StreamError as error:
                    process.kill()
                    garbled = f"{self._command.source} sent what was not asked for: {error}"
                else:
                    garbled = ""
                with trio.move_on_after(_FAREWELL_SECONDS):
                    await process.wait()
                    await messages_read.wait()
                if garbled:
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
            self._ended.set()

    def _fail(self, error: SourceError) -> None:
        """Nothing can be asked any more: every wait ends with `error`."""
        self.failure = error
        if not self._closing:
            self._log(str(error))
        for batch in self._pending:
            batch.error = error
            batch.settled.set()
        self._pending.clear()
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
        decoder = wire.Decoder(wire.BLOCK_STREAM)
        while data := await pipe.receive_some(PIPE_SIZE):
            self.received_bytes += len(data)
            decoder.feed(data)
            while (message := decoder.next()) is not None:
                if isinstance(message, wire.XzData):
                    self._take(message.position, xz.expand(message))
                elif isinstance(message, wire.Data):
                    self._take(message.position, message.payload)

    def _take(self, position: int, payload: bytes) -> None:
        batch = self._pending[0] if self._pending else None
        if payload:
            if batch is None or not batch.take(position, payload):
                raise StreamError(f"{len(payload)} bytes for position {position}")
        elif batch is not None and position == batch.fence:
            self._pending.popleft()
            self._old_fence = position
            batch.settled.set()
        elif position != self._old_fence:
            raise StreamError(f"an empty block for position {position}")

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
