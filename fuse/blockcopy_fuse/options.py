"""The options of `-o`, as of sshfs and mount(8).

Some options are for libfuse and the kernel. `uid`, `gid` and `umask` decide what the files show.
An option of other programs that cannot work here is refused with a reason.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass

from blockcopy.cli.parser import long_options
from blockcopy.cli.suggestions import nearest_to
from blockcopy.errors import UsageError
from blockcopy_fuse import fuse_support

FLAGS = {
    *("allow_other", "allow_root", "auto_unmount", "default_permissions", "debug", "ro", "rw", "exec", "noexec"),
    *("suid", "nosuid", "dev", "nodev", "sync", "async", "dirsync", "atime", "noatime"),
}
"""Options without a value, which libfuse takes and which do no harm here."""

_OWN = {"atime", "ro", "rw"}
"""Flags that are not passed on. `atime` changes nothing, and libfuse 3.17 refuses it. The mount adds `ro`."""

VALUES = {"fsname", "subtype", "uid", "gid", "umask"}
"""Options that need a value."""

REFUSED = {
    "max_read": "it makes the mount vanish at once (a fault of libfuse's bindings)",
    "max_background": "set /sys/fs/fuse/connections/*/max_background instead",
    "remount": "options of a mounted replica cannot change; unmount it, and mount it again",
}
"""Options that cannot work, and why."""


@dataclass(frozen=True)
class MountOptions:
    """The parsed options. `fuse`: flags for libfuse. `uid`, `gid`, `umask`: owner and mode of the files.

    `writable`: None if neither `rw` nor `ro` was given.
    `fsname`: the source that `mount` and `df` show, or None for the real one. `subtype`: as in fuse.SUBTYPE.
    """

    fuse: frozenset[str]
    uid: int
    gid: int
    umask: int
    fsname: str | None = None
    subtype: str = "blockcopy"
    writable: bool | None = None

    def mode(self, all_bits: int) -> int:
        """Return `all_bits`, such as 0o444 or 0o555, without the bits of the umask."""
        return all_bits & ~self.umask


def split(text: str) -> Iterator[str]:
    r"""Yield the options in `text`, the value of an `-o`, split at its commas and without quotes.

    The quotes are those of mount(8).

    For example, a,b="c,d",e=f\,g gives a, b=c,d and e=f,g.
    """
    for found in re.finditer(r'((?:"[^"]*"|\\.|[^,"]|")+)', text):
        yield re.sub(r'"([^"]*)"|\\([,\\])', lambda each: each[1] or each[2] or "", found[1])


def quoted(name: str) -> str:
    r"""Return `name`, the value of an option, quoted for libfuse: \NNN for each byte that is not plain ASCII."""
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in b"/:@._-+=~" else f"\\{byte:03o}"
        for byte in os.fsencode(name)
    )


def parse(texts: list[str]) -> MountOptions:
    """Return the MountOptions that `texts`, the values of all `-o`, describe.

    libfuse is not asked, because its own messages come too late.
    Raises UsageError if an option is unknown, has a wrong value, or is not allowed.
    """
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
    if {"rw", "ro"} <= flags:
        raise UsageError("-o rw and -o ro exclude each other")
    _check_sharing(flags)
    subtype = values.get("subtype", "blockcopy")
    if not re.fullmatch(r"[\w.+-]+", subtype, re.ASCII):
        raise UsageError(f"-o subtype={subtype} is not possible: it must be one word, as in fuse.blockcopy")
    return MountOptions(
        frozenset(flags - _OWN),
        uid=_id("uid", values["uid"]) if "uid" in values else os.getuid(),
        gid=_id("gid", values["gid"]) if "gid" in values else os.getgid(),
        umask=_umask(values["umask"]) if "umask" in values else 0 if "allow_other" in flags else 0o077,
        fsname=values.get("fsname"),
        subtype=subtype,
        writable=None if not flags & {"rw", "ro"} else "rw" in flags,
    )


def _why_not(name: str) -> str:
    if name in VALUES:
        return "it needs a value"
    if name in FLAGS:
        return "it takes no value"
    if name[:1].isupper():  # sshfs has these
        return "options of ssh go into -e 'ssh -o …'"
    own = long_options("mount")
    option = name.replace("_", "-")
    if option in own:
        ways = ("=VALUE", "with a value") if own[option] else ("", "without a value")
        return f"write --{option}{ways[0]}, or in fstab {name}{ways[0]}, {ways[1]}"
    nearest = nearest_to(option, [*own, *FLAGS, *VALUES])
    guess = f" (did you mean {nearest[0]}?)" if nearest else ""
    return (
        f"there is no such option{guess}; -o has {', '.join(sorted({*FLAGS, *VALUES}))}; fstab also has those of "
        "`blockcopy mount`, see `blockcopy help mount.blockcopy`"
    )


def _check_sharing(flags: set[str]) -> None:
    """Raise UsageError if `flags`, names of options, let other users read the mount, and that is not possible."""
    shared = flags & {"allow_other", "allow_root"}
    if len(shared) > 1:
        raise UsageError("-o allow_other and -o allow_root exclude each other: the first is for root as well")
    if shared and os.geteuid() != 0 and not fuse_support.users_may_share():
        raise UsageError(
            f"-o {shared.pop()} is not possible: only root may, unless there is a line `user_allow_other` "
            f"in {fuse_support.FUSE_CONF}"
        )


def _id(option: str, text: str) -> int:
    """Return the id of the user or group that `text` gives by name or number. `option`: "uid" or "gid".

    Raises UsageError if there is none.
    """
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
        raise UsageError(f"-o umask={text} is not possible: it must be octal, such as 022 or 077")
    return int(text, 8)
