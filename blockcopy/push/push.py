"""The source's end of a push: start `receive` on another host, and answer its signatures with a delta.

    source → retrieve, in this process → (pipe) ssh → receive → destination
                                       → (pipe) ssh → receive --join ┘ hands its streams over

If the first connection breaks, all are made anew. The blocks written before stay, and compare as equal then.
"""

from __future__ import annotations

import logging
import math
import time

from blockcopy.block.claim import says_in_use
from blockcopy.block.device import Device
from blockcopy.cli.program import error_line
from blockcopy.errors import BlockcopyError, ForeignContentError, OutputError, RemoteError, StreamError
from blockcopy.progress.reporter import Counts, Progress
from blockcopy.push.further import Connections
from blockcopy.push.spread import Spread
from blockcopy.stage.retrieve import retrieve
from blockcopy.transport import backoff
from blockcopy.transport.command import Command
from blockcopy.transport.hints import SSH_FAILED, explain_end, with_hint
from blockcopy.transport.scaling import MAX_CONNECTIONS, Scaling
from blockcopy.transport.session import Session
from blockcopy.untrusted_text import LineBudget

logger = logging.getLogger(__name__)

_ERROR_PREFIX = error_line("receive", "")
"""The beginning of the line with which `receive` reports why it failed."""


class _ConnectionLostError(RemoteError):
    """A connection that broke after the stage had begun."""


class _ThrottledProgress(Progress):
    """A progress reporter that forwards to `progress`, and delays its caller to `limit` bytes per second."""

    def __init__(self, progress: Progress, limit: int) -> None:
        self._progress = progress
        self._limit = limit
        self._started = time.monotonic()
        self._before = self._passed = 0

    def update(self, counts: Counts) -> None:
        self._progress.update(counts)
        examined = counts.done - counts.skipped
        self._passed += max(0, examined - self._before)  # less if the copy started anew
        self._before = examined
        ahead = self._passed / self._limit - (time.monotonic() - self._started)
        if ahead > 0:
            time.sleep(ahead)

    def finish(self) -> None:
        self._progress.finish()


def push(
    command: Command,
    source: Device,
    *,
    timeout: float = math.inf,
    prompts: bool = False,
    give_up_after: float = math.inf,
    limit: int | None = None,
    connections: int | None = None,
    progress: Progress,
) -> None:
    """Copy `source` to the destination of `command`, which runs `receive`. The copy is synced on return.

    `connections`: their number, or None for as many as pay.
    `timeout`: seconds that the host may be silent when an answer is due. `prompts`: a password may be asked for
    first. `give_up_after`: seconds of attempts to restore a broken connection. `limit`: bytes of the source per
    second, equal or not, or None. `progress` gets the position up to which signatures were answered, and
    the bytes sent.

    Raises RemoteError if the host cannot be reached or goes away, and DeviceError if the source fails. Raises the
    error of `receive`, with its exit status, if `receive` fails.
    """
    delays, lost_at = backoff.delays(), math.inf
    throttled = _ThrottledProgress(progress, limit) if limit else progress
    budget = LineBudget()  # one for all connections
    while True:
        session = Session(
            command,
            timeout=timeout,
            prompts=prompts,
            syncs=True,
            report=lambda line: _log(command, line),
            budget=budget,
        )
        try:
            scaling = _scaling(command, connections, prompts=prompts)
            _push_once(session, source, throttled, scaling)
            return
        except BlockcopyError as error:
            # The `receive` of the lost connection may still wait for its disk, and hold the destination.
            is_held = not isinstance(error, RemoteError) and says_in_use(str(error))
            if isinstance(error, _ConnectionLostError):
                delays, lost_at = backoff.delays(), time.monotonic()
            elif math.isinf(lost_at) or not (is_held or isinstance(error, RemoteError)):
                raise  # there has been no connection at all, or it is no fault of the connection
            delay = next(delays)
            if time.monotonic() + delay - lost_at > give_up_after:
                raise
            held = f"{command.location} is still held, perhaps by the lost connection"
            logger.warning("connection lost, reconnecting: %s", held if is_held else error)
            time.sleep(delay)


def _log(command: Command, line: str) -> None:
    """Log `line`, from the standard error of `command`, unless the line is the error that ends the stage."""
    if not line.startswith(_ERROR_PREFIX):
        logger.warning("%s: %s", command.location, line)


def _scaling(command: Command, connections: int | None, *, prompts: bool) -> Scaling:
    """Return what decides how many connections there are to the host of `command`.

    `connections`: their number if the user named one. `prompts`: each login may ask for a password.
    """
    shares_login = bool(command.route.logout)
    if prompts and not shares_login:
        connections = 1
    count = connections or (MAX_CONNECTIONS if shares_login else 1)
    return Scaling(count, is_fixed=connections is not None, shares_login=shares_login)


def _push_once(
    session: Session,
    source: Device,
    progress: Progress,
    scaling: Scaling,
) -> None:
    """Answer the `receive` of `session` from `source` until it exits. Report to `progress`.

    `scaling`: decides how many connections there are.
    Raises RemoteError, or the error that `receive` reported, if the copy is not complete. Raises DeviceError if the
    source fails.
    """
    failure: BlockcopyError | None = None
    try:
        with session:
            if session.begin():
                working = session.silence.paused
                spread = Spread(session.output, working)
                with Connections(spread, scaling, session, source.size()):
                    retrieve(
                        source,
                        session.input,
                        session.output,
                        delivery=spread,
                        progress=progress,
                        working=working,
                    )
    except (StreamError, OutputError) as error:
        failure = error  # most often `receive` has exited, and has reported why
    except BlockcopyError:
        raise
    except Exception as error:
        logger.error("internal error in the connection to %s", session.command.location, exc_info=error)
        failure = StreamError(f"internal error: {error!r}")
    if session.status or failure or not session.begun:
        raise _failure_of(session, failure)


def _failure_of(session: Session, error: BlockcopyError | None) -> BlockcopyError:
    """Return the error to raise for the failed `receive` of `session`.

    `error`: what failed on this host, if anything.
    """
    command, status, lines = session.command, session.status, session.last_lines()
    if session.timeout_error is not None:
        return (_ConnectionLostError if session.begun else RemoteError)(session.timeout_error)
    lost = session.begun and (status == SSH_FAILED or status < 0)
    begun = session.begun and not lost
    own = next((line for line in lines if line.startswith(_ERROR_PREFIX)), None)
    if own is not None and not lost:  # a `receive` that has lost its connection may still report that
        text = f"{command.location.host_shown or 'this host'}: {own[len(_ERROR_PREFIX) :]}"
        kind = ForeignContentError if own.endswith(ForeignContentError.WAY_ON) else BlockcopyError
        return kind.relayed(with_hint(text, command, status, lines, begun=begun), status)
    return (_ConnectionLostError if lost else RemoteError)(
        explain_end(command, status, lines, begun=begun, error=error)
    )
