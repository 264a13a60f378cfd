"""The background process of `mount`: the command returns when the mount serves, or reports why it does not.

The fork comes first, before threads, trio and ssh. The child keeps the terminal until it is ready, so that ssh can
ask for a password. Then the child leaves its session and its standard streams. Only a standard error that is the
journal's is kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable

from blockcopy.cli import console, log, log_sinks
from blockcopy.errors import BlockcopyError, InternalError, Interrupted, MountError, as_user_error

logger = logging.getLogger(__name__)

_READY = b"ready"


def run_in_background(program: Callable[[Callable[[], None]], object]) -> bool:
    """Run `program` in a child process, and return once the child is ready.

    `program`: called in the child with `ready`, a function to call when the mount serves.
    Returns True in the parent, and False in the child when the program has ended.
    Raises, in the parent, the BlockcopyError by which the child failed before it was ready.
    """
    reader, writer = os.pipe()
    log.drain()  # the threads that write the log do not exist in the child
    child = os.fork()
    if child:
        os.close(writer)
        _await_ready(child, reader)
        return True
    os.close(reader)
    _run_child(program, writer)
    return False


def _await_ready(child: int, reader: int) -> None:
    """Wait for the message of process `child` in the pipe `reader`, a descriptor.

    Raises the error that the message describes. Raises MountError if there is no message.
    """
    try:
        with open(reader, "rb") as pipe:
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


def _run_child(program: Callable[[Callable[[], None]], object], writer: int) -> None:
    """Run `program(ready)`, and send the parent one message: ready, or the error as JSON.

    `writer`: the descriptor of the pipe to the parent. Raises what `program` raises, as a BlockcopyError.
    """
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        _leave_terminal()
        os.write(writer, _READY)
        os.close(writer)

    try:
        program(ready)
    except Exception as exception:
        error = as_user_error(exception)
        if not is_ready:  # the parent reports the error
            os.write(writer, json.dumps({"message": str(error), "exit_code": error.exit_code}).encode())
            logger.debug("failed", exc_info=True)
            if isinstance(error, InternalError):
                log.log_failure(str(error), error)
            console.redirect_to_null(0, 1, 2)
            log_sinks.discard_log()
        raise error from error.__cause__


def _leave_terminal() -> None:
    os.setsid()
    os.chdir("/")
    log.drain()
    if log.is_journal():
        console.redirect_to_null(0, 1)
    else:
        console.redirect_to_null(0, 1, 2)
        log_sinks.detach_from_stderr()
