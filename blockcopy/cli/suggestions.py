"""Parsers of command lines that suggest the nearest option or command for a wrong one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from blockcopy.cli import console
from blockcopy.cli.program import error_line
from blockcopy.errors import OutputError

VERBOSE_AFTER = "verbose_after"
"""Name of the attribute of parsed arguments that counts each `-v` after the command."""


class ConsoleParser(argparse.ArgumentParser):
    """A parser that writes its help as the program writes all output: in full, or with an error."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write `message` to `file`, standard error if None.

        Exits with an error if standard output cannot take all of it.
        """
        if file is None or file is not sys.stdout:
            super()._print_message(message, file)
            return
        try:
            console.write(message.removesuffix("\n"))
        except OutputError as error:
            self.exit(error.exit_code, error_line(self.prog, error) + "\n")


class Parser(ConsoleParser):
    """A parser that suggests what a wrong word may have meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse `args`, sys.argv if None, into `namespace`, a new one if None. Return the namespace.

        For an unknown option, exits with the usage of the command that precedes the option.
        Without a command, prints the help and exits with 1, as git does.
        """
        found, unknown = self.parse_known_args(args, namespace)
        if found.command is None:
            if unknown:
                super().error(f"unrecognized arguments: {' '.join(unknown)}")
            self.print_help(sys.stdout)
            self.exit(1)
        found.verbose += found.__dict__.pop(VERBOSE_AFTER)
        if unknown:
            command = commands_of(self)[found.command]
            hint = _misplaced(unknown, self, found.command) or _similar_options(unknown, command)
            command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """Exit with the usage and `message`. For an unknown command, adds the nearest known one."""
        unknown = re.search(r"invalid choice: '([^']*)'", message)
        if unknown:
            known = [choice for action in self._actions for choice in action.choices or ()]
            nearest = nearest_to(unknown[1], known)
            message += f"; did you mean {nearest[0]}?" if nearest else ""
        super().error(message)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the commands of `parser`: a dict, name → parser."""
    [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(commands.choices)


def _misplaced(unknown: Iterable[str], top: argparse.ArgumentParser, command: str) -> str:
    """Return what to type if an option in `unknown` belongs before the command named `command`.

    `top`: the parser of the whole command line. Returns "" if no option does.
    """
    known = {name for action in top._actions for name in action.option_strings}
    first = next((word for word in unknown if word in known), None)
    return f"; write {first} before the command: blockcopy {first} {command}" if first else ""


def _similar_options(unknown: Iterable[str], command: argparse.ArgumentParser) -> str:
    """Return a question that names options of the parser `command` which are similar to those in `unknown`.

    Returns "" if no option is similar.
    """
    known = [name for action in command._actions for name in action.option_strings]
    options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    nearest = [found for word in options for found in nearest_to(word, known)]
    return f"; did you mean {', '.join(nearest)}?" if nearest else ""


def nearest_to(word: str, known: Iterable[str]) -> list[str]:
    """Return a list of the one word in `known` that is most similar to `word`. Returns [] if none is similar."""
    from difflib import get_close_matches  # seldom needed, and slow to load

    return get_close_matches(word, list(known), 1)
