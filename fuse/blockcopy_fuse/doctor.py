"""`blockcopy doctor`: checks whether this host, and a source host, have what a mount needs, and says what to do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from blockcopy.block.records import default_folder
from blockcopy.errors import BlockcopyError, RemoteError
from blockcopy.optional_packages import BLAKE3, FUSE, ZSTD, install_command
from blockcopy.paths.runtime_dir import make_runtime_dir
from blockcopy.progress.rate import human_size
from blockcopy.protocol import digests, zstd
from blockcopy.protocol.strict_json import parse_object
from blockcopy.replica.monitor import typed_json
from blockcopy.stage.streams import InputStream
from blockcopy.transport.command import Command
from blockcopy.transport.hints import explain_end
from blockcopy.transport.scaling import CHANNEL_WINDOW, MAX_CONNECTIONS
from blockcopy.transport.session import Session
from blockcopy_fuse import fuse_support

_HOST_SECONDS = 30
"""How long a host may take to answer."""

_MAX_FACTS = 64 * 1024
"""Bytes of an answer of `facts`."""

_PINGS = 5
"""Round trips that are measured, of which the least counts."""

_NEWLINE = ord("\n")

_MIN_VERSIONS = {"pyfuse3": (3, 4), "trio": (0, 25)}


class CheckResult(NamedTuple):
    """The verdict of one check, and its message."""

    verdict: Literal["ok", "note", "FAIL"]
    """note: a mount works, but slower or with less. FAIL: a mount or sync is not possible."""
    message: str
    """What was found and, if that is bad, what to do."""


@dataclass(frozen=True)
class HostFacts:
    """The reply of `facts`. `digests`: speeds in MB/s by name. `size`: bytes of the source, if one was named."""

    user: str
    python: str
    program: str
    digests: dict[str, int]
    zstd: bool = False
    size: int | None = None


def examine() -> Iterator[CheckResult]:
    """Check this host. Yields a result for each point."""
    yield CheckResult("ok", f"Python {platform.python_version()} ({sys.executable})")
    for name, minimum in _MIN_VERSIONS.items():
        yield _package(name, minimum)
    yield from _fuse()
    yield from _limits()
    yield from _folders()
    yield CheckResult("ok", f"digests: {_speeds(digests.speeds())}")
    if "blake3" not in digests.speeds():
        yield CheckResult("note", f"the fastest digest, BLAKE3, is not installed: {install_command(BLAKE3)}")
    if not zstd.available():
        yield CheckResult("note", f"zstd is not installed, so nothing is compressed: {install_command(ZSTD)}")


def examine_host(command: Command, *, prompts: bool = False) -> Iterator[CheckResult]:
    """Check the host on which `command` runs the stage `facts`. Yields a result for each point.

    `prompts`: whether ssh may ask for a password at the terminal.
    """
    host = command.location.host_shown
    started = time.monotonic()
    try:
        facts, round_trip = _facts(command, prompts=prompts)
    except BlockcopyError as error:
        yield CheckResult("FAIL", str(error))
        return
    yield CheckResult("ok", f"{host}: reached in {time.monotonic() - started:.1f} s as {facts.user}")
    yield CheckResult("ok", f"{host}: Python {facts.python}, which runs {facts.program}")
    yield CheckResult("ok", f"{host}: digests: {_speeds(facts.digests)}")
    chosen = digests.choose(digests.speeds(), facts.digests)
    yield CheckResult("ok", f"{host}: blocks would be compared by {chosen}")
    if chosen != "blake3":
        yield CheckResult("note", f"{host}: the package blake3 on both hosts would make it faster")
    if round_trip is not None:
        yield CheckResult("ok", f"{host}: {_expected(round_trip)}")
    if not facts.zstd:
        yield CheckResult(
            "note",
            f"{host}: zstd is missing, so nothing would be compressed; Python 3.14 has it, and so has the package "
            "backports.zstd",
        )
    if facts.size is not None:
        yield CheckResult("ok", f"{command.location} can be read: {facts.size} bytes")


def _expected(round_trip: float) -> str:
    """Return what to expect of a link whose round trip takes `round_trip` seconds, as text for people."""
    channel = int(CHANNEL_WINDOW / round_trip)
    return (
        f"a round trip takes {1000 * round_trip:.1f} ms: a channel of ssh carries at most {human_size(channel)}/s, "
        f"and a copy opens up to {MAX_CONNECTIONS} while that pays"
    )


def _facts(command: Command, *, prompts: bool) -> tuple[HostFacts, float | None]:
    """Run `command`, which runs the stage `facts`. Returns its reply, and the seconds of a round trip if measured.

    `prompts`: whether ssh may ask for a password at the terminal.
    Raises RemoteError, with what to do, if there is no valid reply.
    """
    host = command.location.host_shown
    answer, round_trip = b"", None
    with Session(command, timeout=_HOST_SECONDS, prompts=prompts) as session:
        if session.begin():
            answer = _read(session.input, host, until_line=bool(command.mark))
            if command.mark and answer:
                round_trip = _round_trip(session)
    if session.timeout_error is not None:
        raise RemoteError(session.timeout_error)
    text = answer[answer.find(b"{") :]  # without bootstrap, the login may print text first
    with contextlib.suppress(ValueError):
        facts = typed_json.parse(HostFacts, parse_object(text))
        if session.status == 0:
            return facts, round_trip
    raise RemoteError(explain_end(command, session.status, session.last_lines(), begun=session.begun))


def _round_trip(session: Session) -> float | None:
    """Return the least seconds of some round trips to the stage of `session`, an echo. None if it has ended."""
    buffer, best = memoryview(bytearray(1)), math.inf
    for _ in range(_PINGS):
        asked_at = time.monotonic()
        session.output.write([b"?"])
        if not session.input.read_into(buffer):
            return None
        best = min(best, time.monotonic() - asked_at)
    return best


def _read(stream: InputStream, host: str, *, until_line: bool) -> bytes:
    """Return all bytes up to the end of `stream`, or up to the end of a line if `until_line`.

    `host`: its name in messages.
    Raises RemoteError if there are more bytes than the stage `facts` writes.
    """
    buffer = memoryview(bytearray(_MAX_FACTS))
    length = 0
    while count := stream.read_into(buffer[length:]):
        length += count
        if until_line and buffer[length - 1] == _NEWLINE:
            break
        if length == len(buffer):
            raise RemoteError(f"{host} sent no facts: {bytes(buffer[:100])!r} …")
    return bytes(buffer[:length])


def _speeds(speeds: dict[str, int]) -> str:
    return ", ".join(f"{name} {speed} MB/s" for name, speed in speeds.items())


def _package(name: str, minimum: tuple[int, int]) -> CheckResult:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return CheckResult("FAIL", f"the package {name} is not installed: {install_command(*FUSE)}")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < minimum:
        required = f"{name}>={minimum[0]}.{minimum[1]}"
        return CheckResult("FAIL", f"{name} {version} is too old: {install_command(required)}")
    return CheckResult("ok", f"{name} {version}")


def _fuse() -> Iterator[CheckResult]:
    """Check the device and the programs that mounting needs. Yields the results."""
    problem = fuse_support.device_problem()
    yield CheckResult("FAIL", problem) if problem else CheckResult("ok", "/dev/fuse can be used")
    program = fuse_support.fusermount()
    if program is None:
        yield CheckResult("FAIL", fuse_support.FUSERMOUNT_MISSING)
    elif os.geteuid() and not os.stat(program).st_mode & stat.S_ISUID:
        yield CheckResult("FAIL", f"{program} is not set-user-id root, so only root can mount")
    else:
        yield CheckResult("ok", program)
    if os.geteuid() and not fuse_support.users_may_share():
        yield CheckResult(
            "note", f"only root may use -o allow_other: no user_allow_other in {fuse_support.FUSE_CONF}"
        )


def _limits() -> Iterator[CheckResult]:
    """Check the kernel's limits. Yields results only for limits that matter here."""
    if not os.path.ismount(fuse_support.CONNECTIONS):  # else MAX_BACKGROUND cannot be set
        fix = f"mount -t fusectl none {fuse_support.CONNECTIONS}"
        yield CheckResult("note", f"only 12 reads can wait for the source at once, 256 after this: {fix}")
    for name, seconds in fuse_support.request_timeouts().items():
        yield CheckResult("note", f"the kernel ends a mount if a read takes {seconds} s ({name})")
    size = fuse_support.max_pipe_size()
    if size is not None and size < 1 << 20 and os.geteuid():
        yield CheckResult(
            "note", f"pipes have at most {size} bytes, which is slower: sysctl fs.pipe-max-size=1048576"
        )


def _folders() -> Iterator[CheckResult]:
    """Check the folders of sockets and of state files. Yields the results."""
    try:
        yield CheckResult("ok", f"sockets are in {make_runtime_dir()}")
    except BlockcopyError as error:
        yield CheckResult("note", f"pause, resume, limit and shared logins will not work: {error}")
    try:
        folder = default_folder()
    except BlockcopyError as error:
        yield CheckResult("FAIL", str(error))
        return
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if os.access(existing, os.W_OK | os.X_OK):
        yield CheckResult("ok", f"state files are kept in {folder}")
    else:
        yield CheckResult(
            "FAIL", f"state files cannot be kept in {folder}: {existing} is not writable; see --state"
        )
