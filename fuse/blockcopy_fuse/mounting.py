"""`blockcopy mount`: checks, the replica, the file system that shows it, and their orderly end.

    checks → open_replica → pyfuse3.init → serve … a signal, or the mount was removed from outside …
           → mapped pages written back → waiters get EIO → terminate → close (unmounts) → destination synced,
             processes reaped

However it ends, nothing stays mounted, no child process is left, and the destination is synced.
Only SIGKILL leaves the mountpoint behind. Readers then get ENOTCONN rather than an empty folder,
and the next mount says how to clear it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import select
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyfuse3
import trio

import blockcopy
from blockcopy.block.records import default_folder
from blockcopy.block.syscalls import become_io_flusher, lock_memory
from blockcopy.errors import Interrupted, MountError, UsageError
from blockcopy.paths import safe_write
from blockcopy.paths.runtime_dir import runtime_dir_candidates
from blockcopy.progress.reporter import Progress
from blockcopy.replica.engine import open_replica
from blockcopy.replica.monitor import on_complete, prometheus
from blockcopy.replica.monitor.progress import report, report_start
from blockcopy.replica.monitor.sd_notify import Notifier
from blockcopy.replica.monitor.status import Status
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from blockcopy.replica.tasks import abandonable
from blockcopy.replica.tasks.runner import receive_signals, run_optional
from blockcopy_fuse import STATUS_NAME, control_client, control_server, fuse_support, mountinfo
from blockcopy_fuse.control_server import ControlServer
from blockcopy_fuse.operations import Operations
from blockcopy_fuse.options import MountOptions, quoted

logger = logging.getLogger(__name__)

_TERMINATE_SECONDS = 5
"""How long the running handlers may take to end after their waits have failed. Then they are cancelled."""

_MAX_HANDLERS = fuse_support.MAX_BACKGROUND + 64
"""Requests that are handled at once: all reads that may wait, and lookups and the like."""

_WRITE_BACK_SECONDS = 5
"""How long the kernel may take at the end to write back what programs changed in mapped pages."""

_OPEN_AND_SYNC = "import os, sys; os.fsync(os.open(sys.argv[1], os.O_RDONLY))"
"""A Python program that opens and syncs a file in the mount."""

_FILE_SECONDS = 2
"""How long writing or removing the pid file may take before it is abandoned."""


@dataclass(frozen=True)
class MountPlan:
    """A replica, and how it is mounted."""

    plan: Plan
    mountpoint: str
    """Its absolute path."""
    name: str | None
    """The name of the replica in the mounted folder. None: the mountpoint is a file, and becomes the replica."""
    options: MountOptions
    pid_file: str | None = None
    log_file: str | None = None

    @property
    def file(self) -> Path:
        """The path by which the replica is read."""
        return Path(self.mountpoint) / (self.name or "")


def check(mount_plan: MountPlan) -> None:
    """Check, before anything is started, that the mount of `mount_plan` is possible.

    Raises MountError if the mountpoint or FUSE cannot be used.
    Raises UsageError if the file's name is invalid, or if the mount would hide a path in use.
    """
    mountpoint = Path(mount_plan.mountpoint)
    if control_client.is_replica(mount_plan.mountpoint):
        raise MountError(f"{mountpoint} has a replica mounted already (see: blockcopy status {mountpoint})")
    try:
        mode = mountpoint.stat().st_mode
    except FileNotFoundError as error:
        fix = f"mkdir -p {shlex.quote(str(mountpoint))}"
        raise MountError(f"cannot mount on {mountpoint}: {error.strerror}. Make it first: {fix}") from error
    except OSError as error:
        raise MountError(f"cannot mount on {mountpoint}: {error.strerror}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise MountError(f"cannot mount on {mountpoint}: it is neither a folder nor a regular file")
    for path, label in _paths_in_use(mount_plan):
        if _hides(mountpoint, Path(path)):
            raise UsageError(f"the mount on {mountpoint} would hide the {label} {path}")
    if mount_plan.name is not None and ("/" in mount_plan.name or mount_plan.name in ("", ".", "..", STATUS_NAME)):
        raise UsageError(f"--name {mount_plan.name!r} cannot be the name of the file")
    if problem := fuse_support.device_problem():
        raise MountError(problem)


def _paths_in_use(mount_plan: MountPlan) -> Iterator[tuple[str, str]]:
    """Yield each path that is used while the mount of `mount_plan` exists, and a label for messages, in pairs."""
    plan = mount_plan.plan
    yield plan.destination, "destination"
    if plan.command.location.host is None:
        yield plan.command.location.path, "source"
    if plan.keep_state:
        yield plan.state or str(default_folder()), "state file"
    files = {"pid file": mount_plan.pid_file, "log file": mount_plan.log_file, "metrics file": plan.metrics}
    yield from ((path, label) for label, path in files.items() if path is not None)
    yield plan.command.working_dir, "folder it is started in,"
    yield plan.command.argv[0], "program"
    yield from ((path, "folder of control sockets,") for path in map(str, runtime_dir_candidates(os.geteuid())[:1]))
    yield from ((path, "folder of Python modules,") for path in (*sys.path, *blockcopy.__path__) if path)


def _hides(mountpoint: Path, path: Path) -> bool:
    """Return whether a mount on `mountpoint` will hide `path`, under any name."""
    if path.resolve().is_relative_to(mountpoint.resolve()):
        return True
    return path.exists() and path.samefile(mountpoint)


async def serve(mount_plan: MountPlan, ready: Callable[[], None], progress: Progress, notifier: Notifier) -> Status:
    """Make the mount of `mount_plan`, and serve it until a signal or an unmount. Returns the last status.

    `ready`: called once without arguments, when the mount is there. `progress`, `notifier`: get reports meanwhile.
    Raises, in exception groups, what `open_replica` raises, and MountError if FUSE refuses the mount.
    Raises Interrupted if a signal came before the mount was there. Call from trio's thread only.
    """
    if mount_plan.plan.writable:
        _prepare_for_writes()
    report_start(progress)
    stop, unmounted = trio.Event(), trio.Event()
    mounted = False
    mountpoint = os.path.realpath(mount_plan.mountpoint)  # now: later it would be a request to this process
    socket: ControlServer | None = None

    async def watch_signals() -> None:
        async for signum in signals:
            if not mounted:
                raise Interrupted(signum)
            logger.info("ending on %s", signal.Signals(signum).name)
            stop.set()

    async with receive_signals() as signals, trio.open_nursery() as nursery:
        nursery.start_soon(watch_signals)
        async with open_replica(mount_plan.plan) as replica:

            def status() -> Status:
                path = socket.path if socket else None
                return dataclasses.replace(replica.status(), mountpoint=mountpoint, control_socket=path)

            _init(mount_plan, mountpoint, replica, status)
            mounted = True
            try:
                with _released_before_helper(mount_plan.options):
                    async with (
                        control_server.opened(_device_of(mountpoint)) as socket,
                        _pid_file(mount_plan.pid_file),
                        trio.open_nursery() as helpers,
                    ):
                        parts = {
                            "sd_notify": partial(notifier.keep_notifying, replica),
                            "--metrics": partial(prometheus.keep_writing, mount_plan.plan.metrics, status),
                            "the progress": partial(report, replica, progress),
                            "the kernel's cache": partial(_drop_lost_pages, replica, mount_plan.file),
                            "--on-complete": partial(_on_complete, mount_plan.plan, replica, status),
                        }
                        if socket is not None:
                            parts["the control socket"] = partial(
                                socket.serve, replica, status, stop.set, unmounted.is_set
                            )
                        for name, part in parts.items():
                            helpers.start_soon(run_optional, name, part)
                        await _serve(replica, mount_plan, stop, unmounted, ready, notifier)
                        helpers.cancel_scope.cancel()
            finally:
                pyfuse3.close(unmount=True)
        nursery.cancel_scope.cancel()
    return status()


def _prepare_for_writes() -> None:
    """Make sure that this process cannot wait for its own mount, short of memory. Call before threads start.

    It waits neither for the write-back of the mount, nor for memory that the kernel has swapped to the mount.
    """
    for prepare in (become_io_flusher, lock_memory):
        try:
            prepare()
        except OSError as error:  # an ordinary user may not
            logger.debug("a lack of memory may delay this mount: %s: %s", prepare.__name__, error.strerror)


def _device_of(mountpoint: str) -> str:
    found = mountinfo.mount_at(mountpoint)
    return found.device if found else str(os.getpid())  # the mount was removed already


async def _drop_lost_pages(replica: Replica, file: Path) -> None:
    """Drop the kernel's cache of `replica`, which is mounted as `file`, once a sync has failed: it has lost bytes.

    From then on each open drops the cache (`Operations.open`).
    """
    await replica.read_only.wait()
    await _open_and_sync(file)


async def _on_complete(plan: Plan, replica: Replica, status: Callable[[], Status]) -> None:
    await replica.settled.wait()
    final = status()
    if not final.source_needed:
        await on_complete.run(plan, final)


@asynccontextmanager
async def _pid_file(path: str | None) -> AsyncIterator[None]:
    """Keep this process's id in the file `path` inside the `async with` block. Yields nothing.

    Does nothing if `path` is None. Raises MountError if the file cannot be written.
    """
    if path is None:
        yield
        return
    write = partial(safe_write.replace, path, f"{os.getpid()}\n".encode(), 0o644)
    try:
        written = await abandonable.run_within(write, _FILE_SECONDS)
    except OSError as error:
        raise MountError(f"cannot write --pid-file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(TimeoutError):
            await abandonable.run_within(partial(safe_write.remove, path, written), _FILE_SECONDS)


def _init(mount_plan: MountPlan, mountpoint: str, replica: Replica, status: Callable[[], Status]) -> None:
    """Mount `replica` on the resolved path `mountpoint`, as `mount_plan` says.

    `status`: called without arguments, returns the content of the status file.
    Raises MountError if libfuse cannot mount.
    """
    name = mount_plan.options.fsname or str(mount_plan.plan.command.location)
    options = {
        *pyfuse3.default_options,
        "default_permissions" if mount_plan.plan.writable else "ro",
        f"fsname={quoted(name)}",
        f"subtype={mount_plan.options.subtype}",
        *mount_plan.options.fuse,
    }
    operations = Operations(
        replica,
        mount_plan.name,
        status,
        options=mount_plan.options,
        writable=mount_plan.plan.writable,
        before_first_open=lambda: fuse_support.tune(mountpoint),
    )
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:  # libfuse has printed the reason itself
        raise MountError(f"cannot mount on {mount_plan.mountpoint}: {error}") from error


@contextmanager
def _released_before_helper(options: MountOptions) -> Iterator[None]:
    """Make the kernel end the connection before libfuse's helper notices our death. Yields nothing.

    Does nothing unless `options` have auto_unmount.

    The helper unmounts only a mount that answers ENOTCONN. A connection that still exists, or is just ending,
    answers something else, and the dead mount would stay.
    When a process ends, the kernel closes its descriptors from the lowest on. It releases the files as task works,
    in the opposite order. So a duplicate of /dev/fuse above the helper's socket is released first.
    """
    if "auto_unmount" not in options.fuse:
        yield
        return
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    duplicates = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, highest + 1) for descriptor in _fuse_descriptors()]
    try:
        yield
    finally:
        for descriptor in duplicates:
            os.close(descriptor)


def _fuse_descriptors() -> list[int]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists the folder is closed again
            if os.readlink(entry) == "/dev/fuse":
                found.append(int(entry.name))
    return found


async def _watch_connection(stop: trio.Event, unmounted: trio.Event) -> None:
    """Set `stop` and `unmounted` when the kernel has ended the FUSE connection.

    pyfuse3.main() notices that as well, but returns only after all handlers have returned. A handler that waits
    for an unresponsive source does not return. An ended connection is an error condition of its descriptor.
    An epoll that asks for no events reports just this, and trio can wait for the epoll.
    """
    with select.epoll() as errors:
        for descriptor in _fuse_descriptors():
            errors.register(descriptor, 0)
        await trio.lowlevel.wait_readable(errors.fileno())
        logger.debug("the kernel has ended the connection")
        unmounted.set()
        stop.set()


async def _open_and_sync(file: Path) -> None:
    """Open and sync `file`, which is in the mount, in a child process, and wait for its end.

    The kernel may wait for reads of the mount meanwhile, and no signal ends such a wait. In a thread, it would keep
    the connection open after a SIGKILL, and so wait for ever.
    """
    command_line = [sys.executable, "-I", "-S", "-c", _OPEN_AND_SYNC, str(file)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command_line, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    try:
        process = await abandonable.start_process(start)
    except OSError as error:
        logger.warning("cannot start the program that syncs %s: %s", file, error.strerror)
        return
    try:
        await abandonable.wait_for_exit(process)
    finally:
        abandonable.abandon_process(process)


async def _write_back(file: Path) -> None:
    """Write back what programs changed in mapped pages of `file`, which is in the mount, as fsync does."""
    with trio.move_on_after(_WRITE_BACK_SECONDS) as limit:
        await _open_and_sync(file)
    if limit.cancelled_caught:
        logger.warning("what programs changed in mapped pages of %s was not written back in time", file)


async def _serve(
    replica: Replica,
    mount_plan: MountPlan,
    stop: trio.Event,
    unmounted: trio.Event,
    ready: Callable[[], None],
    notifier: Notifier,
) -> None:
    """Serve requests for `replica` of `mount_plan` until `stop` is set or the mount is removed from outside.

    Sets `stop` then, and `unmounted` once the mount is gone.

    `ready`: called once without arguments, when requests are served. `notifier`: reports the start and the end.
    """

    async def take_requests() -> None:
        await pyfuse3.main(max_tasks=_MAX_HANDLERS)
        ended.set()
        stop.set()  # if it was unmounted from outside

    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_requests)
        nursery.start_soon(_watch_connection, stop, unmounted)
        ready()
        notifier.notify(READY=1, MAINPID=os.getpid())
        await stop.wait()
        notifier.notify(STOPPING=1)
        if mount_plan.plan.writable and not unmounted.is_set():
            await _write_back(mount_plan.file)
        # Fail the handlers that wait for the source first: terminate() would wait for them without end.
        await replica.disconnect()
        if not ended.is_set():
            pyfuse3.terminate()
            with trio.move_on_after(_TERMINATE_SECONDS):
                await ended.wait()
        nursery.cancel_scope.cancel()
