"""A process that has imported the program, and forks for each command: a start takes 10 ms instead of 150 to 450.

`support.run` uses the process. A forked command has its own streams, folder, environment and signals. A start of
Python itself is proved by the tests that use `subprocess` with `support.BLOCKCOPY`, and by test_command_line.

As a program, this module is that process. Argument: the descriptor of the socket for requests.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

MODULES = (
    *("blockcopy.cli.main", "blockcopy.cli.commands", "blockcopy.replica.commands", "blockcopy_fuse.commands"),
    *(
        "blockcopy.replica.sync",
        "blockcopy.replica.engine",
        "blockcopy_fuse.mounting",
        "blockcopy_fuse.control_client",
        "blockcopy_fuse.daemon",
    ),
    *("blockcopy.stage.checksum", "blockcopy.stage.retrieve", "blockcopy.stage.save"),
    *("blockcopy.progress.bar", "blockcopy.progress.lines"),
    *("blockcopy.replica.defaults", "logging.handlers", "tomllib", "blake3", "encodings.unicode_escape"),
)
"""The modules that are imported before a fork."""

MAX_REQUEST = 100_000
"""Bytes of a request."""

MAX_STREAM = 1 << 20
"""Bytes that are read from a stream at a time."""


class ForkServer:
    """The process, as the tests see it. `pid`: its process id. Call `close` at the end."""

    def __init__(self, mark: str) -> None:
        """Start the process. `mark`: the variable by which the processes of a test are found."""
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno()), mark],
            env=os.environ | {mark: "0" * 32},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.pid = self._process.pid

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait()

    def start(self, argv: Sequence[str], streams: Sequence[int], cwd: str | os.PathLike[str] = ".") -> Forked:
        """Start the command `argv` in the folder `cwd`. `streams`: descriptors of its three standard streams."""
        request = json.dumps([argv, dict(os.environ)]).encode()
        assert len(request) <= MAX_REQUEST, "too much for a request: use support.start"
        folder = os.open(cwd, os.O_PATH | os.O_DIRECTORY)
        answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._requests, [request], [theirs.fileno(), folder, *streams])
        os.close(folder)
        return Forked(answers)

    def run(
        self, argv: Sequence[str], input: bytes | None, timeout: float, cwd: str | os.PathLike[str] = "."
    ) -> tuple[int, bytes, bytes]:
        """Run the command `argv` in the folder `cwd`. Returns its exit status, standard output and standard error.

        Raises subprocess.TimeoutExpired.
        """
        stdin, write_end = os.pipe() if input is not None else (os.open(os.devnull, os.O_RDONLY), -1)
        (stdout_end, stdout), (stderr_end, stderr) = os.pipe(), os.pipe()
        with self.start(argv, (stdin, stdout, stderr), cwd) as process:
            for fd in (stdin, stdout, stderr):
                os.close(fd)
            try:
                read = _communicate(write_end, input or b"", stdout_end, stderr_end, timeout)
                return process.wait(timeout), *read
            except TimeoutError:
                raise subprocess.TimeoutExpired(list(argv), timeout) from None


class Forked:
    """A forked command. `pid`: its process id. Use it in `with`, whose end kills a command that still runs."""

    def __init__(self, answers: socket.socket) -> None:
        """Wait until the command is forked. `answers`: the server's socket for it."""
        self._answers = answers
        self._has_ended = False
        self.pid = int(answers.recv(20))

    def wait(self, timeout: float) -> int:
        """Return the exit status, once the command has ended. Raises TimeoutError after `timeout` seconds."""
        self._answers.settimeout(timeout)
        status = int(self._answers.recv(20))
        self._has_ended = True
        return status

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._has_ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(10)
        self._answers.close()


def _communicate(stdin: int, data: bytes, stdout: int, stderr: int, timeout: float) -> tuple[bytes, bytes]:
    """Write `data` to `stdin`, if that is not -1, and read the others to their ends. Closes all three.

    Raises TimeoutError.
    """
    left, read = memoryview(data), {stdout: bytearray(), stderr: bytearray()}
    end = time.monotonic() + timeout
    with DefaultSelector() as ready:
        for fd in read:
            ready.register(fd, EVENT_READ)
        if stdin != -1:
            os.set_blocking(stdin, False)
            ready.register(stdin, EVENT_WRITE)
        try:
            while ready.get_map():
                events = ready.select(max(0, end - time.monotonic()))
                if not events:
                    raise TimeoutError
                for key, _ in events:
                    if key.fd in read:
                        more = os.read(key.fd, MAX_STREAM)
                        read[key.fd] += more
                        ended = not more
                    else:
                        left, ended = _write(key.fd, left)
                    if ended:
                        ready.unregister(key.fd)
                        os.close(key.fd)
        finally:
            for key in ready.get_map().values():
                os.close(key.fd)
    return bytes(read[stdout]), bytes(read[stderr])


def _write(fd: int, data: memoryview) -> tuple[memoryview, bool]:
    """Write a part of `data`. Returns the rest, and whether this is the end.

    The end is reached if all is written, or if the reader is gone.
    """
    try:
        data = data[os.write(fd, data) if data else 0 :]
    except BrokenPipeError:
        return data, True
    return data, not data


def serve(requests: socket.socket, mark: str) -> None:
    """Fork for each request, and report the process id and the exit status. Returns in each forked process."""
    for name in MODULES:
        importlib.import_module(name)
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    place = libc.getenv(mark.encode())
    gc.freeze()
    running: dict[int, tuple[int, socket.socket]] = {}
    events = select.poll()
    events.register(requests, select.POLLIN)
    while True:
        for fd, _ in events.poll():
            if fd != requests.fileno():
                events.unregister(fd)
                pid, answers = running.pop(fd)
                os.close(fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # a test that failed does not wait
                    answers.send(str(status).encode())
                answers.close()
                continue
            message, fds, *_ = socket.recv_fds(requests, MAX_REQUEST, 5)
            if not message:
                os._exit(0)
            pid = os.fork()
            if not pid:
                argv, environment = json.loads(message)
                _become(argv, environment, fds[1:])
                # /proc/PID/environ shows the memory in which the kernel put the variables
                ctypes.memmove(place, environment[mark].encode(), 32)
                return
            answers = socket.socket(fileno=fds[0])
            with contextlib.suppress(OSError):
                answers.send(str(pid).encode())
            for each in fds[1:]:
                os.close(each)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, answers
            events.register(pidfd, select.POLLIN)


def _become(argv: list[str], environment: dict[str, str], fds: list[int]) -> None:
    """Take the arguments, the environment, the folder and the three streams of a command."""
    os.fchdir(fds[0])
    for stream, fd in enumerate(fds[1:]):
        os.dup2(fd, stream)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["blockcopy", *argv]
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    from blockcopy.cli.main import main

    main()
