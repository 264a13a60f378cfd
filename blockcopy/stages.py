"""What the three stages share: an ordered pipeline of threads, the two ends of a pipe, signals.

    reader thread ── items ──> worker threads ── results, in the order of the items ──> caller

The caller of `run_ordered` is the writer. Errors travel in the same order as results, so all that
came before an error is still delivered, and the first error is the one that is told. When the
caller stops early, the reader is woken, the workers are let finish, and no thread is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import signal
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Callable, NoReturn, TypeVar

from blockcopy.digests import Buffer
from blockcopy.errors import BlockcopyError, Interrupted, OutputError, StreamError

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(len(os.sched_getaffinity(0)), 8)

DEPTH = 2 * WORKERS
"""Items between the reader and the writer: enough that neither waits for a slow one of the other."""

PIECE_SIZE = 512 * 1024
"""Bytes of a device that make one item, so DEPTH of them are what a stage holds: 8 MiB at most."""

PIPE_SIZE = 1024 * 1024
"""What a pipe is enlarged to: the default of 64 KiB costs a wake-up for half a block."""


class InputStream:
    """The bytes of a descriptor as they come, for one reader thread; `wake` ends its waiting."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        enlarge_pipe(fd)
        self._wake_read, self._wake_write = os.pipe()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)

    def __enter__(self) -> InputStream:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)

    def wake(self) -> None:
        """From any thread: what is read from now on is the end of the stream."""
        os.write(self._wake_write, b"x")

    def read(self, most: int = PIPE_SIZE) -> bytes:
        """What has arrived, up to `most` bytes, waiting for at least one; empty at the end of the stream."""
        try:
            ready = self._poll.poll()
            if any(fd == self._wake_read for fd, _ in ready):
                return b""
            return os.read(self._fd, most)
        except OSError as error:
            raise StreamError(f"cannot read the input: {error.strerror}") from error


class OutputStream:
    """A descriptor that is written in full or not at all."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        enlarge_pipe(fd)

    def write(self, buffers: Sequence[Buffer]) -> None:
        """All of `buffers`, in order. OutputError where the reader went away or the disk is full."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        try:
            while views:
                written = os.writev(self._fd, views[:1024])
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]
        except BrokenPipeError as error:
            raise OutputError("whoever reads the output has gone away") from error
        except OSError as error:
            raise OutputError(f"cannot write the output: {error.strerror}") from error


def enlarge_pipe(fd: int) -> None:
    """Give a pipe PIPE_SIZE bytes where that is allowed; anything else stays as it is."""
    set_pipe_size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 does not name it
    try:
        if fcntl.fcntl(fd, set_pipe_size + 1) < PIPE_SIZE:  # F_GETPIPE_SZ
            fcntl.fcntl(fd, set_pipe_size, PIPE_SIZE)
    except OSError:
        return  # no pipe, or above the user's limit: slower, not wrong


def refuse_terminal(fd: int) -> None:
    """A stage's output is not for eyes: BlockcopyError where `fd` is a terminal."""
    if os.isatty(fd):
        raise OutputError("the output is a terminal; binary data goes into a pipe or a file")


def run_ordered(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    consume: Callable[[Result], None],
    *,
    wake: Callable[[], None] | None = None,
) -> None:
    """`consume(work(item))` for each item, in order: items are made in one thread, worked on in
    WORKERS others, DEPTH ahead, and consumed here.

    Raises the first error, in the order of the items. `wake` is called, from the caller's thread,
    when the items' thread has to end although it may be waiting for input.
    """
    pending: queue.Queue[Future[Result] | None] = queue.Queue(DEPTH)
    stopping = threading.Event()

    def read(executor: ThreadPoolExecutor) -> None:
        try:
            for item in items:
                if stopping.is_set():
                    return
                pending.put(executor.submit(work, item))
                del item  # not held while the next one is waited for
            pending.put(None)
        except BaseException as error:  # noqa: BLE001  (handed on in order, raised by the caller)
            failed: Future[Result] = Future()
            failed.set_exception(error)
            pending.put(failed)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="work") as executor:
        reader = threading.Thread(target=read, args=(executor,), name="read")
        reader.start()
        try:
            for future in iter(pending.get, None):
                consume(future.result())
                del future
        finally:
            stopping.set()
            if wake is not None:
                wake()
            while reader.is_alive():  # it may be waiting for room in the queue
                with contextlib.suppress(queue.Empty):
                    pending.get(timeout=0.05)


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted in the main thread, once; a second one kills."""

    def interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) != signal.SIG_IGN:  # started with nohup and the like
            signal.signal(each, interrupt)


def die_of(signum: int) -> NoReturn:
    """End as a program that the signal killed: what a shell and a parent expect to see."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    raise BlockcopyError(f"signal {signum} is blocked")  # cannot be reached unless it is
