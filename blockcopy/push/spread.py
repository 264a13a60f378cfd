"""The answers of a push, spread over its connections.

    retrieve → Spread.deliver ─┬─ what must arrive in order → the first connection, in the caller's thread
                               └─ all else → a branch with room → a further connection, confirmed by fences

The caller writes to the first connection if no branch has room. If a further connection breaks, its branch ends.
Then the source is examined again for each answer that was not confirmed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from blockcopy.protocol.handshake import ClientGreeting
from blockcopy.stage.delivery import Answer, Delivery
from blockcopy.stage.streams import OutputStream
from blockcopy.transport.session import SilenceTimer

_MAX_WAITING = 2
"""Answers that wait in a branch. No branch is idle then while the caller writes to the first connection."""

_RECENT_BYTES = 4 * 1024 * 1024
"""Bytes after which earlier answers hardly count in `seconds_per_byte`."""

Again = Callable[[], Answer]
"""Called without arguments, examines the source again and returns an Answer."""


class Branch:
    """The answers for one further connection: those that wait, and those that are not confirmed. Thread-safe."""

    def __init__(self, spread: Spread, output: OutputStream, silence: SilenceTimer) -> None:
        """Open a branch of `spread` to `output`. `silence`: runs while a confirmation is due."""
        self.output = output
        self.number = 0
        """The number of answers taken. The fence behind an answer has the number of that answer."""
        self._spread = spread
        self._changed = spread.changed
        self._silence = silence
        self._waiting: deque[tuple[Answer, Again]] = deque()
        self._unconfirmed: deque[tuple[int, Again]] = deque()
        self._is_retired = self._is_ended = False
        silence.pause()

    @property
    def load(self) -> int:
        """The number of answers that wait or are not confirmed."""
        return len(self._waiting) + len(self._unconfirmed)

    @property
    def has_room(self) -> bool:
        """Whether the branch takes one more answer."""
        return len(self._waiting) < _MAX_WAITING and not self._is_retired

    @property
    def is_retired(self) -> bool:
        """Whether the branch ends once all its answers are confirmed."""
        return self._is_retired

    def put(self, answer: Answer, again: Again) -> None:
        """Add `answer` to those that wait. If the connection breaks, `again` makes it anew.

        The caller holds `changed`, and has seen that there is room.
        """
        self._waiting.append((answer, again))
        self._changed.notify_all()

    def take(self) -> Answer | None:
        """Wait for an answer to send, and return it. Returns None if no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_retired or self._is_ended)
            if self._is_ended or not self._waiting:
                return None
            answer, again = self._waiting.popleft()
            self.number += 1
            if not self._unconfirmed:
                self._silence.resume()
            self._unconfirmed.append((self.number, again))
            return answer

    def confirm(self, number: int) -> None:
        """Note that all answers up to `number` have arrived."""
        with self._changed:
            had_any = bool(self._unconfirmed)
            while self._unconfirmed and self._unconfirmed[0][0] <= number:
                self._unconfirmed.popleft()
            if had_any and not self._unconfirmed:
                self._silence.pause()
            self._changed.notify_all()

    def retire(self) -> None:
        """Take no more answers."""
        with self._changed:
            self._is_retired = True
            self._changed.notify_all()

    def end(self) -> None:
        """Leave all that is not confirmed to other connections. The connection has ended."""
        with self._changed:
            self._is_ended = self._is_retired = True
            again = [each for _, each in self._unconfirmed]
            for answer, each in self._waiting:
                answer.release()
                again.append(each)
            self._waiting.clear()
            self._unconfirmed.clear()
            self._spread.forget(self, again)


class Spread(Delivery):
    """Delivery of answers over the first connection and over branches."""

    def __init__(
        self, output: OutputStream, working: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Deliver over `output`, of the first connection, until there are branches.

        `working`: called without arguments, returns a context manager, within which that connection may be silent.
        """
        super().__init__(output)
        self.changed = threading.Condition()
        """Guards all branches. Notified of each change."""
        self.token: str | None = None
        """The token of further connections. None if unknown yet, or if the other end takes none."""
        self.round_trip: float | None = None
        """Seconds of a round trip. None if unknown."""
        self.is_blocked = False
        """Whether the caller of `deliver` waits for a connection."""
        self.position = 0
        """The offset up to which the source was answered."""
        self._working = working
        self._greeted_at: float | None = None
        self._branches: list[Branch] = []
        self._again: deque[Again] = deque()
        self._past_bytes = 0  # of branches that have ended
        self._pace = 0.0

    @property
    def seconds_per_byte(self) -> float:
        """Recent time for which the caller of `deliver` waited, for each byte."""
        return self._pace

    @property
    def sent_bytes(self) -> int:
        """Bytes written to all connections."""
        with self.changed:
            return self._past_bytes + self._output.written + sum(branch.output.written for branch in self._branches)

    @property
    def branches(self) -> list[Branch]:
        """A list of the branches that take answers."""
        with self.changed:
            return [branch for branch in self._branches if not branch.is_retired]

    def greeted(self, greeting: ClientGreeting) -> None:
        """Take the token of further connections from `greeting`."""
        self.token = greeting.join

    def fenced(self) -> None:
        """Measure the round trip: the first fence answers our greeting."""
        if self.round_trip is None and self._greeted_at is not None:
            self.round_trip = time.monotonic() - self._greeted_at

    def open_branch(self, output: OutputStream, silence: SilenceTimer) -> Branch:
        """Return a new Branch to `output`. `silence`: as for a Branch."""
        branch = Branch(self, output, silence)
        with self.changed:
            self._branches.append(branch)
        return branch

    def forget(self, branch: Branch, again: list[Again]) -> None:
        """Remove `branch`, which has ended. `again`: what it leaves to others. The caller holds `changed`."""
        if branch in self._branches:
            self._branches.remove(branch)
            self._past_bytes += branch.output.written
        self._again.extend(again)
        self.changed.notify_all()

    def deliver(self, answer: Answer) -> None:
        """Send `answer`, or put it into a branch. If its order matters, first wait until all before has arrived.

        Raises OutputError if the first connection fails, and what examining the source again raises.
        """
        self.position = max(self.position, answer.end)
        size = sum(map(len, answer.frames))
        started = time.perf_counter()
        self.is_blocked = True
        try:
            if answer.again is None:
                self._settle()
                self._send(answer)
                self._greeted_at = self._greeted_at or time.monotonic()
            else:
                self._repeat()
                self._pass_on(answer, answer.again, size)
        finally:
            self.is_blocked = False
        if size:
            seconds = time.perf_counter() - started
            self._pace += (seconds / size - self._pace) * min(1, size / _RECENT_BYTES)

    def _pass_on(self, answer: Answer, again: Again, size: int) -> None:
        """Put `answer`, of `size` bytes, into the branch with the least load. Without room there, write it here.

        `again`: makes the answer anew.
        """
        if size:
            with self.changed:
                branches = [branch for branch in self._branches if branch.has_room]
                if branches:
                    min(branches, key=lambda branch: branch.load).put(answer, again)
                    return
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        self._output.write(answer.frames)
        answer.release()

    def _repeat(self) -> None:
        """Examine the source again for what branches have left, and pass that on."""
        while self._again:
            again = self._again.popleft()
            answer = again()
            self._pass_on(answer, again, sum(map(len, answer.frames)))

    def _settle(self) -> None:
        """Wait until all that was passed on has arrived."""
        while True:
            self._repeat()
            with self.changed:
                if self._again:
                    continue
                if not any(branch.load for branch in self._branches):
                    return
                with self._working():
                    self.changed.wait()
