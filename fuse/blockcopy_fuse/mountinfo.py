"""The mounts of this mount namespace, read from /proc/self/mountinfo.

No mount itself is touched: its program may be dead, unresponsive, or this very process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from blockcopy.paths.places import mountinfo

NO_FUSE = -1
"""Owner of a mount that is no FUSE mount."""


class Mount(NamedTuple):
    """A mounted file system.

    `device`: MAJOR:MINOR. `kind`: the type, as in fuse.blockcopy. `owner`: id of the user who mounted a FUSE mount.
    """

    mountpoint: str
    device: str
    kind: str
    source: str
    owner: int

    @property
    def connection(self) -> str:
        """The name of its folder in /sys/fs/fuse/connections: the minor device number, as text."""
        return self.device.partition(":")[2]


def mount_at(mountpoint: str) -> Mount | None:
    """Return the Mount that was made last on `mountpoint`, an absolute path without symbolic links.

    Returns None if nothing is mounted there.
    """
    return {mount.mountpoint: mount for mount in mounts()}.get(mountpoint)


def mounts() -> Iterator[Mount]:
    """Yield all mounts as Mount, in the order in which they were made."""
    for line in mountinfo():
        fields = line.split(b" ")
        kind, source, options = fields[fields.index(b"-") + 1 :]
        owners = [each[8:] for each in options.split(b",") if each.startswith(b"user_id=")]
        yield Mount(
            mountpoint=_text(fields[4]),
            device=fields[2].decode(),
            kind=_text(kind),
            source=_text(source),
            owner=int(owners[0]) if owners else NO_FUSE,
        )


def _text(field: bytes) -> str:
    r"""Return the bytes `field` of mountinfo as text. There \040 stands for a blank (proc(5))."""
    return os.fsdecode(field.decode("unicode_escape").encode("latin-1"))
