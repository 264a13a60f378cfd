"""Helpers of the tests: data, commands, mounts, an sshd, and the search for what a test leaves behind."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from forkserver import ForkServer

from blockcopy.block import syscalls
from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.block.identity import sample_extents
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.wire import Done, Message
from blockcopy.replica.engine import open_replica
from blockcopy.replica.plan import Plan
from blockcopy.replica.replica import Replica
from sshd import Sshd as Sshd

for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(
        name, None
    )  # few users set these variables, and they hide faults: output that fails when it is flushed

PYTHON = sys.executable
BLOCKCOPY = [PYTHON, "-P", "-m", "blockcopy"]
STANDINS = Path(__file__).resolve().parent.parent / "tools" / "standins"
QUEUEING = f"{PYTHON} {STANDINS / 'queueing_retrieve'}"
"""The --blockcopy-path of the stand-in for the original's `retrieve`."""
FAULTY = f"{PYTHON} {STANDINS / 'faulty_retrieve'}"
"""The --blockcopy-path of our own `retrieve` with faults. Nobody asks it for a sample, so answer 1 is a block."""

TEST_ID = "BLOCKCOPY_TEST_ID"
"""An environment variable of every process that a test starts. It identifies processes that are left behind."""

PATIENCE = 20
"""Seconds that `until` and `run` wait."""

SERVERS: list[ForkServer] = []
"""The process that forks for the commands of `run`, during a session of tests."""

Text = str | bytes
Finished = subprocess.CompletedProcess[bytes] | subprocess.CompletedProcess[str]

needs_views = pytest.mark.skipif(
    not syscalls.populate_returns(os.uname().release), reason="this kernel would hang at a read error: no views"
)
"""The mark of a test of views of the page cache. Older kernels only read, as all other tests show there."""


# Data


def noise(size: int, seed: int = 1) -> bytes:
    """Return `size` random bytes, the same for each call with `seed`."""
    return random.Random(seed).randbytes(size)


def with_changes(data: bytes, blocks: list[int], block_size: int = BLOCK_SIZE) -> bytes:
    """Return `data` with one byte changed in each of `blocks`: block numbers, in blocks of `block_size` bytes."""
    changed = bytearray(data)
    for block in blocks:
        changed[min(block * block_size + 7, len(data) - 1)] ^= 0xFF
    return bytes(changed)


def written(path: Path, data: bytes) -> Path:
    """Write `data` to the file `path`, and return `path`."""
    path.write_bytes(data)
    return path


def pairwise(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return combinations in which any two values of two parameters occur together at least once.

    `parameters`: the values of each parameter. The list is short, not the shortest; each call returns the
    same list. Greedy: the next combination is the one with the most pairs that are still missing.
    """
    lists = [list(values) for values in parameters]

    def pairs(indexes: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(indexes), 2))

    candidates = {each: pairs(each) for each in itertools.product(*(range(len(values)) for values in lists))}
    missing = set().union(*candidates.values())
    chosen = []
    while missing:
        best = max(candidates, key=lambda each: len(candidates[each] & missing))
        missing -= candidates[best]
        chosen.append(tuple(values[index] for values, index in zip(lists, best, strict=True)))
    return chosen


# Streams


class FedDecoder(Decoder):
    """A decoder that gets bytes by hand instead of reading a stream. Earlier payloads stay valid."""

    done = False
    """Whether the message `done` was read. All further bytes are ignored."""

    def next(self) -> Message | None:
        """Parse and return the next message. Returns None if more bytes are needed, or after `done`."""
        message = None if self.done else super().next()
        self.done = self.done or isinstance(message, Done)
        return message

    def feed(self, data: Buffer) -> None:
        """Accept `data`, the next bytes of the stream."""
        if not self.done:
            self._buffer = memoryview(bytearray(self._buffer[self._at : self._end]) + data)
            self._at, self._end = 0, len(self._buffer)

    def feed_eof(self) -> None:
        """Accept the end of the stream. Raises TruncatedStreamError unless the message `done` was read."""
        if not self.done:
            raise self._ended_early()


def served(parts: list[bytes]) -> Callable[[memoryview], int]:
    """Return a function that reads `parts` as `Decoder.messages` wants it: each part in one read or more."""
    stream = b"".join(parts)
    ends = list(itertools.accumulate(map(len, parts)))
    at = 0

    def read_into(room: memoryview) -> int:
        nonlocal at
        found = bisect.bisect(ends, at)
        count = min(len(room), ends[found] - at) if found < len(ends) else 0
        room[:count] = stream[at : at + count]
        at += count
        return count

    return read_into


# Commands


def sample_answers(size: int) -> int:
    """Return the number of answers of QUEUEING before the first block of a connection: a sample, and its proof.

    `size`: bytes of the source.
    """
    return len(sample_extents(size)) + 1


def run(*args: object, input: bytes | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a blockcopy command to its end, and return its status and output. `input`: its standard input.

    The command is a fork of a Python that has imported the program (see `forkserver`). With other `options` of
    subprocess.run than `cwd`, Python is started for the command.
    Raises subprocess.TimeoutExpired after `PATIENCE` seconds.
    """
    command = [*BLOCKCOPY, *map(str, args)]
    if SERVERS and not options.keys() - {"cwd"}:
        return subprocess.CompletedProcess(
            command, *SERVERS[0].run(command[len(BLOCKCOPY) :], input, PATIENCE, **options)
        )
    return start(*args, input=input, **options)


def start(*args: object, input: bytes | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Start Python to run a blockcopy command, as users do. Otherwise as `run`."""
    return subprocess.run(
        [*BLOCKCOPY, *map(str, args)], input=input, capture_output=True, timeout=PATIENCE, check=False, **options
    )


def succeeded(done: Finished, text: Text | None = "", *, stdout: Text | None = None) -> None:
    """Check that the command `done` ended with status 0 and has `text` in its standard error.

    Without `text`, its standard error must be empty; with None, it may say anything. `stdout`: the whole of
    its standard output, if given.
    Raises AssertionError that shows status, standard output and standard error.
    """
    _ended(done, 0, text or "", stdout)
    assert text != "" or not done.stderr, _report(done, "nothing in its standard error")


def failed(done: Finished, status: int, text: Text = "", *, stdout: Text | None = None) -> None:
    """Check that the command `done` ended with `status` and has `text` in its standard error.

    `stdout`: the whole of its standard output, if given. Raises AssertionError as `succeeded` does.
    """
    _ended(done, status, text, stdout)


def _ended(done: Finished, status: int, text: Text, stdout: Text | None) -> None:
    assert done.returncode == status, _report(done, f"status {status}", text)
    assert _str(text) in _str(done.stderr or ""), _report(done, f"{_str(text)!r} in its standard error")
    assert stdout is None or _str(done.stdout) == _str(stdout), _report(done, f"standard output {stdout[:1000]!r}")


def _report(done: Finished, *expected: Text) -> str:
    """Return what a failed check shows of a command."""
    wanted = ", ".join(_str(each) for each in expected if each)
    return (
        f"expected {wanted}\ncommand: {done.args}\nstatus: {done.returncode}\n"
        f"standard output: {(done.stdout or '')[:1000]!r}\nstandard error:\n{_str(done.stderr or '')}"
    )


def _str(text: Text) -> str:
    return text if isinstance(text, str) else os.fsdecode(text)


def output(*args: object) -> str:
    """Run another program, and return its standard output. Raises AssertionError if the program fails."""
    done = subprocess.run([str(each) for each in args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{args}: {done.stderr}"
    return done.stdout


def until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until `condition()` is true. For conditions that no other process reports.

    Raises AssertionError with `what` after `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    pauses = _pauses()
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(next(pauses))


def _pauses() -> Iterator[float]:
    """Yield seconds between two checks: short ones first, because a check costs the time of the others."""
    pause = 0.005
    while True:
        yield pause
        pause = min(1.3 * pause, 0.04)


def errno_of(action: Callable[[], object]) -> int | None:
    """Return the errno that `action()` fails with. Returns None if it does not fail."""
    try:
        action()
    except OSError as error:
        return error.errno
    return None


# Destinations in use

_HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | int(sys.argv[2]))
if not int(sys.argv[2]):
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another_process(path: object, flags: int = 0) -> Iterator[None]:
    """Hold the file or device `path` open with `flags` in another process. Without `flags`, it is locked there."""
    command = [PYTHON, "-c", _HOLD, str(path), str(flags)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.communicate()


@contextlib.contextmanager
def mounted(device: str, point: Path) -> Iterator[None]:
    """Make an ext4 on `device`, and mount the file system at `point`, which must not exist yet."""
    output("mkfs.ext4", "-q", "-F", device)
    point.mkdir()
    output("mount", device, point)
    try:
        yield
    finally:
        output("umount", point)


# Replicas in this process


@contextlib.asynccontextmanager
async def replica_of(plan: Plan) -> AsyncIterator[Replica]:
    """Open the replica of `plan`, with a time limit. A single error comes out of its groups."""
    with trio.fail_after(40):
        try:
            async with open_replica(plan) as replica:
                yield replica
        except ExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None


# Requirements: if one is missing, the test is skipped. With BLOCKCOPY_REQUIRE_FUSE=1, as in CI, it fails


def require(present: bool, reason: str) -> None:
    """Skip the test with `reason` unless `present` is true."""
    if present:
        return
    if os.environ.get("BLOCKCOPY_REQUIRE_FUSE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def require_fuse() -> None:
    """Skip the test if FUSE is not available."""
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse cannot be used here")
    require(shutil.which("fusermount3") is not None, "fusermount3 is not installed")


def require_root() -> None:
    """Skip the test if there are no loop devices, or this user is not root."""
    require(os.geteuid() == 0, "loop devices need root")
    require(os.path.exists("/dev/loop-control"), "there are no loop devices here")


def require_sshd() -> None:
    """Skip the test if sshd is not installed."""
    require(shutil.which("sshd", path="/usr/sbin:/usr/bin") is not None, "sshd is not installed")


# Mounts


class Mount:
    """A replica that `blockcopy mount` serves. `file` is the path of the file in the mount."""

    def __init__(
        self,
        point: Path,
        source: object,
        destination: object,
        *options: object,
        program: str | None = None,
        wait: bool = False,
    ) -> None:
        """Mount `source` and `destination` at `point` with `options`. `program`: the --blockcopy-path.

        With `wait`, also wait until the copy is complete. Raises AssertionError if the command fails.
        """
        self.point = point
        more = ["--blockcopy-path", program] if program else []
        done = run("mount", *options, *more, source, destination, point)
        assert done.returncode == 0, done.stderr.decode()
        name = options[options.index("--name") + 1] if "--name" in options else Path(str(destination)).name
        self.file = point / str(name)
        if wait:
            self.wait()

    def status(self) -> dict[str, Any]:
        """Return the status, as the mount serves it in status.json."""
        return json.loads((self.point / "status.json").read_bytes())  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait until the copy is complete, as `blockcopy wait` does."""
        until(lambda: self.status()["state"] in ("complete", "failed"), "the end of the copy")
        assert self.status()["state"] == "complete", self.status()["error"]

    def umount(self) -> None:
        """Unmount by `blockcopy umount`. The copy may be incomplete."""
        done = run("umount", self.point)
        assert done.returncode in (0, 75), done.stderr.decode()  # 75: not complete yet

    def retrievers(self) -> list[int]:
        """Return the process ids of the mount's `retrieve` processes."""
        return children(self.status()["pid"])

    def clear(self) -> None:
        """Remove the mount after the test, in whatever state it is, and wait until its process ends."""
        pids = []
        with contextlib.suppress(OSError, ValueError):
            pids.append(self.status()["pid"])
        if str(self.point) in fuse_mounts():
            subprocess.run(["fusermount3", "-u", "-z", str(self.point)], check=False)
        for pid in pids:
            with contextlib.suppress(AssertionError):
                until(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def killed(mounted: Mount) -> None:
    """Kill the program of the mount, and remove the dead mount."""
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))
    mounted.clear()


def fuse_mounts(below: Path = Path("/")) -> set[str]:
    """Return the mountpoints of replicas and faulty disks `below` a folder."""
    kinds = {"fuse.blockcopy", "fuse.disk", "fuse.faulty_disk"}
    table = Path("/proc/mounts").read_bytes().split(b"\n")
    lines = (os.fsdecode(line).split(" ") for line in table if b" fuse." in line)
    points = {point.replace("\\040", " ") for _, point, kind, *_ in lines if kind in kinds}
    return {point for point in points if Path(point).is_relative_to(below)}


def clear_mounts(points: set[str]) -> set[str]:
    """Unmount `points` lazily, and return them."""
    for point in points:
        subprocess.run(["fusermount3", "-u", "-z", point], check=False)
    return points


# Processes and descriptors


def alive(pid: int) -> bool:
    """Return whether process `pid` runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Return the process ids of the children of `pid`, without zombies.

    The file `children` of proc(5) is no source: it can miss some while others come and go.
    """
    found = []
    for each in processes():
        with contextlib.suppress(OSError), open(f"/proc/{each}/stat", "rb", buffering=0) as stat:
            state, parent = stat.read().rpartition(b")")[2].split()[:2]
            if int(parent) == pid and state != b"Z":
                found.append(each)
    return found


def is_shared(pid: int) -> bool:
    """Return whether the tests of a session share the process `pid`: the sshd and the fork server."""
    if pid in {server.pid for server in SERVERS}:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace") == "sshd\n"
    return False


def peak_memory(pid: int) -> int:
    """Return the peak memory of process `pid` in bytes, as the kernel accounts it (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmHWM of {pid}")


def processes() -> set[int]:
    """Return the process ids of this machine."""
    return set(map(int, filter(str.isdigit, os.listdir("/proc"))))


def _marked(mark: str, before: set[int]) -> list[int]:
    """Return the running processes whose environment has `mark` as `TEST_ID`, without those in `before`."""
    found, wanted = [], f"{TEST_ID}={mark}\0".encode()
    for pid in processes() - before:
        # a plain read, because this runs after each test
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb", buffering=0) as environment:
            if wanted in environment.read() and alive(pid):
                found.append(pid)
    return found


def reap(mark: str, before: set[int]) -> list[str]:
    """Kill the processes of a test that do not end by themselves, and return their command lines.

    `mark`: the value of `TEST_ID` in their environment. They have 10 seconds to end.
    `before`: the processes that ran before the test, which are not looked at.
    """
    end = time.monotonic() + 10
    pauses = _pauses()
    while (pids := _marked(mark, before)) and time.monotonic() < end:
        time.sleep(next(pauses))
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            left.append(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")))
            os.kill(pid, signal.SIGKILL)
    return left


def threads_left(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads that are not in `before` and do not end within `PATIENCE` seconds.

    Idle threads of trio do not count: trio keeps them for the next task.
    """

    def left() -> set[threading.Thread]:
        return {each for each in set(threading.enumerate()) - before if not each.name.startswith("Trio thread")}

    with contextlib.suppress(AssertionError):
        until(lambda: not left())
    return left()


def descriptors() -> set[str]:
    """Return the open file descriptors of this process, as "number → target"."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            # memfds and logs of the test runner itself come and go
            found.add(f"{entry} → {target}")
    return {each for each in found if "/proc/" not in each}
