"""A round: a mount, its readers and its commands, from the start to the checks at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from campaign import reader
from campaign.ground import MARK, TIME_LIMIT, Ends, WrongError, is_mounted, processes, until
from campaign.reader import TALLIED, TALLY
from checkout import CHECKOUT

BLOCKCOPY = [sys.executable, "-P", "-m", "blockcopy"]
LINK = str(CHECKOUT / "tools/standins/link")
FAULTY = shlex.join([sys.executable, str(CHECKOUT / "tools/standins/faulty_retrieve")])
READERS = 3
TIMEOUT = 2
"""The --timeout of the mounts, in seconds. Some freezes are longer."""

COMPLETION_LIMIT = 120
"""Time limit in seconds for completing a copy. The next attempt to connect may be 30 s away."""


class Round:
    """One round. Call `run`, then always `clean_up`.

    `name` seeds all choices. `size`: bytes of the source. `totals`: counts of all rounds, to add to.
    """

    OPTIONS: tuple[tuple[str, float], ...] = (("--verify", 0.2), ("--recheck", 0.1))
    """Options of `mount` and `sync`, and how likely each is."""

    MOUNT_OPTIONS: tuple[object, ...] = ()
    """Options of each mount."""

    ENDS: type[Ends] = Ends

    def __init__(self, name: str, size: int, folder: Path, totals: Counter[str], verbose: bool) -> None:
        self.choose = random.Random(name)
        self.connections: int | None = None
        """The value of --connections. None: the default."""
        self.folder = folder
        self.state, self.cut, self.frozen = folder / "state", folder / "cut", folder / "frozen"
        self.trickling = folder / "trickling"
        self.instead = folder / "instead"
        """While this file exists, the source's host runs its shell commands instead of `retrieve`."""
        self.events: list[str] = []
        self.calm_at = 0.0
        """The monotonic time from which a mount may no longer fail because of the last disturbance."""
        self._totals = totals
        self._verbose = verbose
        self._began = time.monotonic()
        self._mark = uuid.uuid4().hex
        python_path = [str(CHECKOUT), str(CHECKOUT / "fuse"), os.environ.get("PYTHONPATH", "")]
        self._environment = {
            **os.environ,
            MARK: self._mark,
            "PYTHONPATH": ":".join(filter(None, python_path)),
            "STATE_DIRECTORY": str(folder / "states"),
        }
        self._timers: list[threading.Timer] = []
        self._readers: dict[int, subprocess.Popen[bytes]] = {}
        self._started = 0  # readers
        self._prefetches: list[subprocess.Popen[bytes]] = []
        self._mount: subprocess.Popen[bytes] | None = None
        self._unread: list[int] = []  # read ends of pipes that nobody reads
        self._log = (folder / "log").open("ab", buffering=0)
        self.point = folder / "mnt"
        self.point.mkdir()
        self.file = self.point / "disk"
        self.ends = self.ENDS(folder, size, self.choose)

    def say(self, text: str) -> None:
        """Write `text` and the time to the log, and to standard output if verbose."""
        line = f"{time.monotonic() - self._began:7.3f} {text}"
        self._log.write(f"=== {line}\n".encode())
        if self._verbose:
            print(f"  {line}", flush=True)

    # Processes

    def popen(self, *command: object, stderr: int | None = None) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, so that Ctrl-C reaches only this program.

        `stderr`: a file descriptor, by default the log's.
        """
        return subprocess.Popen(
            [str(each) for each in command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log if stderr is None else stderr,
            start_new_session=True,
        )

    def blockcopy(self, *words: object, right: Collection[int] = (0,), seconds: float = TIME_LIMIT) -> int:
        """Run `blockcopy` with the arguments `words`. Returns and raises as `wait_for`."""
        return self.wait_for(self.popen(*BLOCKCOPY, *words), f"`blockcopy {words[0]}`", right, seconds)

    def wait_for(
        self,
        process: subprocess.Popen[bytes],
        what: str,
        right: Collection[int] = (0,),
        seconds: float = TIME_LIMIT,
    ) -> int:
        """Wait for the end of `process`, at most `seconds`. Returns its exit status. `what`: its name for messages.

        Raises WrongError if the status is not in `right`, or if time is up.
        """
        until(lambda: process.poll() is not None, f"the end of {what}", seconds)
        if process.returncode not in right:
            raise WrongError(f"{what} ended with {process.returncode}")
        return process.returncode

    def others(self) -> dict[int, list[str]]:
        """Return the arguments of all running processes of this round except the readers, by process id."""
        readers = {each.pid for each in self._readers.values()}
        return {pid: words for pid, words in processes(self._mark).items() if pid not in readers}

    def await_no_others(self) -> None:
        """Wait until only readers run. Raises WrongError if other processes do not end."""
        until(lambda: not self.others(), f"the end of {self.others()}")

    def command(self, name: str) -> list[object]:
        """Return a command line of `name` (`mount` or `sync`) with random options, without a mountpoint.

        In place of ssh stands a script that waits for the link. So a SIGKILL of the script does not reach the
        link, which would lose its count.
        """
        link = ["--cut-while", self.cut, "--freeze-while", self.frozen, "--trickle-while", self.trickling]
        link += ["--count", self.folder / "counts"]
        options: list[object] = ["--state", self.state, "--timeout", TIMEOUT, "--compress", "none"]
        rate = self.rate()
        if self.choose.random() < 0.5:
            link += ["--rate", rate]  # then much is in flight on the link
        else:
            options += ["--limit", rate]  # limits background hydration
        if self.choose.random() < 0.3:
            link += ["--delay", self.choose.choice([2, 10, 40])]
        if name == "mount":
            options += self.MOUNT_OPTIONS
        if self.connections is not None:
            options += ["--connections", self.connections]
        for option, chance in self.OPTIONS:
            options += [option] * (self.choose.random() < chance)
        rsh = self.folder / "rsh"
        rsh.unlink(missing_ok=True)  # not overwritten: a shell may be reading the old script
        rsh.write_text(f'#!/bin/sh\n{shlex.join(map(str, [sys.executable, LINK, *link]))} "$@"\nexit $?\n')
        rsh.chmod(0o700)
        options += ["-e", rsh, "--blockcopy-path", f"sh {self._program()}", f"host:{self.ends.source}"]
        return [*BLOCKCOPY, name, *options, self.ends.destination]

    def rate(self) -> str:
        """Return a random rate of the link or of background hydration, in bytes per second."""
        return f"{self.choose.randint(8, 20)}M"

    def _program(self) -> Path:
        """Write the script that the source's host runs, if missing. Returns its path."""
        script = self.folder / "program"
        if not script.exists():
            script.write_text(f'[ -e {self.instead} ] && . {self.instead}\nexec {shlex.join(BLOCKCOPY)} "$@"\n')
        return script

    # The mount and its readers

    def up(self, *, unread: bool = False) -> None:
        """Mount, and start the readers. Repeats a mount that fails while the source is cut off.

        `unread`: nobody reads the mount's standard error. Raises WrongError if the mount fails otherwise.
        """
        while not self._mounts(unread=unread):
            self._totals["mounts refused while the link was down"] += 1
            until(lambda: time.monotonic() > self.calm_at, "the link")
        self._totals["mounts"] += 1
        self.start_readers()

    def _mounts(self, *, unread: bool) -> bool:
        """Start a mount, and wait until it serves or ends. Returns False if it ended because of a disturbance."""
        was_calm = time.monotonic() > self.calm_at
        words = [*self.command("mount"), self.point, "-f", "--name", self.file.name]
        stderr = None
        if unread:
            words += ["--progress", "--log-file", self.folder / "log.unread"]
            stderr = self._pipe_that_nobody_reads()
        self._mount = process = self.popen(*words, stderr=stderr)
        if stderr is not None:
            os.close(stderr)
        until(lambda: is_mounted(self.point) or process.poll() is not None, "the mount")
        if process.poll() is not None and (was_calm or process.returncode != 3):
            raise WrongError(f"the mount ended with {process.returncode} before it served")
        return process.returncode is None

    def _pipe_that_nobody_reads(self) -> int:
        """Return the write end of a new pipe. The read end is closed, or stays open until the pipe is full."""
        reader, writer = os.pipe()
        if self.choose.random() < 0.5:
            os.close(reader)
        else:
            fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ: Python 3.10
            self._unread.append(reader)
        return writer

    def down(self, *, kill: bool) -> None:
        """Unmount, or kill the mount if `kill`, and wait until its processes are gone. Readers survive a kill.

        Raises WrongError if anything fails or is left behind.
        """
        process = self._mount
        if process is None or process.poll() is not None:
            raise WrongError(f"the mount ended by itself, with {process and process.returncode}")
        self.say("kill -9 of the mount" if kill else "umount")
        if kill:
            process.kill()
            process.wait(TIME_LIMIT)
        else:
            self.stop_readers()
        # Ends with 4 (busy) while a reader has not noticed the death, or a prefetch asks for the status.
        while (status := self.blockcopy("umount", self.point, right=(0, 4, 75))) == 4:
            time.sleep(0.01)
        if not kill:
            self.wait_for(process, "the mount", {0, 75})  # 75: the copy is not complete yet
            if status == 0:
                self.check_copy()
        for each in self._prefetches:
            self.wait_for(each, "`blockcopy prefetch`", (0, 3, 4))
        self._prefetches.clear()
        if is_mounted(self.point):
            raise WrongError(f"{self.point} is still mounted")
        self._mount = None
        self.await_no_others()

    def start_readers(self) -> None:
        """Start readers until there are READERS."""
        for number in {*range(READERS)} - self._readers.keys():
            self._started += 1
            tally = self.folder / f"reader.{self._started}"
            tally.write_bytes(bytes(TALLY.size))
            words = [self.file, self.ends.source_file, tally, self.choose.random()]
            self._readers[number] = self.popen(sys.executable, "-E", "-s", "-S", reader.__file__, *words)

    def stop_readers(self, numbers: Collection[int] = range(READERS)) -> None:
        """Kill the readers with these numbers. Raises WrongError if one ended before."""
        for process in filter(None, [self._readers.pop(number, None) for number in numbers]):
            if process.poll() is not None:
                raise WrongError(f"a reader ended by itself, with {process.returncode}")
            process.kill()
            process.wait(TIME_LIMIT)

    def tally(self) -> Counter[str]:
        """Return the counts of all readers so far, dead ones included, by the names of TALLIED."""
        counts: Counter[str] = Counter(dict.fromkeys(TALLIED, 0))
        for each in self.folder.glob("reader.*[0-9]"):
            counts.update(dict(zip(TALLIED, TALLY.unpack(each.read_bytes()))))
        return counts

    def disturb(self, sign: Path, seconds: float, text: str = "") -> None:
        """Create the file `sign` with `text`, and remove it after `seconds`. Returns at once."""
        sign.write_text(text)
        self._timers.append(threading.Timer(seconds, sign.unlink, [True]))
        self._timers[-1].start()
        self.calm_at = max(self.calm_at, time.monotonic() + seconds + 1)

    def prefetch(self, *extents: str) -> None:
        """Start a prefetch of `extents` (OFFSET:LENGTH), without waiting for it."""
        self._prefetches.append(self.popen(*BLOCKCOPY, "prefetch", self.point, *extents))

    # From its beginning to its end

    def run(self, events: Mapping[str, tuple[int, Callable[[Round], object]]]) -> None:
        """Run random `events`, complete the copy, and check all bytes. Raises WrongError if anything is wrong."""
        self.ends.make()
        self.say(str(self.ends))
        self.up()
        for _ in range(self.choose.randint(5, 10)):
            time.sleep(self.choose.uniform(0.05, 0.4))
            [name] = self.choose.choices(list(events), [weight for weight, _ in events.values()])
            self.say(name)
            self.events.append(name)
            events[name][1](self)
            self.check_readers()
        self.say("completing")
        for timer in self._timers:
            timer.join()
        self.blockcopy("limit", self.point, "none")
        self.blockcopy("resume", self.point)
        self.blockcopy("wait", self.point, seconds=COMPLETION_LIMIT)
        self.say("complete")
        self.down(kill=False)
        self.check_copy()
        self.check_readers()

    def check_copy(self) -> None:
        """Compare both ends of a complete copy. Raises WrongError if they differ."""
        if differing := self.ends.differing():
            raise WrongError(f"the copy is complete, but differing blocks have {differing} bytes")

    def check_readers(self) -> None:
        """Raise WrongError if a reader has read wrong bytes."""
        if wrong := self.tally()["wrong reads"]:
            raise WrongError(f"{wrong} wrong reads")

    def count(self) -> None:
        """Add the counts of this round to the totals. Call for a passed round only."""
        self._totals.update(self.tally())
        self._totals.update(f"survived: {event}" for event in self.events)
        lines = [line.split() for line in (self.folder / "counts").read_text().splitlines()]
        answered = sum(int(down) for _, down in lines)
        self._totals["connections"] += len(lines)
        self._totals["bytes on the wire: requests"] += sum(int(up) for up, _ in lines)
        self._totals["bytes on the wire: answers"] += answered
        # Answers beyond the needed blocks crossed the link twice, or got lost on the way. This is an upper
        # bound: it includes greetings (2.5 KB a connection), headers (16 bytes a block) and fences.
        self._totals["bytes on the wire: repeated answers"] += answered - self.ends.needed

    def clean_up(self) -> list[str]:
        """Remove everything that the round left behind. Returns descriptions of what should not have been left."""
        for timer in self._timers:
            timer.cancel()
        for process in (*self._readers.values(), *self._prefetches):
            process.kill()
            process.wait()
        self._readers.clear()
        left = [f"process {pid} {shlex.join(words)}" for pid, words in self.others().items()]
        for pid in self.others():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if is_mounted(self.point):
            left.append(f"mount {self.point}")
            subprocess.run(["fusermount3", "-u", "-z", self.point], check=False)
        if self._mount is not None:
            self._mount.wait(TIME_LIMIT)
        until(lambda: not self.others(), "the end of the killed processes")
        self._log.close()
        for each in self._unread:
            os.close(each)
        self._unread.clear()
        return left + self.ends.detach()
