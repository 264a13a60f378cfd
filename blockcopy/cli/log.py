"""Where the log goes: standard error, which may be the journal's, a file, or syslog.

The modules log by name, as is usual; who reads it is settled here.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from functools import partial
from typing import Callable

from blockcopy.cli import console
from blockcopy.cli.background_writer import BackgroundWriter
from blockcopy.errors import OutputError
from blockcopy.paths.places import absolute
from blockcopy.paths.safe_write import open_log
from blockcopy.untrusted_text import LineBudget, printable

_PLAIN = "%(message)s"
_VERBOSE = "%(asctime)s [%(process)d %(threadName)s] %(name)s %(levelname)5s: %(message)s"
_FILE = "%(asctime)s blockcopy[%(process)d] %(levelname)s: %(message)s"

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Of syslog(3), which the journal reads as a `<3>` before the line; from sd-daemon(3)."""


_MOST_MESSAGE = 8192
"""Characters of a message; most have a path or two."""

_LINES = 1000
"""Lines a minute of one module that anybody is told, whatever makes it talk; developers are told all."""

_FAREWELL_SECONDS = 2
"""How long the end of the program waits for those who read the log."""


class _Formatter(logging.Formatter):
    """Formats each message as one line, whatever is in it. Lines of a traceback begin with a mark."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = printable(record.getMessage(), _MOST_MESSAGE)
        record.asctime = self.formatTime(record)
        lines = [self.formatMessage(record)]
        if record.exc_info:
            lines += [f"  | {printable(line)}" for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(lines)


class _JournalFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_priority(super().format(record), record.levelno)


class _Bounded(logging.Filter):
    """Lets through _LINES a minute of each module, and tells later how many more there were."""

    def __init__(self) -> None:
        super().__init__()
        self._budgets: dict[str, LineBudget] = {}
        self._last: tuple[logging.LogRecord, bool] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if self._last is None or self._last[0] is not record:
            self._last = record, self._passes(record)
        return self._last[1]

    def _passes(self, record: logging.LogRecord) -> bool:
        budget = self._budgets.setdefault(record.name, LineBudget(_LINES))
        if dropped := budget.take_dropped():
            record.msg, record.args = f"{record.getMessage()} ({dropped} messages before it were dropped)", ()
        return budget.take()


def _as_it_is(record: logging.LogRecord) -> logging.LogRecord:
    """Return the same for another thread, which formats it: a traceback makes Python read its modules' files."""
    try:
        text = record.getMessage()  # what it tells of may change meanwhile
    except Exception as error:  # noqa: BLE001  (a fault of the message is none of whoever logs it)
        text = f"{record.msg!r} cannot be told: {error!r}"
    record.msg, record.args = text, None
    return record


def _record(level: int, text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelno": level, "levelname": logging.getLevelName(level)})


class _StandardError(logging.Handler):
    """As it is at the time: where a bar is drawn, lines pass by above it."""

    def emit(self, record: logging.LogRecord) -> None:
        console.say(partial(self.format, _as_it_is(record)))


class _Outside(logging.Handler):
    """A place that may keep us waiting, or fail, and does neither to whoever logs."""

    def __init__(self, write: Callable[[int, str], None]) -> None:
        super().__init__()
        self._outlet: BackgroundWriter[logging.LogRecord] = BackgroundWriter(
            lambda record: write(record.levelno, self.format(record)),
            lambda count: _record(logging.ERROR, f"{count} lines were dropped: they could not be written in time"),
        )

    def emit(self, record: logging.LogRecord) -> None:
        self._outlet.put(_as_it_is(record))

    def drain(self, seconds: float) -> None:
        """Wait until all is written, for so long at most."""
        self._outlet.drain(seconds)


def set_up(*, verbose: bool, quiet: bool = False, file: str | None = None) -> None:
    """Log to standard error, and to the end of `file`. OutputError where that cannot be written.

    In the file, and in the journal, is more than on a terminal: also what went well. `quiet`: nothing but errors
    on standard error. SourceFaults of the program are logged as well, of whatever thread.
    """
    journal = is_journal()
    level = logging.DEBUG if verbose else logging.INFO if journal else logging.WARNING
    standard_error = _StandardError()
    formatter = _JournalFormatter if journal else _Formatter
    standard_error.setFormatter(formatter(_VERBOSE if verbose else _PLAIN))
    standard_error.setLevel(logging.ERROR if quiet else level)
    handlers: list[logging.Handler] = [standard_error]
    if file is not None:
        handlers.append(_log_file(file, logging.DEBUG if verbose else logging.INFO))
    if not verbose:
        bounded = _Bounded()
        for handler in handlers:
            handler.addFilter(bounded)
    logging.basicConfig(level=min(handler.level for handler in handlers), handlers=handlers)
    logging.raiseExceptions = False  # where the log cannot be written there is nobody to tell
    sys.excepthook = lambda _kind, error, _traceback: fault(error)
    threading.excepthook = lambda thrown: fault(thrown.exc_value or thrown.exc_type())


def fault(error: BaseException) -> None:
    """Log an error that nobody foresaw, with its traceback: also where there is no standard error any more."""
    logging.getLogger(__name__).critical("a fault of blockcopy's: %r", error, exc_info=error)
    drain()


def drain() -> None:
    """Wait until all that was logged or said is written, for a moment at most."""
    console.drain(_FAREWELL_SECONDS)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Outside):
            handler.drain(_FAREWELL_SECONDS)


class _LogFile:
    """The end of a file; one that logrotate has moved away is made anew."""

    def __init__(self, path: str) -> None:
        self._path = absolute(path)
        self._fd = open_log(self._path)
        self._told = False

    def write(self, _level: int, text: str) -> None:
        """Append a line, or several. What cannot be written is told once."""
        data = f"{text}\n".encode(errors="replace")
        for part in (self._follow, lambda: os.write(self._fd, data)):
            try:
                part()
            except OSError as error:
                if not self._told:
                    console.say(f"cannot write --log-file {printable(self._path)}: {error.strerror}")
                self._told = True

    def take_fatal_signals(self) -> None:
        """Let Python write to the file what kills it, as SIGBUS does if a destination is cut."""
        faulthandler.enable(os.dup(self._fd), all_threads=False)

    def _follow(self) -> None:
        """Write to a new file from now on, if the one that was is moved away."""
        if not self._is_there():
            fd = open_log(self._path)
            os.close(self._fd)
            self._fd = fd

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False


class _FileHandler(_Outside):
    pass


def _log_file(path: str, level: int) -> logging.Handler:
    try:
        log_file = _LogFile(path)
        handler = _FileHandler(log_file.write)
        log_file.take_fatal_signals()
    except OSError as error:
        raise OutputError(f"cannot write --log-file {path}: {error.strerror}") from error
    handler.setFormatter(_Formatter(_FILE))
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


def last_words(text: str, fault: BaseException | None = None) -> str:
    """Log what the program fails with, but not to standard error; return the text for standard error.

    `fault`: an exception that is logged with its traceback.
    """
    record = _record(logging.ERROR, text)
    if fault is not None:
        record.exc_info = (type(fault), fault, fault.__traceback__)
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, _StandardError):
            handler.handle(record)
    text = printable(text, _MOST_MESSAGE)
    return with_priority(text, logging.ERROR) if is_journal() else text


def be_ready_for_syslog() -> None:
    """Load what `leave_standard_error` needs: the thread that serves a mount must not look for modules."""
    import logging.handlers  # noqa: F401  (slow to load)


def leave_standard_error() -> None:
    """Log to the file alone from now on, or else to syslog."""
    root = logging.getLogger()
    to_file = [each for each in root.handlers if isinstance(each, _FileHandler)]
    root.handlers[:] = to_file if to_file else [_syslog()]


def be_silent() -> None:
    """Another process of ours is the one who tells."""
    logging.getLogger().handlers[:] = [logging.NullHandler()]


def _syslog() -> logging.Handler:
    from logging.handlers import SysLogHandler

    try:
        syslog = SysLogHandler("/dev/log")
    except OSError:
        return logging.NullHandler()  # no syslog here: `status` still tells the last error

    def write(level: int, text: str) -> None:
        for line in text.split("\n"):
            syslog.emit(_record(level, line))

    handler = _Outside(write)
    handler.setFormatter(_Formatter("blockcopy[%(process)d]: %(message)s"))
    handler.addFilter(_Bounded())
    return handler
