"""The manual page and the completions of shells, both made from the parser and from the error classes."""

from __future__ import annotations

import argparse
import inspect
import signal

import shtab
from argparse_manpage.manpage import Manpage

from blockcopy import __version__, errors
from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of

_FILES = """\
.TP
.I /var/lib/blockcopy, $XDG_STATE_HOME/blockcopy
The record of what is here, of root and of others: a file for each destination. $STATE_DIRECTORY goes before both.
.TP
.I /run/blockcopy, $XDG_RUNTIME_DIR/blockcopy
The sockets of mounts, and of shared ssh logins."""

_ENVIRONMENT = """\
.TP
.B BLOCKCOPY_DEBUG
As \\-\\-verbose."""


def page() -> str:
    """For man(1)."""
    whole = parser()
    made = Manpage(whole, format="single-commands-section")
    made.description = "use a remote disk now, own a complete local copy of it soon"
    made.manual = "User Commands"
    made.source = f"blockcopy {__version__}"
    made.date = ""
    made.add_section("EXIT STATUS", ">", _exit_statuses())
    made.add_section("FILES", ">", _FILES)
    made.add_section("ENVIRONMENT", ">", _ENVIRONMENT)
    return str(made)


def _exit_statuses() -> str:
    """From the classes of errors, and the signals that end a program."""
    meanings: dict[int, list[str]] = {0: ["Done."]}
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.BlockcopyError) and error is not errors.BlockcopyError:
            meanings.setdefault(error.exit_code, []).append((error.__doc__ or "").partition("\n")[0])
    for each in (signal.SIGINT, signal.SIGTERM):
        meanings[128 + each] = [f"Ended by {each.name}."]
    return "\n".join(f".TP\n.B {code}\n{_escaped(' '.join(meanings[code]))}" for code in sorted(meanings))


def _escaped(text: str) -> str:
    """As roff has it."""
    return text.replace("\\", "\\\\").replace("-", "\\-").replace("`", "")


def completion(shell: str) -> str:
    """A script for one of the parser's shells."""
    whole = parser()
    for command in commands_of(whole).values():
        _complete(command)
    return str(shtab.complete(whole, shell))


def _complete(command: argparse.ArgumentParser) -> None:
    """With paths, where these are."""
    for action in command._actions:
        if action.metavar in ("FILE", "SOURCE", "DESTINATION"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "MOUNTPOINT":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
