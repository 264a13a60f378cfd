"""What is asked of a `retrieve`, and what its answers mean, in each of the two forms. No I/O.

The agreed form (see `wire`) closes each batch of questions with a numbered fence, and says in words
what it cannot answer.

The original form has neither. It answers when 16 commands are queued, says nothing for a block that
is equal, and never says how far it got. So a batch is followed by FENCES empty questions (size 0, a
digest nothing has): they fill the queue, and each comes back as an empty frame with the position it
was sent with. The position of the fences alternates between 1 and 2, which tells those of
neighbouring batches apart: no block begins there, and both lie inside any block device (one refuses
to seek past its end). Silence is also what the original gives for a block beyond its end. So that a
source which was shortened cannot pass for an equal one, each batch ends with a question for its last
byte that cannot be equal: without that answer nothing of the batch is believed.

In both, answers come in the order asked, so silence before a fence means "equal". A source that no
longer has what it had fails the batches in question, and goes on serving others; what cannot be an
answer at all is a StreamError, and ends the connection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import trio

from blockcopy import wire, xz
from blockcopy.digests import NO_DIGEST, digest
from blockcopy.errors import BlockcopyError, SourceError, StreamError

FENCES = 16
"""Empty questions behind a batch in the original form: whatever its queue held, one of them fills it."""


class Question(NamedTuple):
    """`size` bytes (at least 1) at `position` have `digest` here: the source's, if they differ."""

    position: int
    size: int
    digest: bytes


class Batch:
    """Questions on their way, and what has come back for them."""

    def __init__(self, questions: Sequence[Question], fence: int) -> None:
        self.questions = questions
        self.fence = fence
        self.answers: list[bytes | None] = [None] * len(questions)
        self.settled = trio.Event()
        self.error: BlockcopyError | None = None
        self._next = 0  # the first question that can still be answered

    def take(self, position: int, payload: bytes, *, exact: bool) -> bool:
        """Put an answer where it belongs; False if it answers nothing that was asked.

        With `exact` it has to be of the length asked for, else it may be shorter.
        """
        for index in range(self._next, len(self.questions)):
            question = self.questions[index]
            if question.position == position:
                fits = len(payload) == question.size or (len(payload) < question.size and not exact)
                if fits:
                    self.answers[index] = payload
                    self._next = index + 1
                return fits
        return False

    def fail(self, error: BlockcopyError) -> None:
        self.error = error
        self.settled.set()


class Form(ABC):
    """The batches of one connection, in the order in which they are answered."""

    grammar: wire.Grammar
    exact: bool
    """An answer has the length asked for; else the source may end inside a block, and say what it has."""

    def __init__(self, source: str) -> None:
        """`source` is its name in messages."""
        self.source = source
        self.pending: deque[Batch] = deque()
        self._sequence = 0

    def ask(self, questions: Sequence[Question]) -> tuple[Batch, bytes]:
        """A new batch, and what to send for it."""
        batch = Batch(questions, self._fence_of(self._sequence))
        self._sequence += 1
        self.pending.append(batch)
        stream = b"".join(wire.encode(wire.Hash(*question)) for question in questions)
        return batch, stream + self._closing(batch)

    def take(self, message: wire.Message) -> None:
        """A message that came. StreamError for what was not asked for."""
        if isinstance(message, wire.XzData):
            self._take_data(message.position, xz.expand(message))
        elif isinstance(message, wire.Data):
            self._take_data(message.position, bytes(message.payload))
        elif not isinstance(message, wire.Done):
            raise StreamError(f"a {type(message).__name__} out of its turn")

    def _take_data(self, position: int, payload: bytes) -> None:
        if not self.pending or not self.pending[0].take(position, payload, exact=self.exact):
            raise StreamError(f"{len(payload)} bytes for position {position}")

    def _settle(self) -> None:
        self.pending.popleft().settled.set()

    @abstractmethod
    def _fence_of(self, sequence: int) -> int:
        """What tells a batch's fence from its neighbours'."""

    @abstractmethod
    def _closing(self, batch: Batch) -> bytes:
        """What follows the questions, so that all of them are answered."""

    @abstractmethod
    def proof(self, questions: Sequence[Question]) -> list[Question]:
        """What to ask besides, so that silence can be believed."""

    @abstractmethod
    def believe(self, questions: Sequence[Question], answers: list[bytes | None]) -> list[bytes | None]:
        """The answers to `questions`, of those and their proof. SourceError where they prove nothing."""


class AgreedForm(Form):
    """Between two of ours."""

    grammar = wire.AGREED_BLOCK_STREAM
    exact = True

    def _fence_of(self, sequence: int) -> int:
        return sequence

    def _closing(self, batch: Batch) -> bytes:
        return wire.encode(wire.Fence(batch.fence))

    def proof(self, questions: Sequence[Question]) -> list[Question]:
        return []

    def believe(self, questions: Sequence[Question], answers: list[bytes | None]) -> list[bytes | None]:
        return answers

    def take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Fence):
            if not self.pending or self.pending[0].fence != message.number:
                raise StreamError(f"the fence {message.number}")
            self._settle()
        elif isinstance(message, wire.Failure):
            if not self.pending:
                raise StreamError(f"a failure for position {message.position}")
            self.pending[0].error = SourceError(f"{self.source}: {message.reason}")
        else:
            super().take(message)


class OriginalForm(Form):
    """With the original program, whose `retrieve` is a filter and was not made to be asked."""

    grammar = wire.BLOCK_STREAM
    exact = False

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self._old_fence: int | None = None  # of the batch that was settled last; more of them follow

    def _fence_of(self, sequence: int) -> int:
        return 1 + sequence % 2

    def _closing(self, batch: Batch) -> bytes:
        return wire.encode(wire.Hash(batch.fence, 0, NO_DIGEST)) * FENCES

    def _take_data(self, position: int, payload: bytes) -> None:
        if payload:
            super()._take_data(position, payload)
        elif self.pending and position == self.pending[0].fence:
            self._settle()
            self._old_fence = position
        elif position != self._old_fence:
            raise StreamError(f"an empty block for position {position}")

    def proof(self, questions: Sequence[Question]) -> list[Question]:
        last = questions[-1]
        return [Question(last.position + last.size - 1, 1, NO_DIGEST)]

    def believe(self, questions: Sequence[Question], answers: list[bytes | None]) -> list[bytes | None]:
        *answers, proven = answers
        last = questions[-1]
        if proven is None and last.size == 1 and answers[-1] is not None and digest(answers[-1]) == last.digest:
            # The proof asks for the same byte as the last question: where that is equal, the one
            # answer there is, is the proof's.
            proven, answers[-1] = answers[-1], None
        whole = all(
            answer is None or len(answer) == asked.size for asked, answer in zip(questions, answers, strict=True)
        )
        if proven is None or not whole:
            raise SourceError(
                f"{self.source} is shorter than it was: it does not reach {last.position + last.size}"
            )
        return answers
