"""A guest: a QEMU process, its disks, its ssh, its events, and its power switch.

The guest has no network but its own ssh. Two more ways lead out of it:

    events    a serial port for lines of text: `next_event` returns what the guest wrote to it
    share     a folder of the host, which the guest mounts: mount -t 9p -o trans=virtio share /mnt

An event that was read was written by the guest before any later cut. So events are what a guest has acknowledged.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from debian import ToolError
from guests.image import Image
from libc import end_with_parent

BOOT_SECONDS = 300
"""Time limit of a boot to ssh. It takes 20 s on an idle machine."""

OFF_SECONDS = 180
"""Time limit of an orderly shutdown."""

SSH_OPTIONS = (
    *("BatchMode=yes", "LogLevel=ERROR", "ConnectTimeout=60", "IdentitiesOnly=yes"),
    *("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"),
)
"""The guest's host key is new with each image."""

EVENTS = "/dev/vport0p1"
"""The serial port for events, in the guest. It exists without udev, too."""


class WrongError(Exception):
    """A broken promise of blockcopy, or a fault of the scenario."""


class Disk(NamedTuple):
    """A disk of a guest. `serial`: its serial number in the guest. `place`: a file of raw bytes, or an NBD URL."""

    serial: str
    place: Path | str
    readonly: bool = False


class Machine:
    """A guest. `boot` starts it, again after each end. Use `closing` or a Lab, which ends it in any case.

    `folder`: for its sockets and its log. `archives`: what is carried in. `disks`: /dev/vdb and on.
    `init`: the path in the guest of a program to run instead of systemd, with a root that is mounted read-only.
    """

    def __init__(
        self,
        image: Image,
        folder: Path,
        archives: Sequence[Path],
        disks: Sequence[Disk] = (),
        *,
        init: str | None = None,
        memory: int = 1024,
        cpus: int = 1,
        accel: str = "tcg",
    ) -> None:
        """Make the guest's root, a copy of the image's. `memory`: MiB."""
        self.folder = folder
        self.share = folder / "share"
        self.share.mkdir()
        self.log = folder / "serial.log"
        self._key = image.key
        self._process: subprocess.Popen[bytes] | None = None
        self._events: socket.socket | None = None
        self._unread = b""
        self.port = 0
        """The port of 127.0.0.1 that leads to the guest's ssh."""
        root, initrd = folder / "root.qcow2", folder / "initrd"
        _qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image.root), str(root))
        initrd.write_bytes(b"".join(each.read_bytes() for each in (image.initrd, *archives)))
        line = f"console=ttyS0 loglevel=4 panic=-1 mitigations=off audit=0 {f'ro init={init}' if init else 'rw'}"
        kind = ("kvm", "host") if accel == "kvm" else ("tcg,thread=multi", "qemu64")  # AVX is slow there
        self._command: list[object] = ["qemu-system-x86_64", "-accel", kind[0], "-cpu", kind[1], "-m", memory]
        self._command += ["-smp", cpus, "-nodefaults", "-display", "none", "-no-reboot"]
        self._command += [
            "-serial",
            f"file:{self.log}",
            "-kernel",
            image.kernel,
            "-initrd",
            initrd,
            "-append",
            line,
        ]
        # The serial ports come first, so that they are vport0 of the guest.
        self._command += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=events,name=events"]
        self._command += ["-device", "virtio-rng-pci", "-device", "virtio-net-pci,netdev=net"]
        self._command += ["-chardev", f"socket,id=events,path={folder}/events"]
        self._command += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        self._command += ["-virtfs", f"local,path={self.share},mount_tag=share,security_model=none"]
        self._add_disk(0, Disk("root", f"file:{root}"), "qcow2")
        for number, disk in enumerate(disks, 1):
            self._add_disk(number, disk, "raw")

    def _add_disk(self, number: int, disk: Disk, form: str) -> None:
        readonly = ",readonly=on" * disk.readonly
        # A raw file outlives the guest in any case: no flush is needed. A server gets each flush.
        cache = "" if str(disk.place).startswith("nbd") else ",cache=unsafe"
        place = str(disk.place)
        self._command += [
            *("-drive", f"if=none,id=disk{number},format={form},file={place}{readonly}{cache}"),
            *("-device", f"virtio-blk-pci,drive=disk{number},serial={disk.serial}"),
        ]

    @property
    def is_running(self) -> bool:
        """Whether the guest is powered on."""
        return self._process is not None and self._process.poll() is None

    def boot(self, saved: Path | None = None) -> None:
        """Power on. Returns when QEMU runs; `wait_for_ssh` and `next_event` wait for the guest.

        `saved`: what `save` has made. The guest goes on there. Its disks may hold something else by now.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"
        path = self.folder / "events"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(60)
            incoming = ["-incoming", f"exec:cat {saved}"] if saved else []
            self._process = _start([*self._command, "-netdev", network, *incoming], self.folder / "qemu.log")
            try:
                self._events, _ = listener.accept()
            except TimeoutError:
                self.cut()
                raise ToolError(f"QEMU does not start: {(self.folder / 'qemu.log').read_text()}") from None
        self._unread = b""

    def wait_for_ssh(self) -> None:
        """Wait until the guest's ssh answers. Raises WrongError if it does not within BOOT_SECONDS."""
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end and self.is_running:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2) as probe:
                probe.settimeout(5)  # QEMU accepts before the guest does
                if probe.recv(4) == b"SSH-":
                    return
            time.sleep(0.2)
        raise WrongError(f"the guest's ssh does not answer; its console is in {self.log}")

    def try_ssh(self, command: str, *, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the shell `command` in the guest, as root. Returns its result, whatever its exit status."""
        words = ["ssh", "-F", "none", "-i", str(self._key), "-p", str(self.port)]
        words += [f"-o{each}" for each in SSH_OPTIONS]
        words += ["root@127.0.0.1", "--", command]
        try:
            return subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise WrongError(f"`{command}` does not end within {seconds} s in the guest") from None

    def ssh(self, command: str, *, right: Collection[int] = (0,), seconds: float = 120) -> str:
        """Run the shell `command` in the guest, as root. Returns its output, without white space at the end.

        Raises WrongError if its exit status is none of `right`.
        """
        done = self.try_ssh(command, seconds=seconds)
        if done.returncode not in right:
            raise WrongError(f"`{command}` ended with {done.returncode} in the guest: {done.stdout}{done.stderr}")
        return done.stdout.rstrip()

    def next_event(self, seconds: float) -> str | None:
        """Return the next line that the guest wrote to EVENTS. Returns None if there is none within `seconds`.

        Returns None at once if the guest is off and nothing is left to read.
        """
        if self._events is None:
            raise RuntimeError("never booted")
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            self._events.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = self._events.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return None
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def tell(self, line: str) -> None:
        """Write `line` to the guest's EVENTS, where it can be read."""
        if self._events is None:
            raise RuntimeError("never booted")
        self._events.sendall(f"{line}\n".encode())

    def save(self, path: Path) -> None:
        """Save the memory of the guest in `path`, and end the guest. The guest has nothing of its disks in use."""
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
            connection.connect(f"{self.folder}/qmp")
            stream.readline()

            def execute(command: str, **arguments: object) -> dict[str, Any]:
                stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                stream.flush()
                while "event" in (reply := json.loads(stream.readline())):
                    pass
                if "return" not in reply:
                    raise ToolError(f"QEMU: {command}: {reply}")
                return dict(reply["return"])

            execute("qmp_capabilities")
            execute("migrate", uri=f"exec:cat >{path}")
            while (status := execute("query-migrate")["status"]) not in ("completed", "failed"):
                time.sleep(0.1)
        if status == "failed":
            raise ToolError(f"QEMU cannot save the guest: {(self.folder / 'qemu.log').read_text()}")
        self.cut()

    def power_off(self) -> None:
        """Shut down by ssh, and wait for the end. Raises WrongError if the guest does not end."""
        self.try_ssh("systemctl poweroff")
        self.wait_until_off()

    def wait_until_off(self, seconds: float = OFF_SECONDS) -> None:
        """Wait until the guest has powered off by itself. Raises WrongError if it does not within `seconds`."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise WrongError(
                f"the guest does not power off within {seconds} s; its console is in {self.log}"
            ) from None

    def cut(self) -> None:
        """Cut the power. Returns once the guest is off. Its disks keep what they were given: see `disks`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Cut the power, and close the guest's pipes."""
        self.cut()
        if self._events is not None:
            self._events.close()


def _start(command: Sequence[object], log: Path) -> subprocess.Popen[bytes]:
    """Start QEMU so that it ends with this program, however that ends. Its own messages go to `log`."""
    with log.open("wb") as file:
        try:
            return subprocess.Popen(
                [str(each) for each in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for this program
                preexec_fn=lambda: end_with_parent(signal.SIGKILL),
                env={**os.environ, "TMPDIR": str(log.parent)},
            )
        except FileNotFoundError:
            raise ToolError("qemu-system-x86_64 is not installed here: apt-get install qemu-system-x86") from None


def _qemu(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ToolError(f"{command[0]} is not installed here: apt-get install qemu-utils") from None
    except subprocess.CalledProcessError as error:
        raise ToolError(f"{command[0]}: {error.stderr}") from error
