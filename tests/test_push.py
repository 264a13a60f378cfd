"""`sync SOURCE host:/destination`: both ends, what becomes of the destination, a link that breaks, refusals."""

from __future__ import annotations

import lzma
import os
import signal
import subprocess
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import support
from support import (
    BLOCK_SIZE,
    BLOCKCOPY,
    PYTHON,
    STANDINS,
    FedDecoder,
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
from blockcopy.errors import OutputError
from blockcopy.protocol import wire, zstd
from blockcopy.transport import session

SIZE = 40 * BLOCK_SIZE + 1000
DATA = noise(SIZE)

LINK = f"{PYTHON} {STANDINS / 'link'}"
"""In place of ssh."""


def push(
    source: object, destination: object, *options: object, rsh: str = LINK
) -> subprocess.CompletedProcess[bytes]:
    return run("sync", "-e", rsh, "--python", PYTHON, *options, source, f"host:{destination}")


# What the destination is afterwards


@pytest.mark.parametrize(
    ("before", "compress"),
    [
        pytest.param(None, "none", id="missing"),
        pytest.param(None, "auto", id="missing, auto"),
        pytest.param(b"", "auto", id="empty"),
        pytest.param(DATA, "auto", id="equal"),
        pytest.param(with_changes(DATA, [3, 17, 40]), "zstd:1", id="differing"),
        pytest.param(with_changes(DATA, [3, 17, 40]), "none", id="differing, none"),
        pytest.param(DATA[: 7 * BLOCK_SIZE + 5], "zstd:1", id="shorter"),
        pytest.param(bytes(SIZE), "none", id="zeros"),
    ],
)
def test_it_is_the_copy(source: Path, destination: Path, before: bytes | None, compress: str) -> None:
    if before is not None:
        written(destination, before)
    done = push(source, destination, "--compress", compress)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA


def test_a_longer_one_keeps_its_tail(source: Path, destination: Path) -> None:
    written(destination, bytes(SIZE) + b"the tail")
    assert push(source, destination).returncode == 0
    assert destination.read_bytes() == DATA + b"the tail"


@pytest.mark.parametrize("options", [(), ("--no-sparse",)], ids=["sparse", "no-sparse"])
def test_holes_become_holes(tmp_path: Path, destination: Path, options: tuple[str, ...]) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(64 * BLOCK_SIZE)
        file.seek(20 * BLOCK_SIZE)
        file.write(DATA[: 2 * BLOCK_SIZE])
    written(destination, noise(64 * BLOCK_SIZE, seed=2))
    assert push(source, destination, *options).returncode == 0
    assert destination.read_bytes() == source.read_bytes()
    assert (destination.stat().st_blocks * 512 < 8 * BLOCK_SIZE) == (not options)


def test_a_limit_does_not_count_holes(tmp_path: Path, destination: Path) -> None:
    """At that rate it would take months."""
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(DATA[:BLOCK_SIZE])
    assert push(source, destination, "--limit", "1M").returncode == 0
    assert destination.stat().st_size == 1 << 40
    with destination.open("rb") as file:
        file.seek(1 << 39)
        assert file.read(BLOCK_SIZE) == DATA[:BLOCK_SIZE]


def test_only_what_differs_is_sent(source: Path, destination: Path, tmp_path: Path) -> None:
    written(destination, with_changes(DATA, [3]))
    count = tmp_path / "count"
    assert push(source, destination, rsh=f"{LINK} --count {count}").returncode == 0
    to_it, from_it = map(int, count.read_text().split())
    assert BLOCK_SIZE < to_it < 3 * BLOCK_SIZE  # with the stages themselves
    assert from_it < 10_000


def test_a_device(source: Path, tmp_path: Path, loop_device: Callable[..., str]) -> None:
    backing = written(tmp_path / "backing", bytes(64 * BLOCK_SIZE))
    device = loop_device(backing)
    assert push(source, device).returncode == 0
    assert Path(device).read_bytes()[:SIZE] == DATA


def test_through_ssh_and_verified(sshd: Sshd, source: Path, destination: Path) -> None:
    written(destination, with_changes(DATA, [3, 17]))
    there = f"{sshd.user}@{sshd.host}:{destination}"
    done = run("sync", "-e", sshd.rsh, "--python", PYTHON, "--verify", source, there)
    succeeded(done, stdout=b"")
    assert destination.read_bytes() == DATA


def test_by_a_program_that_is_there(source: Path, destination: Path) -> None:
    program = " ".join(BLOCKCOPY)
    done = run("sync", "-e", LINK, "--blockcopy-path", program, source, f"host:{destination}")
    assert done.returncode == 0, done.stderr
    assert destination.read_bytes() == DATA


def test_a_record_of_the_destination_is_ended(source: Path, destination: Path) -> None:
    """A sync has recorded blocks that the push overwrites: the next sync must not believe them."""
    other = written(source.with_name("other"), noise(SIZE, seed=3))
    assert run("sync", other, destination).returncode == 0
    assert push(source, destination).returncode == 0
    assert run("sync", other, destination).returncode == 0
    assert destination.read_bytes() == other.read_bytes()


# verify of an end that is elsewhere


@pytest.mark.parametrize(
    ("there", "differing"),
    [
        (DATA, ""),
        (DATA + b"tail", ""),
        (with_changes(DATA, [2]), f"{2 * BLOCK_SIZE}:{BLOCK_SIZE}\n"),
        (DATA[:BLOCK_SIZE], f"{BLOCK_SIZE}:{SIZE - BLOCK_SIZE}\n"),
    ],
)
def test_verify(source: Path, destination: Path, there: bytes, differing: str) -> None:
    written(destination, there)
    done = run("verify", "-e", LINK, "--python", PYTHON, source, f"host:{destination}")
    assert (done.returncode, done.stdout.decode()) == (5 if differing else 0, differing)


# What goes wrong


def test_a_link_that_breaks_is_made_again(source: Path, destination: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    rsh = f"{LINK} --rate 1M --cut-while {cut}"
    command = [*BLOCKCOPY, "sync", "-e", rsh, "--python", PYTHON, str(source), f"host:{destination}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: destination.exists() and destination.stat().st_size, "the first writes")
        cut.touch()
        assert process.stderr is not None
        assert any(b"connection lost, reconnecting" in line for line in process.stderr)
        cut.unlink()
        _, rest = process.communicate(timeout=support.PATIENCE)
    assert (process.returncode, b"ERROR" in rest) == (0, False)
    assert destination.read_bytes() == DATA


def test_a_write_ends_when_the_session_gives_up() -> None:
    silence = session.SilenceTimer()
    given_up = SimpleNamespace(timeout_error="it sent nothing", silence=silence)
    reader, writer = os.pipe()  # nobody reads
    with open(reader, "rb"), open(writer, "wb"), pytest.raises(OutputError, match="sent nothing"):
        session._Output(writer, given_up).write([bytes(4 << 20)])  # type: ignore[arg-type]


def test_a_link_that_stays_away_is_given_up(source: Path, destination: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    rsh = f"{LINK} --rate 1M --cut-while {cut}"
    options = ["--reconnect-timeout", "0.5", "--python", PYTHON]
    with subprocess.Popen([*BLOCKCOPY, "sync", "-e", rsh, *options, str(source), f"host:{destination}"]) as process:
        until(lambda: destination.exists() and destination.stat().st_size, "the first writes")
        cut.touch()
        assert process.wait(support.PATIENCE) == 3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_ends(source: Path, destination: Path, signum: signal.Signals) -> None:
    """What is left behind, the fixture finds."""
    rsh = f"{LINK} --rate 100K"
    command = [*BLOCKCOPY, "sync", "-e", rsh, "--python", PYTHON, str(source), f"host:{destination}"]
    with subprocess.Popen(command) as process:
        until(lambda: destination.exists() and destination.stat().st_size, "the first writes")
        process.send_signal(signum)
        assert process.wait(support.PATIENCE) == -signum


def test_a_device_that_is_too_small(source: Path, tmp_path: Path, loop_device: Callable[..., str]) -> None:
    before = noise(8 * BLOCK_SIZE, seed=4)
    device = loop_device(written(tmp_path / "backing", before))
    done = push(source, device)
    failed(done, 1, b"ERROR (sync): host: ")
    assert b"is too small" in done.stderr
    assert Path(device).read_bytes() == before


def test_a_destination_in_use_unless_forced(source: Path, destination: Path) -> None:
    written(destination, bytes(SIZE))
    with support.held_by_another_process(destination):
        done = push(source, destination)
        failed(done, 1, b"is locked")
        assert destination.read_bytes() == bytes(SIZE)
        assert push(source, destination, "--force").returncode == 0
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize(
    ("place", "told"),
    [("/no/such/folder/file", "there is no folder /no/such/folder"), ("/dev/null", "neither a regular file nor")],
)
def test_what_cannot_be_a_destination(source: Path, place: str, told: str) -> None:
    done = push(source, place)
    failed(done, 1, told)


def test_a_program_that_knows_no_receive(source: Path, destination: Path) -> None:
    done = run("sync", "-e", LINK, "--blockcopy-path", "false", source, f"host:{destination}")
    failed(done, 3, b"exit status 1")


def test_a_source_that_is_not_there(destination: Path, tmp_path: Path) -> None:
    done = push(tmp_path / "nowhere", destination)
    failed(done, 1, b"cannot open")
    assert not destination.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sync", "one:/a", "two:/b"], "both on another host"),
        (["verify", "one:/a", "two:/b"], "both on another host"),
        (["sync", "--recheck", "/a", "two:/b"], "need a local DESTINATION"),
        (["sync", "/a", "two:"], "DESTINATION"),
        (["mount", "one:/a", "two:/b", "/mnt"], "DESTINATION"),
    ],
)
def test_what_cannot_be_meant(arguments: list[str], told: str) -> None:
    done = run(*arguments)
    failed(done, 2, told)


# `receive`, asked to believe a source of our making


ANSWERED = wire.Fence(1)
"""The fence behind the last request. Only then is the source asked for its identity once more."""


class Receiver:
    """A `receive` of `destination`; it is asked by nobody but the test."""

    def __init__(self, destination: Path) -> None:
        self._process = subprocess.Popen(
            [*BLOCKCOPY, "receive", str(destination)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ended(self, *messages: wire.Message) -> tuple[int | None, str, list[wire.Message]]:
        """Its status, its words, and what it asked, once these were all that it got."""
        stream, said = self._process.communicate(b"".join(map(wire.encode, messages)), timeout=support.PATIENCE)
        decoder = FedDecoder(wire.HASH_STREAM)
        decoder.feed(stream)
        asked = []
        while (message := decoder.next()) is not None:
            asked.append(message)
        return self._process.returncode, said.decode(), asked


def facts(source: Path, **more: object) -> dict[str, object]:
    with open_source(str(source)) as device:
        return {"digest": "sha256", "identity": identity.source_identity(device), **more}


def test_it_asks_about_all_and_writes_what_comes(source: Path, destination: Path) -> None:
    written(destination, DATA[:BLOCK_SIZE])
    hello = wire.Hello(facts(source))
    status, said, asked = Receiver(destination).ended(hello, wire.Data(0, b"new"), ANSWERED, hello, wire.Done())
    assert (status, said) == (0, "")
    kinds = [type(each) for each in asked]
    assert kinds == [wire.Hello, wire.Fence, wire.Asks, wire.Zero, wire.Fence, wire.Hello, wire.Done]
    assert destination.read_bytes() == b"new" + DATA[3:BLOCK_SIZE] + bytes(SIZE - BLOCK_SIZE)


def test_what_the_source_cannot_read_is_told_and_all_else_is_written(source: Path, destination: Path) -> None:
    hello = wire.Hello(facts(source))
    failures = [wire.Failure(at * BLOCK_SIZE, f"cannot read block {at}") for at in (0, 1, 9)]
    status, said, _ = Receiver(destination).ended(
        hello, *failures, wire.Data(5, b"x"), ANSWERED, hello, wire.Done()
    )
    assert (status, destination.read_bytes()[5:6]) == (3, b"x")
    ranges = f"0:{2 * BLOCK_SIZE}, {9 * BLOCK_SIZE}:{BLOCK_SIZE}"
    assert f"cannot read {3 * BLOCK_SIZE} bytes ({ranges}): cannot read block 0. All else was copied" in said


def test_a_source_that_changed_is_told(source: Path, destination: Path) -> None:
    before = wire.Hello(facts(source))
    os.utime(source, ns=(1, 1))
    status, said, _ = Receiver(destination).ended(before, ANSWERED, wire.Hello(facts(source)), wire.Done())
    assert (status, "source changed" in said, "mtime" in said) == (3, True, True)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([wire.Done()], "no agreement"),
        ([wire.Data(0, b"x")], "no agreement"),
        ([wire.Hello({})], "no agreement"),
        ([wire.Hello({"digest": "md5", "identity": {"size": 0, "sample": []}})], "no agreement"),
        ([], "without `done`"),
    ],
)
def test_what_is_no_source_is_refused(destination: Path, messages: list[wire.Message], told: str) -> None:
    status, said, _ = Receiver(destination).ended(*messages)
    assert (status, told in said, destination.exists()) == (1, True, False)


def test_a_stream_that_is_cut_is_an_error_and_what_came_is_written(source: Path, destination: Path) -> None:
    status, said, _ = Receiver(destination).ended(wire.Hello(facts(source)), wire.Data(0, b"came"))
    assert (status, "without `done`" in said, destination.read_bytes()[:4]) == (1, True, b"came")


BEYOND = [
    wire.Data(SIZE - 5, b"beyond"),
    wire.Data(1 << 40, b""),
    wire.Zero(SIZE - 5, 6),
    wire.Zero(0, 1 << 40),
    wire.XzData(SIZE, lzma.compress(b"x")),
    wire.ZstdData(SIZE - 5, bytes(zstd.compress(b"beyond", 1))),
]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        *zip(BEYOND, cycle(["file", "longer file", "device"]), strict=False),
        (BEYOND[0], "device"),
        (BEYOND[3], "device"),
    ],
)
def test_nothing_is_written_beyond_the_size_that_the_source_declared(
    source: Path, tmp_path: Path, loop_device: Callable[..., str], kind: str, message: wire.Data
) -> None:
    file = written(tmp_path / "file", noise(64 * BLOCK_SIZE if kind != "file" else SIZE, seed=2))
    before = file.read_bytes()
    receiver = Receiver(Path(loop_device(file)) if kind == "device" else file)
    hello = wire.Hello(facts(source))
    status, said, _ = receiver.ended(hello, wire.Data(0, b"within"), message, wire.Zero(7, 1), hello, wire.Done())
    assert (status, f"for position {message.position}, but declared a size of {SIZE} bytes" in said) == (1, True), (
        said
    )
    assert file.read_bytes() == b"within" + before[6:]


def test_a_source_may_fill_the_destination_to_its_last_byte(source: Path, destination: Path) -> None:
    hello = wire.Hello(facts(source))
    messages = [hello, wire.Zero(0, SIZE - 4), wire.Data(SIZE - 4, b"last"), ANSWERED, hello, wire.Done()]
    assert Receiver(destination).ended(*messages)[0] == 0
    assert destination.read_bytes() == bytes(SIZE - 4) + b"last"
