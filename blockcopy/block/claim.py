"""The claim on a destination: open exclusively or locked, writable, with room, before any write."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from blockcopy.block.destination import Destination
from blockcopy.block.device import check_kind, open_device
from blockcopy.errors import DestinationRefusedError, DeviceError
from blockcopy.paths import durable
from blockcopy.paths.places import obstacle

logger = logging.getLogger(__name__)

_REASONS = {
    errno.EROFS: "its file system is mounted read-only",
    errno.EACCES: "this user may not write to it",
    errno.EPERM: "it is immutable or append-only (lsattr shows this)",
    errno.ETXTBSY: "it is in use for swap, or is a program that runs",
}


def open_destination(path: str, *, force: bool = False, create: bool = False) -> Destination:
    """`path` for reading and writing, claimed for as long as it is open.

    A block device is opened exclusively, so the kernel refuses one that is mounted, swapped on, or
    part of a volume group or array, and refuses to mount it meanwhile. A regular file is locked
    (fcntl, the kind QEMU heeds). With `force` neither claim has to succeed. `create` makes a
    missing regular file, readable and writable by its owner.

    DestinationRefusedError where the claim fails, DeviceError where it cannot be opened.
    """
    if not os.path.exists(path):
        _check_missing(path, create=create)
    device = _open(path, os.O_RDWR | (os.O_CREAT if create else 0) | (0 if force else os.O_EXCL))
    try:
        _check_writable(device)
        if not force:
            check_kind(device)
        if not device.is_block_device:
            if not force:
                _claim_file(device)
            _keep_name(device)
    except BaseException:
        device.close()
        raise
    return device


def existing_destination(path: str, *, force: bool) -> Destination | None:
    """Do as `open_destination`, before anything is asked of anybody. Returns None if the file must be created.

    DeviceError where it could not be.
    """
    if os.path.exists(path):
        return open_destination(path, force=force)
    _check_missing(path, create=True)
    return None


def check_destination(path: str, *, force: bool) -> None:
    """Raise DeviceError if `path` cannot be claimed or created now, and keep no claim on it."""
    device = existing_destination(path, force=force)
    if device is not None:
        device.close()


def make_room(device: Destination, size: int) -> None:
    """Make the destination hold at least `size` bytes. A longer one keeps its tail.

    Raises DestinationRefusedError if a device is too small.
    """
    own = device.size()
    if own < size and device.is_block_device:
        raise DestinationRefusedError(
            f"{device.path} is too small: it has {own} bytes, and the source {size}. Nothing was written"
        )
    if own < size:
        device.grow(size)
    if own > size:
        logger.warning(
            "%s is %d bytes longer than the source: what it has from %d on stays as it is",
            device.path,
            own - size,
            size,
        )
    device.require_size(size)


def _check_missing(path: str, *, create: bool) -> None:
    """Raise DeviceError if a missing destination cannot be created, or may not be."""
    reason = obstacle(path)
    if reason is not None:
        raise DeviceError(f"cannot {'create' if create else 'open'} {path}: {reason}")


def _check_writable(device: Destination) -> None:
    """Raise DestinationRefusedError if the kernel refuses every write, even one of nothing."""
    try:
        device.write_nothing()
    except DeviceError as error:
        raise _refused(device.path, error, is_block_device=device.is_block_device) from error


def _open(path: str, flags: int) -> Destination:
    try:
        return open_device(path, flags, Destination)
    except DeviceError as error:
        if flags & os.O_EXCL and error.errno == errno.EBUSY:
            raise DestinationRefusedError(
                f"{path} is in use: mounted, swapped on, or held by LVM, RAID or another program. "
                "Release it first (lsblk shows by what); --force writes all the same"
            ) from error
        raise _refused(path, error, is_block_device=Path(path).is_block_device()) from error


def _keep_name(device: Destination) -> None:
    """Make the name of the file durable: a complete copy without a name would be lost with the power."""
    try:
        durable.sync_folder(Path(device.path).resolve().parent)
    except OSError as error:
        raise DeviceError.from_os_error("sync the folder of", device.path, error) from error


def _refused(path: str, error: DeviceError, *, is_block_device: bool) -> DeviceError:
    """Return the error with the reason in words, where the number of `error` tells one."""
    reason = _REASONS.get(error.errno or 0)
    if reason is None:
        return error
    if is_block_device and error.errno in (errno.EPERM, errno.EACCES):
        reason = "the device is read-only (blockdev --getro shows this), or this user may not write to it"
    return DestinationRefusedError(f"{error}: {reason}. Nothing was written")


def _claim_file(device: Destination) -> None:
    path = device.path
    try:
        device.lock()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise DestinationRefusedError(
                f"{path} cannot be locked: {error.strerror}. Its file system has no locks, or their server is not "
                "reached (NFS without lockd); --force writes without a lock"
            ) from error
        raise DestinationRefusedError(
            f"{path} is locked: another program, a virtual machine or another blockcopy, uses it "
            "(lslocks shows which); --force writes all the same"
        ) from error
    loop = _loop_device_of(device)
    if loop:
        raise DestinationRefusedError(
            f"{path} is attached to the loop device {loop}; detach it (losetup -d {loop}) or name "
            f"{loop} as the destination; --force writes all the same"
        )


def _loop_device_of(device: Destination) -> str | None:
    """The loop device that has the file as its backing file, if one has."""
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            status = os.stat(entry.read_text().rstrip("\n"))
        except OSError:
            continue  # detached meanwhile, or its file was deleted: not ours then
        if (status.st_dev, status.st_ino) == device.file_id:
            return f"/dev/{entry.parts[3]}"
    return None
