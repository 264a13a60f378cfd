"""A stage on a host that does not begin, or goes silent: what is told, and that nobody waits for ever."""

from __future__ import annotations

import logging
import math
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from support import BLOCK_SIZE, BLOCKCOPY, PATIENCE, PYTHON, STANDINS, failed, noise, run, succeeded, until, written

from blockcopy.block.device import open_source
from blockcopy.errors import RemoteError, SourceError
from blockcopy.progress.reporter import Progress
from blockcopy.push.push import push
from blockcopy.replica.plan import Plan
from blockcopy.replica.source.connector import Connector
from blockcopy.transport import control_master, start_timeout
from blockcopy.transport.command import stage_command
from blockcopy.transport.location import parse_location
from blockcopy_fuse import doctor

DATA = noise(40 * BLOCK_SIZE)

LINK = f"{PYTHON} {STANDINS / 'link'}"

LOGINS = {
    "waits": "echo Welcome; exec sleep 100",
    "asks": "echo 'Welcome. Go on? [y/N]' >&2; read answer; read answer; exec sleep 100",
    "another shell": "echo Welcome; cat >/dev/null; exit 1",
    "closed its output": "echo Welcome; exec >&- 2>&- sleep 100",
}


@pytest.fixture
def rsh(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a script in place of ssh. The children of the script end with the test."""

    def make(script: str) -> str:
        path = written(tmp_path / "rsh", f"#!/bin/sh\n{script}\n".encode())
        path.chmod(0o755)
        return str(path)

    return make


@pytest.mark.parametrize("kind", LOGINS)
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_login_that_never_begins_is_given_up_with_its_words(
    rsh: Callable[[str], str], source: Path, tmp_path: Path, direction: str, kind: str
) -> None:
    ends = [f"host:{source}", tmp_path / "copy"] if direction == "pull" else [source, f"host:{tmp_path}/copy"]
    done = run("sync", "-e", rsh(LOGINS[kind]), "--timeout", "1", *ends)
    last = done.stderr.decode().splitlines()[-1]
    failed(done, 3)
    assert "Welcome" in last or kind == "closed its output"
    if kind != "closed its output":
        assert "gave up waiting for host to start `python3` after 1 seconds; its login printed: Welcome" in last
        assert last.endswith("host true")
    assert "Traceback" not in done.stderr.decode()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("arguments", [["verify", "{source}", "host:/x"], ["verify", "host:/x", "{source}"]])
def test_so_it_is_for_verify(rsh: Callable[[str], str], source: Path, arguments: list[str]) -> None:
    command, *ends = (each.format(source=source) for each in arguments)
    done = run(command, "-e", rsh(LOGINS["waits"]), "--timeout", "1", *ends)
    failed(done, 3, b"gave up waiting for host")


def test_so_it_is_for_doctor(rsh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_HOST_SECONDS", 1)
    [finding] = doctor.examine_host(stage_command(parse_location("host:/x"), rsh(LOGINS["waits"]), stage="facts"))
    assert (finding.verdict, "gave up waiting for host" in finding.message) == ("FAIL", True)


@pytest.mark.parametrize("answer", ["yes", "echo '{}'", "echo '{\"user\": 1}'; sleep 100"])
def test_facts_that_are_none(rsh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(doctor, "_HOST_SECONDS", 1)
    command = stage_command(parse_location("host:/x"), rsh(f"exec sh -c {answer!r}"), "facts", stage="facts")
    [finding] = doctor.examine_host(command)
    assert finding.verdict == "FAIL"


def test_a_user_is_told_what_is_waited_for(
    rsh: Callable[[str], str], source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Long before it is given up: there may be a password to type."""
    monkeypatch.setattr(start_timeout, "WARN_SECONDS", 0.2)
    monkeypatch.setattr(start_timeout, "LOGIN_SECONDS", 1)
    caplog.set_level(logging.WARNING)
    command = stage_command(parse_location("host:/x"), rsh(LOGINS["waits"]))

    async def pull() -> None:
        connector = Connector(Plan(command, "destination", timeout=0.5, prompts=True), size_guess=0)
        async with trio.open_nursery() as nursery:
            with pytest.raises(SourceError, match="after 1 seconds"):
                await connector.open(nursery)
            nursery.cancel_scope.cancel()

    with open_source(str(source)) as device, pytest.raises(RemoteError, match="after 1 seconds"):
        push(command, device, timeout=0.5, prompts=True, progress=Progress())
    trio.run(pull)
    told = "still waiting for host to start `python3`; its login printed: Welcome"
    assert [record.getMessage() for record in caplog.records] == [told, told]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Somebody accepts connections there, and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_shared_login_is_given_up_too(
    silent_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start_timeout, "WARN_SECONDS", 0.2)
    monkeypatch.setattr(start_timeout, "LOGIN_SECONDS", 0.5)
    rsh = f"ssh -F none -p {silent_port} -o BatchMode=yes"
    command = stage_command(parse_location("127.0.0.1:/x"), rsh, control=control_master.control_path(shared=True))
    with pytest.raises(RemoteError, match=r"gave up waiting for 127\.0\.0\.1 .* after 0\.5 seconds"):
        control_master.log_in(command)
    assert "still waiting for 127.0.0.1" in caplog.text


def test_a_host_that_accepts_and_says_nothing(silent_port: int, source: Path, tmp_path: Path) -> None:
    rsh = f"ssh -F none -p {silent_port} -o BatchMode=yes"
    done = run("sync", "-e", rsh, "--timeout", "1", f"127.0.0.1:{source}", tmp_path / "copy")
    failed(done, 3, b"gave up waiting for 127.0.0.1")


@pytest.mark.parametrize(
    ("timeout", "prompts", "seconds"),
    [(30, False, 30), (30, True, 120), (300, True, 300), (math.inf, True, math.inf)],
)
def test_a_login_that_may_ask_has_longer(timeout: float, prompts: bool, seconds: float) -> None:
    assert start_timeout.max_start_seconds(timeout, prompts=prompts) == seconds


# A push, later on


def test_a_push_over_a_link_that_freezes_is_begun_again(source: Path, tmp_path: Path) -> None:
    freeze, destination = tmp_path / "freeze", tmp_path / "destination"
    way = ["-e", f"{LINK} --rate 2M --freeze-while {freeze}", "--python", PYTHON, "--timeout", "2"]
    command = [*BLOCKCOPY, "sync", *way, str(source), f"host:{destination}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: destination.exists() and destination.stat().st_blocks, "the first writes")
        freeze.touch()
        assert process.stderr is not None
        assert any(b"sent nothing for 2 seconds" in line for line in process.stderr)
        freeze.unlink()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert destination.read_bytes() == DATA


def test_a_push_whose_own_end_takes_its_time_is_not_cut(tmp_path: Path) -> None:
    """At that limit each megabyte is held up for longer than the host may be silent."""
    source, destination = written(tmp_path / "source", DATA[: 2 << 20]), tmp_path / "destination"
    way = ["-e", LINK, "--python", PYTHON, "--timeout", "1.5", "--limit", "600K", "--compress", "none"]
    done = run("sync", *way, source, f"host:{destination}")
    succeeded(done)
    assert destination.read_bytes() == source.read_bytes()


def test_a_push_to_a_program_that_cannot_be_reached_is_not_tried_for_ever(
    rsh: Callable[[str], str], source: Path
) -> None:
    done = run("sync", "-e", rsh("exit 255"), "--blockcopy-path", "blockcopy", source, "host:/x")
    failed(done, 3)
