"""Defaults of options, from configuration files and the environment.

    option > environment > the user's file > the system's file

In a file, keys at the top hold for every host. The tables below `host` have a pattern of host names. Later tables
have priority over earlier ones, and over the keys at the top.

    connections = 4
    [host."*.example.org"]
    rsh = "ssh -p 2222"
    python = "sudo -n python3"
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from blockcopy.cli.suggestions import Parser, commands_of, nearest_to
from blockcopy.errors import UsageError
from blockcopy.transport.location import parse_location

SYSTEM_FILE = "/etc/blockcopy.toml"

OPTIONS = {
    name: f"BLOCKCOPY_{name.removeprefix('blockcopy-').replace('-', '_').upper()}"
    for name in (
        *("rsh", "python", "blockcopy-path", "no-control-master", "timeout", "reconnect-timeout"),
        *("connections", "limit", "compress", "no-sparse"),
    )
}
"""The options that can have a default: their long names, and their variables of the environment."""

_EITHER = {"python": "blockcopy-path", "blockcopy-path": "python"}
"""Options that exclude each other. The one with priority removes the other."""

_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class _Default(NamedTuple):
    """A default: an option's name, its value as found, and its place for messages."""

    option: str
    value: object
    place: str


def complete(parser: Parser, words: Sequence[str], args: argparse.Namespace) -> argparse.Namespace:
    """Return `args`, with defaults in place of the options that are not in `words`, the command line.

    `parser`: has parsed `words` into `args`. Raises UsageError if a default is invalid, with its place.
    """
    actions = {name: each for each in commands_of(parser)[args.command]._actions for name in each.option_strings}
    found: dict[str, object] = {}
    for option, value, place in _defaults(_hosts(args)):
        if (action := actions.get(f"--{option}")) is not None:
            found.pop(_EITHER.get(option, ""), None)
            found[option] = _typed(action, value, f"{place}: {option}")
    for option, other in _EITHER.items():
        if getattr(args, option.replace("-", "_"), None) is not None:
            found.pop(other, None)
    if not found:
        return args
    commands_of(parser)[args.command].set_defaults(
        **{actions[f"--{option}"].dest: value for option, value in found.items()}
    )
    completed: argparse.Namespace = parser.parse_args(words)
    return completed


def user_file() -> Path | None:
    """Return the Path of the user's configuration file. Returns None if the user has no home folder."""
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        return None
    return folder / "blockcopy" / "config.toml"


def _hosts(args: argparse.Namespace) -> list[str]:
    """Return the names of the other hosts in the parsed options `args`, without users. Seldom there are several."""
    names = []
    for argument in ("source", "destination", "host"):
        if text := getattr(args, argument, None):
            host = parse_location(text, argument.upper(), needs_path=argument != "host").host
            names += [host.rpartition("@")[2]] if host is not None else []
    return names


def _defaults(hosts: Sequence[str]) -> Iterator[_Default]:
    """Yield the defaults for `hosts`, ascending in priority. Raises UsageError if a file is invalid."""
    for path in filter(None, (Path(SYSTEM_FILE), user_file())):
        yield from _of_file(path, hosts)
    for option, variable in OPTIONS.items():
        if value := os.environ.get(variable):
            yield _Default(option, value, f"{variable} of the environment")


def _of_file(path: Path, hosts: Sequence[str]) -> Iterator[_Default]:
    """Yield the defaults of the file at `path` for `hosts`. Raises UsageError if the file is invalid."""
    text = _read(path)
    if not text:
        return
    import tomllib  # slow to load

    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f'{path} is no TOML: {error}. Texts need quotes, as in limit = "20M"') from error
    sections = tables.pop("host", {})
    if not (isinstance(sections, dict) and all(isinstance(each, dict) for each in sections.values())):
        raise UsageError(f'{path}, line {_line(text, "host")}: write tables such as [host."*.example.org"]')
    for pattern, table in ((None, tables), *sections.items()):
        for option, value in table.items():
            place = f"{path}, line {_line(text, option, pattern)}"
            if option not in OPTIONS:
                nearest = nearest_to(option, OPTIONS)
                guess = f" (did you mean {nearest[0]}?)" if nearest else ""
                raise UsageError(
                    f"{place}: unknown key {option!r}{guess}; there are {', '.join(OPTIONS)}, and [host.PATTERN]"
                )
            if pattern is None or any(fnmatchcase(host, pattern) for host in hosts):
                yield _Default(option, value, place)


def _read(path: Path) -> str:
    """Return the text of the file at `path`, or "" if there is none.

    Raises UsageError if it cannot be read, or if others may write it: its values are run as commands.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                raise UsageError(f"{path} must be yours or root's, and others must not be able to write it")
            return file.read().decode()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _line(text: str, key: str, pattern: str | None = None) -> int:
    """Return the number of the line in `text`, TOML, that has `key`. `pattern`: of its table of a host, or None."""
    is_inside = pattern is None
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[", line):
            is_inside = pattern is not None and pattern in line
        if is_inside and re.match(rf"""\s*(\[\s*)?["']?{re.escape(key)}["']?\s*[].=]""", line):
            return number
    return 1


def _typed(action: argparse.Action, value: object, place: str) -> Any:
    """Return `value` as the type that the option `action` gives to its text.

    Raises UsageError, which names `place`, if the option has no such value.
    """
    if action.nargs == 0:
        word = value if isinstance(value, bool) else _WORDS.get(str(value).lower())
        if word is None:
            raise UsageError(f"{place}: {value!r} is neither true nor false")
        return word
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{place}: {value!r} is no text or number")
    try:
        return action.type(str(value)) if callable(action.type) else str(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{place}: {error}") from error
