"""A round: a mount, its readers, and how it comes to its end."""

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
from campaign.ground import MARK, PATIENCE, Ends, WrongError, is_mounted, processes, until
from campaign.reader import TALLIED, TALLY
from checkout import CHECKOUT

BLOCKCOPY = [sys.executable, "-P", "-m", "blockcopy"]
LINK = str(CHECKOUT / "tools/standins/link")
FAULTY = shlex.join([sys.executable, str(CHECKOUT / "tools/standins/faulty_retrieve")])
READERS = 3
TIMEOUT = 2
"""--timeout, in seconds: some freezes are longer."""

PATIENCE_COMPLETE = 120
"""Seconds for the rest of a copy: the next attempt may be 30 s away."""


class Round:
    """One of them. `run` it, then `clear` it up, whatever became of it."""

    def __init__(self, name: str, size: int, folder: Path, totals: Counter[str], verbose: bool) -> None:
        self.choose = random.Random(name)
        self.folder = folder
        self.state, self.cut, self.frozen = folder / "state", folder / "cut", folder / "frozen"
        self.trickling = folder / "trickling"
        self.instead = folder / "instead"
        """As long as it exists: what the source's host runs instead of `retrieve`, for the shell."""
        self.events: list[str] = []
        self.calm_at = 0.0
        """When a mount is no longer refused because of the last cut or freeze."""
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
        self._unread: list[int] = []  # pipes that nobody reads
        self._log = (folder / "log").open("ab", buffering=0)
        self.point = folder / "mnt"
        self.point.mkdir()
        self.file = self.point / "disk"
        self.ends = Ends(folder, size, self.choose)

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:7.3f} {text}"
        self._log.write(f"=== {line}\n".encode())
        if self._verbose:
            print(f"  {line}", flush=True)

    # Processes

    def popen(self, *words: object, stderr: int | None = None) -> subprocess.Popen[bytes]:
        """In a session of its own: a Ctrl-C is ours to tell of."""
        return subprocess.Popen(
            [str(each) for each in words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log if stderr is None else stderr,
            start_new_session=True,
        )

    def blockcopy(self, *words: object, right: Collection[int] = (0,), seconds: float = PATIENCE) -> int:
        """A command, to its end."""
        return self.ended(self.popen(*BLOCKCOPY, *words), f"`blockcopy {words[0]}`", right, seconds)

    def ended(
        self, process: subprocess.Popen[bytes], what: str, right: Collection[int] = (0,), seconds: float = PATIENCE
    ) -> int:
        """Its exit status, one of those that are right."""
        until(lambda: process.poll() is not None, f"the end of {what}", seconds)
        if process.returncode not in right:
            raise WrongError(f"{what} ended with {process.returncode}")
        return process.returncode

    def others(self) -> dict[int, list[str]]:
        """All running processes of this round, but for the readers."""
        readers = {each.pid for each in self._readers.values()}
        return {pid: words for pid, words in processes(self._mark).items() if pid not in readers}

    def await_no_others(self) -> None:
        until(lambda: not self.others(), f"the end of {self.others()}")

    def command(self, name: str) -> list[object]:
        """`mount` or `sync`, and its options. What ssh would be is a script that waits for the link, so that
        a SIGKILL of it is no SIGKILL of the link, which would lose the count."""
        words = ["--cut-while", self.cut, "--freeze-while", self.frozen, "--trickle-while", self.trickling]
        words += ["--count", self.folder / "counts"]
        options: list[object] = ["--state", self.state, "--timeout", TIMEOUT, "--compress", "none"]
        pace = ["--rate", f"{self.choose.randint(8, 20)}M"]
        if self.choose.random() < 0.5:
            words += pace  # of the link, which then has much under way
        else:
            options += ["--limit", pace[1]]  # of the pass
        if self.choose.random() < 0.3:
            words += ["--delay", self.choose.choice([2, 10, 40])]
        for option, chance in (("--verify", 0.2), ("--recheck", 0.1)):
            options += [option] * (self.choose.random() < chance)
        rsh = self.folder / "rsh"
        rsh.unlink(missing_ok=True)  # not overwritten: a shell may be reading it
        rsh.write_text(f'#!/bin/sh\n{shlex.join(map(str, [sys.executable, LINK, *words]))} "$@"\nexit $?\n')
        rsh.chmod(0o700)
        options += ["-e", rsh, "--blockcopy-path", f"sh {self._program()}", f"host:{self.ends.source}"]
        return [*BLOCKCOPY, name, *options, self.ends.destination]

    def _program(self) -> Path:
        """Return the script that the source's host runs."""
        script = self.folder / "program"
        if not script.exists():
            script.write_text(f'[ -e {self.instead} ] && . {self.instead}\nexec {shlex.join(BLOCKCOPY)} "$@"\n')
        return script

    # The mount and its readers

    def up(self, *, unread: bool = False) -> None:
        """Mount, and have readers. A mount is refused, and tried again, while the source is cut off.

        `unread`: nobody reads what the mount says.
        """
        while not self._mounts(unread=unread):
            self._totals["mounts refused while the link was down"] += 1
            until(lambda: time.monotonic() > self.calm_at, "the link")
        self._totals["mounts"] += 1
        self.start_readers()

    def _mounts(self, *, unread: bool) -> bool:
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
        """Return its end to write to. The other end is closed, or open and the pipe soon full."""
        reader, writer = os.pipe()
        if self.choose.random() < 0.5:
            os.close(reader)
        else:
            fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ: Python 3.10
            self._unread.append(reader)
        return writer

    def down(self, *, kill: bool) -> None:
        """No mount any more, nor what belongs to it. Readers live on where it was killed."""
        process = self._mount
        if process is None or process.poll() is not None:
            raise WrongError(f"the mount ended by itself, with {process and process.returncode}")
        self.say("kill -9 of the mount" if kill else "umount")
        if kill:
            process.kill()
            process.wait(PATIENCE)
        else:
            self.stop_readers()
        # Refused as busy, which is 4, while a reader has not noticed its death, or a prefetch asks for its status.
        while (status := self.blockcopy("umount", self.point, right=(0, 4, 75))) == 4:
            time.sleep(0.01)
        if not kill:
            self.ended(process, "the mount", {0, 75})  # 75: it was not complete yet
            if status == 0 and (differing := self.ends.differing()):
                raise WrongError(f"{differing} bytes are in blocks that differ, though umount ended with 0")
        for each in self._prefetches:
            self.ended(each, "`blockcopy prefetch`", (0, 3, 4))
        self._prefetches.clear()
        if is_mounted(self.point):
            raise WrongError("it is still mounted")
        self._mount = None
        self.await_no_others()

    def start_readers(self) -> None:
        for number in {*range(READERS)} - self._readers.keys():
            self._started += 1
            tally = self.folder / f"reader.{self._started}"
            tally.write_bytes(bytes(TALLY.size))
            words = [self.file, self.ends.source_file, tally, self.choose.random()]
            self._readers[number] = self.popen(sys.executable, "-E", "-s", "-S", reader.__file__, *words)

    def stop_readers(self, numbers: Collection[int] = range(READERS)) -> None:
        for process in filter(None, [self._readers.pop(number, None) for number in numbers]):
            if process.poll() is not None:
                raise WrongError(f"a reader ended by itself, with {process.returncode}")
            process.kill()
            process.wait(PATIENCE)

    def tally(self) -> Counter[str]:
        """Of all readers, those that are gone too."""
        counts: Counter[str] = Counter(dict.fromkeys(TALLIED, 0))
        for each in self.folder.glob("reader.*[0-9]"):
            counts.update(dict(zip(TALLIED, TALLY.unpack(each.read_bytes()))))
        return counts

    def disturb(self, sign: Path, seconds: float, text: str = "") -> None:
        """`sign` is there for so long from now on, with this text in it."""
        sign.write_text(text)
        self._timers.append(threading.Timer(seconds, sign.unlink, [True]))
        self._timers[-1].start()
        self.calm_at = max(self.calm_at, time.monotonic() + seconds + 1)

    def prefetch(self, *extents: str) -> None:
        """Does not wait for it."""
        self._prefetches.append(self.popen(*BLOCKCOPY, "prefetch", self.point, *extents))

    # From its beginning to its end

    def run(self, events: Mapping[str, tuple[int, Callable[[Round], object]]]) -> None:
        """WrongError."""
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
        self.blockcopy("wait", self.point, seconds=PATIENCE_COMPLETE)
        self.say("complete")
        self.down(kill=False)
        if differing := self.ends.differing():
            raise WrongError(f"{differing} bytes are in blocks that differ in the end")
        self.check_readers()

    def check_readers(self) -> None:
        if wrong := self.tally()["wrong reads"]:
            raise WrongError(f"{wrong} wrong reads")

    def count(self) -> None:
        """Add to the totals, for a round that has ended well."""
        self._totals.update(self.tally())
        self._totals.update(f"survived: {event}" for event in self.events)
        lines = [line.split() for line in (self.folder / "counts").read_text().splitlines()]
        answered = sum(int(down) for _, down in lines)
        self._totals["connections"] += len(lines)
        self._totals["bytes on the wire: asked"] += sum(int(up) for up, _ in lines)
        self._totals["bytes on the wire: answered"] += answered
        # Whatever was answered beyond the blocks that had to be brought crossed twice, or got lost on its way.
        # An upper bound: greetings (2.5 KB a connection), headers (16 bytes a block) and fences are in it.
        self._totals["bytes on the wire: answered twice"] += answered - self.ends.needed

    def clear(self) -> list[str]:
        """Whatever is left is taken away, and told."""
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
            self._mount.wait(PATIENCE)
        until(lambda: not self.others(), "the end of what was killed")
        self._log.close()
        for each in self._unread:
            os.close(each)
        self._unread.clear()
        return left + self.ends.detach()
