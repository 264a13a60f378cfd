"""The installed program: every command that this copy of blockcopy has.

Each layer has a module of commands, whose functions are named as users type them. Only the module that is needed is
imported, because some hosts have a copy of the stages alone.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Callable, NoReturn

from blockcopy.cli import program
from blockcopy.cli.parser import parser
from blockcopy.errors import UsageError

_STAGES = "blockcopy.cli.commands"

_LAYERS = {
    _STAGES: ("checksum", "retrieve", "save", "receive", "facts"),
    "blockcopy.replica.commands": ("sync", "verify", "discard-writes", "state"),
}

_DEFAULTS = "blockcopy.replica.defaults"
"""The module that completes the options of all commands but the stages."""

_MOUNT = "blockcopy_fuse.commands"
"""The module of all other commands."""

_OPEN_FILES = {"mount": 64, "sync": 64, "verify": 64, "doctor": 32}
"""Files that a command may have open at once, if these are more than usual."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `argv` names, and exit with its status. `argv`: sys.argv's arguments if None."""
    words = sys.argv[1:] if argv is None else argv
    made = parser(_named(words))

    def find(name: str) -> Callable[[argparse.Namespace], None]:
        command = _find(name)
        if name in _LAYERS[_STAGES]:
            return command
        complete = importlib.import_module(_DEFAULTS).complete
        return lambda args: command(complete(made, words, args))

    program.run(made, find, words, _OPEN_FILES)


def _named(argv: Sequence[str]) -> str | None:
    """Return the name of the command in `argv`. Returns None if options other than `-v` come before a name."""
    word = next((each for each in argv if not re.fullmatch("-v+|--verbose", each)), None)
    return None if word is None or word.startswith("-") else word


def _find(name: str) -> Callable[[argparse.Namespace], None]:
    """Import and return the function of the command `name`, which is called with the parsed arguments."""
    module = next((each for each, commands in _LAYERS.items() if name in commands), _MOUNT)
    if module != _STAGES and sys.version_info < (3, 11):
        raise UsageError(f"{name} needs Python 3.11 or newer; the copy stages work with this one")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{name} is not part of this copy of blockcopy, which has the stages alone: install the checkout, "
            "see its README"
        ) from error
    command: Callable[[argparse.Namespace], None] = getattr(found, name.replace("-", "_"))
    return command
