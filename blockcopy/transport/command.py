"""Where a source or a destination is, and the command that runs a stage there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blockcopy.errors import UsageError
from blockcopy.paths.places import absolute, working_folder
from blockcopy.transport import bootstrap, payload
from blockcopy.transport.location import Location

DEFAULT_RSH = "ssh"
DEFAULT_PYTHON = "python3"

MOST_NOISE = 64 * 1024
"""Bytes that a login may print before a stage begins."""

_KEEP_ALIVE = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
"""ssh notices within half a minute that the other end is gone. What was said before, in -e, it heeds first."""

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
"""Options that make an ssh connection a plain pipe to a command, whatever ssh_config(5) says; as scp sets them.

ssh takes the first value that it is given, so one in -e wins."""

_NO_FORWARDING = "ClearAllForwardings=yes"
"""No port forwarding and no tunnel. ssh obeys this even against -L and the like, so these leave it out."""

_FORWARDING = re.compile(r"-[LRDwW]|(?i:(-o)?\s*(tunnel|(local|remote|dynamic)forward))")
"""A word of -e that asks for a forwarding."""


NO_CONTROL = "none"
"""As `control`: a login for each connection, whatever ssh's configuration says."""

_IDLE_SECONDS = 10
"""How long a shared login is kept, by ssh, when nobody uses it."""


class Route(NamedTuple):
    """How a host is reached, as argument lists; empty for this one."""

    argv: Sequence[str] = ()
    """What the words of a command are put behind."""
    by_hand: Sequence[str] = ()
    """What a user would type to log in."""
    log_in: Sequence[str] = ()
    end_login: Sequence[str] = ()
    """What makes and ends the login that all connections share; nothing where each has its own."""


class Command(NamedTuple):
    """What to run to have a stage work on what is at `location`: arguments, and additions to the environment."""

    location: Location
    argv: list[str]
    environment: dict[str, str]
    folder: str
    """Where it is run: relative paths in it are meant from there, whatever we change into."""
    runs: str = ""
    """What is run there, in words of who asked for it; for messages."""
    way: Route = Route()
    own_session: bool = False
    """It needs no terminal, and whatever happens to ours does not concern it."""
    opening: bytes = b""
    """What its standard input gets before anything else."""
    mark: bytes = b""
    """What it says on standard output when the stage begins; what comes before is a login's. None if empty."""

    def start(self) -> subprocess.Popen[bytes]:
        """Run it, with three pipes. OSError where it cannot be."""
        return subprocess.Popen(
            self.argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **self.environment},
            cwd=self.folder if os.path.isdir(self.folder) else None,
            start_new_session=self.own_session,
        )

    def outliving_terminal(self) -> Command:
        """The same for an ssh that asks for its password at a terminal which may be gone afterwards."""
        return self._replace(argv=["nohup", *self.argv]).located()

    def located(self) -> Command:
        """The same with its programs as absolute paths: PATH may name folders that are in the way later."""
        way = self.way._replace(log_in=_located(self.way.log_in), end_login=_located(self.way.end_login))
        return self._replace(argv=_located(self.argv), way=way)

    def logged_in(self) -> Command:
        """The same where `log_in` has asked for all there was to ask."""
        return self._replace(own_session=True)


def _located(argv: Sequence[str]) -> list[str]:
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
    """The command whose standard input and output are those of a stage, of `location`, with these options.

    On a host, `python` runs the stages of this package, which are sent to it; or else `program` is there
    already. `rsh`, `python` and `program` are command lines: `ssh -p 2222`, `sudo -n python3`. As rsync does
    with --rsync-path, the latter two are left to the remote shell, so `~` and variables work there.
    """
    if location.host is None:
        return _local_command(location, program, [stage, *options])
    way = _route_to(location, _words("-e", DEFAULT_RSH if rsh is None else rsh), control)
    python = DEFAULT_PYTHON if python is None else python
    home, rest = location.under_home()
    path = [rest if home else _no_option(rest)] if location.path else []
    if program is not None:
        words = _remote_words("--blockcopy-path", program)
        named = [_for_shell(home, each) for each in path]
        argv = [*way.argv, *words, stage, *options, *named]
        return Command(location, argv, {}, working_folder(), runs=program, way=way)
    # What stands behind the code is for whoever lists the processes there; it tells Python nothing.
    shown = [word for word in ("blockcopy", stage, *path) if re.fullmatch(r"[\w@%+:,./-]+", word, re.ASCII)]
    home_word = [home] if home else []  # a shell there says where that is, or else Python does
    return Command(
        location,
        [*way.argv, *_remote_words("--python", python), "-c", payload.CODE, *shown, *home_word],
        {},
        working_folder(),
        runs=python,
        way=way,
        opening=payload.opening([stage, *options, *path], under_home=bool(home)),
        mark=bootstrap.MARK,
    )


def _for_shell(home: str, rest: str) -> str:
    """Return the word that a shell reads as this path. It finds `home` if that and a slash are not quoted."""
    if not home:
        return shlex.quote(rest)
    return f"{home}/{shlex.quote(rest[1:])}" if rest[1:] else home


def _route_to(location: Location, rsh: list[str], control: str | None) -> Route:
    host = location.host or ""
    at = next((at for at, word in enumerate(rsh) if Path(word).name == "ssh"), None)
    if at is None:
        if location.port is not None:
            raise UsageError(f"{location}: the port is for ssh; name it in -e {shlex.join(rsh)!r}")
        return Route([*rsh, host], [*rsh, host])
    if location.port is not None:
        rsh = [*rsh[: at + 1], "-p", str(location.port), *rsh[at + 1 :]]
    end = ["--", host]  # whatever the host is called, it is no option
    options = [*_plain(rsh[at + 1 :]), *_KEEP_ALIVE]
    if at > 0:
        control = None  # run by another program, as another user perhaps, who may not use our sockets
    if control is None or any(word.startswith("-S") or "controlpath" in word.lower() for word in rsh):
        return Route([*rsh, *options, *end], [*rsh, host])  # a login of the user's own is not ours to end
    options += ["-o", f"ControlPath={control}"]
    if control == NO_CONTROL:
        return Route([*rsh, *options, *end], [*rsh, host])
    options += ["-o", "ControlMaster=auto", "-o", f"ControlPersist={_IDLE_SECONDS}"]
    return Route(
        [*rsh, *options, *end],
        [*rsh, host],
        [*rsh, "-fN", *options, *end],  # before the options: ssh refuses -N after a SessionType
        [*rsh, *options, "-O", "exit", *end],
    )


def _plain(given: Sequence[str]) -> list[str]:
    """The options of ssh that undo what its configuration adds to a command; `given`: those of the user."""
    settings = ["IgnoreUnknown=*"]  # some are newer than OpenSSH 8.4; from here on an unknown one is no error
    settings += [f"{name}={value}" for name, value in _PLAIN.items()]
    if not any(_FORWARDING.match(word) for word in given):
        settings.append(_NO_FORWARDING)
    return [word for setting in settings for word in ("-o", setting)]


def _remote_words(option: str, command: str) -> list[str]:
    words = command.split()
    if not words:
        raise UsageError(f"{option} is empty")
    return words


def _local_command(location: Location, program: str | None, arguments: list[str]) -> Command:
    path = absolute(location.path)
    if program is not None:
        argv = [*_words("--blockcopy-path", program), *arguments, path]
        return Command(location, argv, {}, working_folder(), runs=program)
    # This very package, wherever it lies; -P, so that nothing in the working directory is taken for it.
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    argv = [sys.executable, "-P", "-m", "blockcopy", *arguments, path]
    return Command(location, argv, {"PYTHONPATH": python_path}, working_folder(), runs="blockcopy")


def _words(option: str, command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"{option} {command!r} is no command line: {error}") from error
    if not words:
        raise UsageError(f"{option} is empty")
    return words


def _no_option(path: str) -> str:
    return f"./{path}" if path.startswith("-") else path
