"""`blockcopy mount`: checks, the replica, the file system over it, and their end in order.

    checks → open_replica → pyfuse3.init → serve … a signal, or the mount is taken away …
           → waiters get EIO → terminate → close (unmounts) → destination synced, processes reaped

Whichever way it ends, nothing stays mounted, no child is left, and the destination is synced. Only
a death by SIGKILL leaves the mountpoint behind: then readers get ENOTCONN rather than an empty
folder, and the next mount says how to clear it.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import select
import shlex
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyfuse3
import trio

import blockcopy
from blockcopy.block.records import default_folder
from blockcopy.errors import Interrupted, MountError, UsageError
from blockcopy.paths import safe_write
from blockcopy.paths.runtime_dir import runtime_dir_candidates
from blockcopy.progress.reporter import Progress
from blockcopy.replica.engine import open_replica
from blockcopy.replica.monitor import on_complete, prometheus
from blockcopy.replica.monitor.progress import report
from blockcopy.replica.monitor.sd_notify import Notifier
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from blockcopy.replica.tasks import abandonable
from blockcopy.replica.tasks.runner import receive_signals, run_optional
from blockcopy_fuse import STATUS_NAME, control_client, control_server, mountinfo
from blockcopy_fuse.control_server import ControlServer
from blockcopy_fuse.kernel_readahead import MAX_BACKGROUND, tune
from blockcopy_fuse.operations import Operations
from blockcopy_fuse.options import MountOptions, quoted
from blockcopy_fuse.probe import await_answer

logger = logging.getLogger(__name__)

_TERMINATE_SECONDS = 5
"""How long handlers in flight may take to end, once their waits have failed, before they are cancelled."""

_MAX_HANDLERS = MAX_BACKGROUND + 64
"""Requests being handled at once: all reads that may wait, and lookups and the like beside them."""

_FILE_SECONDS = 2
"""How long a file of the user's may take to be written, or removed, before it is left."""

_REQUEST_MARGIN = 20
"""The kernel looks each 15 seconds for requests that took too long."""


@dataclass(frozen=True)
class MountPlan:
    """Where and how the replica of `plan` is shown: as `name` in a folder, or, None, as the mountpoint itself."""

    plan: Plan
    mountpoint: str
    name: str | None
    options: MountOptions
    pid_file: str | None = None
    log_file: str | None = None

    @property
    def file(self) -> Path:
        return Path(self.mountpoint) / (self.name or "")


def check(mount: MountPlan) -> None:
    """Before anything is started: can it be mounted there, like this? MountError or UsageError."""
    mountpoint = Path(mount.mountpoint)
    if control_client.is_replica(mount.mountpoint):
        raise MountError(f"{mountpoint} has a replica mounted already (see: blockcopy status {mountpoint})")
    try:
        mode = mountpoint.stat().st_mode
    except FileNotFoundError as error:
        todo = f"mkdir -p {shlex.quote(str(mountpoint))}"
        raise MountError(f"cannot mount on {mountpoint}: {error.strerror}. Make it first: {todo}") from error
    except OSError as error:
        raise MountError(f"cannot mount on {mountpoint}: {error.strerror}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise MountError(f"cannot mount on {mountpoint}: it is neither a folder nor a regular file")
    for path, what in _not_to_be_hidden(mount):
        if _hides(mountpoint, Path(path)):
            raise UsageError(f"the mount on {mountpoint} would hide the {what} {path}")
    if mount.name is not None and ("/" in mount.name or mount.name in ("", ".", "..", STATUS_NAME)):
        raise UsageError(f"--name {mount.name!r} cannot be the name of the file")
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse: load it (modprobe fuse), or have the container given it")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError(
            "this user may not use /dev/fuse; where all users may mount it is readable and writable by all"
        )


def longest_request() -> float:
    """Seconds that a request may take before the kernel gives the whole mount up; inf where it never does."""
    limits = [math.inf]
    for name in ("default_request_timeout", "max_request_timeout"):
        try:
            seconds = int(Path("/proc/sys/fs/fuse", name).read_text())
        except (OSError, ValueError):
            continue  # kernels before 6.14 have no such limit
        if seconds:
            limits.append(max(1, seconds - _REQUEST_MARGIN))
    return min(limits)


def _not_to_be_hidden(mount: MountPlan) -> Iterator[tuple[str, str]]:
    """Yield each path that is used while the mount is there, and its name for a message."""
    plan = mount.plan
    yield plan.destination, "destination"
    if plan.command.location.host is None:
        yield plan.command.location.path, "source"
    if plan.keep_state:
        yield plan.state or str(default_folder()), "state file"
    files = {"pid file": mount.pid_file, "log file": mount.log_file, "metrics file": plan.metrics}
    yield from ((path, what) for what, path in files.items() if path is not None)
    yield plan.command.folder, "folder it is started in,"
    yield plan.command.argv[0], "program"
    yield from ((path, "folder of control sockets,") for path in map(str, runtime_dir_candidates(os.geteuid())[:1]))
    yield from ((path, "folder of Python modules,") for path in (*sys.path, *blockcopy.__path__) if path)


def _hides(mountpoint: Path, path: Path) -> bool:
    """Whether the mount will hide `path`, by whichever name."""
    if path.resolve().is_relative_to(mountpoint.resolve()):
        return True
    return path.exists() and path.samefile(mountpoint)


async def serve(
    mount: MountPlan, ready: Callable[[], None], progress: Progress, notifier: Notifier
) -> dict[str, Any]:
    """Mount and serve until a signal or an unmount. `ready` is called once, when it is mounted.

    Returns the last snapshot.

    `progress` and `notifier` are told how it goes. Raises, in exception groups, what `open_replica` does,
    MountError, and Interrupted for a signal that came before it was mounted.
    """
    stop = trio.Event()
    mounted = False
    mountpoint = os.path.realpath(mount.mountpoint)  # not to be looked at once it is ours to answer for
    socket: ControlServer | None = None

    async def watch_signals() -> None:
        async for signum in signals:
            if not mounted:
                raise Interrupted(signum)
            logger.info("ending on %s", signal.Signals(signum).name)
            stop.set()

    async with receive_signals() as signals, trio.open_nursery() as nursery:
        nursery.start_soon(watch_signals)
        async with open_replica(mount.plan) as replica:

            def snapshot() -> dict[str, Any]:
                path = socket.path if socket else None
                return {**replica.snapshot(), "mountpoint": mountpoint, "control_socket": path}

            _init(mount, mountpoint, replica, snapshot)
            mounted = True
            try:
                with _released_before_helper(mount.options):
                    async with (
                        control_server.opened(_device_of(mountpoint)) as socket,
                        _pid_file(mount.pid_file),
                        trio.open_nursery() as helpers,
                    ):
                        parts = {
                            "sd_notify": partial(notifier.keep_telling, replica),
                            "--metrics": partial(prometheus.keep_writing, mount.plan.metrics, snapshot),
                            "the progress": partial(report, replica, progress),
                            "--on-complete": partial(_on_complete, mount.plan, replica, snapshot),
                        }
                        if socket is not None:
                            parts["the control socket"] = partial(socket.serve, replica, snapshot, stop.set)
                        for name, part in parts.items():
                            helpers.start_soon(run_optional, name, part)
                        await _serve(replica, stop, ready, notifier)
                        helpers.cancel_scope.cancel()
            finally:
                pyfuse3.close(unmount=True)
        nursery.cancel_scope.cancel()
    return snapshot()


def _device_of(mountpoint: str) -> str:
    entry = mountinfo.at(mountpoint)
    return entry.device if entry else str(os.getpid())  # it was taken away already


async def _on_complete(plan: Plan, replica: Replica, snapshot: Callable[[], dict[str, Any]]) -> None:
    await replica.settled.wait()
    facts = snapshot()
    if plan.on_complete and not facts["source_needed"]:
        await on_complete.run(plan.on_complete, facts, plan.command.folder)


@asynccontextmanager
async def _pid_file(path: str | None) -> AsyncIterator[None]:
    """Keep our process id in the file for as long as we serve. Raises MountError if it cannot be written."""
    if path is None:
        yield
        return
    write = partial(safe_write.replace, path, f"{os.getpid()}\n".encode(), 0o644)
    try:
        ours = await abandonable.run_within(write, _FILE_SECONDS)
    except OSError as error:
        raise MountError(f"cannot write --pid-file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(TimeoutError):
            await abandonable.run_within(partial(safe_write.remove, path, ours), _FILE_SECONDS)


def await_first_answer(mount: MountPlan) -> None:
    """Return when the mount answers. For another process than the one that serves it."""
    await_answer(str(mount.file), mount.mountpoint)


def _init(mount: MountPlan, mountpoint: str, replica: Replica, snapshot: Callable[[], dict[str, Any]]) -> None:
    name = mount.options.fsname or str(mount.plan.command.location)
    options = {
        *pyfuse3.default_options,
        "ro",
        f"fsname={quoted(name)}",
        f"subtype={mount.options.subtype}",
        *mount.options.fuse,
    }
    operations = Operations(
        replica, mount.name, snapshot, options=mount.options, before_first_open=lambda: tune(mountpoint)
    )
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:  # libfuse has printed the reason itself
        raise MountError(f"cannot mount on {mount.mountpoint}: {error}") from error


@contextmanager
def _released_before_helper(options: MountOptions) -> Iterator[None]:
    """With `auto_unmount`: have the kernel end the connection before libfuse's helper hears of our death.

    The helper unmounts only what answers ENOTCONN; a connection that still stands, or falls just then,
    says something else, and the dead mount stays. At the end of a process its descriptors are closed from
    the lowest on, and let go of in the opposite order, as task works are: a duplicate of /dev/fuse above
    the helper's socket goes first.
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
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir() if _is_fuse(entry)]


async def _watch_connection(stop: trio.Event) -> None:
    """Set `stop` when the kernel has taken the mount down.

    pyfuse3.main() notices as well, but returns only after every handler did, and one that waits for
    a source that stands still does not. A connection that is gone is an error condition of its
    descriptor, which an epoll that asks for nothing else reports, and trio can wait for that epoll.
    """
    with select.epoll() as errors:
        for descriptor in _fuse_descriptors():
            errors.register(descriptor, 0)
        await trio.lowlevel.wait_readable(errors.fileno())
        logger.debug("the kernel has taken the mount down")
        stop.set()


def _is_fuse(entry: Path) -> bool:
    try:
        return os.readlink(entry) == "/dev/fuse"
    except OSError:
        return False  # the descriptor that lists them is gone again


async def _serve(replica: Replica, stop: trio.Event, ready: Callable[[], None], notifier: Notifier) -> None:
    """Take requests until `stop` is set or the mount is taken away."""

    async def take_requests() -> None:
        await pyfuse3.main(max_tasks=_MAX_HANDLERS)
        ended.set()
        stop.set()  # unmounted from outside, where nobody asked for it here

    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_requests)
        nursery.start_soon(_watch_connection, stop)
        ready()
        notifier.tell(READY=1, MAINPID=os.getpid())
        await stop.wait()
        notifier.tell(STOPPING=1)
        # A handler that waits for the source would keep terminate() waiting for ever: fail it first.
        await replica.disconnect()
        if not ended.is_set():
            pyfuse3.terminate()
            with trio.move_on_after(_TERMINATE_SECONDS):
                await ended.wait()
        nursery.cancel_scope.cancel()
