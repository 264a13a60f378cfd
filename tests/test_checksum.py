"""`blockcopy checksum` as a command."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import BLOCKCOPY, failed, noise, run, succeeded, with_changes

from blockcopy.block.device import open_source
from blockcopy.block.geometry import BLOCK_SIZE, Extent
from blockcopy.block.pieces import Piece
from blockcopy.errors import DeviceError
from blockcopy.protocol import digests
from blockcopy.stage import checksum

HELLO = b"Hello World!"


def hashes(data: bytes, start: int = 0, end: int | None = None, *, rest: bool = True) -> bytes:
    """Return the stream of signatures of `data`, without using the product's encoder."""
    stop = len(data) if end is None else end
    stream = b""
    for at in range(start, stop, BLOCK_SIZE):
        block = data[at : min(at + BLOCK_SIZE, stop)]
        stream += b"Hash" + at.to_bytes(8, "big") + len(block).to_bytes(4, "big") + hashlib.sha3_512(block).digest()
    if rest and end is None:
        stream += b"rest" + max(start, stop).to_bytes(8, "big")
    return stream + b"done"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(content: bytes) -> Path:
        (tmp_path / "file").write_bytes(content)
        return tmp_path / "file"

    return make


def stream_of(done: subprocess.CompletedProcess[bytes]) -> bytes:
    succeeded(done)
    return done.stdout


def refused(done: subprocess.CompletedProcess[bytes], *words: str) -> bytes:
    """Check the error: status 1, one line with all `words`, and a stream without `done`. Returns the stream."""
    failed(done, 1)
    message = done.stderr.decode()
    assert message.startswith("ERROR (checksum): ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)
    assert not done.stdout.endswith(b"done")
    return done.stdout


def test_the_test_vector(file: Callable[[bytes], Path]) -> None:
    digest = hashlib.sha3_512(HELLO).digest()
    stream = b"Hash" + bytes(8) + b"\0\0\0\x0c" + digest
    assert stream_of(run("checksum", file(HELLO))) == stream + b"rest" + bytes(7) + b"\x0cdone"
    assert stream_of(run("checksum", "-", input=HELLO)) == stream + b"done"


SIZES = [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 4 * BLOCK_SIZE, 9 * BLOCK_SIZE + 777]


@pytest.mark.parametrize("size", SIZES)
def test_every_block_of_a_file_is_hashed(file: Callable[[bytes], Path], size: int) -> None:
    assert stream_of(run("checksum", file(noise(size)))) == hashes(noise(size))


@pytest.mark.parametrize("size", SIZES)
def test_a_pipe_is_hashed_without_rest(size: int) -> None:
    assert stream_of(run("checksum", "-", input=noise(size))) == hashes(noise(size), rest=False)


def test_a_pipe_may_give_little_at_a_time() -> None:
    data = noise(2 * BLOCK_SIZE + 5)
    with subprocess.Popen(
        [*BLOCKCOPY, "checksum", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        for at in range(0, len(data), 4999):
            process.stdin.write(data[at : at + 4999])
        stream, _ = process.communicate()
    assert stream == hashes(data, rest=False)


def test_standard_input_may_be_a_file(file: Callable[[bytes], Path]) -> None:
    with file(noise(1000)).open("rb") as opened:
        assert stream_of(run("checksum", "-", stdin=opened)) == hashes(noise(1000))


def test_a_named_pipe_is_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with subprocess.Popen([*BLOCKCOPY, "checksum", tmp_path / "fifo"], stdout=subprocess.PIPE) as process:
        (tmp_path / "fifo").write_bytes(HELLO)
        stream, _ = process.communicate()
    assert (process.returncode, stream) == (0, hashes(HELLO, rest=False))


def test_a_device_is_hashed(file: Callable[[bytes], Path], loop_device: Callable[[Path], str]) -> None:
    data = noise(5 * BLOCK_SIZE + 512)
    assert stream_of(run("checksum", loop_device(file(data)))) == hashes(data)


# --start and --end


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (1000, None),
        (BLOCK_SIZE, None),
        (5 * BLOCK_SIZE + 100, None),
        (9 * BLOCK_SIZE, None),
        (0, 1),
        (0, BLOCK_SIZE),
        (1000, 2000),
        (1000, 5 * BLOCK_SIZE + 1),
        (5, 5 * BLOCK_SIZE + 100),
    ],
)
def test_a_part_is_hashed(file: Callable[[bytes], Path], start: int, end: int | None) -> None:
    """In blocks that begin at --start; nothing beyond --end is asked for."""
    data = noise(5 * BLOCK_SIZE + 100)
    options = ["--start", start] + ([] if end is None else ["--end", end])
    assert stream_of(run("checksum", file(data), *options)) == hashes(data, start, end)


def test_a_file_that_becomes_shorter_is_an_error(file: Callable[[bytes], Path]) -> None:
    """Its stream would end in order, and the source would be asked for less than there was."""
    path = file(noise(4 * BLOCK_SIZE))
    with open_source(str(path)) as device:
        os.truncate(path, BLOCK_SIZE)
        whole = Extent(0, 4 * BLOCK_SIZE)
        with pytest.raises(DeviceError, match="shorter than it was"):
            checksum._sign_device(device, [Piece(*whole, [whole])], digests.named(digests.ORIGINAL), lambda _: None)


def test_a_part_may_be_named_in_units(file: Callable[[bytes], Path]) -> None:
    data = noise(BLOCK_SIZE)
    assert stream_of(run("checksum", file(data), "--start", "1K", "--end", "2k")) == hashes(data, 1024, 2048)


def test_a_pipe_has_an_end(file: Callable[[bytes], Path]) -> None:
    assert stream_of(run("checksum", "-", "--end", 100, input=noise(1000))) == hashes(noise(1000), 0, 100)


@pytest.mark.parametrize("size", [0, 100, BLOCK_SIZE, 5 * BLOCK_SIZE])
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_an_end_beyond_the_destination_is_an_error(file: Callable[[bytes], Path], size: int, way: str) -> None:
    end = ("--end", size + 1)
    done = (
        run("checksum", file(noise(size)), *end) if way == "file" else run("checksum", "-", *end, input=noise(size))
    )
    assert refused(done, "--end", str(size)) == hashes(noise(size), rest=False).removesuffix(b"done")


@pytest.mark.parametrize("options", [("--start", 5, "--end", 5), ("--start", 6, "--end", 5), ("--end", 0)])
def test_an_empty_part_is_an_error(file: Callable[[bytes], Path], options: tuple[object, ...]) -> None:
    assert refused(run("checksum", file(HELLO), *options)) == b""


def test_a_pipe_has_no_other_start() -> None:
    assert refused(run("checksum", "-", "--start", 5, input=HELLO), "-") == b""


# What cannot be read or written


def test_what_cannot_be_opened_is_told_with_its_name(tmp_path: Path) -> None:
    assert refused(run("checksum", tmp_path / "missing"), str(tmp_path / "missing"), "No such file") == b""
    assert refused(run("checksum", tmp_path), str(tmp_path), "Is a directory") == b""


@pytest.mark.parametrize("options", [[], ["--digest", "sha256"]], ids=["original", "extended"])
def test_what_cannot_be_read_is_asked_for_and_told(
    options: list[str], file: Callable[[bytes], Path], loop_device: Callable[..., str]
) -> None:
    """Read a loop device whose backing file became shorter. A write can repair the missing part."""
    data = noise(32 * BLOCK_SIZE)
    path = file(data)
    device = loop_device(path, "--direct-io=on")
    os.truncate(path, 8 * BLOCK_SIZE)
    hashing = run("checksum", *options, device)
    succeeded(hashing, f"{8 * BLOCK_SIZE}:{24 * BLOCK_SIZE}): cannot read")
    changed = with_changes(data, [3])
    source = path.with_name("source")
    source.write_bytes(changed)
    answers = run("retrieve", source, input=hashing.stdout)
    assert answers.returncode == 0
    assert 25 * BLOCK_SIZE < len(answers.stdout) < 26 * BLOCK_SIZE
    assert run("save", device, input=answers.stdout).returncode == 0
    assert path.read_bytes() == changed


def test_a_terminal_is_refused(file: Callable[[bytes], Path]) -> None:
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [*BLOCKCOPY, "checksum", file(HELLO)], stdout=theirs, stderr=subprocess.PIPE, check=False
        )
        failed(done, 1)
        assert done.stderr.startswith(b"ERROR (checksum): ")
        assert b"terminal" in done.stderr
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_full_disk_is_told(file: Callable[[bytes], Path]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*BLOCKCOPY, "checksum", file(HELLO)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (
        1,
        b"ERROR (checksum): cannot write the output: No space left on device\n",
    )


# --progress


def test_progress_goes_to_standard_error(file: Callable[[bytes], Path]) -> None:
    data = noise(16 * BLOCK_SIZE)
    done = run("checksum", "--progress", file(data))
    succeeded(done, None, stdout=hashes(data))
    *lines, last = done.stderr.decode().splitlines()
    assert lines
    assert all(line.startswith("Checksum progress: ") for line in lines)
    assert lines[-1].endswith("(100.00%)")
    assert last.startswith("Checksum done in ")


@pytest.mark.parametrize("options", [("--end", 1000), ("--start", 10), ("--start", 2000)])
def test_progress_knows_the_part(file: Callable[[bytes], Path], options: tuple[object, ...]) -> None:
    done = run("checksum", "--progress", file(noise(1000)), *options)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert done.stdout.endswith(b"done")


def test_progress_of_a_pipe_does_without_percents() -> None:
    done = run("checksum", "--progress", "-", input=noise(1000))
    succeeded(done, None, stdout=hashes(noise(1000), rest=False))
    assert b"%" not in done.stderr
