"""The stand-ins: each fault must happen, or the tests that request it prove nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import BLOCK_SIZE, PATIENCE, PYTHON, STANDINS, FedDecoder, failed, noise, until, written

from blockcopy.protocol import wire
from blockcopy.protocol.digests import NO_DIGEST

LOST = 255


def standin(name: str, *arguments: object) -> list[str]:
    """Return the command line of a stand-in."""
    return [PYTHON, str(STANDINS / name), *map(str, arguments)]


def finish(command: list[str], input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    return subprocess.run(command, input=input, capture_output=True, timeout=PATIENCE, check=False)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with unbuffered pipes during the block. Kills it at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def says(process: subprocess.Popen[bytes], size: int = 1, seconds: float = PATIENCE) -> bytes:
    """Return the next bytes of the output, or none after `seconds`."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.read(size) or b"" if ready else b""


def line(process: subprocess.Popen[bytes]) -> bytes:
    """Return the next line of the output, or its part until the time is up."""
    text = b""
    while not text.endswith(b"\n") and (more := says(process)):
        text += more
    return text


def tell(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)


def quickest(action: Callable[[], object], enough: float) -> float:
    """Return the seconds of the quickest of up to ten calls of `action`. A busy machine delays some.

    `enough`: seconds after which no further call is needed.
    """
    best = math.inf
    for _ in range(10):
        start = time.monotonic()
        action()
        best = min(best, time.monotonic() - start)
        if best < enough:
            break
    return best


def ending(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Wait for the end of a process. Returns its exit status and its standard error."""
    status = process.wait(timeout=PATIENCE)
    assert process.stderr is not None
    return status, process.stderr.read()


# link


def link(*arguments: object) -> list[str]:
    return standin("link", *arguments)


def test_the_link_carries_both_ways_and_the_exit_status() -> None:
    data = noise(3_000_001)
    done = finish(link("host", "cat;", "echo --delay >&2;", "exit 7"), data)
    assert (done.returncode, done.stdout, done.stderr) == (7, data, b"--delay\n")


def test_delay_is_the_time_of_a_byte_and_not_of_each_piece(tmp_path: Path) -> None:
    with running(link("--delay", 150, "host", "cat")) as process:
        tell(process, b"1")
        assert says(process) == b"1"  # the command runs now

        def echo() -> None:
            tell(process, b"2")
            assert says(process) == b"2"

        assert 0.3 <= quickest(echo, 0.45) < 0.45
    data = bytes(32 * 1024 * 1024)
    start = time.monotonic()
    assert finish(link("--delay", 500, "host", "cat"), data).stdout == data
    assert time.monotonic() - start < 10  # delaying one piece after the other would take 16 s


def test_rate() -> None:
    data = noise(512 * 1024)

    def carry() -> None:
        assert finish(link("--rate", "1M", "host", "cat"), data).stdout == data

    assert 0.5 <= quickest(carry, 1) < 1


@pytest.mark.parametrize("command", ["wc -c", "head -c 524288 /dev/zero"])
def test_a_window_passes_its_bytes_once_a_round_trip(command: str) -> None:
    """Send eight windows, either way: seven round trips pass before the last may start."""
    start = time.monotonic()
    done = finish(link("--delay", 20, "--window", "64K", "host", command), bytes(512 * 1024))
    assert time.monotonic() - start >= 7 * 0.04 + 0.02
    assert done.stdout in (b"524288\n", bytes(512 * 1024))
    start = time.monotonic()
    finish(link("--delay", 20, "--window", "512K", "host", command), bytes(512 * 1024))
    assert time.monotonic() - start < 7 * 0.04 + 5


def test_a_cut_ends_the_connection_and_refuses_new_ones(tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    with running(link("--cut-while", cut, "host", "echo $$; exec cat")) as process:
        command = int(line(process))
        cut.touch()
        status, message = ending(process)
        assert (status, b"Broken pipe" in message) == (LOST, True)
        assert not support.alive(command)
    refused = finish(link("--cut-while", cut, "host", "echo here"))
    failed(refused, LOST, b"connect to host host", stdout=b"")
    cut.unlink()
    assert finish(link("--cut-while", cut, "host", "echo here")).stdout == b"here\n"


def test_a_frozen_link_passes_nothing_until_it_thaws(tmp_path: Path) -> None:
    frozen, seen = tmp_path / "frozen", tmp_path / "seen"
    with running(link("--freeze-while", frozen, "host", f"tee {seen}")) as process:
        tell(process, b"a")
        assert says(process) == b"a"
        frozen.touch()
        tell(process, b"b")
        tell(process, b"c")
        assert says(process, seconds=0.2) == b""
        assert seen.read_bytes() == b"a"
        frozen.unlink()
        assert says(process) + says(process) == b"bc"


def test_a_trickling_link_passes_a_byte_at_a_time(tmp_path: Path) -> None:
    trickling = tmp_path / "trickling"
    with running(link("--trickle-while", trickling, "host", "cat")) as process:
        tell(process, b"a")
        assert says(process) == b"a"
        trickling.touch()
        tell(process, b"bcdef")
        assert says(process, 5) == b"b"
        trickling.unlink()
        assert b"".join(iter(lambda: says(process, seconds=0.5), b"")) == b"cdef"


def test_drop_after_so_many_bytes() -> None:
    done = finish(link("--drop-after", 100_000, "host", "head -c 3000000 /dev/zero"))
    failed(done, LOST, b"Broken pipe", stdout=bytes(100_000))


def test_count_at_a_normal_end_and_on_sigterm(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    finish(link("--count", counts, "host", "cat; echo"), b"12345")
    assert counts.read_text() == "5 6\n"
    with running(link("--count", counts, "host", "cat")) as process:
        tell(process, b"123")
        assert says(process, 3) == b"123"
        process.terminate()
        assert ending(process) == (LOST, b"Killed by signal 15.\n")
    assert counts.read_text() == "5 6\n3 3\n"


@pytest.mark.parametrize("end", ["close its output", "kill it"])
def test_the_command_ends_with_the_link(end: str) -> None:
    with running(link("host", "echo $$; exec sleep 1000")) as process:
        command = int(line(process))
        if end == "kill it":
            process.kill()
        else:
            assert process.stdout is not None
            process.stdout.close()
        until(lambda: not support.alive(command), "the end of the command")


# faulty_retrieve

BLOCKS = 4
DATA = noise(BLOCKS * BLOCK_SIZE)
POSITIONS = range(0, len(DATA), BLOCK_SIZE)
QUESTION = b"".join(
    wire.encode(message)
    for message in (
        wire.Hello({"protocol": wire.PROTOCOL}),
        *(wire.Hash(position, BLOCK_SIZE, NO_DIGEST) for position in POSITIONS),
        wire.Fence(7),
    )
)
WISH = {"protocol": wire.PROTOCOL, "compress": {"name": "zstd", "level": 1}}
RUN = wire.Asks(0, BLOCK_SIZE, BLOCKS * BLOCK_SIZE, BLOCKS * NO_DIGEST)


def retrieve(source: Path, *options: object) -> list[str]:
    return standin("faulty_retrieve", *options, "retrieve", source)


def decoded(stream: bytes) -> list[wire.Message]:
    decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
    decoder.feed(stream)
    return list(iter(decoder.next, None))


def truth() -> list[wire.Message]:
    """Return the right answers to QUESTION, without the greeting."""
    blocks = [wire.Data(position, DATA[position : position + BLOCK_SIZE]) for position in POSITIONS]
    return [*blocks, wire.Fence(7), wire.Done()]


def answers(source: Path, *options: object) -> list[wire.Message]:
    done = finish(retrieve(source, *options), QUESTION + wire.encode(wire.Done()))
    assert done.returncode == 0, done.stderr
    hello, *said = decoded(done.stdout)
    assert isinstance(hello, wire.Hello)
    return said


def test_without_a_fault_it_is_the_real_one(source: Path) -> None:
    real = support.run("retrieve", source, input=QUESTION + wire.encode(wire.Done()))
    assert finish(retrieve(source), QUESTION + wire.encode(wire.Done())).stdout == real.stdout
    assert answers(source) == truth()


SECOND = wire.Data(BLOCK_SIZE, DATA[BLOCK_SIZE : 2 * BLOCK_SIZE])
LIES = {
    "misplace": lambda said: said.position not in POSITIONS and said.payload == SECOND.payload,
    "oversize": lambda said: said.position == BLOCK_SIZE and said.payload[:-1] == SECOND.payload,
    "short": lambda said: said == wire.Data(BLOCK_SIZE, SECOND.payload[: BLOCK_SIZE // 2]),
    "fail": lambda said: isinstance(said, wire.Failure) and said.position == BLOCK_SIZE and said.reason,
}


@pytest.mark.parametrize("fault", LIES)
def test_one_answer_is_wrong(source: Path, fault: str) -> None:
    said = answers(source, f"--{fault}-at", 2)
    assert LIES[fault](said.pop(1))
    assert said == [each for each in truth() if each != SECOND]


def test_garble(source: Path) -> None:
    said = finish(retrieve(source, "--garble-at", 2), QUESTION).stdout
    with pytest.raises(wire.StreamError, match="Last login"):
        decoded(said)


def test_a_fence_with_another_number(source: Path) -> None:
    *blocks, fence, done = answers(source, "--misfence-at", 1)
    assert isinstance(fence, wire.Fence)
    assert fence.number != 7
    assert [*blocks, wire.Fence(7), done] == truth()


def test_the_bytes_of_another_file(source: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", noise(len(DATA) - 5, seed=2))
    first, *said = answers(source, "--other-at", 2, other)
    assert first == truth()[0]
    payloads = b"".join(each.payload for each in said if isinstance(each, wire.Data))
    assert payloads == other.read_bytes()[BLOCK_SIZE:] + bytes(5)
    assert said[BLOCKS - 1 :] == truth()[BLOCKS:]


def test_death(source: Path) -> None:
    with running(retrieve(source, "--die-at", 2)) as process:
        tell(process, QUESTION)
        assert process.stdout is not None
        _, *said = decoded(process.stdout.read())
        assert said == truth()[:1]
        assert process.wait(timeout=PATIENCE) == -signal.SIGKILL


def test_a_stall(source: Path) -> None:
    with running(retrieve(source, "--stall-at", 2)) as process:
        tell(process, QUESTION)
        decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
        said: list[wire.Message] = []
        while len(said) < 2 and (stream := says(process, BLOCK_SIZE)):
            decoder.feed(stream)
            said += iter(decoder.next, None)
        assert said[1:] == truth()[:1]
        fence = QUESTION[QUESTION.index(b"fenc") :]
        tell(process, 200_000 * fence)  # more than pipes hold, so the process must read
        assert says(process, seconds=0.1) == b""
        assert process.poll() is None


def test_a_trickle(source: Path) -> None:
    with running(retrieve(source, "--trickle-at", 2)) as process:
        tell(process, QUESTION)
        decoder = FedDecoder(wire.NEGOTIATED_BLOCK_STREAM)
        said: list[wire.Message] = []
        while len(said) < 2 and (stream := says(process, BLOCK_SIZE)):
            decoder.feed(stream)
            said += iter(decoder.next, None)
        assert said[1:] == truth()[:1]
        assert [len(says(process, 5)) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["exit", "stall"])
def test_a_fault_at_an_offset(source: Path, kind: str) -> None:
    """Let a fault happen at an offset, whatever was sent before."""
    with running(retrieve(source, f"--{kind}-for", BLOCK_SIZE)) as process:
        tell(process, QUESTION)
        assert process.stdin is not None
        process.stdin.close()
        assert process.stdout is not None
        _, *said = decoded(process.stdout.read())
        assert said == truth()[:1]
        assert process.wait(timeout=PATIENCE) == (kind == "exit")


def test_a_fault_once_only(source: Path, tmp_path: Path) -> None:
    once = tmp_path / "once"
    assert answers(source, "--once", once, "--short-at", 9) == truth()
    assert not once.exists()
    assert answers(source, "--once", once, "--short-at", 2) != truth()
    assert once.exists()
    assert answers(source, "--once", once, "--short-at", 2) == truth()


def answers_to_a_run(source: Path, *options: object) -> list[wire.Message]:
    """Return the answers to one request for all blocks, without greeting and fence. The source compresses."""
    stream = b"".join(map(wire.encode, (wire.Hello(WISH), RUN, wire.Fence(7), wire.Done())))
    done = finish(retrieve(source, *options), stream)
    assert done.returncode == 0, done.stderr
    _, *said, fence, _ = decoded(done.stdout)
    assert fence == wire.Fence(7)
    return said


def test_a_run_is_answered_block_by_block(source: Path) -> None:
    assert answers_to_a_run(source) == truth()[:BLOCKS]


@pytest.mark.parametrize("fault", LIES)
def test_one_block_of_a_run_is_wrong(source: Path, fault: str) -> None:
    said = answers_to_a_run(source, f"--{fault}-at", 2)
    assert LIES[fault](said.pop(1))
    assert said == [each for each in truth()[:BLOCKS] if each != SECOND]


def test_zeros_and_compressed_blocks_are_counted_too(source: Path) -> None:
    """Hit the second of two blocks of zeros, and one of two blocks that were compressed together."""
    text = b"to be compressed " * BLOCK_SIZE
    source.write_bytes(bytes(2 * BLOCK_SIZE) + text[: 2 * BLOCK_SIZE])
    assert answers_to_a_run(source, "--fail-for", BLOCK_SIZE) == answers_to_a_run(source, "--fail-at", 2)
    first, *said = answers_to_a_run(source, "--fail-at", 2)
    assert first == wire.Zero(0, BLOCK_SIZE)
    assert isinstance(said.pop(0), wire.Failure)
    assert said == [wire.Data(at * BLOCK_SIZE, text[(at - 2) * BLOCK_SIZE :][:BLOCK_SIZE]) for at in (2, 3)]
    *_, last = answers_to_a_run(source, "--short-at", 4)
    assert last == wire.Data(3 * BLOCK_SIZE, text[BLOCK_SIZE:][: BLOCK_SIZE // 2])


def test_another_greeting(source: Path) -> None:
    stream = finish(retrieve(source, "--hello", '{"size": 12, "new": []}'), QUESTION).stdout
    hello, *_ = decoded(stream)
    assert isinstance(hello, wire.Hello)
    assert (hello.facts["size"], hello.facts["new"], hello.facts["protocol"]) == (12, [], wire.PROTOCOL)


# faulty_disk

Disk = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Return a function that mounts faulty_disk with options, and returns its file with the bytes DATA.

    Unmounts at the end.
    """
    support.require_fuse()
    point = tmp_path / "disk"
    with contextlib.ExitStack() as stack:

        def make(*options: object) -> Path:
            point.mkdir()
            backing = written(tmp_path / "backing", DATA)
            process = stack.enter_context(running(standin("faulty_disk", *options, backing, point)))
            stack.callback(take_down, process, point)
            assert line(process) == b"ready\n"
            return point / "disk"

        yield make


def take_down(process: subprocess.Popen[bytes], point: Path) -> None:
    """End faulty_disk with SIGTERM, which must unmount it."""
    process.terminate()
    try:
        assert ending(process) == (0, b"")
        assert not is_mounted(point)
    finally:
        if is_mounted(point):
            subprocess.run(["fusermount3", "-u", "-z", point], check=False)


def is_mounted(point: Path) -> bool:
    """Tell whether something is mounted on `point`, even a dead mount."""
    return f" {point} " in os.fsdecode(Path("/proc/mounts").read_bytes())  # others mount names of any bytes


@contextlib.contextmanager
def opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def fails_with(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as raised:
        yield
    assert raised.value.errno == number


def test_without_a_fault_it_is_a_file(disk: Disk, tmp_path: Path) -> None:
    file = disk()
    assert file.read_bytes() == DATA
    with opened(file) as fd:
        assert os.pwrite(fd, b"new", len(DATA)) == 3
        os.fsync(fd)
        os.ftruncate(fd, len(DATA) + 2)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert os.fstat(fd).st_size == len(DATA) + 2
    assert (tmp_path / "backing").read_bytes() == DATA + b"ne"
    assert os.statvfs(file).f_blocks
    file.write_bytes(b"shorter")
    assert file.read_bytes() == b"shorter"


def test_a_lock_keeps_others_out(disk: Disk) -> None:
    file = disk()
    with support.held_by_another_process(file), opened(file) as fd, fails_with(errno.EAGAIN):
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_bad_byte(disk: Disk) -> None:
    with opened(disk("--eio-at", 1000, "--eio-at", 5000)) as fd:
        for bad in (1000, 5000):
            with fails_with(errno.EIO):
                os.pread(fd, 11, bad - 10)
            with fails_with(errno.EIO):
                os.pwrite(fd, b"any", bad)
        assert os.pread(fd, 1000, 0) == DATA[:1000]
        assert os.pwrite(fd, b"any", 1001) == 3


def test_a_disk_that_becomes_full(disk: Disk) -> None:
    with opened(disk("--enospc-after", 1000)) as fd:
        assert os.pwrite(fd, bytes(600), 0) == 600
        assert os.pwrite(fd, bytes(600), 0) == 400
        with fails_with(errno.ENOSPC):
            os.pwrite(fd, b"1", 0)
        assert os.pread(fd, 2000, 0) == bytes(600) + DATA[600:2000]


def test_short_reads(disk: Disk) -> None:
    with opened(disk("--short-reads")) as fd:
        assert os.pread(fd, 1000, 0) == DATA[:500]
        assert os.pread(fd, 1, 3) == DATA[3:4]


def test_a_failing_sync(disk: Disk) -> None:
    with opened(disk("--eio-fsync", 2)) as fd:
        os.fsync(fd)
        with fails_with(errno.EIO):
            os.fdatasync(fd)
        os.fsync(fd)


def test_syncs_that_fail_while_a_file_exists(disk: Disk, tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    with opened(disk("--eio-fsync-while", fault)) as fd:
        os.fsync(fd)
        fault.touch()
        for _ in range(2):
            with fails_with(errno.EIO):
                os.fsync(fd)
        fault.unlink()
        os.fsync(fd)


def test_slow_reads_and_writes(disk: Disk) -> None:
    with opened(disk("--slow-reads", 200, "--slow-writes", 100)) as fd:

        def read_and_write() -> None:
            os.pread(fd, 1, 0)
            os.pwrite(fd, b"1", 0)

        assert 0.3 <= quickest(read_and_write, 0.45) < 0.45
