"""What the kernel asks: a folder with two files in it, the replica and status.json; or the replica alone, where
the mountpoint is a file.

The replica's logical content never changes while it is mounted, fetched or not: attributes are
constant, the kernel may cache everything, and nothing is ever invalidated. Handlers run in trio's
one thread and never block in it. An error of ours becomes an errno here, and nowhere else.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FlagT, FUSEError, InodeT

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.errors import BlockcopyError, SourceReadError
from blockcopy.replica.monitor.status import to_json
from blockcopy.replica.replica import Replica
from blockcopy_fuse import STATUS_NAME
from blockcopy_fuse.options import MountOptions

logger = logging.getLogger(__name__)

_ROOT, _REPLICA, _STATUS = pyfuse3.ROOT_INODE, InodeT(2), InodeT(3)

_FOREVER = 86400.0
"""Seconds for which the kernel may keep names and attributes: they do not change."""

_STATUS_HANDLES = 1 << 32
"""File handles from here on are opened status files; below, the handle is the inode."""

P = ParamSpec("P")
R = TypeVar("R")


def handler(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Answer every error with an errno. What is not a FUSEError would end the whole mount."""

    @functools.wraps(method)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except FUSEError:
            raise
        except SourceReadError as error:  # logged when it was found
            logger.debug("%s: %s", method.__name__, error)
            raise FUSEError(errno.EIO) from error
        except BlockcopyError as error:
            logger.warning("%s: %s", method.__name__, error)
            raise FUSEError(errno.EIO) from error
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            raise FUSEError(errno.EIO) from error

    return answer


class Operations(pyfuse3.Operations):
    """See the module. `name` is the file's; None where it is the root itself. `options` tell whose it is.

    `snapshot` tells what is in the status file.
    """

    def __init__(
        self,
        replica: Replica,
        name: str | None,
        snapshot: Callable[[], dict[str, Any]],
        *,
        options: MountOptions,
        before_first_open: Callable[[], None],
    ) -> None:
        super().__init__()
        self._before_first_open: Callable[[], None] | None = before_first_open
        self._replica = replica
        self._volume = replica.volume
        self._snapshot = snapshot
        self._options = options
        self._mounted_ns = time.time_ns()
        self._file = _ROOT if name is None else _REPLICA
        self._entries = {} if name is None else {os.fsencode(name): _REPLICA, STATUS_NAME.encode(): _STATUS}
        self._statuses: dict[FileHandleT, bytes] = {}
        self._next_handle = _STATUS_HANDLES

    def _attributes(self, inode: InodeT) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        if inode == self._file:
            entry.st_mode = stat.S_IFREG | self._options.mode(0o444)
            entry.st_nlink = 1
            entry.st_size = self._volume.size
        elif inode == _ROOT:
            entry.st_mode = stat.S_IFDIR | self._options.mode(0o555)
            entry.st_nlink = 2
        elif inode == _STATUS:
            entry.st_mode = stat.S_IFREG | self._options.mode(0o444)
            entry.st_nlink = 1
            entry.attr_timeout = 0
            entry.st_size = len(to_json(self._snapshot()))
        else:
            raise FUSEError(errno.ENOENT)
        entry.st_uid, entry.st_gid = self._options.uid, self._options.gid
        entry.st_blksize = BLOCK_SIZE
        entry.st_blocks = -(-entry.st_size // 512)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mounted_ns
        return entry

    @handler
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._attributes(inode)

    @handler
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        if name in (b".", b".."):
            return self._attributes(_ROOT)
        if parent_inode != _ROOT or name not in self._entries:
            raise FUSEError(errno.ENOENT)
        return self._attributes(self._entries[name])

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The inodes are there as long as the mount is."""

    @handler
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        if inode != _ROOT:
            raise FUSEError(errno.ENOTDIR)
        return FileHandleT(inode)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for index, (name, inode) in enumerate(self._entries.items()):
            more = index < start_id or pyfuse3.readdir_reply(token, name, self._attributes(inode), index + 1)
            if not more:
                return

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        return None

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        if inode == self._file:
            if self._before_first_open is not None:
                self._before_first_open()
                self._before_first_open = None
            return FileInfo(fh=FileHandleT(inode), keep_cache=True)
        if inode == _STATUS:
            # The text is made once an open file, so that its reader sees one moment.
            handle, self._next_handle = FileHandleT(self._next_handle), self._next_handle + 1
            self._statuses[handle] = to_json(self._snapshot())
            return FileInfo(fh=handle, direct_io=True)
        raise FUSEError(errno.EISDIR)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:  # type: ignore[override]  # pyfuse3 takes any buffer
        text = self._statuses.get(fh)
        if text is not None:
            return text[off : off + size]
        return await self._volume.read(off, size)

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        return None

    @handler
    async def release(self, fh: FileHandleT) -> None:
        self._statuses.pop(fh, None)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """What was read so far, and therefore stored, is durable on the destination."""
        await self._replica.commit()

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = -(-self._volume.size // data.f_frsize)
        data.f_bfree = data.f_bavail = 0
        data.f_files = len(self._entries) + 1
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data
