"""The limit on open files (RLIMIT_NOFILE, `ulimit -n`): raised as far as this user may, refused if too low."""

from __future__ import annotations

import resource

from blockcopy.errors import OperatingSystemError

_WISHED = 1024
"""The default of most systems. It is enough for everything here."""


def check_open_files(needed: int) -> None:
    """Raise the limit if it is low. Raises OperatingSystemError if fewer than `needed` files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _WISHED:
        return
    allowed = _WISHED if hard == resource.RLIM_INFINITY else min(hard, _WISHED)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        raise OperatingSystemError(
            f"only {allowed} files may be open at once, and {needed} are needed: raise the limit "
            "(ulimit -n, or LimitNOFILE= of a unit)"
        )
