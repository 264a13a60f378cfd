"""The connections of a push after the first: opened while that pays, and what becomes of each.

A connection that cannot be opened is no error: a server may allow only so many sessions. Nor is a connection that
breaks: the answers that it owed are sent over others.
"""

from __future__ import annotations

import logging
import threading
import time

from blockcopy.errors import BlockcopyError, RemoteError, StreamError
from blockcopy.protocol import wire
from blockcopy.protocol.decoder import Decoder
from blockcopy.push.spread import Branch, Spread
from blockcopy.stage.streams import OutputStream
from blockcopy.transport.hints import explain_end
from blockcopy.transport.scaling import SAMPLE_SECONDS, Sample, Scaling
from blockcopy.transport.session import Session

logger = logging.getLogger(__name__)

_SETTLE_SECONDS, _SETTLE_ROUND_TRIPS = 0.3, 3
"""Time for which new connections are not measured: at first they only fill the buffers on their way."""


class Further:
    """A further connection of a push. A thread reads confirmations, another one sends the answers of its branch."""

    def __init__(self, session: Session, spread: Spread) -> None:
        """Start the stage of `session`, and open a branch of `spread` once it has joined the first."""
        self.opened = threading.Event()
        """Set once the connection is up, or has failed."""
        self.is_lost = False
        """Whether the connection has failed, or ended too early."""
        self._session = session
        self._spread = spread
        self._branch: Branch | None = None
        self._ends = False  # as it should
        self._thread = threading.Thread(target=self._run, name="further")
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended, and nothing of it is left."""
        return not self._thread.is_alive()

    def retire(self) -> None:
        """End the connection once all its answers are confirmed. If it is not up yet, end it now."""
        self._ends = True
        if self._branch is None:
            self._session.kill("not needed any more")
        else:
            self._branch.retire()

    def abort(self) -> None:
        """End the connection now."""
        self._ends = True
        self._session.kill("the copy has ended")

    def join(self) -> None:
        """Wait until the connection has ended."""
        self._thread.join()

    def _run(self) -> None:
        session, failure = self._session, None
        try:
            with session:
                if session.begin():
                    self._serve()
        except BlockcopyError as error:
            failure = error
        except Exception as error:  # a bug: this connection ends, and its answers go over others
            logger.error("internal error in a connection to %s", session.command.location, exc_info=error)
            failure = StreamError(f"internal error: {error!r}")
        self.is_lost = not self._ends and (failure is not None or self._branch is None)
        if self.is_lost:
            logger.info("%s: %s", self._outcome(), self._reason(failure))
        self.opened.set()

    def _outcome(self) -> str:
        place = self._session.command.location
        return f"a further connection to {place} was lost" if self._branch else f"no further connection to {place}"

    def _reason(self, failure: BlockcopyError | None) -> str:
        """Return why the connection has ended, in words. `failure`: what failed on this host, if anything."""
        session = self._session
        if isinstance(failure, RemoteError):
            return str(failure)  # the command was not found here
        return session.timeout_error or explain_end(
            session.command, session.status, session.last_lines(), begun=session.begun, error=failure
        )

    def _serve(self) -> None:
        """Send the answers of a new branch until it is retired. Raises StreamError if the connection ends first."""
        session = self._session
        messages = Decoder(wire.HASH_STREAM).messages(session.input.read_into)
        if next((each for each in messages if each is not None), None) != wire.Fence(0):
            raise StreamError("the connection did not join the first one")
        self._branch = branch = self._spread.open_branch(session.output, session.silence)
        if self._ends:  # retired meanwhile
            branch.retire()
        self.opened.set()
        sender = threading.Thread(target=self._send, args=[branch, session.output], name="further-send")
        sender.start()
        try:
            for message in messages:
                if isinstance(message, wire.Fence):
                    branch.confirm(message.number)
        except Exception as error:  # of any kind: `_run` logs it
            if not self._ends:  # at its end the owner may close the streams at any time
                session.kill(str(error))  # so that the sender waits no longer
            raise
        finally:
            branch.end()
            sender.join()

    def _send(self, branch: Branch, output: OutputStream) -> None:
        """Send the answers of `branch` to `output`, each with a fence behind it."""
        try:
            while (answer := branch.take()) is not None:
                try:
                    output.write([*answer.frames, wire.encode(wire.Fence(branch.number))])
                finally:
                    answer.release()
            output.write([wire.encode(wire.Done())])
        except BlockcopyError as error:
            self._session.kill(str(error))
        except Exception as error:
            logger.error("internal error in a connection", exc_info=error)
            self._session.kill(f"internal error: {error!r}")
        finally:
            output.release()


class Connections:
    """All connections of a push after the first: as many as pay. Leaving the context ends them."""

    def __init__(self, spread: Spread, scaling: Scaling, first: Session, size: int) -> None:
        """Open connections for `spread`, as many as `scaling` says.

        `first`: the Session of the first connection, whose command and time limit hold for all. `size`: bytes of
        the source.
        """
        self._spread = spread
        self._scaling = scaling
        self._first = first
        self._size = size
        self._lock = threading.Lock()  # guards the list
        self._all: list[Further] = []
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._scale, name="scale")

    def __enter__(self) -> Connections:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._left.set()
        with self._lock:
            everyone = list(self._all)
        for each in everyone:
            if kind is None:
                each.retire()
            else:
                each.abort()
        for each in everyone:
            each.join()
        self._thread.join()

    def _scale(self) -> None:
        """Keep as many connections as `scaling` says, until the context is left."""
        spread, scaling = self._spread, self._scaling
        while not self._left.wait(SAMPLE_SECONDS):
            if spread.token is None:
                continue
            branches = spread.branches
            sample = Sample(
                time.monotonic(),
                spread.sent_bytes,
                1 + len(branches),
                spread.round_trip,
                spread.is_blocked,
                self._size - spread.position,
            )
            wanted = scaling.decide(sample)
            if wanted != sample.connections:
                logger.debug("%d connections instead of %d: %.0f bytes/s", wanted, sample.connections, scaling.rate)
            if wanted > sample.connections:
                self._grow(wanted - sample.connections, spread.token)
                self._left.wait(max(_SETTLE_SECONDS, _SETTLE_ROUND_TRIPS * (spread.round_trip or 0)))
                scaling.restart(time.monotonic(), spread.sent_bytes)
            for branch in branches[wanted - 1 :]:
                branch.retire()

    def _grow(self, count: int, token: str) -> None:
        """Open `count` connections with `token`: all at once over a shared login, else one after the other.

        Returns once each is up or has failed.
        """
        opening: list[Further] = []
        for _ in range(count):
            with self._lock:
                if self._left.is_set():
                    break
                session = Session(self._first.command.joining(token), timeout=self._first.timeout)
                opening.append(Further(session, self._spread))
                self._all = [each for each in self._all if not each.is_over] + opening[-1:]
            if not self._scaling.shares_login:
                opening[-1].opened.wait()
                if opening[-1].is_lost:
                    break
        for each in opening:
            each.opened.wait()
