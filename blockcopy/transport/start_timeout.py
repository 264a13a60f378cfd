"""The time limit for the start of a stage, and messages about a stage that takes long to start.

A stage has started when its first bytes arrive: `bootstrap.MARK`, or an answer. The login before that may ask for a
password. It may also hang for ever, in a start-up file or on a frozen host.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from blockcopy.transport.command import Command
from blockcopy.untrusted_text import printable

WARN_SECONDS = 10
"""Seconds after which the user is warned."""

LOGIN_SECONDS = 120
"""Seconds for a login that may ask the user: sshd's LoginGraceTime."""

_MAX_QUOTED = 300
"""Characters of a login's output that a message quotes."""


def max_start_seconds(timeout: float, *, prompts: bool) -> float:
    """Return the seconds that a stage may take to start, if it may be silent for `timeout` seconds later.

    `prompts`: a password may be asked for meanwhile.
    """
    return max(timeout, LOGIN_SECONDS) if prompts else timeout


def still_waiting(command: Command, output: Iterable[str]) -> str:
    """Return the warning that the stage of `command` has not started yet.

    `output`: lines that the login printed.
    """
    return f"still waiting for {_expected(command)}{_quote(output)}"


def not_started(command: Command, seconds: float, output: Iterable[str]) -> str:
    """Return the message that the stage of `command` did not start within `seconds`.

    `output`: lines that the login printed.
    """
    text = f"gave up waiting for {_expected(command)} after {seconds:g} seconds{_quote(output)}"
    if command.location.host is None:
        return text
    login = shlex.join([*command.route.by_hand, "true"])
    return (
        f"{text} – a start-up file there may wait, ask something or start another shell, or the host hangs: "
        f"this must print nothing and return at once: {login}"
    )


def last_lines(noise: bytes) -> list[str]:
    """Return the last five lines of `noise`, the bytes that a login printed."""
    lines = map(str.strip, noise[-4096:].decode(errors="replace").split("\n"))
    return [line for line in lines if line][-5:]


def _expected(command: Command) -> str:
    if command.location.host is None:
        return f"`{command.program}` to answer for {command.location}"
    return f"{command.location.host_shown} to start `{command.program}`"


def _quote(output: Iterable[str]) -> str:
    text = printable(" | ".join(output))
    if not text:
        return "; its login printed nothing"
    return f"; its login printed: {'…' if len(text) > _MAX_QUOTED else ''}{text[-_MAX_QUOTED:]}"
