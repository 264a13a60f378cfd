"""The manual page and the completion scripts, made from the parser, the error classes and the status fields."""

from __future__ import annotations

import dataclasses
import inspect
import signal
from collections.abc import Iterable, Iterator

import shtab
from argparse_manpage.manpage import Manpage

from blockcopy import __version__, errors
from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of
from blockcopy.replica.monitor.status import LinkStatus, ReadStatus, Status

_FILES = {
    "/var/lib/blockcopy, $XDG_STATE_HOME/blockcopy": "State files of root and of other users: one for each "
    "destination. $STATE_DIRECTORY has priority over both.",
    "/run/blockcopy, $XDG_RUNTIME_DIR/blockcopy": "The sockets of mounts, and of shared ssh logins.",
}

_ENVIRONMENT = {"BLOCKCOPY_DEBUG": "The same as -vv, if it is not empty."}


def page() -> str:
    """Return the text of the manual page as roff, for man(1)."""
    all_commands = parser()
    manpage = Manpage(all_commands, format="single-commands-section")
    manpage.description = "use a remote disk now, own a complete local copy of it soon"
    manpage.manual = "User Commands"
    manpage.source = f"blockcopy {__version__}"
    manpage.date = ""
    manpage.add_section("EXIT STATUS", ">", _list(_exit_statuses()))
    manpage.add_section("STATUS FIELDS", ">", _list(_status_fields(Status)))
    manpage.add_section("FILES", ">", _list(_FILES.items()))
    manpage.add_section("ENVIRONMENT", ">", _list(_ENVIRONMENT.items()))
    return str(manpage)


def _exit_statuses() -> Iterator[tuple[str, str]]:
    """Yield each exit status and its meaning, as texts: from the error classes and the ending signals."""
    meanings: dict[int, list[str]] = {0: ["Done."]}
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.BlockcopyError) and error is not errors.BlockcopyError:
            meanings.setdefault(error.exit_code, []).append((error.__doc__ or "").partition("\n")[0])
    for each in (signal.SIGINT, signal.SIGTERM):
        meanings[128 + each] = [f"Ended by {each.name}."]
    for code in sorted(meanings):
        yield str(code), " ".join(meanings[code])


def _status_fields(kind: type[Status | ReadStatus | LinkStatus], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a pair for each field of the status class `kind`: `prefix` and its name, and its help text."""
    for field in dataclasses.fields(kind):
        if isinstance(field.default, (ReadStatus, LinkStatus)):
            yield from _status_fields(type(field.default), f"{field.name}.")
        else:
            yield prefix + field.name, field.metadata["help"]


def _list(items: Iterable[tuple[str, str]]) -> str:
    """Return a list as roff. `items`: pairs of a term and its description."""
    return "\n".join(f".TP\n.B {_escaped(term)}\n{_escaped(description)}" for term, description in items)


def _escaped(text: str) -> str:
    """Return `text` escaped for roff, without backticks."""
    return text.replace("\\", "\\\\").replace("-", "\\-").replace("`", "")


def completion(shell: str) -> str:
    """Return the text of the completion script for `shell`, one of the parser's SHELLS, such as "bash"."""
    all_commands = parser()
    for command in commands_of(all_commands).values():
        for action in command._actions:
            if action.metavar in ("FILE", "SOURCE", "DESTINATION"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar == "MOUNTPOINT":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(all_commands, shell))
