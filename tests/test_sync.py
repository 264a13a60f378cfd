from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import failed, succeeded, written

from blockcopy.block.geometry import BLOCK_SIZE

BLOCKS = 48
DATA = support.noise(BLOCKS * BLOCK_SIZE)
OLD = support.with_changes(DATA, [0, 7, 20, 21, 47])

OPENING = 2 + support.sample_answers(len(DATA))
"""Answers of the stand-in before any block: two tell the size."""

STALLS = f"{support.QUEUEING} --stall-at {OPENING + 5}"
"""Of an equal destination the first four batches, of a megabyte each, are answered: with one answer each."""

NEARLY = f"{support.QUEUEING} --stall-at {OPENING + 8}"
"""Of OLD the last batch stays open: its blocks that differ have five answers more."""


def here_as_rsh(folder: Path) -> Path:
    """Return an RSH that runs the command on this host, as a remote shell would."""
    path = folder / "rsh"
    path.write_text(f'#!/bin/sh\necho "$1" >>{folder}/hosts\nshift\nexec sh -c "$*"\n')
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def running(*args: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*support.BLOCKCOPY, "sync", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def until_some_is_stored(process: subprocess.Popen[bytes], path: Path) -> None:
    def stored() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return path.read_bytes() != OLD

    support.until(stored, "the first write")


def assert_failed(done: subprocess.CompletedProcess[bytes], status: int, *reasons: str) -> None:
    said = done.stderr.decode()
    failed(done, status)
    assert "ERROR (sync): " in said
    assert "Traceback" not in said
    for reason in reasons:
        assert reason in said
    assert done.stdout == b""


def assert_silent_success(done: subprocess.CompletedProcess[bytes]) -> None:
    succeeded(done, stdout=b"")


# What it does


@pytest.mark.parametrize(
    ("program", "old"),
    [
        pytest.param(None, OLD, id="nearly equal"),
        pytest.param(None, DATA, id="equal"),
        pytest.param(None, None, id="absent"),
        pytest.param(None, b"", id="empty"),
        pytest.param(None, OLD[:12345], id="shorter"),
        pytest.param(None, OLD + b"tail", id="longer"),
        pytest.param(support.QUEUEING, OLD, id="queueing, nearly equal"),
        pytest.param("original", OLD, id="original, nearly equal"),
        pytest.param(support.QUEUEING, OLD + b"tail", id="queueing, longer"),
        pytest.param("original", OLD + b"tail", id="original, longer"),
    ],
)
def test_a_file_becomes_the_copy_and_only_a_tail_is_told(
    program: str | None, old: bytes | None, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if program == "original":
        program = shlex.join(request.getfixturevalue("original"))
    destination = tmp_path / "copy"
    if old is not None:
        destination.write_bytes(old)
    options = ["--blockcopy-path", program] if program else []
    tail = (old or b"")[len(DATA) :]
    done = support.run("sync", *options, source, destination)
    succeeded(done, None, stdout=b"")
    assert (
        done.stderr.decode().count("\n") == done.stderr.decode().count("bytes longer than the source") == bool(tail)
    )
    assert destination.read_bytes() == DATA + tail


@pytest.mark.parametrize("program", [None, support.QUEUEING])
def test_a_device_becomes_the_copy_of_a_device(
    program: str | None, source: Path, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    device = loop_device(written(tmp_path / "backing", OLD + b"tail" * 128))
    options = ["--blockcopy-path", program] if program else []
    done = support.run("sync", *options, loop_device(source), device)
    told = f"{device} is 512 bytes longer than the source: its bytes from {len(DATA)} on stay as they are\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", told)
    assert Path(device).read_bytes() == DATA + b"tail" * 128


def test_names_are_relative_to_where_it_is_run(source: Path, destination: Path) -> None:
    assert_silent_success(support.run("sync", source.name, destination.name, cwd=source.parent))
    assert destination.read_bytes() == DATA


def test_the_source_is_only_read(source: Path, destination: Path) -> None:
    source.chmod(0o400)
    before = source.stat()
    assert_silent_success(support.run("sync", source, destination))
    assert (source.stat().st_mtime_ns, source.read_bytes()) == (before.st_mtime_ns, DATA)


@pytest.mark.parametrize("program", [shlex.join(support.BLOCKCOPY), support.QUEUEING])
@pytest.mark.parametrize("name", ["plain", "with space, quo'te\"s $HOME *"])
def test_a_remote_source_is_reached_through_rsh(program: str, name: str, tmp_path: Path, destination: Path) -> None:
    source = written(tmp_path / name, DATA)
    rsh = here_as_rsh(tmp_path)
    done = support.run("sync", "-e", rsh, "--blockcopy-path", program, f"user@host:{source}", destination)
    assert_silent_success(done)
    assert destination.read_bytes() == DATA
    assert set((tmp_path / "hosts").read_text().split()) == {"user@host"}


def test_the_destination_is_synced(source: Path, tmp_path: Path, loop_device: Callable[[Path], str]) -> None:
    """The kernel counts the flushes of a device: a close alone is none."""
    device = loop_device(written(tmp_path / "backing", OLD))
    before = flushes(device)
    assert_silent_success(support.run("sync", source, device))
    assert flushes(device) > before


def flushes(device: str) -> int:
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[15])


# What it refuses, and how it tells


@pytest.mark.parametrize("program", [None, support.QUEUEING])
def test_a_missing_source(program: str | None, tmp_path: Path) -> None:
    options = ["--blockcopy-path", program] if program else []
    done = support.run("sync", *options, tmp_path / "absent", tmp_path / "destination")
    assert_failed(done, 3, str(tmp_path / "absent"), "No such file or directory")
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize(
    ("rsh", "reason"),
    [
        ("false", "exit status 1"),
        ("/no/such/rsh", "/no/such/rsh"),
        ("ssh -F none -p 1 -o BatchMode=yes", "Connection refused"),
    ],
)
def test_a_host_that_cannot_be_reached(rsh: str, reason: str, destination: Path) -> None:
    done = support.run("sync", "-e", rsh, "127.0.0.1:/source", destination)
    assert_failed(done, 3, reason)
    assert destination.read_bytes() == OLD


def test_a_host_without_ssh_is_told_what_to_install(destination: Path, tmp_path: Path) -> None:
    done = support.run("sync", "host:/source", destination, env={**os.environ, "PATH": str(tmp_path)})
    assert_failed(done, 3, "cannot run `ssh`", "not installed here (Debian: apt install openssh-client)")


def test_a_program_that_is_not_there(source: Path, destination: Path) -> None:
    done = support.run("sync", "--blockcopy-path", "/no/such/program", source, destination)
    assert_failed(done, 3, "cannot run `/no/such/program`", "No such file or directory")
    assert destination.read_bytes() == OLD


def test_a_program_that_is_not_there_on_the_host(tmp_path: Path, destination: Path) -> None:
    done = support.run(
        "sync", "-e", here_as_rsh(tmp_path), "--blockcopy-path", "no-such-program", "h:/x", destination
    )
    assert_failed(done, 3, "127", "no-such-program", "not found")


def test_a_source_that_is_too_large(source: Path, tmp_path: Path, loop_device: Callable[[Path], str]) -> None:
    backing = written(tmp_path / "backing", OLD[:-512])
    done = support.run("sync", source, loop_device(backing))
    assert_failed(done, 1, "too small", str(len(DATA)), str(len(DATA) - 512))
    assert backing.read_bytes() == OLD[:-512]


def test_a_locked_destination(source: Path, destination: Path) -> None:
    with destination.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert_failed(support.run("sync", source, destination), 1, str(destination), "locked")
        assert destination.read_bytes() == OLD
        assert_silent_success(support.run("sync", "--force", source, destination))
    assert destination.read_bytes() == DATA


def test_a_device_in_use(source: Path, tmp_path: Path, loop_device: Callable[[Path], str]) -> None:
    device = loop_device(written(tmp_path / "backing", OLD))
    holder = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        assert_failed(support.run("sync", source, device), 1, device, "in use")
    finally:
        os.close(holder)
    assert Path(device).read_bytes() == OLD


def test_a_second_sync_to_the_same_destination(source: Path, destination: Path) -> None:
    with running("--blockcopy-path", NEARLY, source, destination) as first:
        until_some_is_stored(first, destination)
        assert_failed(support.run("sync", source, destination), 1, "locked")


@pytest.mark.parametrize("place", ["folder", "/dev/null", "folder of its own"])
def test_a_destination_that_is_no_place_for_a_copy(place: str, source: Path, tmp_path: Path) -> None:
    path = {"folder": tmp_path, "/dev/null": "/dev/null"}.get(place, tmp_path / "absent" / "destination")
    assert_failed(support.run("sync", source, path), 1, str(path))


def test_the_source_itself(source: Path) -> None:
    assert_failed(support.run("sync", source, source), 1, "is the source itself")
    assert source.read_bytes() == DATA


@pytest.mark.parametrize("args", [[], ["only-one"], ["", "x"], ["host:", "x"], ["-e", "", "host:/x", "y"]])
def test_a_command_line_that_cannot_be_meant(args: list[str], tmp_path: Path) -> None:
    done = support.run("sync", *args, cwd=tmp_path)
    failed(done, 2)
    assert b"Traceback" not in done.stderr
    assert done.stderr
    assert list(tmp_path.iterdir()) == []


REASONS = {
    "die": "SIGKILL",
    "garble": "Last login",
    "misplace": "unexpected reply",
    "oversize": "unexpected reply",
    "short": "unexpected reply",
}


@pytest.mark.parametrize("fault", ["die", "garble"])  # test_link has all of them
def test_a_source_that_fails_once_is_asked_again(
    fault: str, source: Path, destination: Path, tmp_path: Path
) -> None:
    program = f"{support.FAULTY} --{fault}-at 3 --once {tmp_path}/it-happened"
    done = support.run("sync", "--blockcopy-path", program, source, destination)
    succeeded(done, None, stdout=b"")
    lost, up = done.stderr.decode().splitlines()
    assert "connection lost, reconnecting" in lost
    assert REASONS[fault] in lost
    assert "reconnected to" in up
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize(
    ("fault", "options", "reason"),
    [
        ("die", ["--reconnect-timeout", "0"], "gave up on .* after 0 seconds.*SIGKILL"),
        (
            "stall",
            ["--reconnect-timeout", "0", "--timeout", "1"],
            "gave up on .* after 0 seconds.*no answer from .* for 1 seconds",
        ),
        ("garble", [], "Last login"),  # on each of three connections
        ("fail", [], "cannot be read, on request"),
    ],
)
def test_a_source_that_is_given_up(
    fault: str, options: list[str], reason: str, source: Path, destination: Path
) -> None:
    program = f"{support.FAULTY} --{fault}-at 1"
    done = support.run("sync", *options, "--blockcopy-path", program, source, destination)
    assert_failed(done, 3)
    assert re.search(reason, done.stderr.decode().splitlines()[-1])
    assert_each_block_is_old_or_new(destination)
    assert_silent_success(support.run("sync", source, destination))
    assert destination.read_bytes() == DATA


def test_a_source_that_fails_before_it_is_asked(source: Path, destination: Path) -> None:
    """In the sample that tells what it is: nothing is known of it, and nobody tries again."""
    done = support.run("sync", "--blockcopy-path", f"{support.QUEUEING} --die-at 3", source, destination)
    assert_failed(done, 3, "SIGKILL")
    assert destination.read_bytes() == OLD


def assert_each_block_is_old_or_new(destination: Path) -> None:
    now = destination.read_bytes()
    assert len(now) == len(DATA)
    for start in range(0, len(DATA), BLOCK_SIZE):
        part = slice(start, start + BLOCK_SIZE)
        assert now[part] in (OLD[part], DATA[part])


# Signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_mid_pass_ends_it_in_order(
    signum: signal.Signals, source: Path, tmp_path: Path, loop_device: Callable[[Path], str]
) -> None:
    """Ended by that signal, what was written is synced, nobody is left."""
    device = loop_device(written(tmp_path / "backing", OLD))
    before = flushes(device)
    with running("--blockcopy-path", NEARLY, source, device) as process:
        until_some_is_stored(process, Path(device))
        (child,) = support.children(process.pid)
        process.send_signal(signum)
        said, error = process.communicate(timeout=support.PATIENCE)
        assert process.returncode == -signum
    assert said == b""
    assert b"Traceback" not in error
    assert not support.alive(child)
    assert flushes(device) > before
    assert_each_block_is_old_or_new(Path(device))


def test_a_signal_while_the_source_does_not_answer_at_all(destination: Path, tmp_path: Path) -> None:
    with running("--blockcopy-path", f"{support.QUEUEING} --stall-at 1", destination, tmp_path / "new") as process:
        support.until(lambda: support.children(process.pid), "a retrieve process")
        process.send_signal(signal.SIGTERM)
        assert process.wait(support.PATIENCE) == -signal.SIGTERM
    assert not (tmp_path / "new").exists()


# The progress bar


def on_a_terminal(until: str | None, *args: object) -> tuple[int, str]:
    """Status of the sync, and what it drew; ended with SIGINT when `until` was drawn."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 120))
    process = subprocess.Popen([*support.BLOCKCOPY, "sync", *map(str, args)], stderr=theirs)
    os.close(theirs)
    drawn = b""
    try:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while data := os.read(ours, 65536):
                drawn += data
                if until is not None and until.encode() in drawn:
                    until = None
                    process.send_signal(signal.SIGINT)
        assert until is None, drawn
        return process.wait(support.PATIENCE), drawn.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_terminal_gets_a_progress_bar(source: Path, destination: Path) -> None:
    status, drawn = on_a_terminal(None, source, destination)
    assert status == 0
    last = drawn.rpartition("\x1b[1A")[2]  # it goes up a line before it draws the two once more
    assert "100.00 %" in last
    assert "6.0 MiB of 6.0 MiB" in last
    assert "fetched 640.0 KiB" in last
    assert destination.read_bytes() == DATA


def test_the_percent_of_the_bar_is_floored(source: Path, tmp_path: Path) -> None:
    equal = written(tmp_path / "equal", DATA)
    in_eights = ("--limit", "4M")  # else all of it is one batch
    status, drawn = on_a_terminal("66.66 %", *in_eights, "--blockcopy-path", STALLS, source, equal)
    assert status == -signal.SIGINT
    percents = {float(each) for each in re.findall(r"([\d.]+) %", drawn)}
    assert max(percents) == 66.66
    assert equal.read_bytes() == DATA


ONLY_EMPTY_ANSWERS = """
import sys
while (command := sys.stdin.buffer.read(4)) == b"Hash":
    position = sys.stdin.buffer.read(8)
    sys.stdin.buffer.read(4 + 64)
    sys.stdout.buffer.write(b"data" + position + bytes(4))
    sys.stdout.buffer.flush()
if command != b"done":
    sys.exit(f"I do not know {command}")
"""


def test_a_source_that_answers_with_nothing_at_all_is_no_empty_one(tmp_path: Path) -> None:
    """An empty frame is a fence, but only where a fence was put."""
    program, destination = tmp_path / "program.py", tmp_path / "destination"
    program.write_text(ONLY_EMPTY_ANSWERS)
    destination.write_bytes(OLD)
    done = support.run("sync", "--blockcopy-path", f"{support.PYTHON} {program}", "/dev/null", destination)
    failed(done, 3, "unexpected reply")
    assert destination.read_bytes() == OLD


# What the source compresses with, zeros, holes


PLAIN = b"it compresses well, and is no zeros. " * 60000
LINK = f"{support.PYTHON} {support.STANDINS / 'link'} --count"


@pytest.mark.parametrize("wish", ["zstd", "zstd:9", "none", None])
def test_what_crosses_the_link_is_compressed_as_wished(wish: str | None, tmp_path: Path) -> None:
    source, destination = written(tmp_path / "source", PLAIN), tmp_path / "destination"
    options = [] if wish is None else ["--compress", wish]
    program = shlex.join(support.BLOCKCOPY)
    rsh = f"{LINK} {tmp_path}/counts"
    done = support.run("sync", *options, "-e", rsh, "--blockcopy-path", program, f"host:{source}", destination)
    assert_silent_success(done)
    assert destination.read_bytes() == PLAIN
    answered = sum(int(line.split()[1]) for line in (tmp_path / "counts").read_text().splitlines())
    if wish in ("zstd", "zstd:9"):
        assert answered < len(PLAIN) // 10
    elif wish == "none":
        assert answered > len(PLAIN)


@pytest.mark.parametrize("wish", ["zstd:0", "zstd:20", "gzip", ""])
def test_a_compression_that_cannot_be_meant(wish: str, source: Path, destination: Path) -> None:
    failed(support.run("sync", "--compress", wish, source, destination), 2)


@pytest.mark.parametrize("sparse", [True, False])
def test_zeros_become_holes_unless_they_are_to_be_written_out(sparse: bool, tmp_path: Path) -> None:
    data = support.noise(BLOCK_SIZE) + bytes(4 * BLOCK_SIZE) + support.noise(1000)
    source, destination = written(tmp_path / "source", data), written(tmp_path / "destination", b"\xff" * len(data))
    assert_silent_success(support.run("sync", *([] if sparse else ["--no-sparse"]), source, destination))
    assert destination.read_bytes() == data
    allocated = destination.stat().st_blocks * 512
    assert (allocated < 3 * BLOCK_SIZE) is sparse


def test_holes_at_both_ends_cost_next_to_nothing(tmp_path: Path) -> None:
    """A TiB of them: read one by one, they would take minutes."""
    source, destination = written(tmp_path / "source", DATA), written(tmp_path / "destination", OLD)
    for each in (source, destination):
        os.truncate(each, 1 << 40)
    with source.open("r+b") as file:
        file.seek((1 << 39) + 5)
        file.write(b"far away")
    assert_silent_success(support.run("sync", source, destination))
    with destination.open("rb") as file:
        assert file.read(len(DATA)) == DATA
        file.seek((1 << 39) + 5)
        assert file.read(8) == b"far away"
    assert destination.stat().st_blocks * 512 < len(DATA) + 3 * BLOCK_SIZE


def test_holes_count_for_no_rate_and_not_for_the_time_to_go(tmp_path: Path) -> None:
    limit, size = 2 << 20, 1 << 30
    source = support.written(tmp_path / "source", support.noise(3 * limit))
    os.truncate(source, size)
    command = [*support.BLOCKCOPY, "sync", "--limit", "2M", "--progress=json", source, tmp_path / "destination"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=30)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert max(each["rate_bytes_per_s"] for each in told) < 1.5 * limit
    going = [each for each in told if not each["finished"] and each["eta_seconds"] is not None]
    assert going
    for each in going:  # what is left has the limit's pace
        assert each["eta_seconds"] >= (size - each["done_bytes"]) // (1.5 * limit)


def test_a_destination_that_is_refused_leaves_no_process_behind(source: Path) -> None:
    """That of the source is started before anything else; the fixtures look for what is left."""
    done = support.run("sync", source, source)
    assert_failed(done, 1)
