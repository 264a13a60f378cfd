"""The limit on open files: RLIMIT_NOFILE, `ulimit -n`."""

from __future__ import annotations

import resource

from blockcopy.errors import OperatingSystemError

_WANTED = 1024
"""The default limit of most systems, enough for every command."""


def ensure_open_files(needed: int) -> None:
    """Raise the soft limit to 1024 open files, or as far as this user may.

    Raises OperatingSystemError if fewer than `needed` files may be open then.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _WANTED:
        return
    allowed = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        raise OperatingSystemError(
            f"only {allowed} files may be open at once, and {needed} are needed: raise the limit "
            "(ulimit -n, or LimitNOFILE= of a unit)"
        )
