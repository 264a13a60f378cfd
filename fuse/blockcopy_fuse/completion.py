"""The completion scripts for shells, made from the parser."""

from __future__ import annotations

import shtab

from blockcopy.cli.parser import parser
from blockcopy.cli.suggestions import commands_of
from blockcopy_fuse.manual.pages import titles


def completion(shell: str) -> str:
    """Return the text of the completion script for `shell`, one of the parser's SHELLS, such as "bash"."""
    all_commands = parser()
    pages = [title.name.removeprefix("blockcopy-") for title in titles()]
    for command in commands_of(all_commands).values():
        for action in command._actions:
            if action.metavar in ("FILE", "SOURCE", "DESTINATION"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in ("MOUNTPOINT", "FOLDER"):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar == "PAGE":
                action.choices = pages
    return str(shtab.complete(all_commands, shell))
