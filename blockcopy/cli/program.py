"""How a command is run, from its arguments to its exit status. No other module ends the program."""

from __future__ import annotations

import argparse
import gc
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Callable, NoReturn

from blockcopy.cli import console, log, open_files, signals
from blockcopy.errors import BlockcopyError, InternalError, Interrupted, as_user_error

_OPEN_FILES = 16
"""Files that an ordinary command may have open at once."""


def run(
    parser: argparse.ArgumentParser,
    find: Callable[[str], Callable[[argparse.Namespace], None]],
    argv: Sequence[str] | None,
    open_files_of: Mapping[str, int],
) -> NoReturn:
    """Parse `argv` with `parser`, run the command, and exit with its status, or die of the signal that ended it.

    `find`: called with a command's name, returns the function to call with the parsed arguments. `argv`: the
    arguments, sys.argv's if None. `open_files_of`: mapping, command name → how many files the command must be able
    to open. Commands that need 16 or fewer are not in this mapping.
    """
    gc.set_threshold(50_000)  # start-up makes no garbage, so do not search its objects again and again
    console.fill_closed_streams()
    args = parser.parse_args(argv)
    signals.raise_on_signals()
    try:
        _set_up_log(args)
        open_files.ensure_open_files(open_files_of.get(args.command, _OPEN_FILES))
        find(args.command)(args)
    except Exception as error:  # whatever it is, a user gets one line
        logging.getLogger(__name__).debug("failed", exc_info=True)
        _exit_with(args.command, as_user_error(error))
    except Interrupted as interrupted:
        log.drain()
        signals.die_of(interrupted.signum)
    _exit(0)


def error_line(command: str, message: object) -> str:
    """Return the line that reports that the command named `command` failed, and why: `message`.

    Scripts and `push` rely on its beginning.
    """
    return f"ERROR ({command}): {message}"


def _set_up_log(args: argparse.Namespace) -> None:
    """Set up the log as the options in `args` say."""
    verbose = log.ALL if os.environ.get("BLOCKCOPY_DEBUG") else getattr(args, "verbose", 0)
    more: list[logging.Handler] = []
    if (path := getattr(args, "log_file", None)) is not None:
        from blockcopy.cli.log_sinks import file_handler  # not sent to source hosts

        more.append(file_handler(path, everything=verbose >= log.ALL))
    log.set_up(verbose=verbose, quiet=getattr(args, "quiet", False), more=more)


def _exit(status: int) -> NoReturn:
    """Exit with `status`, without an orderly shutdown of the interpreter.

    All files are written and closed. The shutdown would cost a hundredth of the time to copy 2 GiB, at both ends.
    """
    log.drain()
    os._exit(status)


def _exit_with(command: str, error: BlockcopyError) -> NoReturn:
    console.say(log.log_failure(error_line(command, error), error if isinstance(error, InternalError) else None))
    _exit(error.exit_code)
