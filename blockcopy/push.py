"""The source's end of a push: a `receive` on another host is started, and its questions are answered.

    source → retrieve, here → (pipe) ssh → receive → destination

A connection that breaks is made again. What was written stays, and is found equal then.
"""

from __future__ import annotations

import logging
import math
import time

from blockcopy.block.device import Device
from blockcopy.errors import BlockcopyError, OutputError, RemoteError, StreamError, describe_exit
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.stage.retrieve import retrieve
from blockcopy.transport.backoff import Backoff
from blockcopy.transport.command import Command
from blockcopy.transport.hints import TRANSPORT_FAILED, advice
from blockcopy.transport.session import Clock, Session
from blockcopy.untrusted_text import LineBudget

logger = logging.getLogger(__name__)

_ITS_ERROR = "ERROR (receive): "
"""What it begins the line with that says how it ended."""


class _LostError(RemoteError):
    """The connection broke after it had been there."""


class _Paced(Progress):
    """Tells another; and who tells it of more than `limit` bytes a second, is held up."""

    def __init__(self, progress: Progress, limit: int) -> None:
        self._progress = progress
        self._limit = limit
        self._started = time.monotonic()
        self._before = self._passed = 0

    def update(self, counts: Counts) -> None:
        self._progress.update(counts)
        gone_through = counts.done - counts.skipped
        self._passed += max(0, gone_through - self._before)  # else it began again
        self._before = gone_through
        ahead = self._passed / self._limit - (time.monotonic() - self._started)
        if ahead > 0:
            time.sleep(ahead)

    def finish(self) -> None:
        self._progress.finish()


class _OurTime(Progress):
    """Tells another, who may hold us up: meanwhile the host waits for us."""

    def __init__(self, progress: Progress, clock: Clock) -> None:
        self._progress = progress
        self._clock = clock

    def update(self, counts: Counts) -> None:
        with self._clock.ours():
            self._progress.update(counts)

    def finish(self) -> None:
        self._progress.finish()


def push(
    command: Command,
    source: Device,
    *,
    timeout: float = math.inf,
    prompts: bool = False,
    patience: float = math.inf,
    limit: int | None = None,
    progress: Progress,
) -> None:
    """Have a `receive` make its destination the copy of `source`; synced there when this returns.

    `timeout`: seconds for which the host may say nothing when it is its turn. `prompts`: a password may be asked
    for first. `patience`: seconds for which a connection that broke is tried again. `limit`: bytes of the source
    a second, equal or not. `progress` is told the position that was answered, and how many bytes were sent.

    Raises RemoteError if the host cannot be reached or goes away, what `receive` fails with, with its exit code,
    and DeviceError of the source.
    """
    backoff, lost_at = Backoff(), math.inf
    paced = _Paced(progress, limit) if limit else progress
    budget = LineBudget()  # for the log, of what all connections say
    while True:
        session = Session(
            command,
            timeout=timeout,
            prompts=prompts,
            syncs=True,
            tell=lambda line: _show(command, line),
            budget=budget,
        )
        try:
            _push(session, source, paced)
            return
        except _LostError as error:
            failure: RemoteError = error
            lost_at = time.monotonic()
            backoff.reset()
        except RemoteError as error:
            if math.isinf(lost_at):
                raise  # it was never there
            failure = error
        delay = backoff.next()
        if time.monotonic() + delay - lost_at > patience:
            raise failure
        logger.warning("the link is lost, and is made again: %s", failure)
        time.sleep(delay)


def _show(command: Command, line: str) -> None:
    """Log what the host says by the way, with its name."""
    if not line.startswith(_ITS_ERROR):
        logger.warning("%s: %s", command.location, line)


def _push(session: Session, source: Device, progress: Progress) -> None:
    """Answer what one `receive` asks, to the end."""
    failure: BlockcopyError | None = None
    try:
        with session:
            if session.begin():
                ours = _OurTime(progress, session.clock)
                retrieve(source, session.input, session.output, progress=ours, working=session.clock.ours)
    except (StreamError, OutputError) as error:
        failure = error  # most often because it is gone: then it has said why
    except BlockcopyError:
        raise
    except Exception as error:
        logger.error("the connection to %s met a fault of blockcopy's", session.command.location, exc_info=error)
        failure = StreamError(f"internal error: {error!r}")
    if session.status or failure or not session.begun:
        raise _why(session, failure)


def _why(session: Session, failure: BlockcopyError | None) -> BlockcopyError:
    """Return what to tell of an end that was not in order."""
    command, status, said = session.command, session.status, session.said()
    lost = session.begun and (status == TRANSPORT_FAILED or status < 0)
    if session.given_up is not None:
        return (_LostError if session.begun else RemoteError)(session.given_up)
    todo = advice(command, status, "\n".join(said), begun=session.begun and not lost)
    more = f" – {todo}" if todo else ""
    own = next((text for text in said if text.startswith(_ITS_ERROR)), None)
    if own is not None:
        message = own[len(_ITS_ERROR) :]
        return BlockcopyError.relayed(f"{command.location.host_shown or 'this host'}: {message}{more}", status)
    told = f"; it said: {' | '.join(said)}" if said else ""
    if failure is not None and not told:
        told = f": {failure}"
    how = describe_exit(status)
    return (_LostError if lost else RemoteError)(f"the receive process of {command.location} {how}{told}{more}")
