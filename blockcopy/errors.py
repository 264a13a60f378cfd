"""Every error blockcopy can tell a user: what happened, to which path or host, what to do.

The exit status is an attribute of the class. `cli` is the only place that prints one.
"""

from __future__ import annotations

import errno
import os
import signal


class BlockcopyError(Exception):
    """Anything blockcopy can fail with. The message is one a user can act on."""

    exit_code = 1

    @classmethod
    def told(cls, message: str, exit_code: int) -> BlockcopyError:
        """One that another process of ours met, and told."""
        made = cls(message)
        made.exit_code = exit_code
        return made


class UsageError(BlockcopyError):
    """The command line asks for something that cannot be meant."""

    exit_code = 2


class StreamError(BlockcopyError):
    """A hash or block stream is cut short or is not one."""


class TruncatedStreamError(StreamError):
    """A stream ended without its `done`."""


class OutputError(BlockcopyError):
    """Whoever reads our output went away, or the output cannot be written."""


class DeviceError(BlockcopyError):
    """A local file or device cannot be opened, read, written or synced."""

    errno: int | None = None

    @classmethod
    def of(cls, action: str, path: str, error: OSError) -> DeviceError:
        """The error for `error`, met while doing `action` ("read 4096 bytes at 0 of", …) to `path`."""
        reason = os.strerror(error.errno) if error.errno else str(error)
        made = cls(f"cannot {action} {path}: {reason}")
        made.errno = error.errno
        return made


class DestinationRefusedError(DeviceError):
    """The destination is in use, locked, mounted, too small or no fit place for a copy."""


class DestinationLostError(DeviceError):
    """The destination was removed, replaced, cut or written by another program while it was ours."""


class StateError(BlockcopyError):
    """The state file is none that can be taken, or another process keeps it."""


class StateNotKeptError(StateError):
    """The state cannot be written: the copy goes on, and a restart checks every block again."""


class PeerError(BlockcopyError):
    """The other end cannot be reached, refused, died, or sent what was not asked for."""

    exit_code = 3


class SourceError(PeerError):
    """The source is that other end."""


class ProtocolViolationError(SourceError):
    """The source sent what was not asked for: it lives, but it cannot be believed."""


class SourceChangedError(SourceError):
    """The source is not the one it was: nothing of it can be mixed with what is here."""


class UnreadableError(SourceError):
    """The source cannot read some of its blocks, and goes on to serve all others."""


class OriginalProgramError(SourceError):
    """The source runs the original program, which is asked in another form."""


class MountError(BlockcopyError):
    """A mount cannot be made, found, asked or taken down."""

    exit_code = 4


class MissingRequirementError(BlockcopyError):
    """`doctor` found that something is missing which a mount or a sync cannot do without."""


class DifferentError(BlockcopyError):
    """`verify` found that the destination is not the source's copy."""

    exit_code = 5


class IncompleteError(BlockcopyError):
    """The copy ended before it was complete (sysexits.h EX_TEMPFAIL: run it again)."""

    exit_code = 75


def how_ended(status: int) -> str:
    """Return in words how a process ended that has this `returncode`, as subprocess has it."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"was killed by signal {-status}"


class SurroundingsError(BlockcopyError):
    """The system refuses what any program needs: a file, memory, a process, a folder to be in."""


class FaultError(BlockcopyError):
    """A fault of blockcopy itself."""


_LIMITS = {
    errno.EMFILE: "too many open files: raise the limit (ulimit -n, or LimitNOFILE= of a unit)",
    errno.ENFILE: "too many open files on this machine (fs.file-max)",
    errno.ENOMEM: "not enough memory",
    errno.EAGAIN: "too many processes or threads of this user (ulimit -u)",
}


def told_of(error: BaseException) -> BlockcopyError:
    """Return what a user is told of any exception that ended a command."""
    leaves = _leaves(error)
    unforeseen = next((each for each in leaves if not isinstance(each, BlockcopyError)), leaves[0])
    if isinstance(unforeseen, BlockcopyError):
        return unforeseen
    if isinstance(unforeseen, OSError):
        reason = _LIMITS.get(unforeseen.errno or 0) or unforeseen.strerror or str(unforeseen)
        where = f": {unforeseen.filename}" if unforeseen.filename else ""
        told: BlockcopyError = SurroundingsError(f"{reason}{where}{_no_folder()}")
    elif isinstance(unforeseen, MemoryError):
        told = SurroundingsError(_LIMITS[errno.ENOMEM])
    elif isinstance(unforeseen, RuntimeError) and "start new thread" in str(unforeseen):
        told = SurroundingsError(_LIMITS[errno.EAGAIN])
    else:
        told = FaultError(f"a fault of blockcopy: {type(unforeseen).__name__}: {unforeseen}; -v shows more")
    told.__cause__ = error
    return told


def _leaves(error: BaseException) -> list[BaseException]:
    """Return what is in an exception group; Python 3.9 has none."""
    inner = getattr(error, "exceptions", None)
    return [leaf for each in inner for leaf in _leaves(each)] if inner else [error]


def _no_folder() -> str:
    try:
        os.getcwd()
    except OSError:
        return " (the current folder was removed: go to another one)"
    return ""


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not a BlockcopyError, so that nothing takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
