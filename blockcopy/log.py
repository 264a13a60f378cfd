"""Where the log goes: standard error, which may be the journal's, a file, or syslog.

The modules log by name, as is usual; who reads it is settled here.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
from typing import TextIO

from blockcopy.errors import OutputError
from blockcopy.places import absolute

_PLAIN = "%(message)s"
_VERBOSE = "%(asctime)s [%(process)d %(threadName)s] %(name)s %(levelname)5s: %(message)s"
_FILE = "%(asctime)s blockcopy[%(process)d] %(levelname)s: %(message)s"

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Of syslog(3), which the journal reads as a `<3>` before the line; from sd-daemon(3)."""


_MOST_WAITING = 10_000
"""Records that wait for a log that takes none; further ones are lost."""

_LAST_SECONDS = 2
"""How long the log may take, when we end, to take what waits for it."""


class _StandardError(logging.Handler):
    """As it is at the time: where a bar is drawn, lines pass by above it."""

    def emit(self, record: logging.LogRecord) -> None:
        stream: TextIO | None = sys.stderr  # None where the program was started without one
        try:
            if stream is not None and not hasattr(record, "is_said"):
                stream.write(f"{self.format(record)}\n")
                stream.flush()
        except OSError:
            self.handleError(record)


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_priority(super().format(record), record.levelno)


class _Aside(logging.Handler):
    """Records on their way to `targets`, which a thread of their own calls.

    A log file, a terminal or syslog can keep its writer waiting for ever.
    """

    def __init__(self, targets: list[logging.Handler]) -> None:
        super().__init__(min(target.level for target in targets))
        self.targets = targets
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None  # what it tells of may change meanwhile
        with contextlib.suppress(queue.Full):  # nobody reads the log
            self._waiting.put_nowait(record)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            for target in self.targets:
                if record.levelno >= target.level:
                    with contextlib.suppress(OSError):  # its folder is gone: there is nowhere to tell it
                        target.emit(record)  # without its lock, for which others would wait

    def finish(self, seconds: float) -> None:
        """Wait until all is written, `seconds` at most."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
            self._thread.join(seconds)


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
        handler = WatchedFileHandler(absolute(path), encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"cannot write --log-file {path}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(_FILE))
    handler.setLevel(level)
    return handler


def write_aside() -> None:
    """Log through a thread from now on: nobody who logs waits for the log. End with `finish`."""
    import logging.handlers  # for syslog; the thread that serves a mount must not look for modules

    root = logging.getLogger()
    root.handlers[:] = [_Aside(root.handlers[:])]
    atexit.unregister(logging.shutdown)  # it would wait for the file
    atexit.register(finish)


def finish() -> None:
    """Have the log written, or left if it takes too long. Nothing can be logged after that."""
    asides = [each for each in logging.getLogger().handlers if isinstance(each, _Aside)]
    for aside in asides:
        aside.finish(_LAST_SECONDS)
    if not asides:
        logging.shutdown()


def _targets() -> list[logging.Handler]:
    """The handlers that write, as a list that can be changed."""
    handlers = logging.getLogger().handlers
    return handlers[0].targets if handlers and isinstance(handlers[0], _Aside) else handlers


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
    record.is_said = True
    for handler in logging.getLogger().handlers:
        handler.handle(record)
    return with_priority(text, logging.ERROR) if is_journal() else text


def leave_standard_error() -> None:
    """Log to the file alone from now on, or else to syslog."""
    targets = _targets()
    to_file = [each for each in targets if isinstance(each, logging.FileHandler)]
    targets[:] = to_file if to_file else [_syslog()]


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
