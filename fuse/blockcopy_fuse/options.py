"""`-o`: what may be said of a mount, as sshfs and mount(8) say it. UsageError for what cannot work.

Some of it is libfuse's and the kernel's; `uid`, `gid` and `umask` are what the files show; some that others
have is refused with a reason.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockcopy.errors import UsageError

_FUSE_CONF = "/etc/fuse.conf"

_LONGEST_LINE = 256
"""Bytes of libfuse's buffer for a line, with the end of the text."""

FLAGS = {
    *("allow_other", "allow_root", "auto_unmount", "default_permissions", "debug", "ro", "exec", "noexec"),
    *("suid", "nosuid", "dev", "nodev", "sync", "async", "dirsync", "atime", "noatime"),
}
"""Those that libfuse takes, and whose use is no harm here."""

_DEFAULTS = {"atime"}
"""Flags that change nothing. libfuse 3.17 refuses them, so they stay here."""

VALUES = {"fsname", "subtype", "uid", "gid", "umask"}
"""Those that need a value."""

REFUSED = {
    "max_read": "it makes the mount vanish at once (a fault of libfuse's bindings)",
    "max_background": "set /sys/fs/fuse/connections/*/max_background instead",
    "rw": "the replica is read-only",
    "remount": "a replica is what it was mounted as; unmount it, and mount it again",
}


@dataclass(frozen=True)
class MountOptions:
    """`fuse` is for libfuse, as it reads them; the rest is what a file and a folder of the mount show."""

    fuse: frozenset[str]
    uid: int
    gid: int
    umask: int
    fsname: str | None = None
    subtype: str = "blockcopy"

    def mode(self, all_bits: int) -> int:
        """0o444 or 0o555, less what the umask takes."""
        return all_bits & ~self.umask


def split(text: str) -> Iterator[str]:
    """a,b="c,d",e=f\\,g → a, b=c,d and e=f,g; as mount(8) and libfuse quote."""
    for found in re.finditer(r'((?:"[^"]*"|\\.|[^,"]|")+)', text):
        yield re.sub(r'"([^"]*)"|\\([,\\])', lambda each: each[1] or each[2] or "", found[1])


def quoted(name: str) -> str:
    """Return a value of an option as libfuse takes it, in ASCII: \\NNN for each byte that is not plain."""
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in b"/:@._-+=~" else f"\\{byte:03o}"
        for byte in os.fsencode(name)
    )


def users_may_share() -> bool:
    """Whether fusermount3 will find `user_allow_other`, as it reads its file (libfuse, util/fusermount.c)."""
    try:
        lines = Path(_FUSE_CONF).read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return False  # fusermount3 takes one that it cannot read for one that is empty
    # A `#` begins a comment. A line that is too long, or has no end, is passed over.
    whole = (line for line in lines if line.endswith("\n") and len(line) < _LONGEST_LINE)
    return any(line.partition("#")[0].strip() == "user_allow_other" for line in whole)


def parse(texts: list[str]) -> MountOptions:
    """Of each `-o`. Nothing is asked of libfuse, whose own words come too late."""
    flags: set[str] = set()
    values: dict[str, str] = {}
    for option in (each for text in texts for each in split(text)):
        name, equals, value = option.partition("=")
        if name in REFUSED:
            raise UsageError(f"-o {option} is not possible: {REFUSED[name]}")
        if name in VALUES and value:
            values[name] = value
        elif name in FLAGS and not equals:
            flags.add(name)
        else:
            raise UsageError(f"-o {option} is not possible: {_why_not(name)}")
    _check_sharing(flags)
    subtype = values.get("subtype", "blockcopy")
    if not re.fullmatch(r"[\w.+-]+", subtype, re.ASCII):
        raise UsageError(f"-o subtype={subtype} is not possible: it is a word, as in fuse.blockcopy")
    return MountOptions(
        frozenset(flags - _DEFAULTS),
        uid=_id("uid", values["uid"]) if "uid" in values else os.getuid(),
        gid=_id("gid", values["gid"]) if "gid" in values else os.getgid(),
        umask=_umask(values["umask"]) if "umask" in values else 0 if "allow_other" in flags else 0o077,
        fsname=values.get("fsname"),
        subtype=subtype,
    )


def _why_not(name: str) -> str:
    if name in VALUES:
        return "it needs a value"
    if name in FLAGS:
        return "it takes no value"
    if name[:1].isupper():  # as sshfs takes
        return "what ssh is told goes into -e 'ssh -o …'"
    return f"there is no such option of a mount; there are {', '.join(sorted({*FLAGS, *VALUES}))}"


def _check_sharing(flags: set[str]) -> None:
    shared = flags & {"allow_other", "allow_root"}
    if len(shared) > 1:
        raise UsageError("-o allow_other and -o allow_root exclude each other: the first is for root as well")
    if shared and os.geteuid() != 0 and not users_may_share():
        raise UsageError(
            f"-o {shared.pop()} is not possible: only root may, unless there is a line `user_allow_other` "
            f"in {_FUSE_CONF}"
        )


def _id(option: str, text: str) -> int:
    if text.isdecimal():
        number = int(text)
        if number < 2**32 - 1:
            return number
    else:
        try:
            return pwd.getpwnam(text).pw_uid if option == "uid" else grp.getgrnam(text).gr_gid
        except KeyError:
            pass
    kind = "user" if option == "uid" else "group"
    raise UsageError(f"-o {option}={text} is not possible: there is no such {kind}")


def _umask(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,3}", text):
        raise UsageError(f"-o umask={text} is not possible: it is octal, as 022 or 077")
    return int(text, 8)
