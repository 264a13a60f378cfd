"""Log sinks besides standard error: a file, and syslog. A mount in the background has only these."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os

from blockcopy.cli import console
from blockcopy.cli.log import BackgroundHandler, Formatter, RateLimit, new_record
from blockcopy.errors import OutputError
from blockcopy.paths.places import absolute
from blockcopy.paths.safe_write import open_log
from blockcopy.untrusted_text import printable

_FILE = "%(asctime)s blockcopy[%(process)d] %(levelname)s: %(message)s"
_SYSLOG = "blockcopy[%(process)d]: %(message)s"


class _FileHandler(BackgroundHandler):
    """A handler for `--log-file`. If logrotate has moved the file away, a new one is made."""

    def __init__(self, path: str) -> None:
        """Open or create the file at `path`. Raises OSError if that fails.

        Python writes fatal signals to the file, such as the SIGBUS of a device that shrank.
        """
        super().__init__(self._append)
        self._path = absolute(path)
        self._fd = open_log(self._path)
        self._reported = False
        faulthandler.enable(os.dup(self._fd), all_threads=False)

    def _append(self, _level: int, text: str) -> None:
        """Append `text` and a newline to the file. Only the first failure is reported, on standard error."""
        data = f"{text}\n".encode(errors="replace")
        for step in (self._follow, lambda: os.write(self._fd, data)):
            try:
                step()
            except OSError as error:
                if not self._reported:
                    console.say(f"cannot write --log-file {printable(self._path)}: {error.strerror}")
                self._reported = True

    def _follow(self) -> None:
        """Open a new file at the path if the old one was moved away."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self._path), os.fstat(self._fd)):
                return
        fd = open_log(self._path)
        os.close(self._fd)
        self._fd = fd


def file_handler(path: str, *, everything: bool) -> logging.Handler:
    """Open or create the log file at `path`, and return a logging handler that appends to it.

    The file also gets what went well, and if `everything`, all else.
    Raises OutputError if the file cannot be written.
    """
    try:
        handler = _FileHandler(path)
    except OSError as error:
        raise OutputError(f"cannot write --log-file {path}: {error.strerror}") from error
    handler.setFormatter(Formatter(_FILE))
    handler.setLevel(logging.DEBUG if everything else logging.INFO)
    return handler


def preload_syslog() -> None:
    """Import what `detach_from_stderr()` needs. The thread that serves a mount must not look for modules."""
    import logging.handlers  # noqa: F401  (slow to load)


def detach_from_stderr() -> None:
    """Log to the log file only from now on, or to syslog if there is no log file."""
    root = logging.getLogger()
    to_file: list[logging.Handler] = [each for each in root.handlers if isinstance(each, _FileHandler)]
    root.handlers[:] = to_file or [_syslog_handler()]


def discard_log() -> None:
    """Log nothing from now on, because another process of this program reports instead."""
    logging.getLogger().handlers[:] = [logging.NullHandler()]


def _syslog_handler() -> logging.Handler:
    """Return a logging handler for syslog, or one that drops all records if this host has no syslog."""
    from logging.handlers import SysLogHandler

    try:
        syslog = SysLogHandler("/dev/log")
    except OSError:
        return logging.NullHandler()  # `status` still shows the last error

    def write(level: int, text: str) -> None:
        for line in text.split("\n"):
            syslog.emit(new_record(level, line))

    handler = BackgroundHandler(write)
    handler.setFormatter(Formatter(_SYSLOG))
    handler.addFilter(RateLimit())
    return handler
