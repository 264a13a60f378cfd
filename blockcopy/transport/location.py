"""Locations of sources and destinations: `[user@]host:path`, `ssh://[user@]host[:port]/path`, or a local path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from blockcopy.errors import UsageError

_SYNTAX = "write [user@]host:/path or a local path"


@dataclass(frozen=True)
class Location:
    """A path on a host, or on this host if `host` is None. `path` is empty if the location is a host itself."""

    host: str | None
    """The user and host as ssh expects them. An IPv6 address has no brackets."""
    path: str
    port: int | None = None
    typed: str = field(default="", compare=False)
    """The text that the user typed."""

    def __str__(self) -> str:
        return self.typed or ":".join(filter(None, (self.host, self.path)))

    @property
    def host_shown(self) -> str:
        """The user and host for messages, with an IPv6 address in brackets. Empty for this host."""
        user, at, address = (self.host or "").rpartition("@")
        return f"{user}{at}[{address}]" if ":" in address else f"{user}{at}{address}"

    def split_home(self) -> tuple[str, str]:
        """Split the path. Return a tuple: `~` or `~user`, and the rest, which is empty or begins with a slash.

        Returns an empty string and the whole path if the path does not begin with a home folder.
        """
        found = re.match(r"(~(?:[A-Za-z_][\w.-]*)?)(?=/|$)", self.path, re.ASCII) if self.host is not None else None
        return (found[1], self.path[found.end() :]) if found else ("", self.path)


def parse_location(text: str, argument: str = "SOURCE", *, needs_path: bool = True) -> Location:
    """Return the Location that `text` names. `argument`: name of the command-line argument, for messages.

    As with rsync, a colon before any slash separates host and path. An IPv6 address stands in brackets. A local
    path with a colon in its first part is written `./a:b`. Unless `needs_path`, a name alone is a host.

    Raises UsageError, which says what to write instead, if `text` is no location.
    """
    _refuse_mistakes(text, argument)
    if text.startswith("ssh://"):
        location = _parse_url(text, argument)
    else:
        host, path = _split(text, argument) if needs_path or ":" in text else (text, "")
        if host is None:
            return Location(None, path)
        location = Location(host, path, typed=text)
    host, path = location.host or "", location.path
    if not host.rpartition("@")[2] or (needs_path and not path):
        raise UsageError(f"{argument} {text!r} has no {'path' if host else 'host'}; {_SYNTAX}")
    if host.startswith("-"):
        raise UsageError(f"{argument} {text!r}: a host cannot begin with `-`")
    return location


def _split(text: str, argument: str) -> tuple[str | None, str]:
    """Return a tuple of the host and the path in `text`, as rsync splits it. A local path has the host None.

    Raises UsageError, which names `argument`, if the text is empty.
    """
    bracketed = re.fullmatch(r"((?:[^/:@]+@)?)\[([^/\]]*)\](?::(.*))?", text, re.DOTALL)
    if bracketed and (bracketed[3] is not None or ":" in bracketed[2]):
        return bracketed[1] + bracketed[2] if bracketed[2] else "", bracketed[3] or ""
    host, colon, path = text.partition(":")
    if not colon or "/" in host:
        if not text:
            raise UsageError(f"{argument} is empty; {_SYNTAX}")
        return None, text
    return host, path


def _parse_url(text: str, argument: str) -> Location:
    """Return the Location that `text` names, an `ssh://` URL as in git.

    The path is absolute, unless it begins with `/~`. A `%20` is a space. Raises UsageError, which names `argument`,
    if the URL is invalid.
    """
    from urllib.parse import unquote_to_bytes  # slow to load, and seldom needed

    found = re.fullmatch(
        r"ssh://(?P<user>[^/@]+@)?(?:\[(?P<address>[^/\]]+)\]|(?P<name>[^/:@\[\]]+))(?::(?P<port>\d{1,5}))?(?P<path>/.*)?",
        text,
        re.DOTALL,
    )
    if not found or not 0 < int(found["port"] or 22) < 65536 or ":" in (found["user"] or ""):
        raise UsageError(f"{argument} {text!r} is not ssh://[user@]host[:port]/path")
    path = os.fsdecode(unquote_to_bytes(found["path"] or ""))
    host = (found["user"] or "") + (found["address"] or found["name"])
    return Location(
        host, path[1:] if path.startswith("/~") else path, int(found["port"]) if found["port"] else None, typed=text
    )


def _refuse_mistakes(text: str, argument: str) -> None:
    """Raise UsageError if `text` is the syntax of another program, or a likely mistake.

    `argument`: name of the command-line argument, for the message.
    """
    if "\0" in text:
        raise UsageError(f"{argument} {text!r} contains a NUL, which no path can have")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme and scheme[1] == "file":
        raise UsageError(f"{argument} {text!r}: write the path itself, without file://")
    if scheme and scheme[1] != "ssh":
        raise UsageError(
            f"{argument} {text!r}: {scheme[1]} is not supported, ssh is: write [user@]host:/path or "
            "ssh://[user@]host[:port]/path"
        )
    if re.match(r"[A-Za-z]:\\", text):
        raise UsageError(f"{argument} {text!r} looks like a path of Windows; write ./{text} if it is a file here")
    double = re.match(r"[^/\[\]:]+::", text)
    if double:
        raise UsageError(
            f"{argument} {text!r}: modules of an rsync daemon are not supported, write host:/path; an IPv6 "
            "address stands in brackets, as in [fe80::1]:/path"
        )
