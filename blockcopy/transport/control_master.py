"""One ssh login for all connections to a host, by OpenSSH's connection sharing (ssh_config(5), ControlMaster).

The first ssh logs in, and leaves a master process behind it; the others go through that, each with a channel
of its own. The master ends with us, or by itself when it was idle for a while.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence

from blockcopy.errors import DeviceError, RemoteError
from blockcopy.paths.runtime_dir import make_runtime_dir
from blockcopy.transport import start_timeout
from blockcopy.transport.command import NO_CONTROL, Command
from blockcopy.transport.hints import advice, cannot_run
from blockcopy.untrusted_text import LineBudget, StderrLines

logger = logging.getLogger(__name__)

_MOST_PATH = 107 - 40 - 18
"""Bytes for the path of a socket, less what %C becomes, and what ssh appends while it makes one."""

_PATIENCE_SECONDS = 5

_FAREWELL_SECONDS = 2
"""For the last words of an ssh that has ended: the master that it left behind may hold its standard error."""


def control_path(*, shared: bool) -> str:
    """Where the ssh processes of this command meet; NO_CONTROL where they do not, or there is no place."""
    if not shared:
        return NO_CONTROL
    try:
        path = make_runtime_dir() / os.urandom(4).hex()
    except DeviceError as error:
        logger.info("each connection logs in by itself: %s", error)
        return NO_CONTROL
    if len(os.fsencode(path)) > _MOST_PATH:
        return NO_CONTROL
    return f"{path}-%C"  # of host, port and user: never a way to another host


def log_in(command: Command) -> Command:
    """Make the login that is shared, with the terminal's help, and return what goes through it.

    Raises RemoteError if it fails, or takes longer than LOGIN_SECONDS. ssh itself, asked to go to the background,
    minds a terminal that is closed.
    """
    try:
        ssh = subprocess.Popen(command.way.log_in, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError as error:
        raise RemoteError(cannot_run(command, error)) from error
    said = " | ".join(_last_words(ssh, command))
    if ssh.returncode:
        todo = advice(command, ssh.returncode, said, begun=False)
        raise RemoteError(
            f"{command.location.host_shown}: no login; ssh said: {said}" + (f" – {todo}" if todo else "")
        )
    return command.logged_in()


def _last_words(ssh: subprocess.Popen[bytes], command: Command) -> Sequence[str]:
    """Wait for the end of a process, and return the last lines that it said."""
    said = StderrLines(logger.debug, LineBudget())
    pipe = ssh.stderr
    if pipe is None:
        raise ValueError("it was started without a pipe")

    def listen() -> None:
        with pipe:
            said.read_to_end(pipe.fileno())

    listener = threading.Thread(target=listen, name="listen", daemon=True)
    listener.start()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            ssh.wait(start_timeout.TELL_SECONDS)
        if ssh.returncode is None:
            logger.warning("%s", start_timeout.still_waiting(command, said.last))
            ssh.wait(start_timeout.LOGIN_SECONDS - start_timeout.TELL_SECONDS)
    except subprocess.TimeoutExpired as late:
        raise RemoteError(start_timeout.too_late(command, start_timeout.LOGIN_SECONDS, said.last)) from late
    finally:
        ssh.kill()
        ssh.wait()
        listener.join(_FAREWELL_SECONDS)
    return said.last


@contextlib.contextmanager
def logged_in(command: Command) -> Iterator[None]:
    """At the end the shared login, if there is one, is ended."""
    try:
        yield
    finally:
        if command.way.end_login:
            try:
                subprocess.run(
                    command.way.end_login,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_PATIENCE_SECONDS,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                logger.debug("the login ends by itself: %s", error)
