"""What a benchmark stands on: a folder, processes, mounts, loop devices. All of it is taken down."""

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
"""In the environment of all that is started, so that what is left of it is found."""

PATIENCE = 30
"""Seconds for what has to happen soon."""

ORDINARY = 65534
"""The user and group that an ordinary user's part is run as, where root runs the benchmark: nobody."""


class BenchError(Exception):
    """Something cannot be measured, or was done wrong by what was measured."""


class Ground:
    def __init__(self, parent: Path | None, checkout: Path) -> None:
        """`checkout` is the one whose blockcopy is measured."""
        self.folder = Path(tempfile.mkdtemp(prefix="blockcopy-bench-", dir=parent)).resolve()
        self.folder.chmod(0o711)  # an ordinary user has a folder in it
        self._log = (self.folder / "log").open("ab", buffering=0)
        namespace.let_everybody_use_fuse(self.folder)
        self.python = sys.executable
        self.blockcopy = [self.python, "-P", "-m", "blockcopy"]
        self._mark = uuid.uuid4().hex
        self._loops: list[str] = []
        self._names = 0
        for package in (checkout / "blockcopy", checkout / "fuse"):
            compileall.compile_dir(package, quiet=2)  # as where it is installed; not each run has to do it again
        python_path = [str(checkout), str(checkout / "fuse"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            MARK: self._mark,
            "PYTHONPATH": ":".join(filter(None, python_path)),
            "STATE_DIRECTORY": str(self.folder / "state"),  # not among the states of the user's own mounts
            "LC_ALL": "C.UTF-8",
        }

    def name(self, what: str) -> Path:
        """A path in the folder that nothing has yet."""
        self._names += 1
        return self.folder / f"{what}-{self._names}"

    # Processes

    def popen(self, words: list[Any], **options: Any) -> subprocess.Popen[bytes]:
        """In a session of its own: a Ctrl-C is ours to tell of."""
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

    def output(self, words: list[Any], right: tuple[int, ...] = (0,), seconds: float = PATIENCE) -> str:
        """What a command prints. BenchError where it fails."""
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
        """What to say of a command that ended so: with the last lines that were logged."""
        last = (self.folder / "log").read_bytes()[-2000:].decode(errors="replace").splitlines()[-12:]
        return "\n    ".join([f"exit status {status}: {' '.join(map(str, words))}", *last])

    # Another user

    def as_ordinary_user(self) -> list[str] | None:
        """What to put before a command to run it as one. None where that cannot be."""
        if os.geteuid() != 0:
            return []
        if not shutil.which("setpriv"):
            return None
        plain = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"]
        # An interpreter in a folder of root's alone: nobody is let read it, and gets no other right.
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
        options = ["--read-only"] if read_only else []
        device = self.output(["losetup", "--find", "--show", *options, file]).strip()
        self._loops.append(device)
        return device

    def detach(self, device: str) -> None:
        self.output(["losetup", "--detach", device])
        self._loops.remove(device)

    def point(self) -> Path:
        """A new folder to mount on."""
        point = self.name("mnt")
        point.mkdir()
        return point

    # The end

    def close(self) -> None:
        """Whatever happened before. Ctrl-C is not heard meanwhile."""
        heard = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
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
        for each, handler in heard.items():
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
    return [os.fsdecode(line.split(b" ")[1]) for line in Path("/proc/mounts").read_bytes().split(b"\n") if line]


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE, pause: float = 0.002) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {seconds:g} seconds")
        time.sleep(pause)


def missing(programs: Mapping[str, str]) -> dict[str, str]:
    """Of programs and the packages they are in, those that are not installed."""
    return {name: package for name, package in programs.items() if not shutil.which(name)}
