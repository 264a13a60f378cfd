"""Trust in folders: only we and root may decide what a path leads to.

A user who may write to a folder can create any missing name in it. The sticky bit only keeps that user from
removing or renaming files of others.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def distrust_reason(folder: Path) -> str | None:
    """Return in words why another user may decide what a path in `folder` leads to. Returns None if none may.

    `folder`: an absolute Path without symbolic links. Raises OSError if the folder does not exist.
    """
    for each in (folder, *folder.parents):
        status = each.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{each} belongs to another user"
        # In a sticky folder nobody else may rename the next folder below, which is ours or root's.
        sticky = each != folder and status.st_mode & stat.S_ISVTX
        if _others_may_write(each, status) and not sticky:
            return f"others may write to {each}"
    return None


def _others_may_write(folder: Path, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and (_has_acl(folder) or not _is_own_group(status.st_gid))


def _has_acl(folder: Path) -> bool:
    """Return True if an access control list of `folder` lets more users in than its group."""
    try:
        os.getxattr(folder, "system.posix_acl_access")
    except OSError:
        return False  # no list, or a file system without lists
    return True


def _is_own_group(gid: int) -> bool:
    """Return True if group number `gid` has no member but us. Debian and Fedora have such user private groups."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
