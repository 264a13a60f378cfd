"""Machines in namespaces: each with a network, processes, mounts and an sshd of its own, on one switch. Needs root.

A machine is one tree of processes. Killing its first one ends all of them at once, and its mounts with them, as a
power cut does. Its disks stay: files below its folder, and loop devices, which belong to the real machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sshd

SECONDS = 20
"""Time limit of everything that should take a moment."""

NETWORK = "10.177.0"

BOOT = """
set -e
read -r _
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/lock
mount --bind "$1/lib" /var/lib
mount --bind "$1/srv" /srv
if [ -x "$1/boot" ]; then "$1/boot"; fi
shift
exec "$@"
"""
"""The first process of a machine. It waits for its network, and becomes the sshd."""


class MachineError(Exception):
    """A machine that did not do what it was made for."""


def run(words: Sequence[object], **options: object) -> str:
    """Run the command `words` with `options` of subprocess.run. Returns its output.

    Raises MachineError if it fails.
    """
    done = subprocess.run(
        [str(each) for each in words],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS * 3,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise MachineError(f"{' '.join(map(str, words))}: exit status {done.returncode}: {done.stderr.strip()}")
    return str(done.stdout)


class Namespaces:
    """A process in namespaces of its own, which holds them. `kinds`: options of unshare(1)."""

    def __init__(self, kinds: Sequence[str], command: Sequence[str], log: Path) -> None:
        words = ["unshare", *kinds, "--fork", "--kill-child=KILL", *command]
        with log.open("ab") as file:
            self._unshare = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
            )
        self.pid = self._child()

    def _child(self) -> int:
        path = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError, IndexError, ValueError):
                return int(path.read_text().split()[0])
            if time.monotonic() > end or self._unshare.poll() is not None:
                raise MachineError("unshare made no namespaces: is this root?")
            time.sleep(0.01)

    def go_on(self) -> None:
        """Tell the first process that it may go on."""
        assert self._unshare.stdin is not None  # noqa: S101 - for mypy; it was opened above
        self._unshare.stdin.write(b"\n")
        self._unshare.stdin.flush()

    def enter(self, *kinds: str) -> list[str]:
        """Return the words that run a command in the namespaces `kinds`, options of nsenter(1)."""
        return ["nsenter", f"--target={self.pid}", *kinds, "--"]

    def kill(self) -> None:
        """Kill all processes inside, and wait for their end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait(timeout=SECONDS)
        if self._unshare.stdin is not None:
            self._unshare.stdin.close()


class Switch:
    """A network without a way out, in which the controller lives as well. Leave the context to end it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = f"{NETWORK}.1"

    def __enter__(self) -> Switch:
        self._space = Namespaces(["--net"], ["sleep", "infinity"], self._folder / "switch.log")
        try:
            ours = os.stat("/proc/self/ns/net").st_ino
            end = time.monotonic() + SECONDS
            while os.stat(f"/proc/{self._space.pid}/ns/net").st_ino == ours and time.monotonic() < end:
                time.sleep(0.01)
            for words in ("link set lo up", "link add br0 type bridge", f"address add {self.address}/24 dev br0"):
                run([*self.enter, "ip", *words.split()])
            run([*self.enter, "ip", "link", "set", "br0", "up"])
        except BaseException:
            self._space.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._space.kill()

    @property
    def enter(self) -> list[str]:
        """The words that run a command in this network."""
        return self._space.enter("--net")

    def plug(self, machine: Namespaces, number: int) -> None:
        """Connect `machine`, and give it the address with `number`."""
        name = f"m{number}"
        with contextlib.suppress(MachineError):  # of a machine that was killed a moment ago
            run([*self.enter, "ip", "link", "delete", name])
        # The same hardware address after each boot: the others remember it.
        hardware = ["address", f"02:00:00:00:00:{number:02x}"]
        add = ["link", "add", name, "type", "veth", "peer", "name", "eth0", *hardware, "netns", machine.pid]
        for words in (add, ["link", "set", name, "master", "br0"], ["link", "set", name, "up"]):
            run([*self.enter, "ip", *words])
        inside = machine.enter("--net")
        for words in ("link set lo up", f"address add {NETWORK}.{number}/24 dev eth0", "link set eth0 up"):
            run([*inside, "ip", *words.split()])


class Machine:
    """A machine `name` at `switch`. `number`: the last part of its address.

    `folder` has its disks and /srv and /var/lib. A program `boot` there runs at each start. `keys`: a folder with
    the one key that reaches all machines.
    """

    def __init__(self, name: str, number: int, switch: Switch, folder: Path, keys: Path) -> None:
        self.name, self.folder, self.address = name, folder, f"{NETWORK}.{number}"
        self._number, self._switch, self._keys = number, switch, keys
        self._space: Namespaces | None = None
        self.kills = 0
        for each in ("srv", "lib", "sshd"):
            (folder / each).mkdir(parents=True)
        for each in ("user", "user.pub"):
            os.link(keys / each, folder / "sshd" / each)

    def start(self) -> None:
        """Boot the machine, and wait until its sshd listens."""
        settings = ("MaxStartups 100", "MaxSessions 100")
        command = sshd.prepare(self.folder / "sshd", 22, *settings, host=self.address)
        kinds = ["--net", "--mount", "--pid", "--propagation=private", "--mount-proc"]
        script = ["bash", "-c", BOOT, "boot", str(self.folder), *command]
        self._space = Namespaces(kinds, script, self.folder / "log")
        self._switch.plug(self._space, self._number)
        self._space.go_on()
        end = time.monotonic() + SECONDS
        while not self._listens():
            if time.monotonic() > end:
                raise MachineError(f"{self.name} did not boot: {(self.folder / 'log').read_text()}")
            time.sleep(0.05)

    def _listens(self) -> bool:
        probe = [*self._switch.enter, "bash", "-c", f"exec 3<>/dev/tcp/{self.address}/22"]
        done = subprocess.run(probe, check=False, stderr=subprocess.DEVNULL)
        return done.returncode == 0

    @property
    def enter(self) -> list[str]:
        """The words that run a command on the machine. Raises MachineError if it does not run."""
        if self._space is None:
            raise MachineError(f"{self.name} is not running")
        return self._space.enter("--net", "--mount", "--pid")

    def run(self, *words: object) -> str:
        """Run a command on the machine. Returns its output. Raises MachineError if it fails."""
        return run([*self.enter, *words])

    def kill(self) -> None:
        """Kill the machine: all its processes end at once, and its mounts are gone."""
        if self._space is not None:
            self._space.kill()
            self._space = None
            self.kills += 1

    def kill_processes(self, *patterns: str) -> int:
        """Kill the processes whose command line matches any of `patterns`, but not the first. Returns how many."""
        count = 0
        for pattern in patterns:
            with contextlib.suppress(MachineError):  # there is none
                for pid in self.run("pgrep", "-f", pattern).split():
                    if pid != "1":
                        with contextlib.suppress(MachineError):
                            self.run("kill", "-KILL", pid)
                            count += 1
        return count


@contextlib.contextmanager
def machines(folder: Path, names: Sequence[str]) -> Iterator[tuple[Switch, dict[str, Machine]]]:
    """Make machines with `names` on one switch. None runs yet. Yields the switch and the machines by name."""
    keys = folder / "keys"
    keys.mkdir()
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "user"])
    with Switch(folder) as switch:
        made = {name: Machine(name, 11 + at, switch, folder / name, keys) for at, name in enumerate(names)}
        try:
            yield switch, made
        finally:
            for each in made.values():
                each.kill()
