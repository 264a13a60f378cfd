"""A push over several connections: how answers are spread, and what becomes of connections that fail."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    STANDINS,
    Sshd,
    failed,
    noise,
    run,
    succeeded,
    until,
    with_changes,
    written,
)

from blockcopy.block import identity
from blockcopy.block.device import open_source
from blockcopy.protocol import wire
from blockcopy.protocol.compression import NO_COMPRESSION
from blockcopy.protocol.decoder import Decoder
from blockcopy.protocol.handshake import ClientGreeting, Handshake, read_client
from blockcopy.push.spread import Spread
from blockcopy.stage import join as stage_join
from blockcopy.stage.delivery import Answer
from blockcopy.stage.join import Joins, join
from blockcopy.stage.streams import InputStream, OutputStream
from blockcopy.transport.session import SilenceTimer

MIB = 1 << 20
SIZE = 24 * MIB + 1000
DATA = noise(SIZE)

LINK = f"{PYTHON} {STANDINS / 'link'}"
"""In place of ssh. It shares no login, so there is one connection unless --connections says otherwise."""

PROGRAM = " ".join(BLOCKCOPY)
"""The installed program at the other end: its options are in the list of processes."""


def command(source: object, destination: object, *options: object, rsh: str = LINK, count: int = 3) -> list[str]:
    more = ["-e", rsh, "--blockcopy-path", PROGRAM, "--connections", count, "--compress", "none", *options]
    return ["sync", *map(str, more), str(source), f"host:{destination}"]


# Answers and branches


class Sent:
    """An output that keeps what is written."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.written = 0

    def write(self, frames: list[bytes]) -> None:
        self.frames += frames
        self.written += sum(map(len, frames))

    def release(self) -> None:
        """There is nothing to release."""


class Line:
    """A Spread with an output that keeps all, and answers of one byte string each."""

    def __init__(self) -> None:
        self.first = Sent()
        self.spread = Spread(self.first, contextlib.nullcontext)  # type: ignore[arg-type]
        self.released: list[bytes] = []

    def branch(self) -> Any:
        return self.spread.open_branch(Sent(), SilenceTimer())  # type: ignore[arg-type]

    def answer(self, data: bytes, *, ordered: bool = False) -> Answer:
        return Answer(
            [data], lambda: self.released.append(data), None if ordered else lambda: self.answer(b"again " + data)
        )

    def deliver(self, *names: bytes) -> None:
        for each in names:
            self.spread.deliver(self.answer(each))


def test_without_branches_all_answers_go_over_the_first_connection() -> None:
    line = Line()
    line.deliver(b"a", b"b")
    assert (line.first.frames, line.released) == ([b"a", b"b"], [b"a", b"b"])


def test_branches_are_filled_first() -> None:
    line = Line()
    branches = [line.branch(), line.branch()]
    line.deliver(b"a", b"b", b"c", b"d", b"e")
    assert line.first.frames == [b"e"]
    assert [branch.load for branch in branches] == [2, 2]
    assert [branches[0].take().frames, branches[1].take().frames] == [[b"a"], [b"b"]]
    line.deliver(b"f")
    assert line.first.frames == [b"e"]


def test_what_a_branch_does_not_confirm_is_examined_again() -> None:
    line = Line()
    branch = line.branch()
    line.deliver(b"a", b"b")
    branch.take(), branch.take()
    line.deliver(b"c")
    branch.confirm(1)
    branch.end()
    assert line.spread.branches == []
    line.deliver(b"d")
    assert line.first.frames == [b"again b", b"again c", b"d"]
    assert line.released == [b"c", b"again b", b"again c", b"d"]


def test_an_answer_whose_order_matters_waits_for_all_confirmations() -> None:
    line = Line()
    branch = line.branch()
    line.deliver(b"a", b"b")
    branch.take(), branch.take()
    waiter = threading.Thread(target=lambda: line.spread.deliver(line.answer(b"done", ordered=True)))
    waiter.start()
    branch.confirm(1)
    assert (waiter.is_alive(), line.first.frames) == (True, [])
    branch.confirm(2)
    waiter.join()
    assert line.first.frames == [b"done"]


def test_a_branch_that_ends_while_an_ordered_answer_waits() -> None:
    line = Line()
    branch = line.branch()
    line.deliver(b"a")
    branch.take()
    waiter = threading.Thread(target=lambda: line.spread.deliver(line.answer(b"done", ordered=True)))
    waiter.start()
    branch.end()
    waiter.join()
    assert line.first.frames == [b"again a", b"done"]


def test_silence_counts_only_while_a_confirmation_is_due() -> None:
    line, silence = Line(), SilenceTimer()
    branch = line.spread.open_branch(Sent(), silence)  # type: ignore[arg-type]
    assert silence.seconds() == 0
    line.deliver(b"a")
    branch.take()
    until(silence.seconds)
    branch.confirm(1)
    assert silence.seconds() == 0


def test_the_first_fence_measures_the_round_trip() -> None:
    line = Line()
    line.spread.greeted(ClientGreeting("sha256", NO_COMPRESSION, 1, "ab" * 16))
    line.spread.fenced()
    assert (line.spread.token, line.spread.round_trip) == ("ab" * 16, None)
    line.spread.deliver(line.answer(b"hello", ordered=True))
    line.spread.fenced()
    assert line.spread.round_trip is not None


@pytest.mark.parametrize("token", [None, 7, "", "ab" * 15, "ab" * 17, "AB" * 16, "--force" + "a" * 25, ["ab" * 16]])
def test_a_token_is_believed_only_in_its_form(token: object) -> None:
    hello = {"digests": {"sha256": 1}, "join": token}
    assert read_client(wire.Hello(hello)).join is None


def test_a_greeting_has_the_token() -> None:
    rest = memoryview(Handshake(join="ab" * 16).greeting)

    def read_into(buffer: memoryview) -> int:
        buffer[: len(rest)] = rest
        return len(rest)

    hello = next(each for each in Decoder(wire.HASH_STREAM).messages(read_into) if each is not None)
    assert isinstance(hello, wire.Hello)
    assert read_client(hello).join == "ab" * 16


# Processes that join


class Joined:
    """The streams that `Joins` has been given."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def serve(self, stream: InputStream, output: OutputStream) -> None:
        output.write([b"welcome"])
        buffer = memoryview(bytearray(100))
        while count := stream.read_into(buffer):
            self.received.append(bytes(buffer[:count]))


JOIN = [PYTHON, "-P", "-m", "blockcopy", "receive", "--join"]


def test_a_joined_process_stays_until_its_streams_have_ended(tmp_path: Path) -> None:
    joined = Joined()
    with Joins() as joins:
        joins.open(joined.serve)
        process = subprocess.Popen(
            [*JOIN, str(joins.token), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.read(7) == b"welcome"
            assert process.poll() is None
            process.stdin.write(b"to the owner")
            process.stdin.close()
            assert process.wait(support.PATIENCE) == 0
    assert b"".join(joined.received) == b"to the owner"


def test_the_end_of_the_owner_ends_all_that_have_joined(tmp_path: Path) -> None:
    with Joins() as joins:
        joins.open(Joined().serve)
        processes = [
            subprocess.Popen(
                [*JOIN, str(joins.token), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(3)
        ]
        for each in processes:
            assert each.stdout is not None
            assert each.stdout.read(7) == b"welcome"
    for each in processes:
        with each:
            assert each.wait(support.PATIENCE) == 0


def test_a_wrong_token_finds_no_socket(tmp_path: Path) -> None:
    with Joins() as joins:
        joins.open(Joined().serve)
        done = run("receive", "--join", "ab" * 16, tmp_path)
        failed(done, 1, "cannot join the other connection of this copy: Connection refused")


def hand_over(address: str, token: bytes, fds: list[int]) -> bytes:
    """What a process is told that hands over `token` and `fds`."""
    with socket.socket(socket.AF_UNIX) as joining:
        joining.connect(address)
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(joining, [token], fds)
        with contextlib.suppress(ConnectionResetError):
            return joining.recv(1)
    return b""


@pytest.mark.parametrize("count", [0, 1, 2])
def test_who_finds_the_socket_without_the_token_is_refused(count: int) -> None:
    """All users can list the names of abstract sockets."""
    served: list[object] = []
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"), Joins() as joins:
        joins.open(lambda *streams: served.append(streams))
        assert hand_over(stage_join.address_of(str(joins.token)), b"ab" * 16, [reader, writer][:count]) == b""
    assert served == []


def test_another_user_with_the_token_is_refused() -> None:
    support.require_root()
    served: list[object] = []
    program = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_UNIX) as joining:\n"
        "    joining.connect('\\0' + sys.argv[1])\n"
        "    try:\n"
        "        socket.send_fds(joining, [sys.argv[2].encode()], [0, 1])\n"
        "        print('heard', joining.recv(1))\n"
        "    except OSError: print('heard', b'')\n"
    )
    with Joins() as joins:
        joins.open(lambda *streams: served.append(streams))
        arguments = [stage_join.address_of(str(joins.token))[1:], str(joins.token)]
        done = subprocess.run(
            ["/usr/bin/python3", "-c", program, *arguments], capture_output=True, user=65534, check=False
        )
    assert (done.stdout, served) == (b"heard b''\n", [])


def test_a_socket_of_another_user_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with Joins() as joins:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(Exception, match="cannot join the other connection of this copy: Operation not"):
            join(str(joins.listen()))


def test_a_process_that_hands_over_nothing_delays_no_other_and_no_end(tmp_path: Path) -> None:
    with Joins() as joins, socket.socket(socket.AF_UNIX) as silent:
        joins.open(Joined().serve)
        silent.connect(stage_join.address_of(str(joins.token)))
        process = subprocess.Popen(
            [*JOIN, str(joins.token), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.read(7) == b"welcome"
        ending = time.monotonic()
    with process:
        assert process.wait(support.PATIENCE) == 0
    assert time.monotonic() - ending < stage_join._HAND_OVER_SECONDS / 2


# Whole copies


@pytest.mark.parametrize("before", [None, with_changes(DATA, [3, 17, 40]), DATA[: 7 * BLOCK_SIZE + 5]])
def test_the_copy_is_right_and_each_connection_carries_a_part(
    source: Path, destination: Path, tmp_path: Path, before: bytes | None
) -> None:
    if before is not None:
        written(destination, before)
    count = tmp_path / "count"
    rsh = f"{LINK} --delay 5 --rate 8M --count {count}"
    succeeded(run(*command(source, destination, rsh=rsh)), stdout=b"")
    assert destination.read_bytes() == DATA
    if before is None:
        passed = [int(line.split()[0]) for line in count.read_text().splitlines()]
        assert (len(passed), min(passed) > MIB // 4) == (3, True)


def test_the_stages_that_are_sent_can_join(source: Path, destination: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    rsh = f"{LINK} --rate 8M --count {count}"
    done = run("sync", "-e", rsh, "--python", PYTHON, "--connections", 3, source, f"host:{destination}")
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA
    assert len(count.read_text().splitlines()) == 3


def test_without_a_shared_login_there_is_one_connection(source: Path, destination: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    rsh = f"{LINK} --delay 50 --window 2M --count {count}"
    succeeded(run(*command(source, destination, "--connections", "auto", rsh=rsh)), stdout=b"")
    assert len(count.read_text().splitlines()) == 1


def test_the_limit_holds_for_all_connections_together(source: Path, destination: Path) -> None:
    started = time.monotonic()
    succeeded(run(*command(source, destination, "--limit", "12M")), stdout=b"")
    assert time.monotonic() - started > 1.9
    assert destination.read_bytes() == DATA


def test_several_connections_through_ssh_and_verified(sshd: Sshd, source: Path, destination: Path) -> None:
    there = f"{sshd.user}@{sshd.host}:{destination}"
    options = ["-e", sshd.rsh, "--python", PYTHON, "--verify", "--connections", 4]
    succeeded(run("sync", *options, source, there), stdout=b"")
    assert destination.read_bytes() == DATA


def test_a_server_that_allows_few_sessions(
    source: Path, destination: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    support.require_sshd()
    with Sshd(tmp_path_factory.mktemp("few"), "MaxSessions 2") as sshd:
        there = f"{sshd.user}@{sshd.host}:{destination}"
        options = ["-e", sshd.rsh, "--python", PYTHON, "--connections", 4]
        succeeded(run("sync", *options, source, there), stdout=b"")
    assert destination.read_bytes() == DATA


def test_connections_that_are_refused_are_no_error(source: Path, destination: Path, tmp_path: Path) -> None:
    rsh = tmp_path / "rsh"
    rsh.write_text(f'#!/bin/sh\ncase "$*" in *--join*) exit 255;; esac\nexec {LINK} --rate 20M "$@"\n')
    rsh.chmod(0o755)
    succeeded(run(*command(source, destination, rsh=str(rsh))), stdout=b"")
    assert destination.read_bytes() == DATA


# What goes wrong


class Running:
    """A push over three slow connections, in mid-copy."""

    def __init__(self, source: Path, destination: Path, *options: object, rate: str = "3M") -> None:
        self._destination = destination
        arguments = command(source, destination, *options, rsh=f"{LINK} --rate {rate}")
        self.process = subprocess.Popen([*BLOCKCOPY, "-vv", *arguments], stderr=subprocess.PIPE, text=True)

    def links(self, *, joined: bool) -> list[int]:
        """The processes in place of ssh of the first connection, or of those that have joined."""
        found = []
        for pid in support.children(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"standins/link") for word in words) and (b"--join" in words) == joined:
                    found.append(pid)
        return found

    def wait_for_all(self) -> None:
        """Wait until three connections are at work."""
        assert self.process.stderr is not None
        assert any("3 connections instead of 1" in line for line in self.process.stderr)
        until(lambda: len(self.links(joined=True)) == 2, "two further connections")
        at_work = self._destination.stat().st_blocks
        until(lambda: self._destination.stat().st_blocks > at_work + 4 * MIB // 512, "writes")

    def end(self) -> tuple[int, str]:
        """Wait for the end. Return status and the rest of standard error."""
        _, rest = self.process.communicate(timeout=support.PATIENCE)
        return self.process.returncode, rest


@pytest.mark.long
def test_a_further_connection_that_is_killed_is_no_error(source: Path, destination: Path) -> None:
    running = Running(source, destination)
    running.wait_for_all()
    os.kill(running.links(joined=True)[0], signal.SIGKILL)
    status, said = running.end()
    assert (status, "a further connection to host" in said, "ERROR (sync)" in said) == (0, True, False), said
    assert destination.read_bytes() == DATA


@pytest.mark.long
def test_all_further_connections_are_killed(source: Path, destination: Path) -> None:
    running = Running(source, destination)
    running.wait_for_all()
    for pid in running.links(joined=True):
        os.kill(pid, signal.SIGKILL)
    status, said = running.end()
    assert (status, "ERROR (sync)" in said, "reconnecting" in said) == (0, False, False), said
    assert destination.read_bytes() == DATA


@pytest.mark.long
def test_a_further_connection_that_freezes_is_given_up(source: Path, destination: Path) -> None:
    running = Running(source, destination, "--timeout", "1")
    running.wait_for_all()
    frozen = running.links(joined=True)[0]
    os.kill(frozen, signal.SIGSTOP)
    status, said = running.end()
    assert (status, "sent nothing for 1 seconds" in said, "ERROR (sync)" in said) == (0, True, False), said
    assert destination.read_bytes() == DATA


@pytest.mark.long
def test_the_first_connection_that_is_killed_is_made_again(source: Path, destination: Path) -> None:
    running = Running(source, destination)
    running.wait_for_all()
    os.kill(running.links(joined=False)[0], signal.SIGKILL)
    status, said = running.end()
    assert (status, "connection lost, reconnecting" in said, "ERROR (sync)" in said) == (0, True, False), said
    assert destination.read_bytes() == DATA


@pytest.mark.long
def test_a_source_that_changes_near_the_end_is_noticed(source: Path, destination: Path) -> None:
    """All signatures have been sent by then. The last bytes of the copy are younger than the first ones."""
    running = Running(source, destination)
    running.wait_for_all()
    until(lambda: destination.stat().st_blocks * 512 > SIZE - 10 * MIB, "nearly all")
    with source.open("r+b") as file:
        for offset in (100, SIZE - 100):
            file.seek(offset)
            file.write(b"changed")
    status, said = running.end()
    assert (status, "source changed" in said) == (3, True), said


@pytest.mark.long
def test_a_destination_that_the_lost_connection_still_holds_is_waited_for(source: Path, destination: Path) -> None:
    """Its `receive` may wait for a disk. Here the test holds the lock in its place."""
    running = Running(source, destination)
    running.wait_for_all()
    with destination.open("r+b") as file:
        os.kill(running.links(joined=False)[0], signal.SIGKILL)
        fcntl.lockf(file, fcntl.LOCK_EX)  # once `receive` has ended
        assert running.process.stderr is not None
        said = next(line for line in running.process.stderr if "still held" in line)
        assert "--force" not in said
    status, said = running.end()
    assert (status, "ERROR (sync)" in said) == (0, False), said
    assert destination.read_bytes() == DATA


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_connections(source: Path, destination: Path, signum: signal.Signals) -> None:
    """What is left behind, the fixtures find."""
    running = Running(source, destination)
    running.wait_for_all()
    running.process.send_signal(signum)
    assert running.end()[0] == -signum


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (["--enospc-after", str(9 * MIB)], "No space left on device"),
        (["--eio-at", str(9 * MIB)], "Input/output error"),
    ],
)
def test_a_destination_that_fails_is_one_error(source: Path, tmp_path: Path, fault: list[str], told: str) -> None:
    support.require_fuse()
    backing, point = written(tmp_path / "backing", bytes(SIZE)), tmp_path / "point"
    point.mkdir()
    disk = [PYTHON, str(STANDINS / "faulty_disk"), *fault, str(backing), str(point)]
    with subprocess.Popen(disk, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            done = run(*command(source, point / "disk", rsh=f"{LINK} --rate 20M"))
        finally:
            server.terminate()
    failed(done, 1, told)
    assert done.stderr.decode().count("ERROR") == 1


@pytest.mark.parametrize("message", [wire.Data(SIZE - 1, b"xy"), wire.Rest(0), wire.Failure(SIZE, "no")])
def test_a_further_connection_with_invalid_messages_ends_alone(
    source: Path, destination: Path, message: wire.Message
) -> None:
    with open_source(str(source)) as device:
        hello = wire.Hello({"digest": "sha256", "identity": identity.source_identity(device)})
    receiving = subprocess.Popen(
        [*BLOCKCOPY, "receive", str(destination)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with receiving, contextlib.ExitStack() as stack:
        assert receiving.stdin is not None
        assert receiving.stdout is not None
        first = Decoder(wire.HASH_STREAM).messages(receiving.stdout.raw.readinto)  # type: ignore[attr-defined]
        greeting = next(each for each in first if each is not None)
        assert isinstance(greeting, wire.Hello)
        receiving.stdin.write(wire.encode(hello))
        receiving.stdin.flush()
        with socket.socket(socket.AF_UNIX) as joining:
            token = str(read_client(greeting).join)
            joining.connect(stage_join.address_of(token))
            ours, theirs = os.pipe(), os.pipe()
            socket.send_fds(joining, [token.encode()], [theirs[0], ours[1]])
            os.close(theirs[0])
            os.close(ours[1])
            back = stack.enter_context(open(ours[0], "rb", buffering=0))
            out = stack.enter_context(open(theirs[1], "wb", buffering=0))
            assert back.read(12) == wire.encode(wire.Fence(0))
            out.write(wire.encode(wire.Data(0, b"new")) + wire.encode(wire.Fence(7)))
            assert back.read(12) == wire.encode(wire.Fence(7))
            out.write(wire.encode(message))
            assert (back.read(12), joining.recv(1)) == (b"", b"\0")
        rest = [wire.Fence(1), hello, wire.Done()]  # all is answered, and the source is what it was
        receiving.communicate(b"".join(map(wire.encode, rest)), timeout=support.PATIENCE)
    assert receiving.returncode == 0
    assert destination.read_bytes() == b"new" + bytes(SIZE - 3)
