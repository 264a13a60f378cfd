"""Names of sources and destinations: `[user@]host:path`, `ssh://[user@]host[:port]/path`, or a local path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from blockcopy.errors import UsageError

_FORMS = "it is [user@]host:/path or a local path"


@dataclass(frozen=True)
class Location:
    """A path on a `host`, or a local one if that is None. `path` is empty for a host itself."""

    host: str | None
    """Return the host as ssh takes it, with its user: an IPv6 address has no brackets."""
    path: str
    port: int | None = None
    typed: str = field(default="", compare=False)
    """The text that was parsed."""

    def __str__(self) -> str:
        return self.typed or ":".join(filter(None, (self.host, self.path)))

    @property
    def host_shown(self) -> str:
        """The host for messages: an IPv6 address in brackets."""
        user, at, address = (self.host or "").rpartition("@")
        return f"{user}{at}[{address}]" if ":" in address else f"{user}{at}{address}"

    def under_home(self) -> tuple[str, str]:
        """Return `~` or `~user`, and the rest of the path, which begins with a slash if there is any.

        Returns an empty string and the whole path if that does not begin so.
        """
        found = re.match(r"(~(?:[A-Za-z_][\w.-]*)?)(?=/|$)", self.path, re.ASCII) if self.host is not None else None
        return (found[1], self.path[found.end() :]) if found else ("", self.path)


def parse_location(text: str, what: str = "SOURCE", *, needs_path: bool = True) -> Location:
    """Return the location that `text` names. `what`: the argument, for messages.

    As rsync reads it, a colon before any slash parts host and path, and an IPv6 address stands in brackets. A local
    path with a colon in its first part is written `./a:b`. Without `needs_path`, a name alone is that of a host.
    Raises UsageError for anything else, and says what to write instead.
    """
    _refuse_others(text, what)
    if text.startswith("ssh://"):
        location = _parse_url(text, what)
    else:
        host, path = _split(text, what) if needs_path or ":" in text else (text, "")
        if host is None:
            return Location(None, path)
        location = Location(host, path, typed=text)
    host, path = location.host or "", location.path
    if not host.rpartition("@")[2] or (needs_path and not path):
        raise UsageError(f"{what} {text!r} has no {'path' if host else 'host'}; {_FORMS}")
    if host.startswith("-"):
        raise UsageError(f"{what} {text!r}: a host does not begin with `-`")
    return location


def _split(text: str, what: str) -> tuple[str | None, str]:
    """Return host and path as rsync reads them; None and a local path if there is no host."""
    bracketed = re.fullmatch(r"((?:[^/:@]+@)?)\[([^/\]]*)\](?::(.*))?", text, re.DOTALL)
    if bracketed and (bracketed[3] is not None or ":" in bracketed[2]):
        return bracketed[1] + bracketed[2] if bracketed[2] else "", bracketed[3] or ""
    host, colon, path = text.partition(":")
    if not colon or "/" in host:
        if not text:
            raise UsageError(f"{what} is empty; {_FORMS}")
        return None, text
    return host, path


def _parse_url(text: str, what: str) -> Location:
    """Parse `ssh://` as git does: the path is absolute, unless it begins with `/~`; a `%20` is a space."""
    from urllib.parse import unquote_to_bytes  # slow to load, and seldom needed

    found = re.fullmatch(
        r"ssh://(?P<user>[^/@]+@)?(?:\[(?P<address>[^/\]]+)\]|(?P<name>[^/:@\[\]]+))(?::(?P<port>\d{1,5}))?(?P<path>/.*)?",
        text,
        re.DOTALL,
    )
    if not found or not 0 < int(found["port"] or 22) < 65536 or ":" in (found["user"] or ""):
        raise UsageError(f"{what} {text!r} is not ssh://[user@]host[:port]/path")
    path = os.fsdecode(unquote_to_bytes(found["path"] or ""))
    host = (found["user"] or "") + (found["address"] or found["name"])
    return Location(
        host, path[1:] if path.startswith("/~") else path, int(found["port"]) if found["port"] else None, typed=text
    )


def _refuse_others(text: str, what: str) -> None:
    """Refuse what other programs name so, and what is most often a slip."""
    if "\0" in text:
        raise UsageError(f"{what} {text!r} has a NUL in it, which no path can have")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme and scheme[1] == "file":
        raise UsageError(f"{what} {text!r}: write the path itself, without file://")
    if scheme and scheme[1] != "ssh":
        raise UsageError(
            f"{what} {text!r}: {scheme[1]} is not spoken here, ssh is: write [user@]host:/path or "
            "ssh://[user@]host[:port]/path"
        )
    if re.match(r"[A-Za-z]:\\", text):
        raise UsageError(f"{what} {text!r} looks like a path of Windows; write ./{text} if it is a file here")
    double = re.match(r"[^/\[\]:]+::", text)
    if double:
        raise UsageError(
            f"{what} {text!r}: modules of an rsync daemon are not spoken here, write host:/path; and an IPv6 "
            "address stands in brackets, as in [fe80::1]:/path"
        )
