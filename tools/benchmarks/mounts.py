"""Mounts to read from: blockcopy's, and those of the installed peers. Each is a context manager."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import LINK
from benchmarks.ground import TIME_LIMIT, BenchError, Ground, mountpoints, until
from benchmarks.measure import wait

EXAMPLE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")


@dataclass
class Mounted:
    """A mount that is served."""

    file: Path
    """The file that shows the source."""
    process: subprocess.Popen[bytes]
    """The process that serves the mount."""
    point: Path
    cpu: float = 0.0
    """CPU seconds of the process and the children that it waited for. Set at the end."""


@contextmanager
def served(ground: Ground, words: list[Any], point: Path, file: Path, **options: Any) -> Iterator[Mounted]:
    """Run a foreground program that mounts on `point` and shows the source as `file`. Unmounts to end it.

    `options`: of Popen. Raises BenchError if the program ends before it mounts.
    """
    mounted = Mounted(file, ground.popen(words, **options), point)
    process = mounted.process
    try:
        until(lambda: str(point) in mountpoints() or process.poll() is not None, f"the mount of {words[0]}")
        if process.returncode is not None:
            raise BenchError(ground.failure(words, process.returncode))
        yield mounted
    finally:
        leave = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        if str(point) in mountpoints():
            with suppress(BenchError):  # busy for a moment, or unmounted already: a signal follows
                ground.output([*leave, point])
        if process.returncode is None:
            # Not `terminate`, which would reap the process, and lose its CPU seconds.
            os.kill(process.pid, signal.SIGTERM)
            mounted.cpu = wait(process)


@contextmanager
def replica(
    ground: Ground,
    source: Path,
    destination: Path,
    *options: Any,
    delay: float | None = None,
    rate: str | None = None,
    user: list[str] | None = None,
) -> Iterator[Mounted]:
    """Run `blockcopy mount` with `options`.

    `delay`: milliseconds each way over a link; None: no link. `rate`: of the link.
    `user`: words before the command that change the user.
    """
    point = ground.point()
    if user:
        ground.output(["chown", "--reference", destination, point])
    remote: list[Any] = []
    name: Any = source
    if delay is not None:
        link = [*LINK, "--delay", str(delay), *(["--rate", rate] if rate else [])]
        remote = ["-e", shlex.join(link), "--blockcopy-path", shlex.join(ground.blockcopy)]
        name = f"host:{source}"
    words = [*(user or []), *ground.blockcopy, "mount", "-f", *options, *remote, name, destination, point]
    with served(ground, words, point, point / destination.name) as mounted:
        yield mounted
        leave(ground, mounted, user or [])


def leave(ground: Ground, mounted: Mounted, user: list[str]) -> None:
    """Unmount a blockcopy mount, complete or not. `user`: words that change the user."""
    ground.output([*user, *ground.blockcopy, "umount", mounted.point], right=(0, 75))
    mounted.cpu = wait(mounted.process)


@contextmanager
def nbd_server(ground: Ground, source: Path, delay: float | None) -> Iterator[Path]:
    """Run nbdkit, which delays each answer by `delay` milliseconds. Yields the path of its socket.

    The path is short, wherever the folder of `ground` is: the kernel allows 107 bytes.
    """
    delaying = ["--filter=delay", f"rdelay={delay:g}ms"] if delay else []
    with tempfile.TemporaryDirectory(prefix="blockcopy-bench-", dir="/tmp") as folder:
        socket = Path(folder) / "socket"
        words = ["nbdkit", "--foreground", "--readonly", "--unix", socket]
        words += [*delaying[:1], "file", f"file={source}", *delaying[1:]]
        process = ground.popen(words)
        try:
            until(lambda: socket.exists() or process.poll() is not None, "nbdkit's socket")
            if process.returncode is not None:
                raise BenchError(ground.failure(words, process.returncode))
            yield socket
        finally:
            process.terminate()
            process.wait(TIME_LIMIT)


@contextmanager
def nbdfuse(ground: Ground, source: Path, delay: float | None) -> Iterator[Mounted]:
    """Run nbdfuse on an nbdkit with this delay in milliseconds."""
    point = ground.point()
    with (
        nbd_server(ground, source, delay) as socket,
        served(ground, ["nbdfuse", "--readonly", point, "--unix", socket], point, point / "nbd") as mounted,
    ):
        yield mounted


@contextmanager
def sshfs(ground: Ground, source: Path, delay: float | None) -> Iterator[Mounted]:
    """Run sshfs over a link and sftp-server, without ssh, whose ciphers are not to be measured."""
    point = ground.point()
    link = [*LINK, "--delay", str(delay or 0), "host", shlex.quote(str(sftp_server()))]
    stack, server = contextlib.ExitStack(), ground.popen(link, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with stack:
        stack.callback(server.wait, TIME_LIMIT)
        words = ["sshfs", "-f", "-o", "passive", f":{source.parent}", point]
        with served(ground, words, point, point / source.name, stdin=server.stdout, stdout=server.stdin) as mounted:
            server.stdin.close()
            server.stdout.close()
            yield mounted


def sftp_server() -> Path | None:
    """Return the path of sftp-server, or None if it is not installed."""
    places = [Path("/usr/lib/openssh/sftp-server"), Path("/usr/libexec/openssh/sftp-server")]
    return next((each for each in places if each.exists()), None)


@contextmanager
def qemu(ground: Ground, source: Path, delay: float | None) -> Iterator[Mounted]:
    """Run the FUSE export of qemu-storage-daemon, with copy-on-read into an overlay."""
    overlay, point = ground.name("overlay"), ground.name("export")
    point.touch()  # the export is mounted over a file
    ground.output(["qemu-img", "create", "-q", "-f", "qcow2", overlay, str(source.stat().st_size)])
    with nbd_server(ground, source, delay) as socket:
        nodes = [
            f"driver=nbd,node-name=far,read-only=on,server.type=unix,server.path={socket}",
            f"driver=file,node-name=file,filename={overlay}",
            "driver=qcow2,node-name=overlay,file=file,backing=far",
            "driver=copy-on-read,node-name=top,file=overlay",
        ]
        words = ["qemu-storage-daemon", *(word for node in nodes for word in ("--blockdev", node))]
        words += ["--export", f"type=fuse,id=export,node-name=top,mountpoint={point},writable=off"]
        with served(ground, words, point, point) as mounted:
            yield mounted
    overlay.unlink()


@contextmanager
def passthrough(ground: Ground, source: Path, _: float | None) -> Iterator[Mounted]:
    """Run libfuse's example in C, which keeps the data of reads in the page cache."""
    program, point = ground.folder / "passthrough_ll", ground.point()
    if not program.exists():
        flags = ground.output(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
        ground.output(["gcc", "-O2", EXAMPLE, *flags, "-o", program])
    words = [program, "-f", "-o", f"source={source.parent},cache=always", point]
    with served(ground, words, point, point / source.name) as mounted:
        yield mounted


Maker = Callable[[Ground, Path, "float | None"], AbstractContextManager[Mounted]]

PEERS: dict[str, tuple[Maker, list[tuple[str, str]]]] = {
    "nbdfuse": (nbdfuse, [("nbdkit", "nbdkit"), ("nbdfuse", "libnbd-bin")]),
    "sshfs": (sshfs, [("sshfs", "sshfs")]),
    "qemu, copy-on-read": (qemu, [("qemu-storage-daemon", "qemu-system-common"), ("nbdkit", "nbdkit")]),
    "passthrough_ll": (passthrough, [("gcc", "gcc"), ("pkg-config", "pkg-config")]),
}
"""Each peer's maker, and its programs with their packages."""


def peers(names: list[str], note: Callable[[str], None]) -> dict[str, Maker]:
    """Return the makers of the peers `names` that can be mounted here. Calls `note` for each other peer."""
    found = {}
    for name in names:
        maker, programs = PEERS[name]
        lacking = [
            f"{program} (apt-get install {package})" for program, package in programs if not shutil.which(program)
        ]
        if name == "passthrough_ll" and not EXAMPLE.exists():
            lacking.append(f"{EXAMPLE} (apt-get install libfuse3-dev)")
        if name == "sshfs" and sftp_server() is None:
            lacking.append("sftp-server (apt-get install openssh-sftp-server)")
        if lacking:
            note(f"{name}: not measured, missing {', '.join(lacking)}")
        else:
            found[name] = maker
    return found
