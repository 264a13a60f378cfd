"""The claim on a destination: before any write, it is opened exclusively or locked, and found writable."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from blockcopy.block import user_writes
from blockcopy.block.destination import Destination
from blockcopy.block.device import check_kind, open_device
from blockcopy.block.records import invalidate_records
from blockcopy.errors import DestinationRefusedError, DeviceError
from blockcopy.paths import durable
from blockcopy.paths.places import obstacle

logger = logging.getLogger(__name__)

_IN_USE, _LOCKED = "is in use", "is locked by another program"
"""Words in the message about a device, and about a file, that another program holds."""

_REASONS = {
    errno.EROFS: "its file system is mounted read-only",
    errno.EACCES: "this user may not write to it",
    errno.EPERM: "it is immutable or append-only (lsattr shows this)",
    errno.ETXTBSY: "it is in use for swap, or is a running program",
}


def open_destination(
    path: str, *, force: bool = False, create: bool = False, with_user_writes: bool = False
) -> Destination:
    """Return the file or device at `path`, opened to read and write, as a Destination: claimed until it is closed.

    A block device is opened exclusively. The kernel refuses this if the device is mounted, used for swap, or part
    of a volume group or array. Nor can the device be mounted while it is open. A regular file gets an fcntl lock,
    which QEMU respects. `force`: go on if a claim fails. `create`: create a missing regular file, with mode 0600.
    `with_user_writes`: accept a destination that holds writes of a user, which the caller preserves.

    Raises DestinationRefusedError if the claim fails or the kernel refuses writes. Raises UserWritesError if writes
    of a user would be overwritten. Raises DeviceError if `path` cannot be opened.
    """
    is_new = not os.path.exists(path)
    if is_new:
        _check_missing(path, create=create)
    device = _open(path, os.O_RDWR | (os.O_CREAT if create else 0) | (0 if force else os.O_EXCL))
    try:
        _check_writable(device)
        if is_new and user_writes.find(device):
            invalidate_records(device)  # of an earlier file with this inode number
            user_writes.remove(device)
        elif not with_user_writes:
            user_writes.refuse(device)
        if not force:
            check_kind(device)
        if not device.is_block_device:
            if not force:
                _claim_file(device)
            # a copy whose name is not durable would be lost after a power loss
            with DeviceError.on_os_error("sync the folder of", path):
                durable.sync_folder(Path(path).resolve().parent)
    except BaseException:
        device.close()
        raise
    return device


def existing_destination(path: str, *, force: bool, with_user_writes: bool = False) -> Destination | None:
    """Return the existing file or device at `path` as an open and claimed Destination. Creates nothing.

    Called before any host is contacted. `force`, `with_user_writes`: as for `open_destination()`. Returns None if
    `path` is missing, but a file can be created there. Raises DeviceError if no file can be created, and as
    `open_destination()` does.
    """
    if os.path.exists(path):
        return open_destination(path, force=force, with_user_writes=with_user_writes)
    _check_missing(path, create=True)
    return None


def check_destination(path: str, *, force: bool, with_user_writes: bool = False) -> None:
    """Check that the destination at `path` can be claimed or created now. Keeps no claim and creates nothing.

    `force`, `with_user_writes`: as for `open_destination()`. Raises DeviceError if the destination cannot be used.
    """
    device = existing_destination(path, force=force, with_user_writes=with_user_writes)
    if device is not None:
        device.close()


def make_room(device: Destination, size: int) -> None:
    """Make the Destination `device` hold at least `size` bytes.

    Extends a shorter file, and logs a warning if a tail remains. Raises as `check_room` does.
    """
    check_room(device, size)
    own = device.size()
    if own < size:
        device.grow(size)
    if own > size:
        logger.warning(
            "%s is %d bytes longer than the source: its bytes from %d on stay as they are",
            device.path,
            own - size,
            size,
        )
    device.require_size(size)


def check_room(device: Destination, size: int) -> None:
    """Raise DestinationRefusedError if the Destination `device` cannot be made to hold `size` bytes."""
    own = device.size()
    if own < size and device.is_block_device:
        raise DestinationRefusedError(
            f"{device.path} is too small: it has {own} bytes, and the source {size}. Nothing was written"
        )


def _check_missing(path: str, *, create: bool) -> None:
    """Raise DeviceError if no file can or may be created at the missing `path`.

    `create`: whether the command would create a file. Only the words of the error depend on this.
    """
    reason = obstacle(path)
    if reason is not None:
        raise DeviceError(f"cannot {'create' if create else 'open'} {path}: {reason}")


def _check_writable(device: Destination) -> None:
    """Raise DestinationRefusedError if the kernel refuses writes to `device`."""
    try:
        device.write_nothing()
    except DeviceError as error:
        raise _refused(error, is_block_device=device.is_block_device) from error


def says_in_use(message: str) -> bool:
    """Return whether `message`, of a DestinationRefusedError, says that another program holds the destination."""
    return any(words in message for words in (_LOCKED, _IN_USE))


def _open(path: str, flags: int) -> Destination:
    try:
        return open_device(path, flags, Destination)
    except DeviceError as error:
        if flags & os.O_EXCL and error.errno == errno.EBUSY:
            raise DestinationRefusedError(
                f"{path} {_IN_USE}: mounted, swapped on, or held by LVM, RAID or another program. "
                "Release it first (lsblk shows what uses it); --force writes all the same"
            ) from error
        raise _refused(error, is_block_device=Path(path).is_block_device()) from error


def _refused(error: DeviceError, *, is_block_device: bool) -> DeviceError:
    """Return the error to raise for `error`, the failure to open a path or to write to it.

    Returns a DestinationRefusedError with the reason in words if the errno is a known refusal, else `error` itself.
    `is_block_device`: whether the path is a block device.
    """
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
                f"{path} cannot be locked: {error.strerror}. Its file system has no locks, or their server is "
                "missing (NFS without lockd); --force writes without a lock"
            ) from error
        raise DestinationRefusedError(
            f"{path} {_LOCKED}, such as a virtual machine or another blockcopy "
            "(lslocks shows which); --force writes all the same"
        ) from error
    loop = _loop_device_of(device)
    if loop:
        raise DestinationRefusedError(
            f"{path} is attached to the loop device {loop}; detach it (losetup -d {loop}) or name "
            f"{loop} as the destination; --force writes all the same"
        )


def _loop_device_of(device: Destination) -> str | None:
    """Return the path of the loop device whose backing file is `device`. Returns None if there is none."""
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            status = os.stat(entry.read_text().rstrip("\n"))
        except OSError:
            continue  # detached meanwhile, or its file was deleted, so it is not `device`
        if (status.st_dev, status.st_ino) == device.file_id:
            return f"/dev/{entry.parts[3]}"
    return None
