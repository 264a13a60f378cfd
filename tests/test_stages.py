"""What the three stages share: the pipeline of threads, the ends of pipes, signals, standard descriptors."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest
from support import BLOCKCOPY, PATIENCE, failed, noise, succeeded, until

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.errors import OutputError, StreamError
from blockcopy.protocol.wire import Data, Done, Hash, Rest, encode
from blockcopy.stage import pipeline
from blockcopy.stage.pipeline import DEPTH, run_ordered
from blockcopy.stage.streams import InputStream, OutputStream, refuse_terminal

MIB = 1024 * 1024


@contextmanager
def pipe() -> Iterator[tuple[int, IO[bytes]]]:
    """Return a descriptor to read from, and a file to write to it. The caller may close the file."""
    read, write = os.pipe()
    with open(write, "wb", buffering=0) as file:
        yield read, file
    os.close(read)


def read(stream: InputStream) -> bytes:
    """Return the bytes that have arrived, up to a MiB."""
    buffer = memoryview(bytearray(MIB))
    return bytes(buffer[: stream.read_into(buffer)])


# run_ordered


def test_results_come_in_the_order_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the work on each even item ends after that on the next."""
    monkeypatch.setattr(pipeline, "WORKERS", 2)
    ended = [threading.Event() for _ in range(100)]

    def work(item: int) -> int:
        if item % 2 == 0:
            assert ended[item + 1].wait(PATIENCE)
        ended[item].set()
        return item

    results: list[int] = []
    run_ordered(range(100), work, results.append)
    assert results == list(range(100))


def test_no_items_are_no_results() -> None:
    results: list[int] = []
    run_ordered([], lambda item: item, results.append)
    assert results == []


def test_the_first_error_in_order_wins_and_what_came_before_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "WORKERS", 2)
    later = threading.Event()

    def work(item: int) -> int:
        if item == 5:
            assert later.wait(PATIENCE)
            raise StreamError("the first in order, the second in time")
        if item == 6:
            later.set()
            raise StreamError("the first in time")
        return item

    results: list[int] = []
    with pytest.raises(StreamError, match="first in order"):
        run_ordered(range(20), work, results.append)
    assert results == [0, 1, 2, 3, 4]


def test_an_error_of_the_reader_comes_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(7)
        raise StreamError("cut short")

    results: list[int] = []
    with pytest.raises(StreamError, match="cut short"):
        run_ordered(items(), lambda item: item, results.append)
    assert results == list(range(7))


def test_an_error_of_the_writer_ends_a_reader_that_has_more() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    def consume(_: int) -> None:
        raise OutputError("gone")

    before = threading.active_count()
    with pytest.raises(OutputError, match="gone"):
        run_ordered(endless(), lambda item: item, consume)
    assert threading.active_count() == before


@pytest.mark.parametrize("interruption", [OutputError("gone"), KeyboardInterrupt()])
def test_a_reader_that_waits_for_input_is_woken_when_the_writer_fails(interruption: BaseException) -> None:
    waiting = threading.Event()

    def consume(_: bytes) -> None:
        assert waiting.wait(PATIENCE)
        raise interruption

    before = threading.active_count()
    with pipe() as (fd, writer), InputStream(fd) as stream:

        def items() -> Iterator[bytes]:
            yield read(stream)
            waiting.set()
            yield read(stream)  # of which nothing will ever come

        writer.write(b"x")
        with pytest.raises(type(interruption)):
            run_ordered(items(), lambda item: item, consume, wake=stream.wake)
        assert threading.active_count() == before


def test_no_thread_is_left_after_success() -> None:
    before = threading.active_count()
    run_ordered(range(100), lambda item: item, lambda item: None)
    assert threading.active_count() == before


def test_the_reader_is_ahead_by_a_bounded_number_of_items() -> None:
    made = consumed = 0

    def items() -> Iterator[int]:
        nonlocal made
        while made < 500:
            made += 1
            yield made

    def consume(item: int) -> None:
        nonlocal consumed
        if not consumed:
            until(lambda: made > DEPTH)
        consumed += 1
        # In the queue, in the reader's hand, and in ours.
        assert made - consumed <= DEPTH + 2

    run_ordered(items(), lambda item: item, consume)
    assert consumed == 500


# The ends of pipes


def test_input_is_read_as_it_comes() -> None:
    with pipe() as (fd, writer), InputStream(fd) as stream:
        writer.write(b"abc")
        assert read(stream) == b"abc"
        writer.write(b"d")
        assert read(stream) == b"d"
        writer.close()
        assert read(stream) == b""
        assert read(stream) == b""


def test_what_was_written_before_the_end_is_read() -> None:
    with pipe() as (fd, writer), InputStream(fd) as stream:
        writer.write(b"abc")
        writer.close()
        assert read(stream) == b"abc"
        assert read(stream) == b""


def test_input_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(noise(2 * MIB))
    with (tmp_path / "file").open("rb") as file, InputStream(file.fileno()) as stream:
        assert b"".join(iter(lambda: read(stream), b"")) == noise(2 * MIB)


def test_waking_ends_the_wait() -> None:
    with pipe() as (fd, _), InputStream(fd) as stream:
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(read(stream)))
        reader.start()
        stream.wake()
        reader.join(PATIENCE)
        assert found == [b""]
        assert read(stream) == b""


def test_an_input_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with InputStream(folder) as stream, pytest.raises(StreamError, match="Is a directory"):
            read(stream)
    finally:
        os.close(folder)


@pytest.fixture
def signals_interrupt() -> Iterator[None]:
    """SIGUSR1 does nothing but cut a system call of the main thread short."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("signals_interrupt")
def test_output_is_written_in_full_however_often_it_is_interrupted() -> None:
    pieces = [noise(size, size) for size in (0, 1, 5 * MIB, 0, 5)] + [b"ab"] * 3000
    received = bytearray()
    with pipe() as (fd, writer):
        output = OutputStream(writer.fileno())
        room = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)

        def receive() -> None:
            for _ in range(3):
                until(lambda: unread(fd) == room, "a full pipe")
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                received.extend(os.read(fd, 4 * 4096))
            while data := os.read(fd, 10007):
                received.extend(data)

        reader = threading.Thread(target=receive)
        reader.start()
        output.write([memoryview(piece) for piece in pieces])
        writer.close()
        reader.join(PATIENCE)
    assert bytes(received) == b"".join(pieces)


def unread(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_an_output_that_nobody_reads_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(OutputError, match="gone away"):
            OutputStream(ours.fileno()).write([b"abc"])


def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OutputError, match="No space left"):
        OutputStream(full.fileno()).write([b"abc"])


def test_a_terminal_is_refused_and_a_pipe_is_not() -> None:
    ours, theirs = os.openpty()
    try:
        with pytest.raises(OutputError, match="terminal"):
            refuse_terminal(theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    with pipe() as (fd, _):
        refuse_terminal(fd)


# Signals


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """64 MiB: more than any pipe takes."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)
    return path


class Stage:
    """A stage as a process with both ends in our hands; ended after the test whatever becomes of it."""

    def __init__(self, *args: object, ignoring: signal.Signals | None = None) -> None:
        self.input: socket.socket
        self.output: socket.socket
        # Sockets: unlike a pipe, they stay as small as they are, so 5 KB of unread output stop a stage.
        self.input, theirs_in = socket.socketpair()
        self.output, theirs_out = socket.socketpair()
        theirs_out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        with theirs_in, theirs_out:
            self.process = subprocess.Popen(
                [*BLOCKCOPY, *map(str, args)],
                stdin=theirs_in,
                stdout=theirs_out,
                stderr=subprocess.PIPE,
                preexec_fn=(lambda: signal.signal(ignoring, signal.SIG_IGN)) if ignoring else None,  # type: ignore[arg-type, func-returns-value]
            )
        for end in (self.input, self.output):
            end.settimeout(PATIENCE)

    def ended(self) -> tuple[int, bytes]:
        """Return status and standard error of a process whose input stays open."""
        _, errors = self.process.communicate(timeout=5)
        return self.process.returncode, errors

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.input.close()
        self.output.close()


def checksum_waits_for_input(file: Path) -> Stage:
    stage = Stage("checksum", "-")
    stage.input.sendall(bytes(8 * BLOCK_SIZE))
    assert stage.output.recv(4) == b"Hash"
    return stage


def checksum_waits_for_its_reader(file: Path) -> Stage:
    stage = Stage("checksum", file)
    assert stage.output.recv(4) == b"Hash"
    return stage


def retrieve_waits_for_input(file: Path) -> Stage:
    stage = Stage("retrieve", file)
    stage.input.sendall(encode(Hash(0, 5, bytes(64))))
    assert stage.output.recv(4) == b"data"
    return stage


def retrieve_waits_for_its_reader(file: Path) -> Stage:
    stage = Stage("retrieve", file)
    stage.input.sendall(encode(Rest(0)))
    assert stage.output.recv(4) == b"data"
    return stage


def save_waits_for_input(file: Path) -> Stage:
    stage = Stage("save", file)
    stage.input.sendall(encode(Data(0, b"abc")))
    with file.open("rb") as opened:
        until(lambda: os.pread(opened.fileno(), 3, 0) == b"abc")
    return stage


WAITING = [
    checksum_waits_for_input,
    checksum_waits_for_its_reader,
    retrieve_waits_for_input,
    retrieve_waits_for_its_reader,
    save_waits_for_input,
]
WITH_A_READER = [each for each in WAITING if each is not save_waits_for_input]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", WAITING)
def test_a_signal_ends_a_stage_that_waits(
    file: Path, start: Callable[[Path], Stage], signum: signal.Signals
) -> None:
    """As a program that the signal killed, without a word."""
    with closing(start(file)) as stage:
        stage.process.send_signal(signum)
        assert stage.ended() == (-signum, b"")


@pytest.mark.parametrize("start", WITH_A_READER)
def test_a_stage_ends_when_its_reader_goes_away(file: Path, start: Callable[[Path], Stage]) -> None:
    """At the next bytes for it, although more input might come."""
    with closing(start(file)) as stage:
        stage.output.close()
        if start is checksum_waits_for_input:
            stage.input.sendall(bytes(8 * BLOCK_SIZE))
        elif start is retrieve_waits_for_input:
            stage.input.sendall(encode(Hash(0, 5, bytes(64))))
        status, errors = stage.ended()
        assert status == 1
        assert errors.startswith(b"ERROR (")
        assert errors.endswith(b"gone away\n")
        assert errors.count(b"\n") == 1


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(10))
    with closing(Stage("save", path, ignoring=signal.SIGINT)) as stage:
        stage.input.sendall(encode(Data(0, b"abc")))
        until(lambda: path.read_bytes().startswith(b"abc"))
        stage.process.send_signal(signal.SIGINT)
        stage.input.sendall(encode(Data(3, b"def")) + encode(Done()))
        assert stage.ended() == (0, b"")
    assert path.read_bytes() == b"abcdef" + bytes(4)


# Standard descriptors that are closed


def run_without(descriptor: str, *args: object, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """`descriptor` as a shell closes it: `0<&-`, `1>&-`, `2>&-`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {descriptor}', "sh", *BLOCKCOPY, *map(str, args)],
        input=input,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def test_save_does_not_take_the_destination_for_its_input(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = encode(Data(100, b"written")) + encode(Done()) + bytes(200)
    path.write_bytes(content)
    done = run_without("0<&-", "save", path)
    assert path.read_bytes() == content
    failed(done, 1)
    assert done.stderr.startswith(b"ERROR (save): ")


def test_save_needs_no_output(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5))
    done = run_without("1>&-", "save", path, input=encode(Data(0, b"abc")) + encode(Done()))
    succeeded(done)
    assert path.read_bytes() == b"abc\0\0"


@pytest.mark.parametrize("command", ["checksum", "retrieve"])
def test_no_error_message_goes_into_the_stream(tmp_path: Path, command: str) -> None:
    done = run_without("2>&-", command, tmp_path / "missing")
    failed(done, 1, stdout=b"")


@pytest.mark.parametrize("command", ["checksum", "retrieve"])
def test_a_closed_output_is_an_error(tmp_path: Path, command: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(BLOCK_SIZE))
    done = run_without("1>&-", command, path, input=encode(Rest(0)) + encode(Done()))
    failed(done, 1)
    assert done.stderr.startswith(f"ERROR ({command}): cannot write the output".encode())
    assert done.stderr.count(b"\n") == 1
