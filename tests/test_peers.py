"""What a peer says ends its own connection at most: greetings, streams, words; and what is bounded of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest
import support
import trio
from hypothesis import given
from hypothesis import strategies as st
from support import BLOCK_SIZE, BLOCKCOPY, PYTHON, STANDINS, FedDecoder, Mount, failed, noise, run, until, written
from test_wire_properties import stable

from blockcopy.block.geometry import Extent
from blockcopy.block.identity import differences, sample_extents
from blockcopy.errors import SourceError, StreamError
from blockcopy.progress.reporter import Progress
from blockcopy.protocol import wire
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.handshake import Handshake, read_client
from blockcopy.replica.monitor import prometheus
from blockcopy.replica.monitor.sd_notify import Notifier
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.batches import HoleQuery
from blockcopy.replica.source.client import Client
from blockcopy.replica.sync import sync
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import Location
from blockcopy.transport.stderr_lines import StderrLines
from blockcopy.untrusted_text import LineBudget

SIZE = 8 * BLOCK_SIZE
DATA = noise(SIZE)

DEEP = '{"identity": ' + "[" * 980 + "]" * 980 + "}"
ODD_JSON = [
    DEEP,
    "[" * 60000,
    '{"digest": []}',
    '{"digest": {}, "identity": 7}',
    '{"identity": {"size": 1e400}}',
    '{"identity": {"size": NaN, "sample": []}}',
    '{"identity": {"size": 1' + "0" * 4000 + ', "sample": []}}',
    '{"identity": {"size": 0, "sample": [], "id": "\\ud800"}, "digest": "sha256"}',
    '{"identity": {"size": 0, "sample": [], "id": [[]]}, "digest": "sha256"}',
    '{"identity": {"size": true, "sample": []}, "digest": "sha256"}',
    '{"digest": "sha256", "digest": []}',
    "{}",
    "7",
    "",
    "\xff",
]
NUMBERS = st.sampled_from(["NaN", "-Infinity", "1e400", "9" * 400, "-0", "1.5", str(2**63)])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(["sha256", "zstd", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
NAMES = st.sampled_from(
    ["protocol", "program", "digests", "digest", "compress", "identity", "size", "sample", "inode", "level", "name"]
)
OBJECTS = st.recursive(
    VALUES | NUMBERS,
    lambda inner: st.lists(st.tuples(NAMES, inner), max_size=5).map(
        lambda pairs: "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}"
    ),
    max_leaves=12,
)


def hello(text: str) -> bytes:
    data = text.encode("latin-1")
    return b"helo" + len(data).to_bytes(4, "big") + data


@given(text=st.sampled_from(ODD_JSON) | OBJECTS)
@stable
def test_any_greeting_is_believed_or_a_stream_error(text: str) -> None:
    """Also what is done with the facts of one that is believed, at either end."""
    decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
    decoder.feed(hello(text))
    try:
        message = decoder.next()
        assert isinstance(message, wire.Hello)
        wire.encode(message)
        read_client(message)
    except StreamError:
        return
    try:
        identity, name, _ = Handshake(digest="sha256").read(message)
    except StreamError:
        return
    assert name == "sha256"
    assert differences(identity, {"size": 1, **identity}) == []


def greeted(folder: Path, stream: bytes) -> str:
    """What is told to whoever greets a source that says this, and some words."""
    said = written(folder / "said", stream)
    program = shlex.join(["sh", "-c", f"echo words >&2; cat {said}; exec cat 3>&1 >/dev/null"])

    async def main() -> str:
        async with trio.open_nursery() as nursery:
            retriever = Client(stage_command(Location(None, "source"), program=program), Handshake())
            await nursery.start(retriever.run)
            with pytest.raises(SourceError) as told:
                await retriever.greet()
            await retriever.close()
        return str(told.value)

    return trio.run(main)


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
def test_an_odd_greeting_is_the_error_of_its_connection(tmp_path: Path, text: str) -> None:
    assert greeted(tmp_path, hello(text))


def test_a_fault_of_ours_is_the_error_of_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised in any part of it; and the log has the traceback."""

    def fail(*_: object) -> NoReturn:
        raise RecursionError("on request")

    for owner, name in ((Decoder, "next"), (Client, "_log"), (Client, "_owes")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            assert "on request" in greeted(tmp_path, b"fe")
        assert any(record.exc_info for record in caplog.records)
        caplog.clear()


def test_helpers_end_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Progress):
        silent = False

        def update(self, counts: object) -> None:
            raise RuntimeError("the progress")

    def broken(*_: object) -> NoReturn:
        raise RuntimeError("the metrics")

    monkeypatch.setattr(prometheus, "_write", broken)
    monkeypatch.setattr(Notifier, "keep_notifying", broken)
    source, destination = written(tmp_path / "source", DATA), tmp_path / "destination"
    plan = Plan(
        stage_command(Location(None, str(source))),
        str(destination),
        metrics=str(tmp_path / "metrics"),
        on_complete="true\0",  # no environment can have it
    )
    trio.run(sync, plan, Broken(), Notifier())
    assert destination.read_bytes() == DATA
    told = [record.getMessage() for record in caplog.records if record.exc_info]
    for name in ("sd_notify", "--metrics", "the progress", "--on-complete"):
        assert any(message.startswith(f"internal error in {name};") for message in told), told


def test_a_live_mount_outlives_a_source_that_garbles_its_greeting(
    tmp_path: Path, mount: Callable[..., Mount]
) -> None:
    """It dies, comes back with an odd greeting, twice, and is itself again the third time."""
    source, destination = written(tmp_path / "source", DATA), tmp_path / "destination"
    counts = tmp_path / "counts"
    counts.mkdir()
    for number, text in enumerate(['{"digest": []}', DEEP]):
        written(tmp_path / f"odd{number}", hello(text))
    faulty = f"{support.FAULTY} --once {tmp_path}/once --die-at 3"
    program = tmp_path / "program"
    program.write_text(
        f"""#!/bin/sh
        test -e {tmp_path}/once || exec {faulty} "$@"
        for number in 0 1; do
            mkdir {counts}/$number 2>/dev/null && {{ cat {tmp_path}/odd$number; exec cat >/dev/null; }}
        done
        exec {faulty} "$@"
        """
    )
    program.chmod(0o755)
    mounted = mount(source, destination, "--log-file", tmp_path / "log", program=str(program))
    until(lambda: len(list(counts.iterdir())) == 2, "two odd greetings")
    assert mounted.status()["state"] in ("reconnecting", "hydrating")
    mounted.wait()
    assert mounted.file.read_bytes() == DATA
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "no agreement" in log
    assert "nested too deep" in log


# Nobody who looks away


@contextmanager
def nobody_reads(how: str) -> Iterator[int]:
    """A standard error that takes nothing: `gone`, `full` as a disk is, or `stuck`, a pipe that nobody empties."""
    if how == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
        others = []
    else:
        other, fd = os.pipe()
        others = [other]
    try:
        if how == "gone":
            os.close(others.pop())
        if how == "stuck":
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):
                while True:
                    os.write(fd, bytes(4096))
            os.set_blocking(fd, True)
        yield fd
    finally:
        for each in (fd, *others):
            os.close(each)


LOOKING_AWAY = pytest.mark.parametrize("how", ["gone", "full", "stuck"])


def ended(*arguments: object, stderr: int) -> tuple[int, bytes]:
    done = subprocess.run(
        [*BLOCKCOPY, *map(str, arguments)], stdout=subprocess.PIPE, stderr=stderr, timeout=20, check=False
    )
    return done.returncode, done.stdout


@LOOKING_AWAY
def test_nobody_who_looks_away_ends_or_blocks_a_copy(tmp_path: Path, how: str) -> None:
    """With some 100 lines of log and progress; the exit status is the same."""
    source, destination = written(tmp_path / "source", DATA), tmp_path / "destination"
    with nobody_reads(how) as stderr:
        assert ended("-vv", "sync", "--progress", source, destination, stderr=stderr) == (0, b"")
        assert destination.read_bytes() == DATA
        assert ended("-vv", "sync", "--progress", tmp_path / "no", destination, stderr=stderr) == (3, b"")
        status, stream = ended("-vv", "checksum", "--progress", source, stderr=stderr)
    assert (status, stream) == (0, run("checksum", source).stdout)


@LOOKING_AWAY
def test_nobody_who_looks_away_ends_or_blocks_a_mount(tmp_path: Path, how: str) -> None:
    support.require_fuse()
    source, point = written(tmp_path / "source", DATA), tmp_path / "point"
    point.mkdir()
    command = [*BLOCKCOPY, "-vv", "mount", "-f", "--progress", source, tmp_path / "copy", point]
    with nobody_reads(how) as stderr, subprocess.Popen(list(map(str, command)), stderr=stderr) as process:
        until((point / "status.json").exists, "the mount")
        assert (point / "copy").read_bytes() == DATA
        assert run("wait", point).returncode == 0
        assert run("umount", point).returncode == 0
        assert process.wait(20) == 0


# What is told, and how much of it

FORGED = "no such\n2026-01-01 blockcopy[1] ERROR forged\x1b[2J\x9b\u202e:/disk"


def test_no_name_forges_a_line_or_commands_a_terminal(tmp_path: Path) -> None:
    done = run("sync", "--log-file", tmp_path / "log", FORGED, tmp_path / "copy", cwd=tmp_path)
    for text in (done.stderr.decode(), (tmp_path / "log").read_text()):
        [line] = text.splitlines()
        assert "forged" in line
        assert line.isprintable()


def test_a_crash_of_a_background_mount_is_in_its_log(tmp_path: Path) -> None:
    """A fault that nobody foresaw: here, in a task of the mount's own."""
    support.require_fuse()
    (tmp_path / "sitecustomize.py").write_text(
        """
import sys
if "mount" in sys.orig_argv:
    from blockcopy_fuse import mounting
    async def fail(*events):
        raise RuntimeError("on request\\n\\x1b[2J")
    mounting._watch_connection = fail
"""
    )
    source, point = written(tmp_path / "source", DATA), tmp_path / "point"
    point.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run("mount", "--log-file", tmp_path / "log", source, tmp_path / "copy", point, env=environment)
    until(lambda: "RuntimeError" in (tmp_path / "log").read_text(), "the traceback")
    until(lambda: str(point) not in support.fuse_mounts(), "the end of the mount")
    log = (tmp_path / "log").read_text()
    assert "Traceback" in log
    assert all(line.isprintable() for line in log.splitlines())
    assert [line for line in log.splitlines() if line[:2] not in ("20", "  ")] == []


def test_what_kills_a_background_mount_is_in_its_log(tmp_path: Path, mount: Callable[..., Mount]) -> None:
    source, log = written(tmp_path / "source", DATA), tmp_path / "log"
    mounted = mount(source, tmp_path / "copy", "--log-file", log, wait=True)
    pid = mounted.status()["pid"]
    os.kill(pid, signal.SIGBUS)
    until(lambda: not support.alive(pid), "its death")
    assert "Fatal Python error: Bus error" in log.read_text()


def flooding(folder: Path, flood: str, *then: str) -> str:
    """A program that does `flood` in the background, and then is another, to whose standard error both write."""
    path = folder / "flooding"
    path.write_text(f'#!/bin/sh\n{{ {flood}; }} >&2 &\nexec {shlex.join(then)} "$@"\n')
    path.chmod(0o755)
    return str(path)


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Run a command, and print the most memory that it had, in KiB.

The peak of a child is at least the size of its parent, so the parent must be small, which pytest is not.
"""


@pytest.mark.long
@pytest.mark.parametrize("flood", ["head -c 300M /dev/zero", "yes 'a word' | head -n 10000000"])
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_flood_of_words_is_neither_kept_nor_logged(tmp_path: Path, flood: str, direction: str) -> None:
    source, log = written(tmp_path / "source", DATA), tmp_path / "log"
    rsh = [str(STANDINS / "link")]
    ends: list[object] = [f"host:{source}", tmp_path / "copy"]
    if direction == "push":
        ends = [source, f"host:{tmp_path}/copy"]
    command = [*BLOCKCOPY, "sync", "--log-file", log, "-e", flooding(tmp_path, flood, PYTHON, *rsh), *ends]
    measured = subprocess.run([PYTHON, "-c", PEAK, *map(str, command)], stdout=subprocess.PIPE, check=True)
    assert (tmp_path / "copy").read_bytes() == DATA
    assert log.stat().st_size < 1 << 20
    assert int(measured.stdout) < 200 * 1024  # KiB; of which about 60 are Python


def test_what_a_program_drew_over_itself_is_not_told() -> None:
    noted: list[str] = []
    said = StderrLines(noted.append, LineBudget(lines=3))
    said.feed(b"0%\r50%\r100%\r\nand \x1b[1m\n")
    said.feed(b"a line in two ")
    said.feed(b"parts\n" + b"more\n" * 1000)
    said.finish()
    assert noted == ["100%", "and \x1b[1m", "a line in two parts"]
    assert list(said.last) == ["more"] * 5


def test_a_size_that_no_map_can_have_is_refused(tmp_path: Path) -> None:
    size = (1 << 50) + 1
    facts = {"identity": {"size": size, "sample": ["0"] * len(sample_extents(size))}}
    source, destination = written(tmp_path / "source", DATA), tmp_path / "copy"
    program = f"{support.FAULTY} --hello {shlex.quote(json.dumps(facts))}"
    done = run("sync", "--blockcopy-path", program, source, destination)
    failed(done, 3, b"claims")
    assert not destination.exists()


def test_holes_of_one_answer_are_bounded() -> None:
    survey = HoleQuery(Extent(0, 64 << 30), 1, lambda: None)
    assert all(survey.take_hole(Extent(2 * number, 1)) for number in range(1 << 17))
    assert len(survey.holes) == 1 << 16
