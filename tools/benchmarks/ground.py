"""The ground of a benchmark: a folder, processes, mounts, loop devices. All are removed at the end."""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks import namespace

MARK = "BLOCKCOPY_BENCH_ID"
"""An environment variable of all started processes. It finds the processes that are left behind."""

TIME_LIMIT = 30
"""Time limit in seconds of everything that should take a moment."""

ORDINARY = 65534
"""The user and group (nobody) of parts that an ordinary user runs, if root runs the benchmark."""


class BenchError(Exception):
    """A figure that cannot be measured, or a contestant that made a mistake."""


class Ground:
    """A new folder, and all that runs in it. Call `close` at the end."""

    def __init__(self, parent: Path | None, checkout: Path) -> None:
        """Create the folder in `parent`; None: in the temporary folder. `checkout`: of the measured blockcopy."""
        self.folder = Path(tempfile.mkdtemp(prefix="blockcopy-bench-", dir=parent)).resolve()
        self.folder.chmod(0o711)  # an ordinary user enters folders in it
        self._log = (self.folder / "log").open("ab", buffering=0)
        namespace.let_everybody_use_fuse(self.folder)
        self.python = sys.executable
        self.blockcopy = [self.python, "-P", "-m", "blockcopy"]
        self._mark = uuid.uuid4().hex
        self._loops: list[str] = []
        self._names = 0
        for package in (checkout / "blockcopy", checkout / "fuse"):
            compileall.compile_dir(package, quiet=2)  # as installed, so that runs do not compile
        python_path = [str(checkout), str(checkout / "fuse"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            MARK: self._mark,
            "PYTHONPATH": ":".join(filter(None, python_path)),
            "STATE_DIRECTORY": str(self.folder / "state"),  # separate from the state files of the user's mounts
            "LC_ALL": "C.UTF-8",
        }

    def name(self, what: str) -> Path:
        """Return a new path in the folder, which begins with `what`."""
        self._names += 1
        return self.folder / f"{what}-{self._names}"

    # Processes

    def popen(self, words: list[Any], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, so that Ctrl-C reaches only this program.

        Output goes to the log unless `options` (of Popen) say otherwise.
        """
        streams: dict[str, int | IO[bytes]] = {
            "stdin": subprocess.DEVNULL,
            "stdout": self._log,
            "stderr": self._log,
        }
        self._log.write(f"=== {' '.join(map(str, words))}\n".encode())
        return subprocess.Popen(
            list(map(str, words)),
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
            **{**streams, **options},
        )

    def output(self, words: list[Any], right: tuple[int, ...] = (0,), seconds: float = TIME_LIMIT) -> str:
        """Run a command, and return its output. Raises BenchError if it takes longer than `seconds`.

        Also raises BenchError unless the exit status is in `right`.
        """
        process = self.popen(words, stdout=subprocess.PIPE)
        try:
            printed = process.communicate(timeout=seconds)[0].decode()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BenchError(f"not within {seconds} seconds: {' '.join(map(str, words))}") from None
        if process.returncode not in right:
            raise BenchError(self.failure(words, process.returncode))
        return printed

    def failure(self, words: list[Any], status: int) -> str:
        """Return a message about a command that ended with `status`, with the last lines of the log."""
        last = (self.folder / "log").read_bytes()[-2000:].decode(errors="replace").splitlines()[-12:]
        return "\n    ".join([f"exit status {status}: {' '.join(map(str, words))}", *last])

    # Another user

    def as_ordinary_user(self) -> list[str] | None:
        """Return the words before a command that run it as an ordinary user. Returns None if that is impossible."""
        if os.geteuid() != 0:
            return []
        if not shutil.which("setpriv"):
            return None
        plain = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"]
        # The interpreter may be in a folder that only root can read: allow reading, and nothing else.
        reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        check = [*self.blockcopy, "--version"]
        for words in (plain, plain + reading):
            become = [*words, "--", "env", f"HOME={self.folder}"]
            with contextlib.suppress(BenchError):
                self.output([*become, *check])
                return become
        return None

    # Loop devices and mounts

    def attach(self, file: Path, *, read_only: bool = False) -> str:
        """Attach a loop device to `file`. Returns its path."""
        options = ["--read-only"] if read_only else []
        device = self.output(["losetup", "--find", "--show", *options, file]).strip()
        self._loops.append(device)
        return device

    def detach(self, device: str) -> None:
        """Detach a loop device."""
        self.output(["losetup", "--detach", device])
        self._loops.remove(device)

    def point(self) -> Path:
        """Create a mountpoint, and return its path."""
        point = self.name("mnt")
        point.mkdir()
        return point

    # The end

    def close(self) -> None:
        """Kill all processes, and remove all mounts, loop devices and files.

        Ignores Ctrl-C and SIGTERM meanwhile.
        """
        handlers = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(BenchError):
                until(lambda: not self._processes(), "the end of all processes", 10)
        for point in self._mounts():
            leave = ["umount", "--lazy"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            subprocess.run([*leave, point], check=False, stderr=subprocess.DEVNULL)
        for device in self._loops:
            subprocess.run(["losetup", "--detach", device], check=False)
        self._log.close()
        shutil.rmtree(self.folder)
        for each, handler in handlers.items():
            signal.signal(each, handler)

    def _processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_ours = f"{MARK}={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if is_ours and (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z":
                    found.append(int(entry.name))
        return found

    def _mounts(self) -> list[str]:
        return [point for point in mountpoints() if point.startswith(f"{self.folder}/")]


def mountpoints() -> list[str]:
    """Return all mountpoints of this process's namespace."""
    return [os.fsdecode(line.split(b" ")[1]) for line in Path("/proc/mounts").read_bytes().split(b"\n") if line]


def until(condition: Callable[[], object], what: str, seconds: float = TIME_LIMIT, pause: float = 0.002) -> None:
    """Wait until `condition()` is true.

    Raises BenchError about `what` after `seconds`. `pause`: seconds of a poll.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {seconds:g} seconds")
        time.sleep(pause)


def missing(programs: Mapping[str, str]) -> dict[str, str]:
    """Return the part of `programs` (names and their packages) that is not installed."""
    return {name: package for name, package in programs.items() if not shutil.which(name)}
