"""Going to the background: the command returns when the mount serves, or tells why it does not.

The fork comes first, before threads, trio and ssh. Until it is ready the child keeps the terminal,
so that ssh can ask for a password; then it leaves the session and its standard streams behind, but for
a standard error that is the journal's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable

from blockcopy.cli import log, log_sinks
from blockcopy.errors import BlockcopyError, InternalError, Interrupted, MountError, as_user_error

logger = logging.getLogger(__name__)

_READY = b"ready"


def run_in_background(program: Callable[[Callable[[], None]], object]) -> bool:
    """Run `program(ready)` in a child. True in the parent, once the child called `ready`; False in
    the child, at its end.

    What the child fails with before that is raised in the parent, with the child's exit code.
    """
    told, tell = os.pipe()
    log.drain()  # the threads that write it do not live on in the child
    child = os.fork()
    if child:
        os.close(tell)
        _await_ready(child, told)
        return True
    os.close(told)
    _run_child(program, tell)
    return False


def _await_ready(child: int, told: int) -> None:
    try:
        with open(told, "rb") as pipe:
            message = pipe.read()
    except Interrupted:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if message == _READY:
        return
    os.waitpid(child, 0)
    if not message:
        raise MountError("the mount's process died before it was ready")
    failure = json.loads(message)
    raise BlockcopyError.relayed(failure["message"], failure["exit_code"])


def _run_child(program: Callable[[Callable[[], None]], object], tell: int) -> None:
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        _leave_terminal()
        os.write(tell, _READY)
        os.close(tell)

    try:
        program(ready)
    except Exception as error:
        told = as_user_error(error)
        if not is_ready:  # the parent is the one who says it
            os.write(tell, json.dumps({"message": str(told), "exit_code": told.exit_code}).encode())
            logger.debug("failed", exc_info=True)
            if isinstance(told, InternalError):
                log.log_failure(str(told), told)
            _leave(0, 1, 2)
            log_sinks.discard_log()
        raise told from told.__cause__


def _leave_terminal() -> None:
    os.setsid()
    os.chdir("/")
    log.drain()
    if log.is_journal():
        _leave(0, 1)
    else:
        _leave(0, 1, 2)
        log_sinks.detach_from_stderr()


def _leave(*streams: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in streams:
        os.dup2(null, stream)
    os.close(null)
