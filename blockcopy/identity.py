"""What tells one source or destination from another, as far as it shows without reading all of it.

A source's identity travels in the greeting (see `wire`) and, with a destination's, into the state
file. It is an object of JSON: numbers, strings, and lists of strings. Where it is equal, the source is
taken for the same, unchanged; so a source that is a block device should be a snapshot, because a
device does not tell when it was written.

    size      bytes
    sample    SHA-256 of 32 pieces of 4 KiB, at fixed positions (fewer where the source is smaller)
    inode, mtime_ns     of a file
    id        of a block device: what the kernel knows it by, where it knows anything
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blockcopy.device import Device
from blockcopy.errors import DeviceError
from blockcopy.geometry import Extent

Identity = dict[str, Any]

_MOST_NAMES = 16
"""Facts of an identity; others than those above may come with newer programs."""

_MOST_DIGITS, _MOST_TEXT = 64, 4096
"""Characters of a sample's digest, and of another fact."""

_PIECES, _PIECE_SIZE = 32, 4096

_BTRFS_SUPERBLOCK = 64 * 1024
"""Other file systems, and partition tables, begin in the first piece; btrfs writes only here."""

_NAMES_IN_SYSFS = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial")
"""Below /sys/dev/block/MAJOR:MINOR: what stays the same over a restart, the most specific first."""


def of_source(device: Device) -> Identity:
    """Of an opened source. DeviceError where it has no size."""
    size = device.size()
    sample = sample_of(_read_or_none(device, extent) for extent in sample_extents(size))
    identity: Identity = {"size": size, "sample": sample}
    if device.is_block_device:
        name = _kernel_name(device.status().st_rdev)
        if name is not None:
            identity["id"] = name
    else:
        status = device.status()
        identity.update(inode=status.st_ino, mtime_ns=status.st_mtime_ns)
    return identity


def of_destination(device: Device) -> Identity:
    """Of an opened destination, its size apart. DeviceError where it cannot be told."""
    status = device.status()
    if device.is_block_device:
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return {"device": _kernel_name(status.st_rdev) or number}
    # Not st_dev: it may be another after a restart.
    return {"file": status.st_ino, "file_system": device.file_system()}


def sample_extents(size: int) -> list[Extent]:
    """The pieces of a source of `size` bytes that stand for it, ascending; the first and last are in it."""
    if size <= _PIECES * _PIECE_SIZE:
        offsets = set(range(0, size, _PIECE_SIZE))
    else:
        spread = (index * (size - _PIECE_SIZE) // (_PIECES - 2) for index in range(_PIECES - 2))
        aligned = {offset // _PIECE_SIZE * _PIECE_SIZE for offset in spread}
        offsets = aligned | {_BTRFS_SUPERBLOCK, size - _PIECE_SIZE}
    return [Extent(offset, min(_PIECE_SIZE, size - offset)) for offset in sorted(offsets)]


def sample_of(pieces: Iterable[bytes | None]) -> list[str]:
    """The digests of the pieces; of one that cannot be read, words that say so."""
    return [hashlib.sha256(piece).hexdigest() if piece is not None else "unreadable" for piece in pieces]


def unchanged_sample(device: Device, identity: Identity, extents: Iterable[Extent]) -> bool:
    """Whether those of the sample's `extents` read from `device` as they did from the source."""
    sample = dict(zip(sample_extents(identity["size"]), identity["sample"]))
    return all(sample_of([_read_or_none(device, extent)]) == [sample[extent]] for extent in extents)


def is_identity(value: object) -> bool:
    """Whether what a peer or a state file says has the form of a source's identity."""
    if not isinstance(value, dict) or len(value) > _MOST_NAMES:
        return False
    size, sample = value.get("size"), value.get("sample")
    return (
        type(size) is int
        and 0 <= size < 1 << 63
        and isinstance(sample, list)
        and all(isinstance(piece, str) and len(piece) <= _MOST_DIGITS for piece in sample)
        and len(sample) == len(sample_extents(size))
        and all(_is_plain(each) for name, each in value.items() if name != "sample")
    )


def _is_plain(value: object) -> bool:
    return type(value) is int or (isinstance(value, str) and len(value) <= _MOST_TEXT)


def tells_of_writes(identity: Identity) -> bool:
    """Whether the same identity again means the same bytes: a file's time shows that it was written."""
    return "mtime_ns" in identity


def differences(known: Identity, found: Identity) -> list[str]:
    """In words, where two identities differ; empty for the same source.

    What is known by way of the original program, size and sample, is compared with just these of
    the other. Not so the other way round: what is known of a file's time has to be found again.
    """
    names = known.keys() if len(known) == len(("size", "sample")) else known.keys() | found.keys()
    return [
        _difference(name, known.get(name), found.get(name))
        for name in sorted(names)
        if known.get(name) != found.get(name)
    ]


def _difference(name: str, known: object, found: object) -> str:
    if name == "sample":
        return "its bytes differ"
    if found is None:
        return f"{name} is not told any more"
    return f"{name} was {known}, is {found}"


def _read_or_none(device: Device, extent: Extent) -> bytes | None:
    try:
        return device.read(*extent)
    except DeviceError:
        return None  # a bad sector, or a source that shrinks: whoever asks for it is told


def _kernel_name(number: int) -> str | None:
    """What the block device is, whatever its number is today: a name of the kernel's, or its file."""
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    partition = _text(entry / "partition")
    disk = entry if partition is None else entry.parent
    name = next(filter(None, (_text(disk / each) for each in _NAMES_IN_SYSFS)), None)
    if name is None:
        name = _backing_file(disk)
    if name is None or partition is None:
        return name
    return f"{name} partition {partition}"


def _backing_file(disk: Path) -> str | None:
    path = _text(disk / "loop/backing_file")
    if path is None:
        return None
    offset = _text(disk / "loop/offset")
    try:
        inode = str(os.stat(path).st_ino)
    except OSError:
        inode = "deleted"
    return f"loop {path} inode {inode} offset {offset}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None  # this kind of device has no such file
