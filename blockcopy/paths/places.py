"""Paths as their users mean them, and the places where no file can or may be created."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_DEVICES = "/dev"

_OF_DEVICES = ("devtmpfs", "devpts", "mqueue", "hugetlbfs")
_OF_THE_KERNEL = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "efivarfs")
"""Types of file systems that accept a new file, or seem to, and hold no data of users."""


def absolute(path: str) -> str:
    """Return `path` from the root on, meaning the same to the kernel.

    A trailing slash stays: it says that the path leads to a folder. Any `..` stays: it may follow a link.
    Raises FileNotFoundError if the path is relative and the current folder was removed.
    """
    if not path.startswith("/"):
        path = os.path.join(os.getcwd(), path)
    if ".." in path.split("/"):
        return path
    tail = "/" if names_folder(path) else ""
    return os.path.normpath(path).rstrip("/") + tail or "/"


def names_folder(path: str) -> bool:
    """Return whether `path` can only be that of a folder, whatever is there."""
    return os.path.basename(path) in ("", ".", "..")


def obstacle(path: str) -> str | None:
    """Return the reason why no file can or may be created at `path`, in words. Returns None if one can."""
    if names_folder(path):
        return "this is the name of a folder; name the file in it"
    folder = os.path.dirname(os.path.realpath(path))  # a link that leads nowhere yet is followed
    if holds_devices(folder):
        return (
            "there is no such device, and no file is created among devices. Is the name right (lsblk)? "
            "Is the device active (lvchange -ay VG/LV, cryptsetup open, udevadm settle)?"
        )
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"there is no folder {folder} to write into" if missing else f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(mode):
        return f"{folder} is no folder"
    if _file_system_type(os.stat(folder).st_dev) in _OF_THE_KERNEL:
        return f"{folder} is the kernel's, and holds no files of users"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"the file system of {folder} is mounted read-only"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"this user may not create files in {folder}, or it is immutable (ls -ld, lsattr -d)"
    return None


def holds_devices(folder: str) -> bool:
    """Return whether a file in `folder`, a path without links, lies in memory among the nodes of devices.

    A tmpfs of its own below /dev, such as /dev/shm, is a place for files. If `folder` is missing, the nearest
    folder above it decides.
    """
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        device, devices, root = (os.stat(path).st_dev for path in (folder, _DEVICES, "/"))
    except OSError:
        return False  # gone, or without /dev: whoever opens a file there is told why
    is_below = folder == _DEVICES or folder.startswith(f"{_DEVICES}/")
    if device == devices and (is_below or devices != root):
        return True
    return _file_system_type(device) in _OF_DEVICES


def _file_system_type(device: int) -> str:
    """Return the type of a mounted file system with the number `device`, or "" if mountinfo shows none."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mountinfo()
    except OSError:
        return ""
    for line in map(os.fsdecode, lines):
        mount, _, source = line.partition(" - ")
        if mount.split(" ", 3)[2] == number:
            return source.split(" ", 1)[0]
    return ""


def mountinfo() -> list[bytes]:
    """Return the lines in which the kernel tells what is mounted. Raises OSError.

    A newline alone ends a line: a source or a folder may have a carriage return in its name.
    """
    return [line for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n") if line]


def working_folder() -> str:
    """Return the current folder. Returns "/" if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"  # it was removed: a relative path means nothing there
