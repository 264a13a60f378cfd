"""The command line: reads it, runs the command, and exits; the only place that does.

Each layer has a module of its commands, named as they are typed. It is loaded by the command that needs
it, because a source host has the stages only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
from typing import Callable, NoReturn

from blockcopy.cli import console, log, open_files, signals
from blockcopy.cli.parser import parser
from blockcopy.errors import BlockcopyError, InternalError, Interrupted, UsageError, as_user_error

_STAGES = "blockcopy.cli.commands"

_LAYERS = {
    _STAGES: ("checksum", "retrieve", "save", "receive", "facts"),
    "blockcopy.replica.commands": ("sync", "verify"),
    "blockcopy_fuse.commands": (
        "mount",
        "status",
        "list",
        "wait",
        "umount",
        "pause",
        "resume",
        "limit",
        "prefetch",
        "doctor",
        "manual",
        "completion",
    ),
}

_OPEN_FILES = {"mount": 64, "sync": 64, "verify": 64, "doctor": 32}
"""Files that a command may have open at once."""

_FEW_FILES = 16
"""The commands of all other layers."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its status; by the signal where one ended it."""
    gc.set_threshold(50_000)  # what starting up makes is no garbage, and need not be looked through again and again
    console.fill_closed_streams()
    args = parser().parse_args(argv)
    signals.raise_on_signals()
    try:
        log.set_up(
            verbose=bool(args.verbose or os.environ.get("BLOCKCOPY_DEBUG")),
            quiet=getattr(args, "quiet", False),
            file=getattr(args, "log_file", None),
        )
        open_files.check_open_files(_OPEN_FILES.get(args.command, _FEW_FILES))
        _command(args.command)(args)
    except Exception as error:  # whatever it is, a user is told one line
        logging.getLogger(__name__).debug("failed", exc_info=True)
        _exit_with(args.command, as_user_error(error))
    except Interrupted as interrupted:
        log.drain()
        signals.die_of(interrupted.signum)
    _end(0)


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    module = next(each for each, commands in _LAYERS.items() if name in commands)
    if module != _STAGES and sys.version_info < (3, 11):
        raise UsageError(f"{name} needs Python 3.11 or newer; the copy stages work with this one")
    try:
        command: Callable[[argparse.Namespace], None] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{name} is not in this copy of the stages: it is in what the checkout installs, see its README"
        ) from error
    return command


def _end(status: int) -> NoReturn:
    """All is done, written and closed: to take the interpreter down in order as well would give nothing back
    that the kernel does not, and takes a hundredth of the time of a copy of 2 GiB, at both of its ends."""
    log.drain()
    os._exit(status)


def _exit_with(command: str, error: BlockcopyError) -> NoReturn:
    console.say(log.last_words(f"ERROR ({command}): {error}", error if isinstance(error, InternalError) else None))
    _end(error.exit_code)
