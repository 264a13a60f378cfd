"""Superblocks of file systems, partition tables, LVM, RAID, LUKS and swap: which of them a device holds.

The table is a part of libblkid's. Its entries lie in the first `HEAD` bytes, which a source can be asked for. RAID
of the formats 0.90 and 1.0, with its superblock at the end, is not found.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import NamedTuple

from blockcopy.block.device import Device
from blockcopy.errors import DeviceError, ForeignContentError

HEAD = 256 * 1024
"""Bytes at the start of a device that `superblocks` looks at."""


class Superblock(NamedTuple):
    """A superblock. Two devices have the same one if all fields are equal."""

    kind: str
    """The kind of contents in words, with an article, such as "an xfs file system"."""
    offset: int
    """The offset of the magic number in bytes."""
    id: str
    """The UUID or serial number, or "" if the kind has none."""

    def __str__(self) -> str:
        return f"{self.kind} ({self.id})" if self.id else self.kind


class _Magic(NamedTuple):
    """A kind of superblock: `magic` at `offset`, and an id of `id_length` bytes at `id_offset`.

    `is_little`: the id is shown as a little-endian number, or as a UUID of such numbers.
    """

    kind: str
    magic: bytes
    offset: int
    id_offset: int = 0
    id_length: int = 0
    is_little: bool = False


_MAGICS = (
    _Magic("an xfs file system", b"XFSB", 0, 32, 16),
    _Magic("a btrfs file system", b"_BHRfS_M", 65536 + 64, 65536 + 32, 16),
    _Magic("an f2fs file system", b"\x10\x20\xf5\xf2", 1024, 1024 + 108, 16),
    _Magic("an erofs file system", b"\xe2\xe1\xf5\xe0", 1024, 1024 + 48, 16),
    _Magic("a jfs file system", b"JFS1", 32768, 32768 + 136, 16),
    _Magic("a reiserfs file system", b"ReIsEr", 65536 + 52, 65536 + 84, 16),
    _Magic("an ISO 9660 file system", b"CD001", 32769, 32768 + 813, 16),
    _Magic("a squashfs file system", b"hsqs", 0, 8, 4),
    _Magic("an NTFS file system", b"NTFS    ", 3, 72, 8, True),
    _Magic("an exFAT file system", b"EXFAT   ", 3, 100, 4, True),
    _Magic("a BitLocker volume", b"-FVE-FS-", 3),
    _Magic("a FAT file system", b"FAT12   ", 54, 39, 4, True),
    _Magic("a FAT file system", b"FAT16   ", 54, 39, 4, True),
    _Magic("a FAT file system", b"FAT32   ", 82, 67, 4, True),
    _Magic("a LUKS volume", b"LUKS\xba\xbe", 0, 168, 36),
    *(_Magic("an LVM physical volume", b"LVM2 001", at + 24, at + 32, 32) for at in range(0, 2048, 512)),
    *(_Magic("a member of a RAID", b"\xfc\x4e\x2b\xa9\x01\0\0\0", at, at + 16, 16) for at in (0, 4096)),
    _Magic("a bcache device", bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), 4096 + 24, 4096 + 40, 16),
    *(_Magic("swap space", b"SWAPSPACE2", page - 10, 1024 + 12, 16) for page in (4096, 8192, 16384, 65536)),
    *(_Magic("a GUID partition table", b"EFI PART", sector, sector + 56, 16, True) for sector in (512, 4096)),
)

_EXT_MAGIC, _EXT = b"\x53\xef", 1024
"""The magic number of ext2, ext3 and ext4, and the offset of their superblock."""

_ZFS_UBERBLOCKS = range(128 * 1024, 256 * 1024, 1024)

_ZFS_MAGICS = (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c")
"""The magic number of an uberblock, in both byte orders."""

_PARTITIONS = range(446, 510, 16)
"""Offsets of the entries of an MBR."""


def superblocks(head: bytes) -> list[Superblock]:
    """Return the Superblocks in `head`, the first bytes of a device, `HEAD` of them if the device has as many."""
    found = [
        Superblock(each.kind, each.offset, _id(head[each.id_offset :][: each.id_length], each.is_little))
        for each in _MAGICS
        if head[each.offset :][: len(each.magic)] == each.magic
    ]
    found += _ext(head)
    if any(head[at : at + 8] in _ZFS_MAGICS for at in _ZFS_UBERBLOCKS):
        found.append(Superblock("a member of a ZFS pool", _ZFS_UBERBLOCKS.start, ""))
    return found or list(_mbr(head))


def head_of(device: Device) -> bytes:
    """Return the first HEAD bytes of `device`, or all. Returns none if they cannot be read: a copy replaces all."""
    try:
        return bytes(device.read(0, min(HEAD, device.size())))
    except DeviceError:
        return b""


def refuse_foreign(
    path: str, held: list[Superblock], source: str, others: list[Superblock], *, is_whole: bool = True
) -> None:
    """Raise ForeignContentError if the destination at `path` holds a superblock that the source lacks.

    `held`, `others`: those of the destination and the source. `source`: its name in the message.
    `is_whole`: whether the source could read its first bytes.
    """
    if foreign := [each for each in held if each not in others]:
        raise ForeignContentError(
            f"{path} holds {_words(foreign)}, which {source} does not hold"
            + (f": that holds {_words(others)}" if others else "")
            + ("" if is_whole else ", as far as it can be read: its beginning cannot")
        )


def _words(found: list[Superblock]) -> str:
    return " and ".join(map(str, found))


def _id(raw: bytes, is_little: bool = False) -> str:
    """Return the id `raw` as text: a UUID, the text that it is, or hexadecimal digits.

    `is_little`: as in `_Magic`.
    """
    if len(raw) == 16:
        return f"UUID {uuid.UUID(bytes_le=raw) if is_little else uuid.UUID(bytes=raw)}"
    text = raw.rstrip(b"\0").decode("ascii", "replace")
    if len(raw) > 16 and text.isprintable():
        return f"UUID {text}"
    return (raw[::-1] if is_little else raw).hex()


def _ext(head: bytes) -> Iterator[Superblock]:
    """Yield the Superblock of ext2, ext3 or ext4 in `head`, if it has one. Its magic number is short: see more."""

    def number(offset: int) -> int:
        return int.from_bytes(head[_EXT + offset : _EXT + offset + 4], "little")

    is_sane = number(0) and number(4) and number(24) <= 6 and number(76) <= 1
    if head[_EXT + 56 : _EXT + 58] == _EXT_MAGIC and is_sane:
        yield Superblock("an ext4 file system", _EXT + 56, _id(head[_EXT + 0x68 : _EXT + 0x78]))


def _mbr(head: bytes) -> Iterator[Superblock]:
    """Yield the Superblock of an MBR partition table in `head`, if it has one with a partition."""
    entries = [head[at : at + 16] for at in _PARTITIONS]
    is_sane = all(entry[0] in (0, 0x80) for entry in entries if entry) and any(
        entry[4:5] > b"\0" for entry in entries
    )
    if head[510:512] == b"\x55\xaa" and is_sane:
        yield Superblock("an MBR partition table", 510, _id(head[440:444], is_little=True))
