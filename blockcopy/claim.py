"""The claim on a destination: opened exclusively or locked, with room for the source, before any write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from blockcopy import durable
from blockcopy.device import Device, open_device
from blockcopy.errors import DestinationRefusedError, DeviceError


def open_destination(path: str, *, force: bool = False, create: bool = False) -> Device:
    """`path` for reading and writing, claimed for as long as it is open.

    A block device is opened exclusively, so the kernel refuses one that is mounted, swapped on, or
    part of a volume group or array, and refuses to mount it meanwhile. A regular file is locked
    (fcntl, the kind QEMU heeds). With `force` neither claim has to succeed. `create` makes a
    missing regular file, readable and writable by its owner.

    DestinationRefusedError where the claim fails, DeviceError where it cannot be opened.
    """
    device = _open(path, os.O_RDWR | (os.O_CREAT if create else 0) | (0 if force else os.O_EXCL))
    try:
        if not device.is_block_device:
            if not force:
                _claim_file(device)
            _keep_name(device)
    except BaseException:
        device.close()
        raise
    return device


def existing_destination(path: str, *, force: bool) -> Device | None:
    """As `open_destination`, before anything is asked of anybody; None where it has to be created first.

    DeviceError where it could not be.
    """
    folder = os.path.dirname(path) or "."
    if os.path.exists(path):
        return open_destination(path, force=force)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DeviceError(f"cannot create {path}: there is no folder {folder} to write into")
    return None


def make_room(device: Device, size: int) -> None:
    """The destination holds at least `size` bytes; a longer one keeps its tail. DestinationRefusedError."""
    own = device.size()
    if own >= size:
        return
    if device.is_block_device:
        raise DestinationRefusedError(
            f"{device.path} is too small: it has {own} bytes, and the source {size}. Nothing was written"
        )
    device.grow(size)


def _open(path: str, flags: int) -> Device:
    try:
        return open_device(path, flags)
    except DeviceError as error:
        if flags & os.O_EXCL and error.errno == errno.EBUSY:
            raise DestinationRefusedError(
                f"{path} is in use: mounted, swapped on, or held by LVM, RAID or another program. "
                "Release it first (lsblk shows by what); --force writes all the same"
            ) from error
        raise


def _keep_name(device: Device) -> None:
    """Make the name of the file durable: a complete copy without a name would be lost with the power."""
    try:
        durable.sync_folder(Path(device.path).resolve().parent)
    except OSError as error:
        raise DeviceError.of("sync the folder of", device.path, error) from error


def _claim_file(device: Device) -> None:
    path = device.path
    try:
        device.lock()
    except OSError as error:
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


def _loop_device_of(device: Device) -> str | None:
    """The loop device that has the file as its backing file, if one has."""
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            status = os.stat(entry.read_text().rstrip("\n"))
        except OSError:
            continue  # detached meanwhile, or its file was deleted: not ours then
        if (status.st_dev, status.st_ino) == device.identity:
            return f"/dev/{entry.parts[3]}"
    return None
