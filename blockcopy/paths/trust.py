"""Folders in which nobody else decides what a name leads to.

Who may write to a folder can put a file of his own at each of its names. The sticky bit keeps him from taking away
what is there, and not from adding what is missing.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def distrust_reason(folder: Path) -> str | None:
    """Say why others than us and root decide what is at a path in `folder`, which has no links in it.

    Returns None if nobody else does. Raises OSError if there is no such folder.
    """
    for each in (folder, *folder.parents):
        status = each.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{each} belongs to another user"
        sticky = each != folder and status.st_mode & stat.S_ISVTX  # what is in it, is ours or root's
        if _others_may_write(each, status) and not sticky:
            return f"others may write to {each}"
    return None


def _others_may_write(folder: Path, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and (_has_acl(folder) or not _is_own_group(status.st_gid))


def _has_acl(folder: Path) -> bool:
    """Whether the bits of the group stand for more users than its own."""
    try:
        os.getxattr(folder, "system.posix_acl_access")
    except OSError:
        return False  # none, or not on this file system
    return True


def _is_own_group(gid: int) -> bool:
    """Whether it is a group of ours alone, as Debian and Fedora make one for each user."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
