"""The meaning of a user's path, and the places where a file must not be created.

A device file system holds the nodes of devices, and a file created in it by mistake fills memory.
"""

from __future__ import annotations

import os
import stat

_DEV = "/dev"

_DEVICE_TYPES = ("devtmpfs", "devpts", "mqueue", "hugetlbfs")
_KERNEL_TYPES = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "efivarfs")
"""Types of file systems that may accept a new file, and hold no data of users."""


def absolute(path: str) -> str:
    """Return `path` as an absolute path that means the same to the kernel.

    A trailing slash stays, because it says that the path leads to a folder. Any `..` stays, because it may follow
    a symbolic link. Raises FileNotFoundError if `path` is relative and the current folder was removed.
    """
    if not path.startswith("/"):
        path = os.path.join(os.getcwd(), path)
    if ".." in path.split("/"):
        return path
    tail = "/" if names_folder(path) else ""
    return os.path.normpath(path).rstrip("/") + tail or "/"


def names_folder(path: str) -> bool:
    """Return True if `path` can only name a folder: it is empty or ends in a slash, `.` or `..`."""
    return os.path.basename(path) in ("", ".", "..")


def obstacle(path: str) -> str | None:
    """Return in words why a file cannot or must not be created at `path`. Returns None if a file can be created."""
    if names_folder(path):
        return "this is the name of a folder; name the file in it"
    folder = os.path.dirname(os.path.realpath(path))  # follows a link to a missing file, too
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
        return f"{folder} is not a folder"
    if _file_system_type(os.stat(folder).st_dev) in _KERNEL_TYPES:
        return f"{folder} belongs to the kernel, and holds no files of users"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"the file system of {folder} is mounted read-only"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"this user may not create files in {folder}, or it is immutable (ls -ld, lsattr -d)"
    return None


def holds_devices(folder: str) -> bool:
    """Return True if `folder` is on a file system of device nodes, so that its regular files lie in memory.

    `folder`: a path without symbolic links. If `folder` is missing, the nearest existing folder above it decides.
    A separate tmpfs below /dev, such as /dev/shm, may hold files: returns False.
    """
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        device, devices, root = (os.stat(path).st_dev for path in (folder, _DEV, "/"))
    except OSError:
        return False  # removed, or there is no /dev: opening a file in `folder` reports the reason
    is_below = folder == _DEV or folder.startswith(f"{_DEV}/")
    if device == devices and (is_below or devices != root):
        return True
    return _file_system_type(device) in _DEVICE_TYPES


def _file_system_type(device: int) -> str:
    """Return the type of the mounted file system with device number `device`. Returns "" if none is mounted."""
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
    """Return the lines of /proc/self/mountinfo as bytes, without their newlines.

    Raises OSError if there is no /proc. Only a newline ends a line: the name of a source or folder may contain a
    carriage return.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        return [line for line in file.read().split(b"\n") if line]


def working_folder() -> str:
    """Return the path of the current folder. Returns "/" if that folder was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"  # a relative path has no meaning in a removed folder
