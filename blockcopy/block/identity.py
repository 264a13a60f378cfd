"""What tells one source or destination from another, as far as it shows without reading all of it.

A source's identity travels in the greeting (see `wire`) and, with a destination's, into the state
file. It is an object of JSON: numbers, strings, and lists of strings. Where it is equal, the source is
taken for the same, unchanged; so a source that is a block device should be a snapshot, because a
device does not tell when it was written.

    size      bytes
    sample    SHA-256 of 32 pieces of 4 KiB, at fixed positions (fewer where the source is smaller)
    inode, mtime_ns, ctime_ns   of a file. No program can put its ctime back, as some do with the mtime. It is not
              told where a file system keeps none of its own, nor by older programs of ours
    id        of a block device: what the kernel knows it by, where it knows anything
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, NamedTuple

from blockcopy.block.device import Device
from blockcopy.block.geometry import Extent
from blockcopy.errors import DeviceError

logger = logging.getLogger(__name__)

Identity = dict[str, Any]

_UNREADABLE = "unreadable"
"""In a sample, in the place of a digest."""

_MOST_NAMES = 16
"""Facts of an identity; others than those above may come with newer programs."""

_MOST_DIGITS, _MOST_TEXT = 64, 4096
"""Characters of a sample's digest, and of another fact."""


class Times(NamedTuple):
    """A file's times, in nanoseconds."""

    mtime_ns: int
    ctime_ns: int


NO_TIMES = Times(0, 0)
"""The times of a block device: the kernel does not tell when it was written."""

_PIECES, _PIECE_SIZE = 32, 4096

_BTRFS_SUPERBLOCK = 64 * 1024
"""Other file systems, and partition tables, begin in the first piece; btrfs writes only here."""

_NAMES_IN_SYSFS = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial")
"""Below /sys/dev/block/MAJOR:MINOR: what stays the same over a restart, the most specific first."""


_TICK_NS = 20_000_000
"""Nanoseconds after which the kernel's clock for files has moved on: two of its longest ticks."""

_WHOLE_SECONDS_NS = 2_000_000_000
"""The same, of a file system that keeps whole seconds. FAT keeps every second one."""

_WRITE_BACK_SECONDS = 5
"""How long a greeting waits for the source's disk. Who greets has `--timeout` seconds of patience."""


def source_identity(device: Device) -> Identity:
    """Of an opened source. DeviceError where it has no size."""
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
    """Return the times of a file, such that whatever is written to it from now on moves them.

    `write_back` writes the dirty pages of the file to its disk. A store through a mapping moves the times only if
    its page is clean. A store after the first `write_back` moves them, and one before the second is older than
    whatever is read from now on. Raises what `write_back` raises, and DeviceError.
    """
    write_back()
    times = times_of(device)
    write_back()
    _wait_out_tick(times.ctime_ns)
    return times


def times_of(device: Device) -> Times:
    """Return the times of a file as they are; NO_TIMES of a block device. Raises DeviceError."""
    if device.is_block_device:
        return NO_TIMES
    status = device.status()
    return Times(status.st_mtime_ns, status.st_ctime_ns)


def _wait_out_tick(ctime_ns: int) -> None:
    """Return when the next change of a file gets a later time than `ctime_ns`."""
    tick = _TICK_NS if ctime_ns % 1_000_000_000 else _WHOLE_SECONDS_NS
    left = ctime_ns + tick - time.time_ns()
    if left > 0:
        time.sleep(min(left, tick) / 1e9)  # more than a tick is left if a clock was set


def _source_times(device: Device) -> Times:
    deadline = time.monotonic() + _WRITE_BACK_SECONDS
    complete = True

    def write_back() -> None:
        nonlocal complete
        complete = complete and device.write_back_until(deadline)

    times = settled_times(device, write_back)
    if not complete:
        logger.warning(
            "%s was written just now, and is not on its disk yet: what a program stores into it through a mapping "
            "may not be noticed",
            device.path,
        )
    return times


def destination_identity(device: Device) -> Identity:
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
    return [hashlib.sha256(piece).hexdigest() if piece is not None else _UNREADABLE for piece in pieces]


def sample_matches(device: Device, identity: Identity, extents: Iterable[Extent]) -> bool:
    """Whether those of the sample's `extents` read from `device` as they did from the source."""
    sample = dict(zip(sample_extents(identity["size"]), identity["sample"]))
    return all(_same_piece(sample_of([_read_or_none(device, extent)])[0], sample[extent]) for extent in extents)


def _same_piece(known: str, found: str) -> bool:
    """Return whether nothing tells two pieces of samples apart: a bad sector that comes or goes is no change."""
    return known == found or _UNREADABLE in (known, found)


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


def shows_writes(identity: Identity) -> bool:
    """Whether the same identity again means the same bytes: a file's ctime shows that it was written."""
    return "ctime_ns" in identity


def differences(known: Identity, found: Identity) -> list[str]:
    """In words, where two identities differ; empty for the same source.

    What is known by way of the original program, size and sample, is compared with just these of
    the other. Not so the other way round: what is known of a file's time has to be found again.
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
        return f"{name} was not told, is {found}"
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
