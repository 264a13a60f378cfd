"""`blockcopy save` as a command, and the memory of all three stages."""

from __future__ import annotations

import lzma
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from support import (
    BLOCKCOPY,
    PATIENCE,
    PYTHON,
    failed,
    held_by_another_process,
    mounted,
    noise,
    output,
    require_root,
    run,
    succeeded,
    until,
)

from blockcopy.block.geometry import BLOCK_SIZE
from blockcopy.protocol import zstd
from blockcopy.protocol.digests import NO_DIGEST
from blockcopy.protocol.wire import (
    MAX_BLOCK_SIZE,
    Asks,
    Data,
    DigestName,
    Done,
    Hash,
    Kind,
    Message,
    Rest,
    XzData,
    Zero,
    ZstdData,
    encode,
    frame_header,
)

HELLO = b"Hello World!"
DONE = Done()
MIB = 1024 * 1024
PEAK = 34 * MIB
"""The most memory a stage may take, whatever the size of the device."""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(content: bytes) -> Path:
        (tmp_path / "file").write_bytes(content)
        return tmp_path / "file"

    return make


def stream_of(*messages: Message) -> bytes:
    return b"".join(map(encode, messages))


def saved(path: object, *messages: Message, options: tuple[str, ...] = ()) -> None:
    """Save `messages` and `done` to `path`, which must succeed."""
    done = run("save", *options, path, input=stream_of(*messages, DONE))
    succeeded(done, stdout=b"")


def refused(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Check the error: status 1, one line with all `words`, and no output."""
    failed(done, 1)
    message = done.stderr.decode()
    assert message.startswith("ERROR (save): ")
    assert message.count("\n") == 1
    assert all(word in message for word in words), message
    assert done.stdout == b""


# Writing


def test_the_test_vector(file: Callable[[bytes], Path]) -> None:
    path = file(b"-" * 12)
    done = run("save", path, input=b"data" + bytes(8) + b"\0\0\0\x0c" + HELLO + b"done")
    succeeded(done, stdout=b"")
    assert path.read_bytes() == HELLO


def test_blocks_go_where_they_belong_and_nowhere_else(file: Callable[[bytes], Path]) -> None:
    before = noise(5 * BLOCK_SIZE + 5)
    path = file(before)
    saved(path, Data(3 * BLOCK_SIZE, b"abc"), Data(7, b"de"), Data(8, b"E"), Data(3, b""))
    expected = bytearray(before)
    expected[3 * BLOCK_SIZE : 3 * BLOCK_SIZE + 3] = b"abc"
    expected[7:9] = b"dE"
    assert path.read_bytes() == expected


def test_an_xz_block_is_expanded(file: Callable[[bytes], Path]) -> None:
    path = file(bytes(5 * BLOCK_SIZE))
    saved(path, XzData(BLOCK_SIZE, lzma.compress(noise(BLOCK_SIZE))), XzData(0, lzma.compress(b"")))
    assert path.read_bytes() == bytes(BLOCK_SIZE) + noise(BLOCK_SIZE) + bytes(3 * BLOCK_SIZE)


def test_the_largest_block_is_taken(file: Callable[[bytes], Path]) -> None:
    path = file(b"")
    saved(path, Data(0, noise(MAX_BLOCK_SIZE)), XzData(MAX_BLOCK_SIZE, lzma.compress(bytes(MAX_BLOCK_SIZE))))
    assert path.read_bytes() == noise(MAX_BLOCK_SIZE) + bytes(MAX_BLOCK_SIZE)


def test_a_file_grows_and_is_never_shortened(file: Callable[[bytes], Path]) -> None:
    path = file(HELLO)
    saved(path)
    assert path.read_bytes() == HELLO
    saved(path, Data(0, b"J"))
    assert path.read_bytes() == b"J" + HELLO[1:]
    saved(path, Data(20, b"far"))
    assert path.read_bytes() == b"J" + HELLO[1:] + bytes(8) + b"far"


def test_a_device_is_a_destination(file: Callable[[bytes], Path], loop_device: Callable[[Path], str]) -> None:
    path = file(noise(8 * BLOCK_SIZE))
    saved(loop_device(path), Data(8 * BLOCK_SIZE - 3, b"end"), Data(0, b"begin"))
    assert path.read_bytes() == b"begin" + noise(8 * BLOCK_SIZE)[5:-3] + b"end"


def test_nothing_is_read_behind_done(file: Callable[[bytes], Path]) -> None:
    path = file(HELLO)
    done = run("save", path, input=b"donejunk")
    succeeded(done)
    assert path.read_bytes() == HELLO


# Zeros


@pytest.mark.parametrize("options", [(), ("--no-sparse",)], ids=["sparse", "written"])
def test_zeros_are_where_they_belong_and_nowhere_else(file: Callable[[bytes], Path], options: tuple[str]) -> None:
    before = noise(5 * MIB + 5)
    path = file(before)
    saved(path, Zero(MIB, 2 * MIB), Zero(7, 3), Zero(5 * MIB, 5), Zero(4 * MIB, 0), options=options)
    expected = bytearray(before)
    for position, length in ((MIB, 2 * MIB), (7, 3), (5 * MIB, 5)):
        expected[position : position + length] = bytes(length)
    assert path.read_bytes() == expected
    assert (path.stat().st_blocks * 512 < 4 * MIB) == (not options)


@pytest.mark.parametrize("options", [(), ("--no-sparse",)], ids=["sparse", "written"])
def test_zeros_make_a_file_longer(file: Callable[[bytes], Path], options: tuple[str]) -> None:
    path = file(HELLO)
    saved(path, Zero(6, 3 * MIB), Zero(2, 1), options=options)
    assert path.read_bytes() == b"He\0lo " + bytes(3 * MIB)
    saved(path, Zero(2, 1), options=options)
    assert path.stat().st_size == 3 * MIB + 6


def test_zeros_take_no_time_and_no_space(file: Callable[[bytes], Path]) -> None:
    path = file(HELLO)
    saved(path, Zero(12, 2**42))
    assert path.stat().st_size == 2**42 + 12
    assert path.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("options", [(), ("--no-sparse",)], ids=["sparse", "written"])
def test_zeros_fit_on_a_device_or_are_refused(
    file: Callable[[bytes], Path], loop_device: Callable[[Path], str], options: tuple[str]
) -> None:
    path = file(noise(3 * MIB))
    device = loop_device(path)
    saved(device, Zero(512, MIB), Zero(2 * MIB, MIB), options=options)
    expected = noise(3 * MIB)[:512] + bytes(MIB) + noise(3 * MIB)[512 + MIB : 2 * MIB] + bytes(MIB)
    assert path.read_bytes() == expected
    refused(run("save", device, input=stream_of(Zero(512, 3 * MIB), DONE)), device, "too small")
    assert path.read_bytes() == expected


def test_a_file_that_cannot_be_so_long_is_told(file: Callable[[bytes], Path]) -> None:
    refused(run("save", file(HELLO), input=stream_of(Zero(2**62, 2**62 - 1), DONE)), "cannot grow")


# zstd

needs_zstd = pytest.mark.skipif(not zstd.available(), reason="this host has no zstd")


@needs_zstd
def test_a_zstd_frame_is_expanded(file: Callable[[bytes], Path]) -> None:
    path = file(bytes(5))
    data = (noise(1000) * 1049)[:MAX_BLOCK_SIZE]
    saved(path, ZstdData(3, zstd.compress(data, 1)), ZstdData(0, zstd.compress(b"abc", 19)))
    assert path.read_bytes() == b"abc" + data


def zstd_payloads() -> dict[str, bytes]:
    """What is not one whole frame of at most a block."""
    if not zstd.available():
        return {}
    packed = zstd.compress(noise(1000), 3)
    flipped = bytearray(zstd.compress(b"to be compressed " * 1000, 3))
    flipped[12] ^= 0xFF
    return {
        "empty": b"",
        "junk": b"junk that is no zstd frame",
        "short by one": packed[:-1],
        "half": packed[:500],
        "junk behind": packed + b"junk",
        "two frames": packed + packed,
        "flipped": bytes(flipped),
        "bomb": zstd.compress(bytes(64 * MIB), 1),
        "bomb that does not tell": bomb_without_size(),
        "larger by one": zstd.compress(bytes(MAX_BLOCK_SIZE + 1), 1),
    }


def bomb_without_size() -> bytes:
    compressor = zstd._module().ZstdCompressor()
    return b"".join(compressor.compress(bytes(MIB)) for _ in range(64)) + bytes(compressor.flush())


@needs_zstd
@pytest.mark.parametrize("kind", zstd_payloads())
def test_a_zstd_frame_that_is_none_is_refused_and_nothing_of_it_is_written(
    file: Callable[[bytes], Path], kind: str
) -> None:
    path = file(HELLO)
    done = measured("save", path, input=stream_of(Data(0, b"abc"), ZstdData(5, zstd_payloads()[kind]), DONE))
    assert done.status == 1
    assert b"zstd frame for position 5" in done.errors
    assert done.peak <= PEAK
    assert path.read_bytes() == b"abc" + HELLO[3:]


# Streams that are none


def test_what_came_before_the_end_of_a_stream_without_done_is_kept(file: Callable[[bytes], Path]) -> None:
    stream = stream_of(Data(0, b"abc"), Data(3, b"def"))
    for cut, expected in (
        (len(stream), b"abcdef"),
        (len(stream) - 1, b"abc"),
        (20, b"abc"),
        (19, b"abc"),
        (18, b""),
    ):
        path = file(HELLO)
        refused(run("save", path, input=stream[:cut]), "the stream ended")
        assert path.read_bytes() == expected + HELLO[len(expected) :], cut
    refused(run("save", file(HELLO), input=b""), "without `done`")


def test_an_unknown_command_is_an_error_after_what_came_before(file: Callable[[bytes], Path]) -> None:
    path = file(HELLO)
    refused(run("save", path, input=encode(Data(0, b"abc")) + b"Last login: never\n"), "Last login")
    assert path.read_bytes() == b"abc" + HELLO[3:]


def xz_with_a_wrong_check() -> bytes:
    packed = bytearray(lzma.compress(noise(1000)))
    packed[500] ^= 1
    return bytes(packed)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"junk that is no xz stream",
        lzma.compress(noise(1000))[:-1],
        lzma.compress(noise(1000))[:500],
        lzma.compress(noise(1000)) + b"junk",
        lzma.compress(noise(1000), lzma.FORMAT_ALONE),
        xz_with_a_wrong_check(),
    ],
    ids=["empty", "junk", "short by one", "half", "junk behind", "lzma alone", "one bit"],
)
def test_a_damaged_xz_block_is_refused_and_nothing_of_it_is_written(
    file: Callable[[bytes], Path], payload: bytes
) -> None:
    path = file(HELLO)
    refused(run("save", path, input=stream_of(Data(0, b"abc"), XzData(5, payload), DONE)), "xz", "position 5")
    assert path.read_bytes() == b"abc" + HELLO[3:]


# Memory


MEASURE = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(process, 0)
print(used.ru_maxrss * 1024, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A parent that is itself small: the peak of a child begins with that of its parent."""

WORKERS = """
import os, sys
workers = int(sys.argv.pop(1))
os.sched_getaffinity = lambda _: range(workers)
from blockcopy.cli.main import main
main()
"""
"""As on a machine with so many processors."""


class Measured(NamedTuple):
    status: int
    output: bytes
    errors: bytes
    peak: int


def measured(*args: object, workers: int = 2, input: bytes = b"", stdout: int | None = None) -> Measured:
    stage = [PYTHON, "-P", "-c", WORKERS, str(workers), *map(str, args)]
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", MEASURE, *stage],
        input=input,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    *errors, peak = done.stderr.splitlines(keepends=True)
    return Measured(done.returncode, done.stdout or b"", b"".join(errors), int(peak))


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """256 MiB, nothing but a hole, and not left on the disk."""
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 256 * MIB)
    yield path
    path.unlink()


@pytest.mark.parametrize(("workers", "most"), [(1, PEAK), (8, PEAK + 6 * MIB)])
def test_checksum_and_retrieve_take_little_memory(large: Path, workers: int, most: int) -> None:
    """Eight workers on a busy machine have some more in hand, for want of a core to give it away."""
    done = measured("checksum", large, workers=workers)
    assert (done.status, done.errors, len(done.output)) == (0, b"", 2048 * 80 + 16)
    assert done.peak <= most
    compared = measured("retrieve", large, workers=workers, input=done.output)
    assert (compared.status, compared.errors, compared.output) == (0, b"", b"done")
    assert compared.peak <= most
    with open(os.devnull, "wb") as nowhere:
        sent = measured("retrieve", large, workers=workers, input=stream_of(Rest(0), DONE), stdout=nowhere.fileno())
    assert (sent.status, sent.errors) == (0, b"")
    assert sent.peak <= most


@pytest.mark.parametrize(("workers", "most"), [(1, PEAK), (8, PEAK + 52 * MIB)])
@pytest.mark.parametrize("level", ["none", "zstd:1"])
def test_the_extended_form_takes_little_memory(large: Path, workers: int, most: int, level: str) -> None:
    """Where all differs, so that as much as can be is on its way to a reader.

    What a worker looks at in the page cache counts as memory of ours: 4 MiB, and up to the next huge page.
    """
    large.write_bytes(noise(64 * MIB))
    done = measured("checksum", "--digest", "sha256", large, workers=workers)
    assert (done.status, done.errors, len(done.output)) == (0, b"", 8 + 6 + 16 * (24 + 32 * 32) + 16)
    assert done.peak <= most
    run_of_nothing = Asks(0, BLOCK_SIZE, 16 * MIB, bytes(128 * 32))
    asked = [run_of_nothing._replace(position=at) for at in range(0, 64 * MIB, 16 * MIB)]
    stream = stream_of(DigestName("sha256"), *asked, DONE)
    with open(os.devnull, "wb") as nowhere:
        sent = measured(
            "retrieve", "--compress", level, large, workers=workers, input=stream, stdout=nowhere.fileno()
        )
    assert (sent.status, sent.errors) == (0, b"")
    assert sent.peak <= most


def test_a_pipe_takes_little_memory(large: Path) -> None:
    with large.open("rb") as opened:
        command = [PYTHON, "-I", "-S", "-c", MEASURE, *BLOCKCOPY, "checksum", "-"]
        with subprocess.Popen(["cat"], stdin=opened, stdout=subprocess.PIPE) as cat:
            done = subprocess.run(command, stdin=cat.stdout, capture_output=True, timeout=PATIENCE, check=False)
    succeeded(done, None)
    assert len(done.stdout) == 2048 * 80 + 4
    assert int(done.stderr) <= PEAK


def test_compression_takes_hardly_more_memory_than_with_the_original(large: Path) -> None:
    """Which took 69 MiB; how much is in hand at once depends on what else the machine does."""
    os.truncate(large, 32 * MIB)
    done = measured("retrieve", "--lzma", large, input=stream_of(Rest(0), DONE))
    assert (done.status, done.errors) == (0, b"")
    assert done.peak <= 80 * MIB


@pytest.mark.parametrize("kind", [Data, XzData])
def test_save_takes_little_memory(large: Path, kind: Kind) -> None:
    payload = bytes(BLOCK_SIZE) if kind is Data else lzma.compress(bytes(BLOCK_SIZE))
    stage = [PYTHON, "-I", "-S", "-c", MEASURE, *BLOCKCOPY, "save", str(large)]
    with subprocess.Popen(stage, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as save:
        assert save.stdin is not None
        for at in range(0, 256 * MIB, BLOCK_SIZE):
            save.stdin.write(frame_header(kind, at, len(payload)))
            save.stdin.write(payload)
        _, errors = save.communicate(b"done", timeout=PATIENCE)
    assert save.returncode == 0, errors
    assert int(errors) <= PEAK


@pytest.mark.parametrize("kind", [Data, XzData, ZstdData])
def test_an_oversized_frame_is_refused_before_memory_is_taken(file: Callable[[bytes], Path], kind: Kind) -> None:
    path = file(HELLO)
    frame = frame_header(kind, 0, 2**32 - 1) + bytes(64 * MIB)
    done = measured("save", path, input=frame)
    assert done.status == 1
    assert done.errors.startswith(b"ERROR (save): ")
    assert done.peak <= PEAK
    assert path.read_bytes() == HELLO


def test_an_oversized_frame_is_refused_before_its_bytes_come(file: Callable[[bytes], Path]) -> None:
    with saving(file(HELLO)) as process:
        assert process.stdin is not None
        process.stdin.write(frame_header(Data, 0, MAX_BLOCK_SIZE + 1))
        assert process.wait(PATIENCE) == 1


def test_an_oversized_question_takes_no_memory(file: Callable[[bytes], Path], large: Path) -> None:
    done = measured("retrieve", large, input=stream_of(Hash(0, 256 * MIB, NO_DIGEST), DONE))
    assert (done.status, done.output) == (1, b"")
    assert done.peak <= PEAK


def test_an_xz_bomb_is_refused(file: Callable[[bytes], Path]) -> None:
    path = file(HELLO)
    bomb = lzma.compress(bytes(64 * MIB), preset=0)
    assert len(bomb) < BLOCK_SIZE
    done = measured("save", path, input=stream_of(XzData(0, bomb), DONE))
    assert done.status == 1
    assert b"expands to more than" in done.errors
    assert done.peak <= PEAK
    assert path.read_bytes() == HELLO


def test_an_xz_block_cannot_ask_for_much_memory(file: Callable[[bytes], Path]) -> None:
    """The header of the stream asks for a dictionary of 64 MiB."""
    path = file(HELLO)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 64 * MIB, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}]
    done = measured("save", path, input=stream_of(XzData(0, lzma.compress(b"x", filters=filters)), DONE))
    assert done.status == 1
    assert done.errors.startswith(b"ERROR (save): ")
    assert done.peak <= PEAK
    assert path.read_bytes() == HELLO


# Positions and sizes


def test_a_device_that_is_too_small_is_told(
    file: Callable[[bytes], Path], loop_device: Callable[[Path], str]
) -> None:
    """What fits is written, and of what does not fit nothing."""
    path = file(noise(2 * BLOCK_SIZE))
    device = loop_device(path)
    stream = stream_of(Data(0, b"abc"), Data(2 * BLOCK_SIZE - 5, b"0123456789"), Data(5, b"no"), DONE)
    refused(run("save", device, input=stream), device, "too small", str(2 * BLOCK_SIZE))
    assert path.read_bytes() == b"abc" + noise(2 * BLOCK_SIZE)[3:]


@pytest.mark.parametrize("position", [2 * BLOCK_SIZE, 2**62, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [Data, XzData])
def test_a_position_beyond_a_device_is_refused(
    file: Callable[[bytes], Path],
    loop_device: Callable[[Path], str],
    position: int,
    kind: Callable[[int, bytes], Message],
) -> None:
    payload = lzma.compress(b"x") if kind is XzData else b"x"
    refused(run("save", loop_device(file(noise(2 * BLOCK_SIZE))), input=stream_of(kind(position, payload), DONE)))


@pytest.mark.parametrize("position", [2**63 - 1, 2**63, 2**64 - 1])
def test_a_position_that_no_file_has_is_refused(file: Callable[[bytes], Path], position: int) -> None:
    path = file(HELLO)
    refused(run("save", path, input=stream_of(Data(position, b"x"), DONE)))
    assert path.read_bytes() == HELLO


def test_a_position_that_the_file_system_refuses_is_told(file: Callable[[bytes], Path]) -> None:
    refused(run("save", file(HELLO), input=stream_of(Data(2**63 - 2, b"x"), DONE)), "cannot write 1 bytes at")


# Destinations that are refused


@contextmanager
def saving(path: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [*BLOCKCOPY, "save", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["-", "missing", "fifo", "folder"])
def test_what_is_no_destination_is_refused(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    path = "-" if kind == "-" else tmp_path / kind
    refused(run("save", path, input=stream_of(Data(0, b"abc"), DONE)), str(path))
    assert not (tmp_path / "missing").exists()


def test_a_mounted_device_is_refused(
    tmp_path: Path, file: Callable[[bytes], Path], loop_device: Callable[[Path], str]
) -> None:
    device = loop_device(file(bytes(4 * MIB)))
    harmless = Data(4 * MIB - 3, b"abc")
    with mounted(device, tmp_path / "mnt"):
        refused(run("save", device, input=stream_of(harmless, DONE)), device, "in use", "--force")
        with open(device, "rb") as opened:
            assert opened.read()[-3:] == bytes(3)
        saved(device, harmless, options=("--force",))
        with open(device, "rb") as opened:
            assert opened.read()[-3:] == b"abc"


def test_a_locked_file_is_refused(file: Callable[[bytes], Path]) -> None:
    path = file(HELLO)
    with held_by_another_process(path):
        refused(run("save", path, input=stream_of(Data(0, b"abc"), DONE)), str(path), "locked", "--force")
        assert path.read_bytes() == HELLO
        saved(path, Data(0, b"abc"), options=("--force",))
    assert path.read_bytes() == b"abc" + HELLO[3:]


@pytest.mark.parametrize("kind", ["file", "device"])
def test_two_saves_do_not_share_a_destination(
    file: Callable[[bytes], Path], loop_device: Callable[[Path], str], kind: str
) -> None:
    backing = file(bytes(MIB))
    path = str(backing) if kind == "file" else loop_device(backing)
    with saving(path) as first:
        assert first.stdin is not None
        first.stdin.write(encode(Data(0, b"first")))
        with open(path, "rb", buffering=0) as opened:
            until(lambda: os.pread(opened.fileno(), 5, 0) == b"first")
        refused(run("save", path, input=stream_of(Data(0, b"other"), DONE)), path)
        first.stdin.write(encode(DONE))
        assert first.wait(PATIENCE) == 0  # although its input stays open
    assert backing.read_bytes() == b"first" + bytes(MIB - 5)


# Destinations that fail


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    require_root()
    point = tmp_path / "small"
    point.mkdir()
    output("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", point)
    yield point
    output("umount", point)


def test_a_full_disk_is_told(small_file_system: Path) -> None:
    path = small_file_system / "file"
    path.touch()
    blocks = [Data(at * BLOCK_SIZE, noise(BLOCK_SIZE)) for at in range(10)]
    refused(run("save", path, input=stream_of(*blocks, DONE)), f"of {path}: No space left")
    assert path.read_bytes()[:BLOCK_SIZE] == noise(BLOCK_SIZE)


def test_a_sync_that_fails_is_told(small_file_system: Path) -> None:
    """Each write succeeds, in the page cache of a device that has nowhere to keep it."""
    path = small_file_system / "file"
    path.touch()
    os.truncate(path, 4 * MIB)
    device = output("losetup", "--find", "--show", path).strip()
    try:
        blocks = [Data(at * BLOCK_SIZE, noise(BLOCK_SIZE)) for at in range(24)]
        refused(run("save", device, input=stream_of(*blocks, DONE)), f"cannot sync {device}")
    finally:
        output("losetup", "--detach", device)
        until(lambda: str(path) not in output("losetup", "--list", "--noheadings", "--output", "BACK-FILE"))
