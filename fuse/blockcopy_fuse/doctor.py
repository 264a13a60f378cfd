"""`blockcopy doctor`: what this host, and another, have of what a mount needs; and what to do about the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from blockcopy.block.records import default_folder
from blockcopy.errors import BlockcopyError, RemoteError
from blockcopy.optional_packages import BLAKE3, FUSE, ZSTD, install_command
from blockcopy.paths.runtime_dir import make_runtime_dir
from blockcopy.protocol import digests, zstd
from blockcopy.protocol.strict_json import parse_object
from blockcopy.stage.streams import InputStream
from blockcopy.transport.command import Command
from blockcopy.transport.hints import advice
from blockcopy.transport.session import Session
from blockcopy_fuse.kernel_readahead import CONNECTIONS
from blockcopy_fuse.options import users_may_share

_HOST_SECONDS = 30

_MOST_FACTS = 64 * 1024
"""Bytes of an answer."""

_REQUIRED = {"pyfuse3": (3, 4), "trio": (0, 25)}


class Finding(NamedTuple):
    """`ok`; `note` for what is slower or less, but works; `FAIL` for what a mount or sync cannot do without."""

    verdict: Literal["ok", "note", "FAIL"]
    words: str


def examine() -> Iterator[Finding]:
    """This host, point by point."""
    yield Finding("ok", f"Python {platform.python_version()} ({sys.executable})")
    for name, least in _REQUIRED.items():
        yield _package(name, least)
    yield from _fuse()
    yield from _limits()
    yield from _folders()
    yield Finding("ok", f"digests: {_speeds(digests.speeds())}")
    if "blake3" not in digests.speeds():
        yield Finding(
            "note",
            f"BLAKE3, the fastest digest, is not here: {install_command(BLAKE3)}",
        )
    if not zstd.available():
        yield Finding(
            "note",
            f"zstd is not here, so nothing is compressed: {install_command(ZSTD)}",
        )


def examine_host(command: Command, *, prompts: bool = False) -> Iterator[Finding]:
    """Yield what there is to say of the host that runs `facts` by this command.

    `prompts`: a password may be asked for at a terminal.
    """
    host = command.location.host_shown
    started = time.monotonic()
    try:
        found = _facts(command, prompts=prompts)
    except BlockcopyError as error:
        yield Finding("FAIL", str(error))
        return
    yield Finding("ok", f"{host}: reached in {time.monotonic() - started:.1f} s as {found['user']}")
    yield Finding("ok", f"{host}: Python {found['python']}, which runs {found['program']}")
    yield from _pair(host, found)
    if "size" in found:
        yield Finding("ok", f"{command.location} can be read: {found['size']} bytes")


def _facts(command: Command, *, prompts: bool) -> dict[str, Any]:
    """Return what `facts` says. Raises RemoteError if it does not come to that, with what to do."""
    host = command.location.host_shown
    session = Session(command, timeout=_HOST_SECONDS, prompts=prompts)
    answer = b""
    with session:
        if session.begin():
            answer = _read(session.input, host)
    if session.given_up is not None:
        raise RemoteError(session.given_up)
    said = session.said()
    text = answer[answer.find(b"{") :]  # a program that is there already begins after what its login prints
    with contextlib.suppress(ValueError):
        found = parse_object(text)
        if session.status == 0 and _is_facts(found):
            return found
    todo = advice(command, session.status, "\n".join(said), begun=session.begun)
    told = " | ".join(said[-3:]) or f"`{command.runs}` ended with exit status {session.status}"
    raise RemoteError(f"{command.location}: {told}" + (f" – {todo}" if todo else ""))


def _read(stream: InputStream, host: str) -> bytes:
    """Return all that comes. Raises RemoteError for more than facts can be."""
    room = memoryview(bytearray(_MOST_FACTS))
    length = 0
    while count := stream.read_into(room[length:]):
        length += count
        if length == len(room):
            raise RemoteError(f"{host} says what cannot be facts: {bytes(room[:100])!r} …")
    return bytes(room[:length])


def _is_facts(found: dict[str, Any]) -> bool:
    """Return whether this has all that is told of a host."""
    if not isinstance(found.get("digests"), dict):
        return False
    speeds = found["digests"].values()
    words = [found.get(name) for name in ("user", "python", "program")]
    return all(isinstance(word, str) for word in words) and all(type(each) is int and each > 0 for each in speeds)


def _pair(host: str, found: dict[str, Any]) -> Iterator[Finding]:
    yield Finding("ok", f"{host}: digests: {_speeds(found['digests'])}")
    chosen = digests.choose(digests.speeds(), found["digests"])
    yield Finding("ok", f"{host}: blocks would be compared by {chosen}")
    if chosen != "blake3":
        yield Finding("note", f"{host}: with the package blake3 on both hosts it would be faster")
    if not found.get("zstd"):
        yield Finding(
            "note",
            f"{host}: it has no zstd, so nothing would be compressed; Python 3.14 has it, or the package "
            "backports.zstd for the python there",
        )


def _speeds(speeds: dict[str, int]) -> str:
    return ", ".join(f"{name} {speed} MB/s" for name, speed in speeds.items())


def _package(name: str, least: tuple[int, int]) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "FAIL",
            f"the package {name} is not installed: {install_command(*FUSE)}",
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
        return Finding(
            "FAIL",
            f"{name} {version} is too old: {install_command(f'{name}>={least[0]}.{least[1]}')}",
        )
    return Finding("ok", f"{name} {version}")


def _fuse() -> Iterator[Finding]:
    if not os.path.exists("/dev/fuse"):
        yield Finding("FAIL", "there is no /dev/fuse: modprobe fuse, or have the container given it")
    elif not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield Finding("FAIL", "this user may not use /dev/fuse: chmod 666 /dev/fuse, as distributions have it")
    else:
        yield Finding("ok", "/dev/fuse can be used")
    program = shutil.which("fusermount3")
    if program is None:
        yield Finding("FAIL", "fusermount3 is not installed: apt install fuse3")
    elif os.geteuid() and not os.stat(program).st_mode & 0o4000:
        yield Finding("FAIL", f"{program} is not set-user-id root, so only root can mount")
    else:
        yield Finding("ok", program)
    if os.geteuid() and not users_may_share():
        yield Finding("note", "-o allow_other is root's alone: user_allow_other is not in /etc/fuse.conf")


def _limits() -> Iterator[Finding]:
    if not os.path.ismount(CONNECTIONS):
        yield Finding(
            "note",
            f"12 reads that wait for the source keep all others waiting: mount -t fusectl none {CONNECTIONS}",
        )
    for name in ("default_request_timeout", "max_request_timeout"):
        try:
            seconds = int(Path("/proc/sys/fs/fuse", name).read_text())
        except (OSError, ValueError):
            continue  # kernels before 6.14 have no such limit
        if seconds:
            yield Finding("note", f"the kernel ends a mount whose reads take {seconds} s (fs.fuse.{name})")
    try:
        largest = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    except (OSError, ValueError):
        return
    if largest < 1 << 20 and os.geteuid():
        yield Finding("note", f"pipes of {largest} bytes at most: slower; sysctl fs.pipe-max-size=1048576")


def _folders() -> Iterator[Finding]:
    try:
        yield Finding("ok", f"sockets are in {make_runtime_dir()}")
    except BlockcopyError as error:
        yield Finding("note", f"pause, resume, limit and shared logins will not work: {error}")
    try:
        folder = default_folder()
    except BlockcopyError as error:
        yield Finding("FAIL", str(error))
        return
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if os.access(existing, os.W_OK | os.X_OK):
        yield Finding("ok", f"states are kept in {folder}")
    else:
        yield Finding("FAIL", f"states cannot be kept in {folder}: {existing} is not writable; see --state")
