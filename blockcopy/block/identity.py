"""Identities, which tell one source or destination from another without reading all of it.

The greeting of a source (see `handshake`) has its identity, and so has the state file, with the destination's.
An identity is a JSON object of numbers, strings, and lists of strings. If two identities are equal, the source
counts as unchanged. A block device does not show when it was written, so as a source it should be a snapshot.

    size        bytes
    sample      SHA-256 digests of 32 pieces of 4 KiB at fixed offsets; fewer pieces of a smaller source
    inode, mtime_ns, ctime_ns
                of a file. No program can set the ctime back, as some do with the mtime. The ctime is missing
                if the file system keeps none of its own, or if the source runs an older version
    id          of a block device: its most specific name in the kernel, if it has any
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from typing import Any, Callable, NamedTuple

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent
from blockcopy.errors import DeviceError

logger = logging.getLogger(__name__)

Identity = dict[str, Any]

_UNREADABLE = "unreadable"
"""The entry of a sample for a piece that cannot be read."""

_MAX_FIELDS = 16
"""Number of fields of an identity. Newer versions may have fields that are not listed above."""

_MAX_DIGEST_LENGTH, _MAX_TEXT_LENGTH = 64, 4096
"""Characters of a digest in a sample, and of any other text field."""


class Times(NamedTuple):
    """The times of a file, in nanoseconds since the epoch."""

    mtime_ns: int
    ctime_ns: int


NO_TIMES = Times(0, 0)
"""The times of a block device: the kernel does not report when it was written."""

_PIECES, _PIECE_SIZE = 32, 4096

_BTRFS_SUPERBLOCK = 64 * 1024
"""Offset of the superblock of btrfs. Other file systems, and partition tables, write into the first piece."""

_NAMES_IN_SYSFS = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial")
"""Files below /sys/dev/block/MAJOR:MINOR with names that survive a restart, the most specific first."""

_TICK_NS = 20_000_000
"""Nanoseconds after which the kernel's clock for file times has advanced: two of its longest ticks."""

_WHOLE_SECONDS_NS = 2_000_000_000
"""Nanoseconds after which times in whole seconds have advanced. FAT has only even seconds."""

_WRITE_BACK_SECONDS = 5
"""Seconds that a source waits for its disk before it greets. The asker waits for `--timeout` seconds."""


def source_identity(device: Device) -> Identity:
    """Return the Identity of the source `device`. Reads its sample, and waits for the write-back of a file.

    Blocks for some seconds: call in a thread. A piece that cannot be read is marked in the sample.
    Raises DeviceError if the size or the times cannot be found.
    """
    found: Identity = {}
    if device.is_block_device:
        name = _kernel_name(device.status().st_rdev)
        if name is not None:
            found["id"] = name
    else:
        found.update(inode=device.status().st_ino, **_source_times(device)._asdict())
        if not device.has_exact_times():
            del found["ctime_ns"]
    size = device.size()
    return {
        "size": size,
        "sample": sample_of(_read_or_none(device, each) for each in sample_extents(size)),
        **found,
    }


def settled_times(device: Device, write_back: Callable[[], object]) -> Times:
    """Return the times of the file `device`, after making sure that every later write changes them.

    `write_back`: called twice without arguments, writes all dirty pages of the file to its disk. A write through a
    mapping changes the times only if its page is clean. So any such write after the first call changes them. Any
    such write before the second call precedes all later reads. Then this waits until the file system's clock
    advances.

    Blocks: call in a thread. Raises DeviceError, and whatever `write_back` raises.
    """
    write_back()
    times = times_of(device)
    write_back()
    tick = _TICK_NS if times.ctime_ns % 1_000_000_000 else _WHOLE_SECONDS_NS
    left = times.ctime_ns + tick - time.time_ns()
    if left > 0:
        time.sleep(min(left, tick) / 1e9)  # more than a tick is left if a clock was set
    return times


def times_of(device: Device) -> Times:
    """Return the current times of the file `device`. Returns NO_TIMES for a block device."""
    if device.is_block_device:
        return NO_TIMES
    status = device.status()
    return Times(status.st_mtime_ns, status.st_ctime_ns)


def _source_times(device: Device) -> Times:
    deadline = time.monotonic() + _WRITE_BACK_SECONDS
    complete = True

    def write_back() -> None:
        nonlocal complete
        complete = complete and device.write_back_until(deadline)

    times = settled_times(device, write_back)
    if not complete:
        logger.warning(
            "%s was just written, and is not on its disk yet: writes of a program that has it mapped into memory "
            "may go unnoticed",
            device.path,
        )
    return times


def destination_identity(device: Device) -> Identity:
    """Return the Identity of the destination `device`, without its size. Raises DeviceError if there is none."""
    status = device.status()
    if device.is_block_device:
        return {"device": _kernel_name(status.st_rdev) or _number(status.st_rdev)}
    # Not st_dev: a restart may change it.
    return {"file": status.st_ino, "file_system": device.file_system()}


def number_of_nameless(device: Device) -> str | None:
    """Return the number of the block device `device`, MAJOR:MINOR, if the kernel has no lasting name for it.

    Returns None if it has one, or if `device` is a file. Only this number tells a nameless device from another.
    """
    status = device.status()
    if not device.is_block_device or _kernel_name(status.st_rdev) is not None:
        return None
    return _number(status.st_rdev)


def sample_extents(size: int) -> list[Extent]:
    """Return the list of Extents that are the sample of a source of `size` bytes, ascending."""
    if size <= _PIECES * _PIECE_SIZE:
        offsets = set(range(0, size, _PIECE_SIZE))
    else:
        spread = (index * (size - _PIECE_SIZE) // (_PIECES - 2) for index in range(_PIECES - 2))
        aligned = {offset // _PIECE_SIZE * _PIECE_SIZE for offset in spread}
        offsets = aligned | {_BTRFS_SUPERBLOCK, size - _PIECE_SIZE}
    return [Extent(offset, min(_PIECE_SIZE, size - offset)) for offset in sorted(offsets)]


def sample_of(pieces: Iterable[bytes | None]) -> list[str]:
    """Return the sample that consists of `pieces`: a list with the SHA-256 of each, in hexadecimal.

    `pieces`: the bytes of each piece, or None for an unreadable piece.
    """
    return [hashlib.sha256(piece).hexdigest() if piece is not None else _UNREADABLE for piece in pieces]


def sample_matches(device: Device, identity: Identity, extents: Iterable[Extent]) -> bool:
    """Return True if the copy `device` has the bytes that are sampled in `identity`, the source's.

    `extents`: the ranges to compare, some or all of those that `sample_extents()` returns. Unreadable pieces count
    as equal.
    """
    sample = dict(zip(sample_extents(identity["size"]), identity["sample"]))
    return all(_same_piece(sample_of([_read_or_none(device, extent)])[0], sample[extent]) for extent in extents)


def _same_piece(known: str, found: str) -> bool:
    """Return True if `known` and `found`, entries of two samples, do not differ.

    A sector that becomes unreadable is no difference.
    """
    return known == found or _UNREADABLE in (known, found)


def is_identity(value: object) -> bool:
    """Return True if `value`, untrusted JSON, has the form of a source's identity and is within its bounds."""
    if not isinstance(value, dict) or len(value) > _MAX_FIELDS:
        return False
    size, sample = value.get("size"), value.get("sample")
    return (
        type(size) is int
        and 0 <= size < 1 << 63
        and isinstance(sample, list)
        and all(isinstance(piece, str) and len(piece) <= _MAX_DIGEST_LENGTH for piece in sample)
        and len(sample) == len(sample_extents(size))
        and all(_is_plain(each) for name, each in value.items() if name != "sample")
    )


def _is_plain(value: object) -> bool:
    return type(value) is int or (isinstance(value, str) and len(value) <= _MAX_TEXT_LENGTH)


def shows_writes(identity: Identity) -> bool:
    """Return True if every write to the source changes its `identity`: if the identity has a ctime."""
    return "ctime_ns" in identity


def differences(known: Identity, found: Identity) -> list[str]:
    """Return how the identities `known` and `found` of a source differ: a list of texts, one for each field.

    Returns [] for the same source. An identity that was found through the original program has only size and
    sample. If `known` is such an identity, only size and sample are compared. If `found` is such an identity, the
    fields that it lacks are differences.
    """
    names = known.keys() if len(known) == len(("size", "sample")) else known.keys() | found.keys()
    differing = sorted(name for name in names if not _is_same(name, known.get(name), found.get(name)))
    words = [_difference(name, known.get(name), found.get(name)) for name in differing]
    if differing == ["ctime_ns"] and "ctime_ns" in known and "ctime_ns" in found:
        words.append("its mtime was put back after a write, or its name, links, owner or mode changed")
    return words


def _is_same(name: str, known: Any, found: Any) -> bool:
    if name == "sample" and known and found and len(known) == len(found):
        return all(map(_same_piece, known, found))
    return bool(known == found)


def _difference(name: str, known: object, found: object) -> str:
    if name == "sample":
        return "its bytes differ"
    if known is None:
        return f"{name} was not reported before, is {found}"
    if found is None:
        return f"{name} is no longer reported"
    return f"{name} was {known}, is {found}"


def _read_or_none(device: Device, extent: Extent) -> bytes | None:
    try:
        return device.read(*extent)
    except DeviceError:
        return None  # a bad sector, or a source that shrinks; a later read of these bytes reports it


def _number(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _kernel_name(number: int) -> str | None:
    """Return a name that survives a restart, of the block device with device number `number`.

    Returns None if the kernel has none.
    """
    entry = os.path.realpath(f"/sys/dev/block/{_number(number)}")
    partition = _text(f"{entry}/partition")
    disk = entry if partition is None else os.path.dirname(entry)
    name = next(filter(None, (_text(f"{disk}/{each}") for each in _NAMES_IN_SYSFS)), None) or _backing_file(disk)
    if name is None or partition is None:
        return name
    return f"{name} partition {partition}"


def _backing_file(disk: str) -> str | None:
    path = _text(f"{disk}/loop/backing_file")
    if path is None:
        return None
    offset = _text(f"{disk}/loop/offset")
    try:
        inode = str(os.stat(path).st_ino)
    except OSError:
        inode = "deleted"
    return f"loop {path} inode {inode} offset {offset}"


def _text(path: str) -> str | None:
    try:
        with open(path, errors="replace") as file:
            return file.read().strip() or None
    except OSError:
        return None  # this kind of device has no such file
