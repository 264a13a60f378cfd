"""One ssh login for all connections to a host, by OpenSSH's connection sharing (ControlMaster in ssh_config(5)).

The first ssh logs in and leaves a master process behind. Later ones connect through the master, each with a channel
of its own. The master ends with this program, or by itself after some idle seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence

from blockcopy.errors import DeviceError, RemoteError
from blockcopy.paths.runtime_dir import make_runtime_dir
from blockcopy.transport import start_timeout
from blockcopy.transport.command import NO_CONTROL, Command
from blockcopy.transport.hints import explain_end, explain_failed_start
from blockcopy.transport.stderr_lines import StderrLines
from blockcopy.untrusted_text import LineBudget

logger = logging.getLogger(__name__)

_MAX_PATH = 107 - 40 - 18
"""Bytes for the path of a socket, less those for ssh's expansion of %C and for its temporary suffix."""

_LOGOUT_SECONDS = 5

_DRAIN_SECONDS = 2
"""Seconds to wait for the last lines of an ssh that has ended. Its master may hold the standard error open."""


def control_path(*, shared: bool) -> str:
    """Return the ControlPath, a text, for the ssh processes of this command.

    Returns NO_CONTROL if the login is not `shared`, or if there is no folder for its socket.
    """
    if not shared:
        return NO_CONTROL
    try:
        path = make_runtime_dir() / os.urandom(4).hex()
    except DeviceError as error:
        logger.info("each connection logs in by itself: %s", error)
        return NO_CONTROL
    if len(os.fsencode(path)) > _MAX_PATH:
        return NO_CONTROL
    return f"{path}-%C"  # a hash of host, port and user: never the way to another host


def log_in(command: Command) -> Command:
    """Make the shared login of `command`. Return the Command that connects through the login.

    May ask at the terminal. ssh itself goes to the background, so closing the terminal does not end the login.
    Raises RemoteError if the login fails, or takes longer than LOGIN_SECONDS.
    """
    try:
        ssh = subprocess.Popen(command.route.login, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError as error:
        raise RemoteError(explain_failed_start(command, error)) from error
    lines = _wait(ssh, command)
    if ssh.returncode:
        raise RemoteError(explain_end(command, ssh.returncode, lines, begun=False))
    return command._replace(own_session=True)  # never asks at a terminal


def _wait(ssh: subprocess.Popen[bytes], command: Command) -> Sequence[str]:
    """Wait for the end of the process `ssh`, the login of `command`. Return its last lines on standard error.

    Raises RemoteError if the process takes longer than LOGIN_SECONDS.
    """
    stderr = StderrLines(logger.debug, LineBudget())
    if ssh.stderr is None:
        raise ValueError("ssh was started without a pipe")
    listener = stderr.listen(ssh.stderr)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            ssh.wait(start_timeout.WARN_SECONDS)
        if ssh.returncode is None:
            logger.warning("%s", start_timeout.still_waiting(command, stderr.last))
            ssh.wait(start_timeout.LOGIN_SECONDS - start_timeout.WARN_SECONDS)
    except subprocess.TimeoutExpired as late:
        raise RemoteError(start_timeout.not_started(command, start_timeout.LOGIN_SECONDS, stderr.last)) from late
    finally:
        ssh.kill()
        ssh.wait()
        listener.join(_DRAIN_SECONDS)
    return stderr.last


@contextlib.contextmanager
def logging_out(command: Command) -> Iterator[None]:
    """Return a context manager that ends the shared login of `command`, if any, when the context is left."""
    try:
        yield
    finally:
        if command.route.logout:
            try:
                subprocess.run(
                    command.route.logout,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_LOGOUT_SECONDS,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                logger.debug("the shared login was not ended, and will end by itself: %s", error)
