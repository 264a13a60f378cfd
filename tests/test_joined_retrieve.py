"""One `retrieve` that serves several connections: what each gets, and what the end of one means for the others."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import support
from support import BLOCK_SIZE, BLOCKCOPY, PYTHON, STANDINS, Mount, noise, run, until, written

from blockcopy.protocol import wire
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.handshake import Handshake
from blockcopy.transport import bootstrap, payload

DATA = noise(64 * BLOCK_SIZE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", DATA)


class Connection:
    """A process that serves a connection, and this end of its streams."""

    def __init__(self, *command: object, opening: bytes = b"", mark: bytes = b"", **greeting: bool) -> None:
        words = [str(each) for each in command]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self.send(opening)
        assert self.process.stdout is not None
        assert self.process.stdout.read(len(mark)) == mark
        self.messages = Decoder(wire.NEGOTIATED_BLOCK_STREAM).messages(self._read_into)
        self.handshake = Handshake(digest="sha256", **greeting)
        self.send(self.handshake.greeting)
        self.token = self.handshake.read(self.receive()).join

    def _read_into(self, buffer: memoryview) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def send(self, *messages: wire.Message | bytes) -> None:
        assert self.process.stdin is not None
        for each in messages:
            self.process.stdin.write(each if isinstance(each, bytes) else wire.encode(each))

    def receive(self) -> wire.Message:
        return next(message for message in self.messages if message is not None)

    def answers(self, block: int) -> bool:
        """Return whether the source sends the right bytes of a block."""
        self.send(wire.Zero(block * BLOCK_SIZE, BLOCK_SIZE))
        answer = self.receive()
        assert isinstance(answer, wire.Data)
        return bytes(answer.payload) == DATA[block * BLOCK_SIZE :][:BLOCK_SIZE]

    def end(self, *last: wire.Message) -> tuple[int, str]:
        """Send `last`, and close the stream. Return the exit status, and what the process said."""
        self.send(*last)
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.ended()

    def ended(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        status = self.process.wait(support.PATIENCE)
        return status, self.process.stderr.read().decode()


Connect = Callable[..., Connection]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(*words, …)` returns a new Connection. All are killed after the test."""
    with ExitStack() as stack:

        def make(*command: object, **more: object) -> Connection:
            made = Connection(*command, **more)  # type: ignore[arg-type]
            stack.enter_context(made.process)
            stack.callback(made.process.kill)
            return made

        yield make


@pytest.fixture(params=["installed", "sent"])
def further(request: pytest.FixtureRequest, connect: Connect, source: Path) -> Callable[[str], Connection]:
    """`further(token)` returns a further connection, of an installed program or one that is sent."""

    def make(token: str) -> Connection:
        if request.param == "installed":
            return connect(*BLOCKCOPY, "retrieve", "--join", token, source)
        return connect(PYTHON, "-c", payload.CODE, opening=payload.joining(token), mark=bootstrap.MARK)

    return make


@pytest.fixture
def pair(connect: Connect, source: Path, further: Callable[[str], Connection]) -> tuple[Connection, Connection]:
    """Return the first connection of a `retrieve`, and one that has joined it."""
    first = connect(*BLOCKCOPY, "retrieve", source, join=True)
    return first, further(str(first.token))


def test_only_who_asks_gets_a_token(connect: Connect, source: Path) -> None:
    assert connect(*BLOCKCOPY, "retrieve", source).token is None
    first = connect(*BLOCKCOPY, "retrieve", source, join=True)
    token = first.token
    assert token is not None
    first.send(first.handshake.greeting)
    assert first.handshake.read(first.receive()).join == token, "once more the same"


def test_each_connection_is_answered(connect: Connect, source: Path, further: Callable[[str], Connection]) -> None:
    first = connect(*BLOCKCOPY, "retrieve", source, join=True)
    others = [further(str(first.token)) for _ in range(3)]
    for at, each in enumerate([*others, first, *others]):
        assert each.answers(at)
    assert [each.end(wire.Done()) for each in others] == 3 * [(0, "")]
    assert first.answers(10)
    assert first.end(wire.Done()) == (0, "")


def test_the_others_outlive_the_first(pair: tuple[Connection, Connection]) -> None:
    first, other = pair
    assert other.answers(1)
    assert first.process.stdin is not None
    first.process.stdin.close()
    assert other.answers(2)
    assert first.process.poll() is None
    assert other.end(wire.Done()) == (0, "")
    status, said = first.ended()
    assert (status, "ended without `done`" in said) == (1, True)


def test_a_fault_of_one_is_told_there_and_ends_no_other(pair: tuple[Connection, Connection]) -> None:
    first, other = pair
    status, said = other.end(wire.Asks(0, BLOCK_SIZE, BLOCK_SIZE, memoryview(b"short")))
    assert (status, "other digests than sha256" in said) == (1, True)
    assert first.answers(1)
    assert first.end(wire.Done()) == (0, "")


def test_the_death_of_the_server_ends_all(pair: tuple[Connection, Connection]) -> None:
    first, other = pair
    assert other.answers(1)
    first.process.kill()
    status, said = other.ended()
    assert (status, "the process that served this connection has ended" in said) == (137, True)


def test_a_signal_to_the_server_ends_all(pair: tuple[Connection, Connection]) -> None:
    first, other = pair
    assert other.answers(1)
    first.process.terminate()
    first.ended()
    assert other.ended()[0] != 0


def test_no_such_server(source: Path) -> None:
    done = run("retrieve", "--join", "ab" * 16, source)
    support.failed(done, 1, "cannot join the other connection of this copy: Connection refused")


# Whole copies

Mounter = Callable[..., Mount]


def opened_by(path: Path) -> list[int]:
    """Return the processes that have `path` open, except this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(each) == str(path) for each in folder.iterdir()):
                found.append(int(folder.parent.name))
        except OSError:
            continue  # it has ended
    return sorted(set(found) - {os.getpid()})


@pytest.fixture
def narrow() -> str:
    """Return a remote shell with a round trip of 40 ms, whose window is 128 KiB."""
    return shlex.join(map(str, [PYTHON, STANDINS / "link", "--delay", 20, "--window", "128K"]))


@pytest.mark.long
@pytest.mark.parametrize("program", [None, f"{PYTHON} -P -m blockcopy"], ids=["sent", "installed"])
def test_one_process_serves_all_connections_of_a_lane(
    mount: Mounter, source: Path, tmp_path: Path, narrow: str, program: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    destination = written(tmp_path / "destination", bytes(len(DATA)))
    options = ["-e", narrow, "--python", PYTHON, "--connections", 5, "--limit", "1M"]
    mounted = mount(f"host:{source}", destination, *options, program=program)
    until(lambda: mounted.status()["link"]["connections"] >= 6, "five connections beside the readers'")
    servers = opened_by(source)
    assert len(servers) == 2, "one for the copy, and one for readers"
    for each in servers:
        os.kill(each, 9)
    assert run("limit", mounted.point, "none").returncode == 0
    assert mounted.file.read_bytes() == DATA
    mounted.wait()
    assert run("umount", mounted.point).returncode == 0
    assert destination.read_bytes() == DATA


def test_a_host_where_none_can_join_has_a_process_for_each(mount: Mounter, source: Path, tmp_path: Path) -> None:
    """Each connection has a network of its own, as behind a balancer: the sockets are not seen."""
    support.require_root()
    rsh = written(tmp_path / "rsh", b'#!/bin/sh\nshift; exec unshare --net sh -c "$*"\n')
    rsh.chmod(0o755)
    destination = written(tmp_path / "destination", bytes(len(DATA)))
    options = ["-e", rsh, "--python", PYTHON, "--connections", 3, "--limit", "1M"]
    mounted = mount(f"host:{source}", destination, *options)
    until(lambda: len(opened_by(source)) >= 4, "a process for each connection")
    assert run("limit", mounted.point, "none").returncode == 0
    mounted.wait()
    assert run("umount", mounted.point).returncode == 0
    assert destination.read_bytes() == DATA
