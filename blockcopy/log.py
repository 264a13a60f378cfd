"""Where the log goes: standard error, which may be the journal's, a file, or syslog.

The modules log by name, as is usual; who reads it is settled here.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from blockcopy.errors import OutputError

_PLAIN = "%(message)s"
_VERBOSE = "%(asctime)s [%(process)d %(threadName)s] %(name)s %(levelname)5s: %(message)s"
_FILE = "%(asctime)s blockcopy[%(process)d] %(levelname)s: %(message)s"

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Of syslog(3), which the journal reads as a `<3>` before the line; from sd-daemon(3)."""


class _StandardError(logging.Handler):
    """As it is at the time: where a bar is drawn, lines pass by above it."""

    def emit(self, record: logging.LogRecord) -> None:
        stream: TextIO | None = sys.stderr  # None where the program was started without one
        try:
            if stream is not None:
                stream.write(f"{self.format(record)}\n")
                stream.flush()
        except OSError:
            self.handleError(record)


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_priority(super().format(record), record.levelno)


def set_up(*, verbose: bool, quiet: bool = False, file: str | None = None) -> None:
    """Log to standard error, and to the end of `file`. OutputError where that cannot be written.

    In the file, and in the journal, is more than on a terminal: also what went well. `quiet`: nothing but errors
    on standard error.
    """
    journal = is_journal()
    level = logging.DEBUG if verbose else logging.INFO if journal else logging.WARNING
    standard_error = _StandardError()
    formatter = _JournalFormatter if journal else logging.Formatter
    standard_error.setFormatter(formatter(_VERBOSE if verbose else _PLAIN))
    standard_error.setLevel(logging.ERROR if quiet else level)
    handlers: list[logging.Handler] = [standard_error]
    if file is not None:
        handlers.append(_log_file(file, logging.DEBUG if verbose else logging.INFO))
    logging.basicConfig(level=min(handler.level for handler in handlers), handlers=handlers)


def _log_file(path: str, level: int) -> logging.Handler:
    from logging.handlers import WatchedFileHandler  # slow to load

    try:
        # One that logrotate has moved away is made anew.
        handler = WatchedFileHandler(os.path.abspath(path), encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"cannot write --log-file {path}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(_FILE))
    handler.setLevel(level)
    return handler


def is_journal() -> bool:
    """Standard error is systemd's journal: it tells which file that is, for those whose error was redirected."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def with_priority(text: str, level: int) -> str:
    """The same lines as the journal wants them."""
    return "\n".join(f"<{_PRIORITIES.get(level, 5)}>{line}" for line in text.split("\n"))


def last_words(text: str) -> str:
    """What the program fails with: logged wherever that is not standard error, and the text for there."""
    record = logging.makeLogRecord({"msg": text, "levelno": logging.ERROR, "levelname": "ERROR"})
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, _StandardError):
            handler.handle(record)
    return with_priority(text, logging.ERROR) if is_journal() else text


def leave_standard_error() -> None:
    """Log to the file alone from now on, or else to syslog."""
    root = logging.getLogger()
    to_file = [each for each in root.handlers if isinstance(each, logging.FileHandler)]
    root.handlers[:] = to_file if to_file else [_syslog()]


def be_silent() -> None:
    """Another process of ours is the one who tells."""
    logging.getLogger().handlers[:] = [logging.NullHandler()]


def _syslog() -> logging.Handler:
    from logging.handlers import SysLogHandler

    try:
        handler: logging.Handler = SysLogHandler("/dev/log")
    except OSError:
        return logging.NullHandler()  # no syslog here: `status` still tells the last error
    handler.setFormatter(logging.Formatter("blockcopy[%(process)d]: %(message)s"))
    return handler
