"""Where a source is, and the command that runs `retrieve` there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from blockcopy.errors import UsageError

DEFAULT_RSH = "ssh -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""ssh, noticing within half a minute that the other end is gone."""


class Source(NamedTuple):
    """`[user@]host:/path`, or a local path where `host` is None."""

    host: str | None
    path: str

    def __str__(self) -> str:
        return f"{self.host}:{self.path}" if self.host else self.path


def parse_source(text: str) -> Source:
    """As rsync reads it: a colon before any slash parts host and path. UsageError for what is neither.

    An IPv6 address stands in brackets. A local path with a colon in its first part is written `./a:b`.
    """
    bracketed = re.match(r"((?:[^/:@]+@)?)\[([^/\]]*)\]:(.*)", text, re.DOTALL)
    if bracketed:
        user, address, path = bracketed.groups()
        host = user + address
    else:
        host, colon, path = text.partition(":")
        if not colon or "/" in host:
            if not text:
                raise UsageError("SOURCE is empty; it is [user@]host:/path or a local path")
            return Source(None, text)
    if not host or not path:
        raise UsageError(
            f"SOURCE {text!r} has no {'path' if host else 'host'}; it is [user@]host:/path or a local path"
        )
    if host.startswith("-"):
        raise UsageError(f"SOURCE {text!r}: a host does not begin with `-`")
    return Source(host, path)


class Command(NamedTuple):
    """What to run to have a `retrieve` of `source`: arguments, and additions to the environment."""

    source: Source
    argv: list[str]
    environment: dict[str, str]
    folder: str
    """Where it is run: relative paths in it are meant from there, whatever we change into."""

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
        )

    def outliving_terminal(self) -> Command:
        """The same for an ssh that asks for its password at a terminal which may be gone afterwards."""
        return self._replace(argv=["nohup", *self.argv])


def retrieve_command(source: Source, rsh: str = DEFAULT_RSH, program: str | None = None) -> Command:
    """The command whose standard input and output are a `retrieve` of `source`.

    `rsh` and `program` are command lines: `ssh -p 2222`, `sudo blockcopy`. As rsync does with
    --rsync-path, a remote `program` is left to the remote shell, so `~` and variables work there.
    """
    if source.host is None:
        return _local_command(source, program)
    argv = _words("-e", rsh)
    if Path(argv[0]).name == "ssh":
        argv.append("--")  # whatever the host is called, it is no option
    words = ["blockcopy"] if program is None else program.split()
    if not words:
        raise UsageError("--blockcopy-path is empty")
    return Command(
        source, [*argv, source.host, *words, "retrieve", shlex.quote(_no_option(source.path))], {}, os.getcwd()
    )


def _local_command(source: Source, program: str | None) -> Command:
    path = os.path.abspath(source.path)
    if program is not None:
        return Command(source, [*_words("--blockcopy-path", program), "retrieve", path], {}, _here())
    # This very package, wherever it lies; -P, so that nothing in the working directory is taken for it.
    package_root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    argv = [sys.executable, "-P", "-m", "blockcopy", "retrieve", path]
    return Command(source, argv, {"PYTHONPATH": python_path}, _here())


def _here() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"  # it was removed: there is nothing to be meant from there


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
