"""argparse that suggests what may have been meant, and writes its help as all output of the program is written."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from blockcopy.cli import console
from blockcopy.errors import OutputError


class PlainParser(argparse.ArgumentParser):
    """A parser of command lines whose help is written as all output of the program is."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help to standard output in full. Exits with an error if nobody reads it."""
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
            return
        try:
            console.write(message.removesuffix("\n"))
        except OutputError as error:
            self.exit(error.exit_code, f"ERROR ({self.prog}): {error}\n")


class Parser(PlainParser):
    """A parser that suggests what may have been meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse. An option that a command does not have is told with the usage of that command."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = commands_of(self)[found.command]
            meant = _misplaced(unknown, self, found.command) or _meant(unknown, command)
            command.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found

    def error(self, message: str) -> NoReturn:
        """With what is nearest to a command that there is not."""
        unknown = re.search(r"invalid choice: '([^']*)'", message)
        if unknown:
            known = [choice for action in self._actions for choice in action.choices or ()]
            nearest = _nearest(unknown[1], known)
            message += f"; did you mean {nearest[0]}?" if nearest else ""
        super().error(message)


def commands_of(parser: Parser) -> dict[str, Parser]:
    """The commands of the whole, by name."""
    [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(commands.choices)


def _misplaced(unknown: Iterable[str], top: argparse.ArgumentParser, command: str) -> str:
    """Return what to type for an option that stands behind the command and belongs before it."""
    known = {name for action in top._actions for name in action.option_strings}
    first = next((word for word in unknown if word in known), None)
    return f"; write {first} before the command: blockcopy {first} {command}" if first else ""


def _meant(unknown: Iterable[str], command: argparse.ArgumentParser) -> str:
    known = [name for action in command._actions for name in action.option_strings]
    options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    nearest = [found for word in options for found in _nearest(word, known)]
    return f"; did you mean {', '.join(nearest)}?" if nearest else ""


def _nearest(word: str, known: Iterable[str]) -> list[str]:
    from difflib import get_close_matches  # seldom needed, and slow to load

    return get_close_matches(word, list(known), 1)
