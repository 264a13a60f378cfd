"""The tree of all errors that blockcopy reports to a user.

A message says what happened, to which path or host, and what to do. Each class has the exit status of the
program. Only `cli.main` prints errors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator


class BlockcopyError(Exception):
    """Base class of all errors that end a command. Its message is for the user."""

    exit_code = 1

    @classmethod
    def relayed(cls, message: str, exit_code: int) -> BlockcopyError:
        """Return an error with the `message` and `exit_code` that another blockcopy process reported."""
        error = cls(message)
        error.exit_code = exit_code
        return error


class UsageError(BlockcopyError):
    """An invalid command line."""

    exit_code = 2


class StreamError(BlockcopyError):
    """A hash stream or block stream that is malformed, or ends early."""


class TruncatedStreamError(StreamError):
    """A stream that ends before its `done` message."""


class OutputError(BlockcopyError):
    """Output that cannot be written, perhaps because its reader has exited."""


class DeviceError(BlockcopyError):
    """A local file or device that cannot be opened, read, written or synced."""

    errno: int | None = None
    """The number of the system's error. None if no system call failed."""

    @classmethod
    def from_os_error(cls, action: str, path: str, error: OSError) -> DeviceError:
        """Return the DeviceError "cannot ACTION PATH: REASON" for `error`, the OSError of a system call.

        `action`: a verb with its objects, such as "read 4096 bytes at 0 of". `path`: the file or device.
        """
        reason = os.strerror(error.errno) if error.errno else str(error)
        made = cls(f"cannot {action} {path}: {reason}")
        made.errno = error.errno
        return made

    @classmethod
    @contextlib.contextmanager
    def on_os_error(cls, action: str, path: str) -> Iterator[None]:
        """Return a context manager that raises each OSError as a DeviceError.

        `action`, `path`: as in `from_os_error()`.
        """
        try:
            yield
        except OSError as error:
            raise cls.from_os_error(action, path, error) from error

    @classmethod
    def ended_early(cls, path: str, offset: int, length: int, count: int) -> DeviceError:
        """Return the error for a read of `length` bytes at `offset` of `path` that got only `count` bytes."""
        return cls(
            f"cannot read {length} bytes at {offset} of {path}: "
            f"it is shorter than it was, or than it says, and ends after {count}"
        )


class DestinationRefusedError(DeviceError):
    """A destination that is in use, locked, mounted, read-only or too small."""


class ForeignContentError(DestinationRefusedError):
    """A destination with a file system, partition table or the like that the source has not."""

    WAY_ON = ". Nothing was written; --force overwrites it"

    @classmethod
    def relayed(cls, message: str, exit_code: int) -> BlockcopyError:
        """Return the error that another blockcopy process reported as `message`, with its `exit_code`."""
        return super().relayed(message.removesuffix(cls.WAY_ON), exit_code)

    def __str__(self) -> str:
        """Return what is held, and how to go on."""
        return f"{self.held}{self.WAY_ON}"

    @property
    def held(self) -> str:
        """A clause that names the file system, partition table or the like which the destination holds."""
        return super().__str__()


class UserWritesError(DestinationRefusedError):
    """A destination that holds what a user wrote to a writable mount, which the command would overwrite."""


class DestinationLostError(DeviceError):
    """A destination that another program removed, replaced, truncated or wrote to during the copy."""


class StateError(BlockcopyError):
    """A state file that is invalid, or that another process uses."""


class StateUnusableError(StateError):
    """A state file that is missing, damaged, or of a version that this program cannot read."""


class StateBusyError(StateError):
    """A state file that another process uses."""


class StateWriteError(StateError):
    """A state file that cannot be written. The copy goes on; a restart checks every block again."""


class StateRemovedError(StateWriteError):
    """A state file, or the note of a user's writes, that was removed or replaced while it was in use."""


class RemoteError(BlockcopyError):
    """Another host that cannot be reached, refuses, exits early, or violates the protocol."""

    exit_code = 3


class ReadOnlyError(DeviceError):
    """A replica that cannot be written: it was mounted read-only, or a sync of its destination has failed."""


class SourceError(RemoteError):
    """A RemoteError of the source."""


class ProtocolViolationError(SourceError):
    """A reply of the source that fits no request. The source runs, but its replies cannot be trusted."""


class SourceChangedError(SourceError):
    """A source that differs from the source of the blocks copied before. The two must not be mixed."""

    BEGINNING = "source changed: "

    @classmethod
    def found(cls, source: str, changes: str) -> SourceChangedError:
        """Return the error for a changed source. `source`: its name in messages. `changes`: what differs."""
        return cls(
            f"{cls.BEGINNING}{source} is not what it was ({changes}). "
            "Start again; copy a snapshot if the source is in use"
        )


class SourceReadError(SourceError):
    """Blocks that the source cannot read. The source continues to serve all other blocks."""


class OriginalProgramError(SourceError):
    """A source that runs the original program, and needs the original dialect."""


class MountError(BlockcopyError):
    """A mount that cannot be created, found, queried or removed."""

    exit_code = 4


class MissingRequirementError(BlockcopyError):
    """A requirement of `mount` or `sync` that `doctor` found missing."""


class MismatchError(BlockcopyError):
    """A destination that differs from the source, as `verify` found."""

    exit_code = 5


class IncompleteError(BlockcopyError):
    """A copy that ended before it was complete. The status is EX_TEMPFAIL of sysexits.h: run it again."""

    exit_code = 75


class OperatingSystemError(BlockcopyError):
    """A resource that the operating system refuses: files, memory, processes, the current folder."""


class InternalError(BlockcopyError):
    """A bug in blockcopy."""


class Interrupted(BaseException):
    """The signal `signum`, SIGINT or SIGTERM.

    It is no BlockcopyError, so that no handler of errors takes it for a failure.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def describe_exit(returncode: int) -> str:
    """Return how a process ended, in words such as "ended with exit status 1" or "was killed by SIGKILL".

    `returncode`: the exit status, or the negative number of the signal, as in `subprocess.Popen.returncode`.
    """
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"was killed by signal {-returncode}"


_LIMITS = {
    errno.EMFILE: "too many open files: raise the limit (ulimit -n, or LimitNOFILE= of a unit)",
    errno.ENFILE: "too many open files on this machine (fs.file-max)",
    errno.ENOMEM: "not enough memory",
    errno.EAGAIN: "too many processes or threads of this user (ulimit -u)",
}


def as_user_error(error: BaseException) -> BlockcopyError:
    """Return the BlockcopyError to report to the user for `error`, any exception that ended a command.

    A BlockcopyError is returned as it is. OSError and MemoryError become an OperatingSystemError, all others an
    InternalError. Of an exception group, the first member that is no BlockcopyError counts, else the first member.
    """
    leaves = _leaves(error)
    unforeseen = next((each for each in leaves if not isinstance(each, BlockcopyError)), leaves[0])
    if isinstance(unforeseen, BlockcopyError):
        return unforeseen
    if isinstance(unforeseen, OSError):
        reason = _LIMITS.get(unforeseen.errno or 0) or unforeseen.strerror or str(unforeseen)
        where = f": {unforeseen.filename}" if unforeseen.filename else ""
        reported: BlockcopyError = OperatingSystemError(f"{reason}{where}{_hint_at_removed_folder()}")
    elif isinstance(unforeseen, MemoryError):
        reported = OperatingSystemError(_LIMITS[errno.ENOMEM])
    elif isinstance(unforeseen, RuntimeError) and "start new thread" in str(unforeseen):
        reported = OperatingSystemError(_LIMITS[errno.EAGAIN])
    else:
        reported = InternalError(
            f"internal error: {type(unforeseen).__name__}: {unforeseen} (a bug in blockcopy; -vv shows more)"
        )
    reported.__cause__ = error
    return reported


def _leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions in an exception group, or `error` itself. Python 3.9 has no groups."""
    inner = getattr(error, "exceptions", None)
    return [leaf for each in inner for leaf in _leaves(each)] if inner else [error]


def _hint_at_removed_folder() -> str:
    try:
        os.getcwd()
    except OSError:
        return " (the current folder was removed: go to another one)"
    return ""
