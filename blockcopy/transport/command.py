"""The command that runs a stage at a location: ssh options, remote shell words, the local interpreter."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple

from blockcopy.errors import UsageError
from blockcopy.paths.places import absolute, working_folder
from blockcopy.transport import bootstrap, payload
from blockcopy.transport.location import Location

DEFAULT_RSH, DEFAULT_PYTHON = "ssh", "python3"
"""The values of `--rsh` and `--python` if the options are not given."""

MAX_NOISE = 64 * 1024
"""Bytes that a login may print before the stage begins."""

_KEEP_ALIVE = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
"""Options with which ssh notices a lost connection within 30 seconds. Earlier ones, of -e, take precedence."""

_PLAIN = {
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "SessionType": "default",
    "StdinNull": "no",
    "ForkAfterAuthentication": "no",
    "PermitLocalCommand": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
}
"""Options of ssh_config(5) that make a connection a plain pipe to a command, as scp sets them.

ssh uses the first value that it gets, so a value in -e takes precedence."""

_NO_FORWARDING = "ClearAllForwardings=yes"
"""No port forwarding and no tunnel. This option overrides even -L, so it is left out if -e has any of these."""

_FORWARDING = re.compile(r"-[LRDwW]|(?i:(-o)?\s*(tunnel|(local|remote|dynamic)forward))")
"""A word of -e that requests a forwarding."""

NO_CONTROL = "none"
"""The `control` for a login per connection, whatever ssh's configuration says."""

_IDLE_SECONDS = 10
"""Seconds for which ssh keeps an unused shared login."""


class Route(NamedTuple):
    """The argument lists that reach a host. All are empty for this host."""

    argv: Sequence[str] = ()
    """The words before those of the remote command."""
    by_hand: Sequence[str] = ()
    """The words with which a user would log in, for messages."""
    login: Sequence[str] = ()
    """The command that makes the shared login. Empty if each connection logs in by itself."""
    logout: Sequence[str] = ()
    """The command that ends the shared login. Empty if there is none."""


class Command(NamedTuple):
    """A command that runs a stage at a location."""

    location: Location
    argv: list[str]
    environment: dict[str, str]
    """Additions to this process's environment."""
    working_dir: str
    """The folder in which to run the command, to which its relative paths refer."""
    stage: str
    """The stage's name, such as `retrieve`."""
    program: str = ""
    """The program that runs the stage, as the user named it; for messages."""
    route: Route = Route()
    own_session: bool = False
    """Whether the command runs in a session of its own: without the terminal, and unharmed if that closes."""
    opening: bytes = b""
    """The first bytes to write to its standard input."""
    mark: bytes = b""
    """The bytes on its standard output after which the stage begins. Empty if the stage's output comes first."""

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command with three unbuffered pipes, and return its Popen.

        Raises OSError if the command cannot be started.
        """
        return subprocess.Popen(
            self.argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **self.environment},
            cwd=self.working_dir if os.path.isdir(self.working_dir) else None,
            start_new_session=self.own_session,
        )

    def joining(self, token: str) -> Command:
        """Return the Command of a further connection, which joins the stage that has told the `token`."""
        if self.opening:
            return self._replace(opening=payload.joining(token))
        return self._replace(argv=[*self.argv, "--join", token])

    def with_nohup(self) -> Command:
        """Return this Command for an ssh that asks for a password at the terminal, and outlives the terminal."""
        return self._replace(argv=["nohup", *self.argv]).with_absolute_programs()

    def with_absolute_programs(self) -> Command:
        """Return this Command with absolute paths of programs. A mount may later hide or block folders of PATH."""
        login, logout = _absolute_program(self.route.login), _absolute_program(self.route.logout)
        return self._replace(
            argv=_absolute_program(self.argv), route=self.route._replace(login=login, logout=logout)
        )


def _absolute_program(argv: Sequence[str]) -> list[str]:
    """Return the list `argv` with its program as an absolute path, or unchanged if PATH lacks the program."""
    program = shutil.which(argv[0]) if argv else None
    return [os.path.abspath(program), *argv[1:]] if program else list(argv)


def stage_command(
    location: Location,
    rsh: str | None = None,
    program: str | None = None,
    *,
    python: str | None = None,
    control: str | None = None,
    stage: str = "retrieve",
    options: Sequence[str] = (),
) -> Command:
    """Return the Command that runs `stage` with `options` at `location`, connected to its standard streams.

    `rsh`: the remote shell, DEFAULT_RSH if None. `python`: the interpreter on a host that runs the sent stages,
    DEFAULT_PYTHON if None. `program`: an installed blockcopy to run instead. All three are command lines, such as
    `sudo -n python3`. The remote shell expands `~` and variables in the latter two, as in rsync's --rsync-path.

    `control`: ssh's ControlPath, NO_CONTROL, or None to leave that to the user's configuration.

    Raises UsageError if a command line is malformed.
    """
    if location.host is None:
        return _local_command(location, program, stage, options)
    route = _route_to(location, _words("-e", DEFAULT_RSH if rsh is None else rsh), control)
    python = DEFAULT_PYTHON if python is None else python
    home, rest = location.split_home()
    if not home and rest.startswith("-"):
        rest = f"./{rest}"  # no program takes it for an option
    path = [rest] if location.path else []
    if program is not None:
        words = _words("--blockcopy-path", program, str.split)  # the remote shell removes quotes
        quoted = [_quote_path(home, each) for each in path]
        argv = [*route.argv, *words, stage, *options, *quoted]
        return Command(location, argv, {}, working_folder(), stage, program=program, route=route)
    # The words after the code are for lists of processes on the host. Python ignores all but the last, `home`.
    shown = [word for word in ("blockcopy", stage, *path) if re.fullmatch(r"[\w@%+:,./-]+", word, re.ASCII)]
    home_word = [home] if home else []  # expanded by the remote shell, or else by Python
    return Command(
        location,
        [*route.argv, *_words("--python", python, str.split), "-c", payload.CODE, *shown, *home_word],
        {},
        working_folder(),
        stage,
        program=python,
        route=route,
        opening=payload.opening([stage, *options, *path], under_home=bool(home)),
        mark=bootstrap.MARK,
    )


def _quote_path(home: str, rest: str) -> str:
    """Return the path `home` + `rest` quoted for a shell. The shell expands `home`, which stays unquoted."""
    if not home:
        return shlex.quote(rest)
    return f"{home}/{shlex.quote(rest[1:])}" if rest[1:] else home


def _route_to(location: Location, rsh: list[str], control: str | None) -> Route:
    """Return the Route to the host of `location` by `rsh`, the words of -e. `control`: as in `stage_command()`."""
    host = location.host or ""
    at = next((at for at, word in enumerate(rsh) if Path(word).name == "ssh"), None)
    if at is None:
        if location.port is not None:
            raise UsageError(f"{location}: a port is for ssh only; put it into -e {shlex.join(rsh)!r}")
        return Route([*rsh, host], [*rsh, host])
    if location.port is not None:
        rsh = [*rsh[: at + 1], "-p", str(location.port), *rsh[at + 1 :]]
    end = ["--", host]  # no host name is taken for an option
    options = [*_plain(rsh[at + 1 :]), *_KEEP_ALIVE]
    # Run by another program, perhaps as a user who cannot use these sockets. Or it is the user's own shared login,
    # which must not be ended.
    if at > 0 or any(word.startswith("-S") or "controlpath" in word.lower() for word in rsh):
        control = None
    if control is not None:
        options += ["-o", f"ControlPath={control}"]
    login: Sequence[str] = ()
    logout: Sequence[str] = ()
    if control not in (None, NO_CONTROL):
        options += ["-o", "ControlMaster=auto", "-o", f"ControlPersist={_IDLE_SECONDS}"]
        login = [*rsh, "-fN", *options, *end]  # before the options: ssh refuses -N after a SessionType
        logout = [*rsh, *options, "-O", "exit", *end]
    return Route([*rsh, *options, *end], [*rsh, host], login, logout)


def _plain(given: Sequence[str]) -> list[str]:
    """Return a list of ssh options that undo what ssh's configuration adds. `given`: the words of -e after ssh."""
    settings = ["IgnoreUnknown=*"]  # some below are newer than OpenSSH 8.4
    settings += [f"{name}={value}" for name, value in _PLAIN.items()]
    if not any(_FORWARDING.match(word) for word in given):
        settings.append(_NO_FORWARDING)
    return [word for setting in settings for word in ("-o", setting)]


def _local_command(location: Location, program: str | None, stage: str, options: Sequence[str]) -> Command:
    """Return the Command for a `location` on this host.

    `program`, `stage`, `options`: as in `stage_command()`.
    """
    arguments = [stage, *options, absolute(location.path)]
    if program is not None:
        argv = [*_words("--blockcopy-path", program), *arguments]
        return Command(location, argv, {}, working_folder(), stage, program=program)
    # Run this very package. -P keeps Python from importing modules of the working folder instead.
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    argv = [sys.executable, "-P", "-m", "blockcopy", *arguments]
    return Command(location, argv, {"PYTHONPATH": python_path}, working_folder(), stage, program="blockcopy")


def _words(option: str, command: str, split: Callable[[str], list[str]] = shlex.split) -> list[str]:
    """Return the list of words of `command`. `option`: name of the option with this value.

    `split`: takes the command line and returns its words, by default as a shell does.

    Raises UsageError if the command line is malformed or empty.
    """
    try:
        words = split(command)
    except ValueError as error:
        raise UsageError(f"{option} {command!r} is not a valid command line: {error}") from error
    if not words:
        raise UsageError(f"{option} is empty")
    return words
