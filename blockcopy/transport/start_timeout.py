"""The beginning of a stage on a host: how many seconds it may take, and words for one that takes longer.

A stage has begun when its first words are here: `bootstrap.MARK`, or an answer. Before that there is a login,
which may wait for a password, and which may wait for ever: for a start-up file, or behind a host that is frozen.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from blockcopy.transport.command import Command
from blockcopy.untrusted_text import printable

TELL_SECONDS = 10
"""Seconds after which a user is told what is waited for."""

LOGIN_SECONDS = 120
"""Seconds for a login that may ask a user: sshd's LoginGraceTime."""

_MOST_SHOWN = 300
"""Characters that a message quotes of a login."""


def limit(timeout: float, *, prompts: bool) -> float:
    """Return the seconds that a stage may take to begin. `prompts`: a password may be asked for meanwhile."""
    return max(timeout, LOGIN_SECONDS) if prompts else timeout


def still_waiting(command: Command, said: Iterable[str]) -> str:
    """Return what to tell after TELL_SECONDS. `said`: lines that the login printed so far."""
    return f"still waiting for {_what(command)}{_quoted(said)}"


def too_late(command: Command, seconds: float, said: Iterable[str]) -> str:
    """Return what to tell of a stage that did not begin within `seconds`, and what to look at."""
    text = f"gave up waiting for {_what(command)} after {seconds:g} seconds{_quoted(said)}"
    if command.location.host is None:
        return text
    login = shlex.join([*command.way.by_hand, "true"])
    return (
        f"{text} – a start-up file there may wait, ask something or start another shell, or the host hangs: "
        f"this has to print nothing and return at once: {login}"
    )


def printed(noise: bytes) -> list[str]:
    """Return the last lines of what a login printed."""
    lines = map(str.strip, noise[-4096:].decode(errors="replace").split("\n"))
    return [line for line in lines if line][-5:]


def _what(command: Command) -> str:
    if command.location.host is None:
        return f"`{command.runs}` to answer for {command.location}"
    return f"{command.location.host_shown} to start `{command.runs}`"


def _quoted(said: Iterable[str]) -> str:
    text = printable(" | ".join(said))
    if not text:
        return "; its login printed nothing"
    return f"; its login printed: {'…' if len(text) > _MOST_SHOWN else ''}{text[-_MOST_SHOWN:]}"
