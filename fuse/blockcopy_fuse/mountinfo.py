"""What is mounted, as the kernel tells it: without a look at the mount itself, which may be dead or our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from blockcopy.paths.places import mountinfo


class Entry(NamedTuple):
    """A mount that is there. `device` is MAJOR:MINOR, `kind` as in fuse.blockcopy."""

    device: str
    kind: str
    source: str
    options: frozenset[str]

    @property
    def owner(self) -> int | None:
        """The id of the user who mounted; None where it is no FUSE."""
        found = [each.partition("=")[2] for each in self.options if each.startswith("user_id=")]
        return int(found[0]) if found else None


def at(mountpoint: str) -> Entry | None:
    """What is mounted last on this very path, which is absolute and has no symbolic links."""
    return dict(everywhere()).get(mountpoint)


def everywhere() -> Iterator[tuple[str, Entry]]:
    """All that is mounted, with its mountpoint, in the order in which it was."""
    for line in mountinfo():
        fields = line.split(b" ")
        kind, source, options = fields[fields.index(b"-") + 1 :]
        yield (
            os.fsdecode(_unescaped(fields[4])),
            Entry(
                fields[2].decode(),
                os.fsdecode(_unescaped(kind)),
                os.fsdecode(_unescaped(source)),
                frozenset(os.fsdecode(options).split(",")),
            ),
        )


def _unescaped(field: bytes) -> bytes:
    """proc(5): \\040 for a blank."""
    return field.decode("unicode_escape").encode("latin-1")
