"""The handlers of the kernel's FUSE requests.

The mount is a folder with two files, the replica and status.json. If the mountpoint is a file, it is the replica.
The content of a replica changes only by writes through the mount, so the kernel may cache everything. Attributes
are constant: a changed mtime would drop the cached pages. Nothing is invalidated, unless a failed sync has lost
writes (`mounting`). The kernel sends each write at once. With its write-back cache, it would trust its own size of
the file. Handlers run in trio's thread, and must not block it. An error of blockcopy becomes an errno here alone.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FlagT, FUSEError, InodeT

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.errors import BlockcopyError, DeviceError, ReadOnlyError, SourceReadError
from blockcopy.replica.monitor.status import Status
from blockcopy.replica.replica import Replica
from blockcopy_fuse import STATUS_NAME
from blockcopy_fuse.options import MountOptions

logger = logging.getLogger(__name__)

_ROOT, _REPLICA, _STATUS = pyfuse3.ROOT_INODE, InodeT(2), InodeT(3)

_FOREVER = 86400.0
"""How long the kernel may cache names and attributes, in seconds. They do not change."""

_STATUS_HANDLES = 1 << 32
"""First file handle of an opened status file. The handle of any other file is its inode."""

P = ParamSpec("P")
R = TypeVar("R")


def handler(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Decorate the async `method` of Operations: returns one like it that answers each error with an errno.

    Any other exception than FUSEError would end the whole mount.
    """

    @functools.wraps(method)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except FUSEError:
            raise
        except SourceReadError as error:  # logged when the block was found
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
    """The file system of one replica."""

    def __init__(
        self,
        replica: Replica,
        name: str | None,
        status: Callable[[], Status],
        *,
        options: MountOptions,
        writable: bool,
        before_first_open: Callable[[], None],
    ) -> None:
        """Show `replica` as the file `name`, or as the root itself if `name` is None.

        `status`: called without arguments, returns the content of the status file.
        `options`: owner and mode of the files. `writable`: whether the replica may be opened for writing.
        `before_first_open`: called once without arguments, before the replica is opened.
        """
        super().__init__()
        self._before_first_open: Callable[[], None] | None = before_first_open
        self._replica = replica
        self._volume = replica.volume
        self._status = status
        self._options = options
        self._writable = writable
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
        entry.st_mode, entry.st_nlink = stat.S_IFREG | self._options.mode(0o444), 1
        if inode == self._file:
            entry.st_size = self._volume.size
            entry.st_mode |= self._options.mode(0o200 if self._writable else 0)
        elif inode == _ROOT:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | self._options.mode(0o555), 2
        elif inode == _STATUS:
            entry.attr_timeout = 0
            entry.st_size = len(self._status().as_json())
        else:
            raise FUSEError(errno.ENOENT)
        entry.st_uid, entry.st_gid = self._options.uid, self._options.gid
        entry.st_blksize = BLOCK_SIZE
        entry.st_blocks = -(-entry.st_size // 512)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mounted_ns
        return entry

    @handler
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        """Return the attributes of `inode`. Ignores `ctx`."""
        return self._attributes(inode)

    @handler
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        """Return the attributes of the file `name`, bytes, in the folder `parent_inode`. Ignores `ctx`.

        Raises FUSEError if there is no such file.
        """
        if name in (b".", b".."):
            return self._attributes(_ROOT)
        if parent_inode != _ROOT or name not in self._entries:
            raise FUSEError(errno.ENOENT)
        return self._attributes(self._entries[name])

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Do nothing: the inodes in `inode_list` exist as long as the mount."""

    @handler
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        """Open the folder `inode`, and return its handle. Ignores `ctx`. Raises FUSEError if it is no folder."""
        if inode != _ROOT:
            raise FUSEError(errno.ENOTDIR)
        return FileHandleT(inode)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the open folder `fh` from entry number `start_id` on, and pass the entries to `token`."""
        for index, (name, inode) in enumerate(self._entries.items()):
            more = index < start_id or pyfuse3.readdir_reply(token, name, self._attributes(inode), index + 1)
            if not more:
                return

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close the open folder `fh`."""

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        """Open the file `inode`. Returns a FileInfo with the handle.

        `flags`: those of open(2). O_TRUNC is ignored, as block devices do. Ignores `ctx`.
        Raises FUSEError if `inode` is a folder, or if `flags` ask for writes that are not possible.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY and not (self._writable and inode == self._file):
            raise FUSEError(errno.EROFS)
        if inode == self._file:
            if self._before_first_open is not None:
                self._before_first_open()
                self._before_first_open = None
            return FileInfo(fh=FileHandleT(inode), keep_cache=not self._replica.read_only.is_set())
        if inode == _STATUS:
            # The text is made when the file is opened, so that its reader sees one moment.
            handle, self._next_handle = FileHandleT(self._next_handle), self._next_handle + 1
            self._statuses[handle] = self._status().as_json()
            return FileInfo(fh=handle, direct_io=True)
        raise FUSEError(errno.EISDIR)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:  # type: ignore[override]  # pyfuse3 takes any buffer
        """Return `size` bytes of the open file `fh` from offset `off` on, fewer only at its end."""
        text = self._statuses.get(fh)
        if text is not None:
            return text[off : off + size]
        return await self._volume.read(off, size)

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write `buf` to the open file `fh` at offset `off`. Returns how many bytes, fewer only at its end.

        Raises FUSEError if there is no room, or if nothing can be written any more.
        """
        try:
            return await self._volume.write(off, buf)
        except ReadOnlyError as error:
            raise FUSEError(errno.EROFS) from error
        except DeviceError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FUSEError(error.errno) from error
            raise

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        """Return the attributes of `inode`, which stay as they are. New times in `attr` are ignored.

        `fields`: what is to change. Ignores `fh` and `ctx`. Raises FUSEError for another size, owner or mode.
        """
        known = self._attributes(inode)
        if fields.update_size and attr.st_size != known.st_size:
            raise FUSEError(errno.EINVAL)  # as truncate(2) of a block device
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        return known

    async def _refuse(self, *_: object, **__: object) -> NoReturn:
        """Refuse a change of the folder. Without a handler, the kernel would say that there is no such call."""
        raise FUSEError(errno.EPERM)

    create = mknod = mkdir = symlink = link = rename = unlink = rmdir = _refuse

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """Do nothing when a process closes the open file `fh`: each write has arrived."""

    @handler
    async def release(self, fh: FileHandleT) -> None:
        """Close the open file `fh`."""
        self._statuses.pop(fh, None)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Sync the destination, and record what was written, and what was read and therefore stored, so far.

        The open file `fh` and `datasync` make no difference.
        """
        await self._replica.flush()

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return pyfuse3's StatvfsData of the file system: it is full, and has the size of the replica.

        Ignores `ctx`.
        """
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = -(-self._volume.size // data.f_frsize)
        data.f_bfree = data.f_bavail = 0
        data.f_files = len(self._entries) + 1
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data
