"""Mounts to read from: blockcopy's, and those of the peers that are installed. Each is a context manager."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import LINK
from benchmarks.ground import PATIENCE, BenchError, Ground, mountpoints, until
from benchmarks.measure import wait

EXAMPLE = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")


@dataclass
class Mounted:
    file: Path
    process: subprocess.Popen[bytes]
    """The one that serves."""
    point: Path
    cpu: float = 0.0
    """Seconds, of it and of those it waited for. Known at the end."""


@contextmanager
def served(ground: Ground, words: list[Any], point: Path, file: Path, **options: Any) -> Iterator[Mounted]:
    """A program in the foreground that mounts on `point`, and is asked to leave by unmounting."""
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
            with suppress(BenchError):  # busy for a moment, or left by the program already; asked again below
                ground.output([*leave, point])
        if process.returncode is None:
            os.kill(process.pid, signal.SIGTERM)  # not `terminate`, which would reap it, and lose its CPU
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
    """`blockcopy mount`, over a link where there is a delay, and as another user where `user` says so."""
    point = ground.point()
    if user:
        ground.output(["chown", "--reference", destination, point])
    far: list[Any] = []
    name: Any = source
    if delay is not None:
        link = [*LINK, "--delay", str(delay), *(["--rate", rate] if rate else [])]
        far = ["-e", shlex.join(link), "--blockcopy-path", shlex.join(ground.blockcopy)]
        name = f"host:{source}"
    words = [*(user or []), *ground.blockcopy, "mount", "-f", *options, *far, name, destination, point]
    with served(ground, words, point, point / destination.name) as mounted:
        yield mounted
        leave(ground, mounted, user or [])


def leave(ground: Ground, mounted: Mounted, user: list[str]) -> None:
    """Unmount: 75 says that the copy is not complete, as it is meant here."""
    ground.output([*user, *ground.blockcopy, "umount", mounted.point], right=(0, 75))
    mounted.cpu = wait(mounted.process)


@contextmanager
def nbd_server(ground: Ground, source: Path, delay: float | None) -> Iterator[Path]:
    """nbdkit, that answers each request so much later; the path of its socket."""
    socket = ground.name("socket")
    late = ["--filter=delay", f"rdelay={delay:g}ms"] if delay else []
    words = [
        "nbdkit",
        "--foreground",
        "--readonly",
        "--unix",
        socket,
        *late[:1],
        "file",
        f"file={source}",
        *late[1:],
    ]
    process = ground.popen(words)
    try:
        until(lambda: socket.exists() or process.poll() is not None, "nbdkit's socket")
        if process.returncode is not None:
            raise BenchError(ground.failure(words, process.returncode))
        yield socket
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def nbdfuse(ground: Ground, source: Path, delay: float | None) -> Iterator[Mounted]:
    point = ground.point()
    with (
        nbd_server(ground, source, delay) as socket,
        served(ground, ["nbdfuse", "--readonly", point, "--unix", socket], point, point / "nbd") as mounted,
    ):
        yield mounted


@contextmanager
def sshfs(ground: Ground, source: Path, delay: float | None) -> Iterator[Mounted]:
    """Over a link and sftp-server, without ssh: its ciphers are not what is measured."""
    point = ground.point()
    link = [*LINK, "--delay", str(delay or 0), "host", shlex.quote(str(sftp_server()))]
    ours, theirs = contextlib.ExitStack(), ground.popen(link, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with ours:
        ours.callback(theirs.wait, PATIENCE)
        words = ["sshfs", "-f", "-o", "passive", f":{source.parent}", point]
        with served(ground, words, point, point / source.name, stdin=theirs.stdout, stdout=theirs.stdin) as mounted:
            theirs.stdin.close()
            theirs.stdout.close()
            yield mounted


def sftp_server() -> Path | None:
    places = [Path("/usr/lib/openssh/sftp-server"), Path("/usr/libexec/openssh/sftp-server")]
    return next((each for each in places if each.exists()), None)


@contextmanager
def qemu(ground: Ground, source: Path, delay: float | None) -> Iterator[Mounted]:
    """The FUSE export of qemu-storage-daemon, with copy-on-read into an overlay."""
    overlay, point = ground.name("overlay"), ground.name("export")
    point.touch()  # it is mounted over a file
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
    """libfuse's example in C, which keeps what it was asked for in the page cache."""
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
"""Each with the programs it takes, and the packages they are in."""


def peers(names: list[str], note: Callable[[str], None]) -> dict[str, Maker]:
    """Those of them that can be mounted here."""
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
            note(f"{name}: not measured, there is no {', no '.join(lacking)}")
        else:
            found[name] = maker
    return found
