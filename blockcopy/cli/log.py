"""The log: one printable line a message, bounded, on standard error and wherever else `log_sinks` takes it.

All modules log by their names with `logging`. Nobody who logs waits for a reader of the log or fails with one.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Callable

from blockcopy.cli import console
from blockcopy.cli.background_writer import BackgroundWriter
from blockcopy.untrusted_text import LineBudget, printable

_PLAIN = "%(message)s"
_VERBOSE = "%(asctime)s [%(process)d %(threadName)s] %(name)s %(levelname)5s: %(message)s"

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Priorities of syslog(3). The journal reads one from `<3>` before a line, see sd-daemon(3)."""

_MAX_MESSAGE = 8192
"""Characters of one message that are logged, enough for several paths."""

_MAX_LINES = 1000
"""Lines a minute that one module may log. `-vv` lifts this bound."""

STEPS, ALL = 1, 2
"""How verbose a log is: the steps of a command, as for `-v`, or everything, as for `-vv`."""

_DRAIN_SECONDS = 2
"""Seconds that the end of the program waits for slow readers of the log."""


class Formatter(logging.Formatter):
    """A formatter that makes a message one printable line. Lines of a traceback begin with `  | `."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of `record`."""
        record.message = printable(record.getMessage(), _MAX_MESSAGE)
        record.asctime = self.formatTime(record)
        lines = [self.formatMessage(record)]
        if record.exc_info:
            lines += [f"  | {printable(line)}" for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(lines)


class _JournalFormatter(Formatter):
    """A formatter that puts the priority before each line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of `record`."""
        return _with_priority(super().format(record), record.levelno)


class RateLimit(logging.Filter):
    """A filter that passes `_MAX_LINES` a minute of each module, and later reports how many were dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._budgets: dict[str, LineBudget] = {}
        self._last: tuple[logging.LogRecord, bool] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if `record` may be logged. Each handler gets the same answer for the same record."""
        if self._last is None or self._last[0] is not record:
            self._last = record, self._take(record)
        return self._last[1]

    def _take(self, record: logging.LogRecord) -> bool:
        budget = self._budgets.setdefault(record.name, LineBudget(_MAX_LINES))
        if dropped := budget.take_dropped():
            record.msg, record.args = f"{record.getMessage()} ({dropped} earlier messages were dropped)", ()
        return budget.take()


def _freeze(record: logging.LogRecord) -> logging.LogRecord:
    """Return `record` with its text made now: its arguments may change before another thread formats the record.

    A traceback stays for that thread: to format a traceback, Python reads source files.
    """
    try:
        text = record.getMessage()
    except Exception as error:  # noqa: BLE001  (a faulty message must not end whoever logs it)
        text = f"the message {record.msg!r} cannot be formatted: {error!r}"
    record.msg, record.args = text, None
    return record


def new_record(level: int, text: str) -> logging.LogRecord:
    """Return a new log record of `text` at `level`, one of logging's levels."""
    return logging.makeLogRecord({"msg": text, "levelno": level, "levelname": logging.getLevelName(level)})


class _StderrHandler(logging.Handler):
    """A handler for whatever standard error is at the time. A progress bar scrolls lines by above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Queue `record` for standard error. Thread-safe."""
        console.say(partial(self.format, _freeze(record)))


class BackgroundHandler(logging.Handler):
    """A handler for a place that may be slow or fail. A background thread formats and writes the records."""

    def __init__(self, write: Callable[[int, str], None]) -> None:
        """Prepare the handler. `write`: called in a thread with the level and the text of each record."""
        super().__init__()
        self._writer: BackgroundWriter[logging.LogRecord] = BackgroundWriter(
            lambda record: write(record.levelno, self.format(record)),
            lambda count: new_record(
                logging.ERROR, f"{count} lines were dropped because they could not be written in time"
            ),
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Queue `record` and return at once. Thread-safe."""
        self._writer.put(_freeze(record))

    def flush(self) -> None:
        """Wait until all records are written, for at most _DRAIN_SECONDS."""
        self._writer.drain(_DRAIN_SECONDS)


def set_up(*, verbose: int, quiet: bool = False, more: Sequence[logging.Handler] = ()) -> None:
    """Log to standard error, and to all handlers in `more`. Uncaught exceptions of all threads are logged as well.

    `verbose`: 0, STEPS or ALL. The journal gets the steps in any case. `quiet`: log only errors to standard error.
    """
    journal = is_journal()
    everything = verbose >= ALL
    level = logging.DEBUG if everything else logging.INFO if journal or verbose else logging.WARNING
    stderr = _StderrHandler()
    formatter = _JournalFormatter if journal else Formatter
    stderr.setFormatter(formatter(_VERBOSE if everything else _PLAIN))
    stderr.setLevel(logging.ERROR if quiet else level)
    handlers: list[logging.Handler] = [stderr, *more]
    if not everything:
        rate_limit = RateLimit()
        for handler in handlers:
            handler.addFilter(rate_limit)
    logging.basicConfig(level=min(handler.level for handler in handlers), handlers=handlers)
    logging.raiseExceptions = False  # nobody can be told if the log cannot be written
    sys.excepthook = lambda _kind, error, _traceback: log_fault(error)
    threading.excepthook = lambda thrown: log_fault(thrown.exc_value or thrown.exc_type())


def log_fault(error: BaseException) -> None:
    """Log the unforeseen `error` with its traceback, and wait until that is written."""
    logging.getLogger(__name__).critical("internal error: %r", error, exc_info=error)
    drain()


def announce(text: str, *, shown: bool) -> None:
    """Log `text`, which says what went well. If `shown`, write it to standard error in any case."""
    record = new_record(logging.INFO, text)
    for handler in logging.getLogger().handlers:
        if record.levelno >= handler.level or (shown and isinstance(handler, _StderrHandler)):
            handler.handle(record)


def drain() -> None:
    """Wait until all log records and lines of `console.say()` are written, for a few seconds at most."""
    console.drain(_DRAIN_SECONDS)
    for handler in logging.getLogger().handlers:
        handler.flush()


def is_journal() -> bool:
    """Return True if standard error is systemd's journal.

    systemd names the journal's file in JOURNAL_STREAM, in case that standard error was redirected since.
    """
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _with_priority(text: str, level: int) -> str:
    """Return the lines of `text` with the journal's prefix for `level` before each."""
    return "\n".join(f"<{_PRIORITIES.get(level, 5)}>{line}" for line in text.split("\n"))


def log_failure(text: str, fault: BaseException | None = None) -> str:
    """Log `text`, which says why the program fails, to all places but standard error.

    Returns the line that the caller must write to standard error. `fault`: an exception to log with its traceback,
    if any.
    """
    record = new_record(logging.ERROR, text)
    if fault is not None:
        record.exc_info = (type(fault), fault, fault.__traceback__)
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, _StderrHandler):
            handler.handle(record)
    text = printable(text, _MAX_MESSAGE)
    return _with_priority(text, logging.ERROR) if is_journal() else text
